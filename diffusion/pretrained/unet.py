"""The U-Net <-> diffusers' `UNet2DModel`: its arrays by name, and its folder of config.json and weights.

`google/ddpm-cifar10-32` is such a folder (so is `unet/` of a pipeline, see `pretrained.pipeline`).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.networks.unet import UNet
from diffusion.pretrained.blocks import block_name, count_levels, from_torch, to_torch, with_modern_names
from diffusion.pretrained.folder import new_folder, read_json, read_weights, resolve, write_json, write_weights
from diffusion.pretrained.identify import identify
from diffusion.pretrained.strict import check_keys, shapes_of, without_memory
from diffusion.pretrained.unet_config import config_of, network_of

WEIGHTS = "diffusion_pytorch_model"
# Pipelines whose U-Net is a DDPM of pixels. Others have such a network too, but of latents, or of another process.
_PIPELINES = ("DDPMPipeline", "DDIMPipeline", "PNDMPipeline")


def load_unet(
    folder: str | os.PathLike,
    variant: str | None = None,
    null_class: bool | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> tuple[UNet, dict[str, Any], dict[str, Any]]:
    """Returns the network, its parameters (the tree under "params", float32) and the config.json of a `UNet2DModel`.

    Args:
      folder: of the network, of a whole pipeline, or a hub's cache directory of one.
      variant: of the weights' file, as "fp16"; see `folder.read_weights`.
      null_class: whether the last class of a class-conditional model means "no class"; see `network_of`.
      image_size: where the config does not know it.

    Raises:
      ValueError: another kind of model, which is named; a file that is missing or damaged; a setting that our network
        cannot honour; weights that are missing, left over, misshapen or not finite (each named).
    """
    folder = unet_folder(folder)
    config = read_json(folder / "config.json")
    try:
        network, image_shape = network_of(config, null_class, image_size)
        like = shapes(network, image_shape)
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return network, from_diffusers(read_weights(folder, WEIGHTS, variant), like), config


def unet_folder(folder: str | os.PathLike) -> Path:
    """Returns the folder with the network's config.json: `folder`, or unet/ in it.

    Raises:
      ValueError: `folder` is another kind of model, which is named.
    """
    root = resolve(folder)
    path = root / "unet" if (root / "unet").is_dir() else root
    config, index = path / "config.json", root / "model_index.json"
    needed = "needed is the folder of a DDPMPipeline, or of its UNet2DModel"
    if index.is_file() and read_json(index).get("_class_name") not in _PIPELINES:
        raise ValueError(f"{folder} is {identify(root)}: {needed}")
    if not config.exists():
        raise ValueError(f"cannot read {config}: {folder} is {identify(root)}; {needed}")
    if read_json(config).get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"{folder} is {identify(path)}: {needed}")
    return path


def shapes(network: UNet, image_shape: tuple[int, int, int]) -> dict[str, Any]:
    """Returns the network's tree of parameters as shapes (the one under "params"), nothing allocated."""
    images, numbers = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    label = None if network.num_classes is None else jax.ShapeDtypeStruct((1,), jnp.int32)
    return shapes_of(network, images, numbers, label)


def save_unet(
    folder: str | os.PathLike, network: UNet, params: Mapping[str, Any], image_size: int | tuple[int, int]
) -> None:
    """Writes network and parameters (the tree under "params") as the folder of a `UNet2DModel`.

    `image_size` (or height and width) decides at which levels `attention_resolutions` are.

    Raises:
      ValueError: `folder` is there already, or a `UNet2DModel` cannot be what `network` is.
    """
    weights = to_diffusers(params)
    config = config_of(network, image_size, in_channels=weights["conv_in.weight"].shape[1])
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        write_weights(temporary / f"{WEIGHTS}.safetensors", weights)


def to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `UNet` (the tree under "params") under diffusers' names and in its layouts."""
    num_levels = count_levels(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_name(path, num_levels): to_torch(path, np.asarray(leaf)) for path, leaf in leaves}


def from_diffusers(weights: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns diffusers' weights as parameters of `UNet`; `like` is its tree of parameters, or of their shapes.

    Raises:
      ValueError: a key is missing, left over or given under its old name too, or a shape differs.
    """
    modern = with_modern_names(weights)
    expected = {name: weight.shape for name, weight in to_diffusers(without_memory(like)).items()}
    check_keys(modern, expected, "U-Net")
    num_levels = count_levels(like)

    def take(path, leaf):
        return from_torch(path, np.asarray(modern[_name(path, num_levels)]))

    return jax.tree_util.tree_map_with_path(take, like)


def _name(path: Any, num_levels: int) -> str:
    """Returns diffusers' name of the parameter at `path`; raises ValueError where it has none."""
    name = block_name([key.key for key in path], num_levels)
    if name is None:
        what = f"diffusers' UNet2DModel has no {path[0].key}"
        raise ValueError(f"{what}: it takes neither prompts nor their features")
    return name
