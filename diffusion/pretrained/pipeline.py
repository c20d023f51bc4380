"""DDPM pipelines of diffusers: a folder with the network in unet/ and its chain in scheduler/, or both at its root."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from diffusion.networks.unet import UNet
from diffusion.pretrained.folder import new_folder, read_json, resolve, write_json
from diffusion.pretrained.scheduler import Chain, chain_of, scheduler_of
from diffusion.pretrained.unet import load_unet, save_unet
from diffusion.pretrained.unet_config import network_of


class Published(NamedTuple):
    """A published model.

    Attributes:
      network: computes in float32.
      params: the tree under "params".
      image_shape: (height, width, channels).
      chain: how it was trained and is sampled; None where that is not published.
    """

    network: UNet
    params: dict[str, Any]
    image_shape: tuple[int, int, int]
    chain: Chain | None


def load_pipeline(
    folder: str | os.PathLike,
    variant: str | None = None,
    null_class: bool | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> Published:
    """Returns the model of a pipeline's folder, or of its network's alone; see `load_unet` for the arguments.

    Raises:
      ValueError: as `load_unet` and `load_chain`, or a network that does not return what the chain needs.
    """
    network, params, config = load_unet(folder, variant, null_class, image_size)
    image_shape, chain = network_of(config, null_class, image_size)[1], load_chain(folder)
    channels = image_shape[-1] * (2 if chain is not None and chain.variance == "learned" else 1)
    if chain is not None and network.out_channels != channels:
        raise ValueError(
            f"{folder}: a network from {image_shape[-1]} to {network.out_channels} channels does not fit a scheduler "
            f"whose variance is {chain.variance}"
        )
    return Published(network, params, image_shape, chain)


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
