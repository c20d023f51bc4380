"""Joining the other processes of a run before JAX is first used, and leaving them when this one cannot continue."""

import atexit
import os
import sys
import threading
import time
from typing import Any

import jax

from diffusion.training.processes.launchers import environment_number, find_launch
from diffusion.training.processes.lifeline import GRACE_SECONDS, Lifeline, delay_aborts
from diffusion.training.processes.rollcall import roll_call, who
from diffusion.training.sharding import find_devices

JOIN_SECONDS = 120  # for all processes to connect
HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead
# With a lifeline, which reports deaths at once, JAX's heartbeats may be patient: a busy machine delays them.
PATIENT_HEARTBEAT_SECONDS = 300
MEET_SECONDS = 1800  # for all processes to have compiled
SHUTDOWN_SECONDS = 30  # for all processes to end

_lifeline: Lifeline | None = None  # after a roll call
_leaving = threading.Lock()


def join() -> None:
    """Starts `jax.distributed` where this process is one of several; does nothing where it is alone.

    The launchers are those of `launchers.find_launch`. DIFFUSION_JOIN_SECONDS is how long to wait for the others
    (default: 120). If one of the processes dies later:

    - launched by launch.sh: the others report which one and exit within a second (`lifeline`);
    - found by JAX (Slurm, Open MPI, TPU pods): JAX ends them, after HEARTBEAT_SECONDS and with its own message.

    Raises:
      RunError: not all processes connected in that time, an environment variable is wrong, or JAX finds no device.
    """
    launch = find_launch()
    if launch is None:
        return
    known: dict[str, Any] = {}
    if launch.count is not None:
        # Without this the processes of a CPU run would not see each other's devices.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        known = {"num_processes": launch.count, "process_id": launch.rank}
    seconds = environment_number("DIFFUSION_JOIN_SECONDS", JOIN_SECONDS)
    rank, count = ("?" if number is None else number for number in (launch.rank, launch.count))
    print_line(f"process {rank} of {count} ({who()}): joining at {launch.address or 'an address that JAX finds'}")
    if launch.rank is not None and launch.count is not None and launch.address and ":" in launch.address:
        global _lifeline
        peers = roll_call(launch.address, launch.rank, launch.count, seconds)
        _lifeline = Lifeline(launch.rank, launch.count, peers, lost)
        delay_aborts()
        atexit.register(_lifeline.announce_end)  # before JAX's own, in which the processes wait for each other
    jax.distributed.initialize(
        **known,
        initialization_timeout=seconds,
        heartbeat_timeout_seconds=PATIENT_HEARTBEAT_SECONDS if _lifeline else HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    find_devices()
    devices = jax.local_devices()
    print_line(
        f"process {jax.process_index()} of {jax.process_count()} ({who()}) has "
        f"{len(devices)} of {jax.device_count()} devices ({devices[0].device_kind}), "
        f"numbers {', '.join(str(device.id) for device in devices)}"
    )


def meet(place: str) -> None:
    """Returns when every process of the run has called this; at once where it is alone.

    Call it before the first collective after compiling: CPU processes wait only 30 seconds for each other there, and
    one may compile longer than another. It goes through the coordinator and is not itself a collective.

    Args:
      place: a name, the same in all processes, used once in a run.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        from jax._src.distributed import global_state  # no public name leads to it

        global_state.client.wait_at_barrier(f"diffusion {place}", timeout_in_ms=1000 * MEET_SECONDS)  # pyright: ignore[reportOptionalMemberAccess]


def leave(code: int, line: str = "") -> None:
    """Ends this process at once where it is one of several; returns where it is alone.

    An orderly exit would wait for the other processes, which are waiting for this one in the middle of a step.

    Args:
      code: the exit status.
      line: the reason; printed here and reported by the other processes.
    """
    if _lifeline is None and not jax.distributed.is_initialized():
        return
    _leaving.acquire()  # never released: a second thread that leaves waits here until the process ends
    if line:
        print_line(f"process {_lifeline.rank if _lifeline else jax.process_index()}: {line}")
    sys.stdout.flush()
    sys.stderr.flush()
    if _lifeline:
        _lifeline.announce_reason(line or f"exit code {code}")
    os._exit(code)


def lost(line: str) -> None:
    """Leaves because another process has ended; `line` names it and the reason."""
    print_line("")  # the progress bar leaves its line open
    leave(1, f"error: {line}; the same command resumes from the newest checkpoint")


def peer_died(error: Exception) -> bool:
    """Returns whether `error` is how JAX reports in this process that another one of the run has ended."""
    if not jax.distributed.is_initialized():
        return False
    words = str(error).lower()
    died = isinstance(error, jax.errors.JaxRuntimeError) and any(
        word in words for word in ("gloo", "connection", "socket", "heartbeat", "coordination", "nccl", "deadline")
    )
    if died and _lifeline:
        time.sleep(3 * GRACE_SECONDS)  # the lifeline, which knows which process and why, ends this one meanwhile
    return died


def print_line(line: str) -> None:
    """Prints a line to stderr in one write: several processes may share a terminal."""
    os.write(2, f"{line}\n".encode())
