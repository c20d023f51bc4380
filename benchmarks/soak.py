"""Random kills of a digits run and random damage to its checkpoints: how many it survives with the same bits.

    python -m benchmarks.soak --kills 200 --damages 500

A run is killed with SIGKILL at random instants, in the middle of saves too, and started again until it ends by itself.
It has survived its kills when the last checkpoint, the logged numbers, the previews and the stored averages are those,
bit for bit, of a run that nothing stopped. A damaged checkpoint is survived when it is detected and kept aside, and the
one before it is restored bit for bit. Resumes where an earlier call ended.
"""

import contextlib
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

import diffusion
from benchmarks.common import SMALL, make_parser, write_results
from diffusion import training
from diffusion.data.sources import digits
from diffusion.files import replacing
from diffusion.model.config import make_settings
from diffusion.model.experiment import abstract_batch, make_learner, make_model
from diffusion.runs.command_line import use_compilation_cache
from diffusion.runs.train import train_run
from diffusion.training import checkpoints as checkpoint_files

PROGRESS = "progress.jsonl"


def train(workdir: Path) -> None:
    """Trains the small run, or resumes it."""
    use_compilation_cache()
    train_run(diffusion.load_config("digits", SMALL), digits("train"), workdir, name="digits")


def in_child(work: Callable[[], Any], log: Path, kill_after: float | None = None) -> int:
    """Forks, before JAX has started anything, and returns the child's exit code, or minus the signal that ended it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            work()
            code = 0
        except SystemExit as leaving:
            code = 0 if leaving.code in (0, None) else 1
            print(leaving.code if code else "", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    begun = time.monotonic()
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if kill_after is not None and time.monotonic() - begun > kill_after:
            os.kill(pid, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        time.sleep(0.001)


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digest(workdir: Path) -> dict[str, str]:
    """Returns a hash of everything that two equal runs have in common."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("images_per_second")
    found = {"metrics": hashlib.sha256(json.dumps(lines).encode()).hexdigest(), "state": restored(workdir)[1]}
    for pattern in ("previews/*.png", "averages/*.safetensors"):
        for path in sorted(workdir.glob(pattern)):
            found[str(path.relative_to(workdir))] = file_digest(path)
    return found


def restored(workdir: Path, read_only: bool = True) -> tuple[int | None, str]:
    """Returns the step of the newest intact checkpoint and a hash of its every array."""
    with checkpoint_files.Checkpoints(workdir / "checkpoints", read_only=read_only) as checkpoints:
        state = checkpoints.restore(abstract_state())
        return checkpoints.newest, training.digest(state)


@functools.cache
def abstract_state() -> training.TrainState:
    """Returns the shapes of the small run's state."""
    config, source = diffusion.load_config("digits", SMALL), digits("train")
    model = make_model(config, source.image_shape, source.num_classes)
    learner, batch = make_learner(config, model), abstract_batch(config, model)
    return training.abstract_train_state(learner, make_settings(config), training.make_mesh(), batch)


def write_digest(workdir: Path, out: Path) -> None:
    """Writes the digest of a finished run as JSON."""
    out.write_text(json.dumps(digest(workdir)))


def digest_in_child(workdir: Path, folder: Path) -> dict[str, str]:
    """Returns the digest of a finished run; JAX must not start in this process."""
    out = folder / f"{workdir.name}.json"
    if code := in_child(lambda: write_digest(workdir, out), folder / "log"):
        raise SystemExit(f"the digest of {workdir} failed ({code}): see {folder / 'log'}")
    return json.loads(out.read_text())


def kill_one_run(number: int, folder: Path, seconds: float, expected: dict[str, str]) -> dict[str, Any]:
    """Kills run `number` repeatedly, at instants drawn from its number, until it ends by itself."""
    draw = random.Random(number)
    workdir = folder / f"killed_{number}"
    shutil.rmtree(workdir, ignore_errors=True)
    kills = in_save = 0
    while True:
        # Sometimes beyond the run's length, so that runs end.
        after = draw.uniform(0, 1.3 * seconds)
        code = in_child(lambda: train(workdir), folder / "log", after)
        if code == 0:
            break
        if code != -signal.SIGKILL:
            return {"run": number, "kills": kills, "in_save": in_save, "same": False, "error": f"exit code {code}"}
        kills += 1
        in_save += bool(list(workdir.glob("checkpoints/.saving-*")))
    found = digest_in_child(workdir, folder)
    differ = sorted(name for name in expected | found if expected.get(name) != found.get(name))
    if not differ:
        shutil.rmtree(workdir)
    return {"run": number, "kills": kills, "in_save": in_save, "same": not differ, "differ": differ}


