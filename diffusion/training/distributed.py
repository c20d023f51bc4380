"""Joining the other processes of a run, before JAX is first used."""

import os

import jax


def join() -> None:
    """Starts `jax.distributed` where this process is one of several; does nothing where it is alone.

    Under Slurm, Open MPI and on TPU pods JAX finds the others itself; `./launch.sh NAME --processes N` tells through
    DIFFUSION_NUM_PROCESSES, DIFFUSION_PROCESS_ID and JAX_COORDINATOR_ADDRESS.
    """
    count = int(os.environ.get("DIFFUSION_NUM_PROCESSES", "1"))
    if count > 1:
        # Without this the processes of a CPU run would not see each other's devices.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(num_processes=count, process_id=int(os.environ["DIFFUSION_PROCESS_ID"]))
    elif _found_by_jax():
        jax.distributed.initialize()


def _found_by_jax() -> bool:
    tasks = int(os.environ.get("SLURM_NTASKS", "1")) if "SLURM_STEP_ID" in os.environ else 1
    tasks = max(tasks, int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")))
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    return tasks > 1 or len(workers) > 1
