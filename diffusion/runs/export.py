"""--mode=export: the averaged weights of a run in the form in which such models are published.

    python -m experiments.cifar10 --mode=export --workdir=runs/ddpm --weights=my-ddpm
    python -m experiments.sd3 --mode=export --workdir=runs/mine --weights=my-sd3

`--weights` is a new folder: a DDPMPipeline of a U-Net, a StableDiffusion3Pipeline or Flux2KleinPipeline of such a model
that was trained whole, pytorch_lora_weights.safetensors of adapters. Of any other model it has our own form, see
`artefact`.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from diffusion.model import flux2_text
from diffusion.model.autoencoders import restore
from diffusion.model.choices import fields_of
from diffusion.model.processes import PROCESSES
from diffusion.model.sampling import SAMPLERS
from diffusion.model.sd3_text import towers_of
from diffusion.networks.mmdit import MMDiT
from diffusion.pretrained import klein, lora, pipeline, sd3
from diffusion.pretrained.scheduler import Chain
from diffusion.pretrained.vae import PublishedAutoencoder
from diffusion.runs.artefact import write_artefact
from diffusion.runs.call import Call
from diffusion.runs.run import Run
from diffusion.runs.weights import published_folder
from diffusion.training import RunError


def export_weights(call: Call) -> None:
    """Writes the averaged weights of a run as a published folder."""
    published, run = published_folder(call), call.open()
    if run.model.lora is not None:
        what = export_lora(published, run)
    else:
        kind = run.config.condition.name if run.config.space.name == "latents" else ""
        if kind in PIPELINES:
            PIPELINES[kind](published, run)
        elif is_chain(run):
            export_chain(published, run)
        else:
            write_artefact(published, run, call.task.about)
        what = "the averaged weights"
    print(f"{published}: {what} of {run.workdir} after {run.step} steps")


def export_lora(published: Path, run: Run) -> str:
    """Writes the adapters of a run for diffusers' `load_lora_weights`; returns what they are."""
    assert run.model.lora is not None
    lora.save_lora(published, run.model.network, jax.device_get(run.params["lora"]), run.model.lora.scale)
    return f"the averaged adapters, of rank {run.model.lora.rank},"


def export_sd3(published: Path, run: Run) -> None:
    """Writes the folder of a `StableDiffusion3Pipeline`, in the dtypes of the run's parameters."""
    model = run.model
    assert model.condition.description is not None
    params = jax.device_get(run.params)
    towers = towers_of(model.condition.description, params["text"])
    network: MMDiT = model.network
    whole = sd3.StableDiffusion3(
        network, params["network"], autoencoder_of(run), towers, run.config.sampling.grid.get("shift", 1.0)
    )
    sd3.save_pipeline(published, whole)


def export_klein(published: Path, run: Run) -> None:
    """Writes the folder of a `Flux2KleinPipeline`, in the dtypes of the run's parameters.

    It is a distilled one where the import was, or, of a run that was trained here, where it samples without guidance.
    """
    model = run.model
    assert model.condition.description is not None
    params = jax.device_get(run.params)
    encoder = flux2_text.published(model.condition.description, params["text"])
    distilled = bool(run.stored.get("distilled", run.config.sampling.guidance == 1.0))
    whole = klein.Klein(model.network, params["network"], autoencoder_of(run), *encoder, distilled)
    klein.save_pipeline(published, whole)


def autoencoder_of(run: Run) -> PublishedAutoencoder:
    """Returns the autoencoder of a run in latents as it is published."""
    assert run.model.space.description is not None
    space, codec = jax.device_get(run.params["space"]), restore(run.model.space.description)
    return PublishedAutoencoder(
        codec.module, space["autoencoder"], space["shift"], space["scale"], codec.patch, run.config.space.sample
    )


def is_chain(run: Run) -> bool:
    """Returns whether a run is what a `DDPMPipeline` holds: a U-Net without prompts on DDPM's process, of pixels."""
    config = run.config
    names = config.process.name, config.network.name, config.space.name
    return names == ("ddpm", "unet", "pixels") and run.model.condition.kind != "prompts"


def export_chain(published: Path, run: Run) -> None:
    """Writes a U-Net and its chain as the folder of a `DDPMPipeline`.

    Raises:
      RunError: its samples are clipped in a way that such a pipeline has not.
    """
    config, network = run.config, run.model.network
    threshold = config.sampling.threshold
    if threshold.name not in ("clip", "none") or threshold.get("low", 0) != -threshold.get("high", 0):
        raise RunError("a DDPMPipeline clips evenly or not: add --config.sampling.threshold=clip (or none)")
    variance = config.sampling.sampler.get("variance", fields_of(SAMPLERS["ancestral"])["variance"])
    grid = config.sampling.grid
    published_grid: dict[str, Any] = {"spacing": grid.name} if grid.name in ("leading", "trailing", "linspace") else {}
    of_process: dict[str, Any] = {field: config.process[field] for field in fields_of(PROCESSES["ddpm"])}
    chain = Chain(
        **of_process,
        prediction=run.model.objective.prediction,
        variance="learned" if run.model.objective.learned_variance else variance,
        clip=threshold.name == "clip",
        clip_range=threshold.get("high", 1.0),
        steps_offset=grid.get("steps_offset", 0),
        final=grid.get("final", "zero"),
        **published_grid,
    )
    params = jax.device_get(run.params["params"])
    pipeline.save_pipeline(published, network, params, run.model.space.image_shape[:2], chain)


PIPELINES: dict[str, Callable[[Path, Run], None]] = {"sd3": export_sd3, "flux2": export_klein}  # of conditions