def kill_runs(worker: int, workers: int, kills: int, folder: Path, reference: dict[str, Any]) -> None:
    """Kills runs number worker, worker + workers, ... until there have been `kills` kills by all workers."""
    while True:
        done = read_progress(folder)
        if sum(run["kills"] for run in done) >= kills:
            return
        number = max([run["run"] + workers for run in done if run["run"] % workers == worker], default=worker)
        run = kill_one_run(number, folder, reference["seconds"], reference["digest"])
        if run["kills"] == 0 and not run["same"]:
            raise SystemExit(f"run {number} failed without a kill: see {folder / 'log'}")
        with (folder / PROGRESS).open("a") as file:
            file.write(json.dumps(run) + "\n")
        print(f"{sum(one['kills'] for one in [*done, run])} kills; the last run: {run}", flush=True)


def read_progress(folder: Path) -> list[dict[str, Any]]:
    """Returns the results of the runs so far, of earlier calls too."""
    path = folder / PROGRESS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def damage(path: Path, draw: random.Random) -> str:
    """Damages a file in one of the ways that disks and people do, and returns which."""
    data = bytearray(path.read_bytes())
    kind = draw.choice(["bit flip", "truncation", "deletion", "garbage", "zeros"])
    first = draw.randrange(len(data)) if data else 0
    last = min(len(data), first + draw.choice([1, 512, 4096, len(data)]))
    match kind:
        case "bit flip" if data:
            data[first] ^= 1 << draw.randrange(8)
        case "truncation" if data:
            del data[first:]
        case "garbage":
            data[first:last] = draw.randbytes(last - first) or b"garbage"
        case "zeros" if any(data[first:last]):
            data[first:last] = bytes(last - first)
        case _:
            path.unlink()
            return "deletion"
    path.write_bytes(data)
    return kind


def damage_checkpoints(count: int, source: Path, folder: Path) -> dict[str, Any]:
    """Damages the newest checkpoint of `source` in `count` ways, a fresh copy each time."""
    copy, survived, kinds = folder / "damaged", 0, {}
    steps = sorted(checkpoint_files.steps_in(source / "checkpoints"))[-2:]
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(source / "checkpoints" / str(steps[0]), copy / "checkpoints" / str(steps[0]))
    before = restored(copy)
    for number in range(count):
        draw = random.Random(number)
        newest = copy / "checkpoints" / str(steps[1])
        shutil.copytree(source / "checkpoints" / newest.name, newest)
        victim = draw.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
        as_it_was = victim.read_bytes()
        kind = damage(victim, draw)
        if victim.exists() and victim.read_bytes() == as_it_was:
            victim.unlink()  # the garbage was what was there
            kind = "deletion"
        aside = newest.with_name(f"{newest.name}.bad")
        with contextlib.redirect_stderr(io.StringIO()):  # every damage is named there
            after = restored(copy, read_only=False)
        sound = after == before and aside.is_dir() and not newest.exists()
        tried, good = kinds.get(kind, (0, 0))
        kinds[kind] = (tried + 1, good + sound)
        survived += sound
        if not sound:
            print(f"damage {number} ({kind} of {victim.name}) was not detected", file=sys.stderr)
        shutil.rmtree(aside if aside.exists() else newest)
    return {"tried": count, "survived": survived, "tried and survived by kind": kinds}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--damages", type=int, default=500)
    parser.add_argument("--folder", type=Path, default=Path("runs/soak"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak_cpu.json"))
    parser.add_argument("--workers", type=int, default=2, help="runs that are killed at a time")
    arguments = parser.parse_args()
    folder = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    # Before JAX starts: dropout, noise and batches are spread over two devices, as on a real machine.
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    jax.config.update("jax_platforms", "cpu")

    whole = folder / "whole"
    if not (folder / "expected.json").exists():
        for attempt in ("compiles", "is timed"):
            shutil.rmtree(whole, ignore_errors=True)
            begun = time.monotonic()
            if in_child(lambda: train(whole), folder / "log"):
                raise SystemExit(f"the run that {attempt} failed: see {folder / 'log'}")
        seconds = time.monotonic() - begun
        with replacing(folder / "expected.json") as temporary:
            temporary.write_text(json.dumps({"seconds": seconds, "digest": digest_in_child(whole, folder)}))
    reference = json.loads((folder / "expected.json").read_text())

    pids = []
    for worker in range(arguments.workers):
        if (pid := os.fork()) == 0:
            kill_runs(worker, arguments.workers, arguments.kills, folder, reference)
            os._exit(0)
        pids.append(pid)
    if any([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]):
        raise SystemExit("a worker failed: the same command resumes")
    done = read_progress(folder)
    tried = sum(run["kills"] for run in done)
    survived = sum(run["kills"] for run in done if run["same"])
    kills = {"tried": tried, "survived": survived, "in the middle of a save": sum(run["in_save"] for run in done)}
    kills["runs"] = len(done)

    results: dict[str, Any] = {"kills": kills, "killed after": f"0 to {1.3 * reference['seconds']:.1f} s, evenly"}
    # JAX starts in this process only now: before, it forks.
    results["damages"] = damage_checkpoints(arguments.damages, whole, folder) if arguments.damages else None
    write_results(arguments.out, results)
    print(f"kills survived: {survived} of {tried}")
    if results["damages"]:
        print(f"damages survived: {results['damages']['survived']} of {results['damages']['tried']}")


if __name__ == "__main__":
    main()
