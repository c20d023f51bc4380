"""Several real processes on this host: the same curve as one, and what becomes of a run when one of them is lost.

    python -m benchmarks.processes

Small digits runs over loopback, each process with its share of four simulated devices. Writes
benchmarks/results/processes_cpu.json; every line of it is also a claim that fails the script when it does not hold.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax

from benchmarks.common import SMALL, as_flags, make_parser, write_results

FLAGS = as_flags(SMALL | {"training.log_every": 1})
DEVICES = 4
LAST = SMALL["training.num_steps"]


class Processes:
    """The processes of one run, each with its log."""

    def __init__(self, workdir: Path, count: int, *flags: str, started: int | None = None, join_seconds: int = 120):
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        workdir.parent.mkdir(parents=True, exist_ok=True)
        self.workdir = workdir
        self.logs = [workdir.with_name(f"{workdir.name}_{rank}.log") for rank in range(count)]
        self.popen = []
        for rank in range(count if started is None else started):
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
            }
            if count > 1:
                environment |= {
                    "DIFFUSION_NUM_PROCESSES": str(count),
                    "DIFFUSION_PROCESS_ID": str(rank),
                    "DIFFUSION_JOIN_SECONDS": str(join_seconds),
                    "JAX_COORDINATOR_ADDRESS": address,
                }
            command = [sys.executable, "-m", "experiments.digits", f"--workdir={workdir}", *FLAGS, *flags]
            with self.logs[rank].open("a") as log:
                self.popen.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))

    def wait(self, seconds: float = 3600) -> list[int]:
        """Returns the exit codes; processes that have not ended by then are killed."""
        deadline = time.monotonic() + seconds
        for process in self.popen:
            try:
                process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        return [process.wait() for process in self.popen]

    def wait_for_step(self, step: int) -> None:
        """Returns when the run has logged `step`."""
        while not any(line["step"] >= step for line in curve(self.workdir)):
            if all(process.poll() is not None for process in self.popen):
                raise SystemExit(f"the run ended early: {self.message(0)}")
            time.sleep(0.02)

    def message(self, rank: int) -> str:
        """Returns the last line in which a process itself reports an error, or else its last line."""
        lines = [line for line in self.logs[rank].read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "error: " in line and line.startswith((f"process {rank}: ", "error: "))]
        return (errors or lines or [""])[-1]


def curve(workdir: Path) -> list[dict[str, float]]:
    """Returns the logged lines so far, without what depends on the clock."""
    path = workdir / "metrics.jsonl"
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break  # it is being written
        line.pop("images_per_second", None)
        lines.append(line)
    return lines


def apart(one: Path, other: Path) -> float:
    """Returns the largest relative difference of two runs' losses."""
    a, b = curve(one), curve(other)
    assert [line["step"] for line in a] == [line["step"] for line in b] == list(range(1, LAST + 1))
    return max(abs(x["loss"] - y["loss"]) / abs(x["loss"]) for x, y in zip(a, b, strict=True))


def whole(folder: Path, count: int) -> Path:
    """Returns the work folder of a run of `count` processes that nothing interrupted."""
    workdir = folder / f"whole_{count}"
    if len(curve(workdir)) < LAST:
        shutil.rmtree(workdir, ignore_errors=True)
        codes = (run := Processes(workdir, count)).wait()
        assert codes == [0] * count, (codes, run.message(0))
    return workdir


def same_curve(folder: Path) -> dict[str, float]:
    """Compares the losses of 2 and 4 processes with those of one."""
    found = {f"{count} processes against 1": apart(whole(folder, 1), whole(folder, count)) for count in (2, 4)}
    assert max(found.values()) < 1e-6, found
    return found


def killed(folder: Path, victim: int) -> dict[str, Any]:
    """Kills process `victim` of 2 at a step: the other must leave, and the same command resume."""
    workdir = folder / f"killed_{victim}"
    shutil.rmtree(workdir, ignore_errors=True)
    run = Processes(workdir, 2)
    run.wait_for_step(17)
    run.popen[victim].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    code = run.popen[1 - victim].wait(120)
    seconds = time.monotonic() - begun
    message = run.message(1 - victim)
    dead = f"error: process {victim} of 2 (pid {run.popen[victim].pid} on "
    assert code != 0 and seconds < 10 and dead in message and "ended unexpectedly" in message, (code, seconds, message)
    assert Processes(workdir, 2).wait() == [0, 0]
    assert curve(workdir) == curve(whole(folder, 2))
    message = message.replace(socket.gethostname(), "HOST")
    return {"the other left after seconds": round(seconds, 1), "message": message, "resumed": "the same bits"}


def moved(folder: Path, before: int, after: int) -> dict[str, float]:
    """Starts a run with `before` processes and resumes it with `after`."""
    workdir = folder / f"moved_{before}_{after}"
    shutil.rmtree(workdir, ignore_errors=True)
    half = Processes(workdir, before, f"--config.training.num_steps={LAST // 2}")
    assert half.wait() == [0] * before, half.message(0)
    rest = Processes(workdir, after)
    assert rest.wait() == [0] * after, rest.message(0)
    found = apart(whole(folder, 1), workdir)
    assert found < 1e-6, found
    return {"largest relative difference of the losses": found}


def missing(folder: Path) -> dict[str, Any]:
    """Starts two of three processes: both must name the third."""
    begun = time.monotonic()
    run = Processes(folder / "missing", 3, started=2, join_seconds=10)
    codes = run.wait(60)
    messages = run.message(0), run.message(1)
    assert 0 not in codes and "process 2 of 3 did not connect" in messages[0] and "process 2" in messages[1], messages
    message = messages[0].replace(socket.gethostname(), "HOST")
    return {"seconds, with Python's start": round(time.monotonic() - begun, 1), "message": message}


def stopped(folder: Path) -> dict[str, Any]:
    """Sends SIGTERM to process 1 alone: both must finish the step, save it and exit with 0."""
    workdir = folder / "stopped"
    shutil.rmtree(workdir, ignore_errors=True)
    run = Processes(workdir, 2)
    run.wait_for_step(10)
    run.popen[1].send_signal(signal.SIGTERM)
    codes = run.wait(120)
    assert codes == [0, 0], (codes, run.message(0), run.message(1))
    saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
    assert saved == curve(workdir)[-1]["step"] < LAST
    assert Processes(workdir, 2).wait() == [0, 0]
    assert curve(workdir) == curve(whole(folder, 2))
    return {"stopped and saved at step": saved, "resumed": "the same bits"}


PARTS = {
    "same curve": same_curve,
    "process 1 of 2 killed": lambda folder: killed(folder, 1),
    "process 0 of 2 killed": lambda folder: killed(folder, 0),
    "saved by 4, resumed by 1": lambda folder: moved(folder, 4, 1),
    "saved by 1, resumed by 4": lambda folder: moved(folder, 1, 4),
    "a missing process": missing,
    "SIGTERM to one of 2": stopped,
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/processes"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/processes_cpu.json"))
    parser.add_argument("--only", nargs="*", choices=[*PARTS], metavar="PART", help="names of parts; default: all")
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # where the runs are
    before = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    results: dict[str, Any] = {name: before[name] for name in PARTS if name in before}
    for name in arguments.only or PARTS:
        results[name] = PARTS[name](arguments.folder)
        print(name, json.dumps(results[name]), flush=True)
        write_results(arguments.out, {"simulated_devices": DEVICES, **results})


if __name__ == "__main__":
    main()
