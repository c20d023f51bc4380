"""A run per point of a product of settings, side by side; then one table and one figure over them.

    ./launch.sh sweep digits --set config.optimizer.learning_rate=1e-4,3e-4 --set config.seed=0,1
    ./launch.sh sweep digits --set config=digits:flow,digits:edm --slurm --sbatch="--gres=gpu:1 --time=2:00:00"

Each point is trained in a folder of its own under runs/sweep_NAME (or --workdir), by the command that would train it
alone; all other flags go to every point. The same command resumes: finished points are skipped. A point that fails is
reported, and the others continue. table.md, results.json and sweep.png are then in the folder.
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import flags

from diffusion.files import check_folder, check_name, replacing
from diffusion.model import fields
from diffusion.model.config import check_ranges
from diffusion.runs import command_line
from diffusion.runs.sweep_results import DONE, Point, done, write_results
from diffusion.training import RunError
from diffusion.training.checkpoints import steps_in
from diffusion.training.errors import one_line

CONFIGS = Path("experiments/configs")


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ours: one line."""

    def error(self, message: str) -> NoReturn:
        """Raises RunError."""
        raise RunError(f"sweep: {message} (--help shows how)")


def main(argv: Sequence[str]) -> None:
    """Does what a command line asks for: trains the points, one of them, or writes and submits a Slurm script."""
    parser = Parser(prog="./launch.sh sweep", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("experiment", help="as ./launch.sh names it")
    parser.add_argument("--set", action="append", required=True, metavar="FIELD=VALUE,VALUE", help="what is varied")
    parser.add_argument("--workdir", help="folder of the sweep; default: runs/sweep_CONFIG")
    parser.add_argument("--slurm", action="store_true", help="write sweep.sbatch, an array job, and submit it")
    parser.add_argument("--sbatch", default="", metavar="FLAGS", help="slurm: more of sbatch's flags, in quotes")
    parser.add_argument("--point", type=int, help="train this point alone, as each job of the array does")
    asked, rest = parser.parse_known_args(argv)
    if asked.sbatch and not asked.slurm:
        raise RunError("--sbatch has flags for a job of Slurm's: add --slurm")
    folder, points = make_points(asked.experiment, asked.set, rest, asked.workdir)
    if asked.slurm:
        submit(write_script(folder, len(points), argv, asked.sbatch))
        return
    if asked.point is not None and not 0 <= asked.point < len(points):
        raise RunError(f"--point={asked.point}: there are points 0 to {len(points) - 1}")
    chosen = points if asked.point is None else [points[asked.point]]
    for number, point in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {point.name}: {point.folder}", file=sys.stderr, flush=True)
        if train_point(asked.experiment, point) or number == len(chosen):
            write_results(folder, asked.experiment, points)
    print((folder / "table.md").read_text(), end="")
    print(f"{folder / 'sweep.png'}", file=sys.stderr)
    if failed := [point for point in chosen if "error" in done(point)]:
        raise RunError(
            f"{len(failed)} of {len(chosen)} points failed, the first {failed[0].folder}: {done(failed[0])['error']}"
        )


def make_points(
    experiment: str, sets: Sequence[str], rest: Sequence[str], workdir: str | None
) -> tuple[Path, list[Point]]:
    """Returns the folder of a sweep and its points, after a check that each is one config.

    Args:
      experiment: its name.
      sets: each FIELD=VALUE,VALUE; commas inside brackets and quotes part no values.
      rest: flags of every point.
      workdir: folder of the sweep; None: named after the config.

    Raises:
      RunError: there is no such field or value, two points are the same, or a flag is not one of a sweep's.
    """
    for flag in ("--mode", "--workdir"):
        if any(command_line.name_of(one) == flag.lstrip("-") for one in rest):
            raise RunError(f"{flag} is not one for every point of a sweep, which trains each in a folder of its own")
    varied: dict[str, list[str]] = {}
    for one in sets:
        field, equals, values = one.partition("=")
        if not equals or not values:
            raise RunError(f"--set {one}: name a field and its values, as config.optimizer.learning_rate=1e-4,3e-4")
        field = field.lstrip("-").removeprefix("config.")
        if field in varied:
            raise RunError(f"--set {field} is given twice: give all its values once")
        varied[field] = split(values)
    default = fields.load(config_of(experiment, rest), CONFIGS)[1]
    folder = Path(workdir).expanduser() if workdir else Path("runs") / f"sweep_{default}"
    check_folder(folder, f"--workdir={folder}")
    last = [field.rpartition(".")[2] for field in varied]
    names = [name if last.count(name) == 1 else field for name, field in zip(last, varied, strict=True)]
    points: list[Point] = []
    for values in itertools.product(*varied.values()):
        given = [
            f"--config={value}" if field == "config" else f"--config.{field}={value}"
            for field, value in zip(varied, values, strict=True)
        ]
        settings = dict(zip(names, values, strict=True))
        plain = {name: re.sub(r"[^A-Za-z0-9.+-]+", "-", value).strip("-") for name, value in settings.items()}
        name = "_".join(f"{name}={value}" for name, value in plain.items())
        check_name(name, f"--set: {name}")
        points.append(Point(settings, folder / name, [*rest, *given]))
        check_point(experiment, points[-1])
    if len({point.folder for point in points}) < len(points):
        raise RunError(f"--set {' --set '.join(sets)}: two points have the same values")
    return folder, points


def split(values: str) -> list[str]:
    """Returns the values between the commas that are in no bracket and no quotes."""
    return [found.group() for found in re.finditer(r"(?:\([^)]*\)|\[[^\]]*\]|'[^']*'|\"[^\"]*\"|[^,])+", values)]


def config_of(experiment: str, arguments: Sequence[str]) -> str:
    """Returns what --config of a command names: the last one, else the experiment's own."""
    given = [one.partition("=")[2] for one in arguments if command_line.name_of(one) == "config" and "=" in one]
    return given[-1] if given else experiment


def check_point(experiment: str, point: Point) -> None:
    """Raises RunError, or ValueError, where the fields of a point make no config."""
    config, _ = fields.load(config_of(experiment, point.arguments), CONFIGS)
    known = flags.FlagValues()
    command_line.define_flags(known, {"train": lambda call: None})
    known(["sweep"])
    of_config = [one for one in point.arguments if one.startswith("--config.")]
    check_ranges(command_line.override(config, ["sweep", *of_config], known))


def train_point(experiment: str, point: Point) -> bool:
    """Trains a point in a process of its own, unless it is finished; notes how it ended. Returns whether it did.

    Ctrl-C and SIGTERM are those of the point, which saves; the sweep ends then.
    """
    noted = done(point)
    if noted.get("arguments") == point.arguments and "error" not in noted:
        print("finished before", file=sys.stderr)
        return False
    command = [sys.executable, "-m", f"experiments.{experiment}", f"--workdir={point.folder}", *point.arguments]
    begun = time.perf_counter()
    code, tail, stopped = run(command)
    if stopped or code in (130, -signal.SIGINT, -signal.SIGTERM):
        print("stopped; the same command resumes from here", file=sys.stderr)
        raise SystemExit(130)
    note: dict[str, Any] = {"arguments": point.arguments, "seconds": round(time.perf_counter() - begun, 1)}
    if code or not is_trained(point.folder):
        reasons = [line for line in tail.splitlines() if line.strip()]
        reason = reasons[-1] if reasons else f"exit status {code}"
        note["error"] = one_line(RunError(reason), 300).removeprefix("error: ")
        print(f"failed: {note['error']}", file=sys.stderr)
    with replacing(point.folder / DONE) as temporary:
        temporary.write_text(json.dumps(note, indent=2) + "\n")
    return True


def run(command: list[str]) -> tuple[int, str, bool]:
    """Returns the exit status of a command, the end of what it wrote to stderr, and whether it was asked to stop.

    What it writes is shown as it comes.
    """
    stopped: list[int] = []
    child = subprocess.Popen(command, stderr=subprocess.PIPE)

    def stop(number: int, frame: Any) -> None:
        stopped.append(number)
        if number == signal.SIGTERM:  # Ctrl-C in a terminal reaches the child by itself
            child.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    tail = b""
    try:
        assert child.stderr is not None
        while part := os.read(child.stderr.fileno(), 4096):
            with contextlib.suppress(OSError):
                os.write(sys.stderr.fileno(), part)
            tail = (tail + part)[-8192:]
        return child.wait(), tail.decode(errors="replace"), bool(stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_trained(folder: Path) -> bool:
    """Returns whether the run in a folder has made its last step: one that was asked to stop ends without an error."""
    path = folder / "config.json"
    if not path.exists():
        return False
    last = json.loads(path.read_text())["config"]["training"]["num_steps"]
    return last in map(int, steps_in(folder / "checkpoints"))


def write_script(folder: Path, count: int, argv: Sequence[str], options: str) -> Path:
    """Writes sweep.sbatch: a job of the array trains one point, and writes the table anew; the last one's is whole.

    Args:
      folder: of the sweep.
      count: of points.
      argv: the sweep's own, of which each job has all but Slurm's.
      options: flags of sbatch.
    """
    kept, skip = [], False
    for one in argv:
        if not skip and one not in ("--slurm", "--sbatch") and not one.startswith("--sbatch="):
            kept.append(one)
        skip = one == "--sbatch"
    command = shlex.join(["./launch.sh", "sweep", *kept])
    lines = [
        "#!/usr/bin/env bash",
        f"#SBATCH --job-name={folder.name}",
        f"#SBATCH --array=0-{count - 1}",
        f"#SBATCH --output={folder.absolute()}/slurm-%a.out",
        "#SBATCH --signal=B:TERM@120",  # before the time is up: the run saves, and the same script resumes from there
        *(f"#SBATCH {option}" for option in shlex.split(options)),
        f"cd {shlex.quote(str(Path.cwd()))}",
        f'exec {command} --point="$SLURM_ARRAY_TASK_ID"',
    ]
    path = folder / "sweep.sbatch"
    with replacing(path) as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    return path


def submit(script: Path) -> None:
    """Submits a script where there is Slurm, else prints how to."""
    if shutil.which("sbatch") is None:
        print(f"{script} is written; there is no sbatch on this machine: submit it where there is, sbatch {script}")
        return
    found = subprocess.run(["sbatch", str(script)], capture_output=True, text=True)
    if found.returncode:
        raise RunError(f"sbatch {script}: {one_line(RunError(found.stderr.strip() or str(found.returncode)), 300)}")
    print(found.stdout, end="")


if __name__ == "__main__":
    command_line.run_to_end(lambda: main(sys.argv[1:]))
