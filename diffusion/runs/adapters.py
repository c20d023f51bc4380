"""--lora=FILE: a run drawn with adapters that were trained elsewhere, in diffusers' form."""

import os
from pathlib import Path

import jax
from jax.sharding import NamedSharding, PartitionSpec

from diffusion.model.lora import ATTENTION, LoRA
from diffusion.pretrained.lora import load_lora
from diffusion.runs.run import Run
from diffusion.training import RunError, check_finite, digest


def with_lora(run: Run, path: str | os.PathLike) -> Run:
    """Returns a run whose network is changed by the adapters in a file, or in a folder as diffusers names it.

    Raises:
      RunError: the run's network is neither MM-DiT nor FLUX.2, has adapters already, or theirs are not finite.
      ValueError: the file cannot be read, or its adapters are of another network.

    Example:
      with_lora(diffusion.open_run("runs/sd3"), "pytorch_lora_weights.safetensors").sample(prompts=["a fox"])
    """
    name = run.config.network.name
    if name not in ATTENTION or run.model.lora is not None:
        needed = " or ".join(ATTENTION)
        what = "has adapters of its own" if run.model.lora else f"has network {name}, not {needed}"
        raise RunError(f"--lora={path}: {run.workdir} {what}: leave it out")
    everywhere = NamedSharding(run.mesh, PartitionSpec())
    adapters = jax.device_put(load_lora(Path(path).expanduser(), run.model.network), everywhere)
    check_finite(adapters, f"--lora={path}")
    model = run.model._replace(lora=LoRA(0, 1.0, ()))  # their rank is their own, their scale is in them
    params = {**run.params, "lora": adapters}
    return run._replace(model=model, params=params, programs={}, known_digest=f"{run.digest}+{digest(adapters)}")
