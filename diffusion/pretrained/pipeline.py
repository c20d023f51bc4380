"""DDPM pipelines of diffusers: a folder with the network in unet/ and its chain in scheduler/, or both at its root."""

import os
from collections.abc import Mapping
from typing import Any

from diffusion.networks.unet import UNet
from diffusion.pretrained.folder import new_folder, read_json, resolve, write_json
from diffusion.pretrained.scheduler import Chain, chain_of, scheduler_of
from diffusion.pretrained.unet import save_unet


def load_chain(folder: str | os.PathLike) -> Chain | None:
    """Returns the chain of a pipeline's folder; None where it has no scheduler, as a network's own folder.

    The file is scheduler/scheduler_config.json, or scheduler_config.json at the root.

    Raises:
      ValueError: naming the setting that is not a DDPM chain's as ours are.
    """
    folder = resolve(folder)
    folders = [folder / "scheduler", folder / "noise_scheduler", folder]
    paths = [path / "scheduler_config.json" for path in folders]
    found = next((path for path in paths if path.exists() or (path.parent != folder and path.parent.is_dir())), None)
    if found is None:
        return None
    config = read_json(found)
    try:
        return chain_of(config)
    except ValueError as error:
        raise ValueError(f"{found}: {error}") from error


def save_pipeline(
    folder: str | os.PathLike,
    network: UNet,
    params: Mapping[str, Any],
    image_size: int | tuple[int, int],
    chain: Chain,
) -> None:
    """Writes what `DDPMPipeline.from_pretrained(folder)` reads: see `save_unet`; the network's time must be t - 1.

    The scheduler is a DDPMScheduler whatever `chain.sampler` is.

    Raises:
      ValueError: as `save_unet`, or a chain that a DDPMScheduler cannot be.
    """
    scheduler = scheduler_of(chain)
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with new_folder(folder) as temporary:
        save_unet(temporary / "unet", network, params, image_size)
        (temporary / "scheduler").mkdir()
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        write_json(temporary / "model_index.json", index)
