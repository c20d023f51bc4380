"""Who started this process, and with how many others."""

import os
from typing import NamedTuple

from diffusion.training.errors import RunError


class Launch(NamedTuple):
    """One process of several.

    Attributes:
      rank, count: its number and how many there are; None where JAX finds out itself.
      address: HOST:PORT of process 0's coordinator; None where JAX finds it itself.
    """

    rank: int | None = None
    count: int | None = None
    address: str | None = None


def find_launch() -> Launch | None:
    """Returns how this process was launched as one of several; None where it is alone.

    Read from the environment:

    - `./launch.sh NAME --processes N` sets DIFFUSION_NUM_PROCESSES, DIFFUSION_PROCESS_ID and JAX_COORDINATOR_ADDRESS.
    - Slurm, Open MPI and TPU pods are recognized; there JAX finds rank, count and address itself.

    Raises:
      RunError: a variable is missing or is not a number in its range.
    """
    count = environment_number("DIFFUSION_NUM_PROCESSES", 1)
    if count > 1:
        rank = environment_number("DIFFUSION_PROCESS_ID")
        if not 0 <= rank < count:
            raise RunError(f"DIFFUSION_PROCESS_ID is {rank}: with {count} processes it must be 0 to {count - 1}")
        return Launch(rank, count, os.environ.get("JAX_COORDINATOR_ADDRESS"))
    tasks = environment_number("SLURM_NTASKS", 1) if "SLURM_STEP_ID" in os.environ else 1
    tasks = max(tasks, environment_number("OMPI_COMM_WORLD_SIZE", 1))
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return Launch() if tasks > 1 or len(workers) > 1 else None


def environment_number(name: str, default: int | None = None) -> int:
    """Returns the integer in an environment variable.

    Raises:
      RunError: it is not an integer, or is not set and there is no default.
    """
    value = os.environ.get(name, default)
    try:
        return int(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        raise RunError(f"{name} is {value!r}: set it to an integer") from None
