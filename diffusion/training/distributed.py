"""Joining the other processes of a run before JAX is first used, and leaving them when this one cannot go on."""

import atexit
import os
import sys
import threading
import time
from typing import Any

import jax

from diffusion.training.lifeline import GRACE_SECONDS, Lifeline, delay_aborts
from diffusion.training.rollcall import roll_call, who

JOIN_SECONDS = 120  # for all processes to be there
HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead
# The same where the lifeline tells of deaths, at once: on a busy machine a process may just not get its turn.
PATIENT_HEARTBEAT_SECONDS = 300
MEET_SECONDS = 1800  # for all to have compiled
SHUTDOWN_SECONDS = 30  # for all to come to the end

_lifeline: Lifeline | None = None  # where the roll was called
_leaving = threading.Lock()


def join() -> None:
    """Starts `jax.distributed` where this process is one of several; does nothing where it is alone.

    Under Slurm, Open MPI and on TPU pods JAX finds the others itself; `./launch.sh NAME --processes N` tells through
    DIFFUSION_NUM_PROCESSES, DIFFUSION_PROCESS_ID and JAX_COORDINATOR_ADDRESS. DIFFUSION_JOIN_SECONDS is how long to
    wait for the others.

    When one of the processes dies later, the others say who it was and leave (`lifeline`). Where JAX finds them itself
    there is no roll call and so no lifeline: JAX ends them, after HEARTBEAT_SECONDS and in its own words.

    Raises:
      RunError: not all processes were there in that time.
    """
    count = int(os.environ.get("DIFFUSION_NUM_PROCESSES", "1"))
    told: dict[str, Any] = {}
    if count > 1:
        # Without this the processes of a CPU run would not see each other's devices.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        told = {"num_processes": count, "process_id": int(os.environ["DIFFUSION_PROCESS_ID"])}
    elif not _found_by_jax():
        return
    seconds = int(os.environ.get("DIFFUSION_JOIN_SECONDS", JOIN_SECONDS))
    address = os.environ.get("JAX_COORDINATOR_ADDRESS", "an address that JAX finds")
    say(f"process {told.get('process_id', '?')} of {count if told else '?'} ({who()}): joining at {address}")
    if told and ":" in address:
        global _lifeline
        rank = told["process_id"]
        _lifeline = Lifeline(rank, count, roll_call(address, rank, count, seconds), lost)
        delay_aborts()
        atexit.register(_lifeline.say_bye)  # before JAX's own, in which the processes wait for each other
    jax.distributed.initialize(
        **told,
        initialization_timeout=seconds,
        heartbeat_timeout_seconds=PATIENT_HEARTBEAT_SECONDS if _lifeline else HEARTBEAT_SECONDS,
        shutdown_timeout_seconds=SHUTDOWN_SECONDS,
    )
    devices = jax.local_devices()
    say(
        f"process {jax.process_index()} of {jax.process_count()} ({who()}) has "
        f"{len(devices)} of {jax.device_count()} devices ({devices[0].device_kind}), "
        f"numbers {', '.join(str(device.id) for device in devices)}"
    )


def meet(place: str) -> None:
    """Returns when every process of the run is here; at once where it is alone.

    CPU processes give each other 30 seconds at their first collective. One that compiles longer than another would use
    them up, so they meet before it: through the coordinator, as nothing else is not itself a collective.
    """
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        from jax._src.distributed import global_state  # no public name leads to it

        global_state.client.wait_at_barrier(f"diffusion {place}", timeout_in_ms=1000 * MEET_SECONDS)  # pyright: ignore[reportOptionalMemberAccess]


def leave(code: int, line: str = "") -> None:
    """Where this process is one of several, prints a line and ends it at once; returns where it is alone.

    An orderly end waits for the others, and they wait for this process in the middle of a step.
    """
    if _lifeline is None and not jax.distributed.is_initialized():
        return
    _leaving.acquire()  # and not let go of: whichever thread comes later waits for the end
    if line:
        say(f"process {_lifeline.rank if _lifeline else jax.process_index()}: {line}")
    sys.stdout.flush()
    sys.stderr.flush()
    if _lifeline:
        _lifeline.say_why(line or f"exit code {code}")
    os._exit(code)


def lost(line: str) -> None:
    """Leaves because another process has; `line` says which and how."""
    say("")  # the progress bar leaves its line open
    leave(1, f"error: {line}; the same command goes on from the newest checkpoint")


def peer_died(error: Exception) -> bool:
    """Whether an error is what the end of another process of the run looks like from here."""
    if not jax.distributed.is_initialized():
        return False
    words = str(error).lower()
    died = isinstance(error, jax.errors.JaxRuntimeError) and any(
        word in words for word in ("gloo", "connection", "socket", "heartbeat", "coordination", "nccl", "deadline")
    )
    if died and _lifeline:
        time.sleep(3 * GRACE_SECONDS)  # in which the lifeline, which knows which one and why, ends this process
    return died


def say(line: str) -> None:
    """Prints a line in one piece: several processes may share a terminal."""
    os.write(2, f"{line}\n".encode())


def _found_by_jax() -> bool:
    tasks = int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1
    tasks = max(tasks, int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return tasks > 1 or len(workers) > 1
