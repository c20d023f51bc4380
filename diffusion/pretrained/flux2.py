"""FLUX.2's transformer <-> diffusers' `Flux2Transformer2DModel`.

A published folder holds config.json and diffusion_pytorch_model.safetensors, whole or in shards, as transformer/ of a
pipeline does.
"""

import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.networks.flux2 import Flux2
from diffusion.pretrained.flux2_config import CLASS, config_of, network_of_config
from diffusion.pretrained.folder import new_folder, read_json, read_weights, resolve, write_json
from diffusion.pretrained.identify import identify
from diffusion.pretrained.shards import LARGEST, write_sharded
from diffusion.pretrained.strict import check_keys, shapes_of, without_memory

WEIGHTS = "diffusion_pytorch_model"
Put = Callable[[Any, np.ndarray], Any]
Names = Mapping[str, str | tuple[str, ...]]  # of our modules, those of blocks behind their kind; of kinds

# Our modules -> diffusers'. Theirs has three layers where ours, "qkv", has one.
_NAMES: Names = {
    "double": "transformer_blocks",
    "single": "single_transformer_blocks",
    "image_in": "x_embedder.weight",
    "context_in": "context_embedder.weight",
    "time_1": "time_guidance_embed.timestep_embedder.linear_1.weight",
    "time_2": "time_guidance_embed.timestep_embedder.linear_2.weight",
    "guidance_1": "time_guidance_embed.guidance_embedder.linear_1.weight",
    "guidance_2": "time_guidance_embed.guidance_embedder.linear_2.weight",
    "image_modulation": "double_stream_modulation_img.linear.weight",
    "text_modulation": "double_stream_modulation_txt.linear.weight",
    "single_modulation": "single_stream_modulation.linear.weight",
    "out_modulation": "norm_out.linear.weight",
    "image_out": "proj_out.weight",
    "double/image_qkv": ("attn.to_q.weight", "attn.to_k.weight", "attn.to_v.weight"),
    "double/image_norm_query": "attn.norm_q.weight",
    "double/image_norm_key": "attn.norm_k.weight",
    "double/image_out": "attn.to_out.0.weight",
    "double/image_mlp_1": "ff.linear_in.weight",
    "double/image_mlp_2": "ff.linear_out.weight",
    "double/text_qkv": ("attn.add_q_proj.weight", "attn.add_k_proj.weight", "attn.add_v_proj.weight"),
    "double/text_norm_query": "attn.norm_added_q.weight",
    "double/text_norm_key": "attn.norm_added_k.weight",
    "double/text_out": "attn.to_add_out.weight",
    "double/text_mlp_1": "ff_context.linear_in.weight",
    "double/text_mlp_2": "ff_context.linear_out.weight",
    "single/parallel_in": "attn.to_qkv_mlp_proj.weight",
    "single/norm_query": "attn.norm_q.weight",
    "single/norm_key": "attn.norm_k.weight",
    "single/parallel_out": "attn.to_out.weight",
}


def shapes(network: Flux2) -> dict[str, Any]:
    """Returns the network's tree of parameters as shapes (the one under "params"), nothing allocated."""

    sizes = {
        "x_t": (1, 1, 1, network.out_channels),
        "time": (1,),
        "context": (1, 1, network.context_width),
        "guidance": (1,) if network.guidance_embedding else None,
    }
    inputs: Any = {name: size and jax.ShapeDtypeStruct(size, jnp.float32) for name, size in sizes.items()}
    return shapes_of(network, **inputs)


def load_flux2(
    folder: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    weights_dtype: Any = np.float32,
    variant: str | None = None,
    put: Put | None = None,
    read: bool = True,
) -> tuple[Flux2, dict[str, Any]]:
    """Returns the network of a published `Flux2Transformer2DModel` and its parameters.

    Args:
      folder: of it, of a pipeline with it in transformer/, or a hub's cache directory of one.
      dtype: what the network computes in.
      weights_dtype: what weights are converted to; None: as they are stored.
      variant: see `folder.read_weights`.
      put: see `from_diffusers`.
      read: whether arrays are read; else the names and shapes in the files are checked, and the parameters are None.

    Raises:
      ValueError: a file is missing, it is another kind of model (which is named), a setting that our network cannot
        honour, or weights that do not fit the config.
    """
    path = transformer_folder(folder)
    found = network(path, dtype)
    weights = read_weights(path, WEIGHTS, variant, weights_dtype)
    if not read:
        weights, put = without_memory(weights), lambda path, array: None
    return found, {"params": from_diffusers(weights, shapes(found), put)}


def transformer_folder(folder: str | os.PathLike) -> Path:
    """Returns the folder with the transformer's config.json: `folder`, or transformer/ in it.

    Raises:
      ValueError: it is another kind of model, which is named.
    """
    root = resolve(folder)
    path = root / "transformer" if (root / "transformer").is_dir() else root
    config = path / "config.json"
    if not config.exists() or read_json(config).get("_class_name", CLASS) != CLASS:
        raise ValueError(
            f"{folder} is {identify(path)}: needed is the folder of a {CLASS}, or of a pipeline with one in "
            "transformer/"
        )
    return path


def network(folder: str | os.PathLike, dtype: Any = jnp.float32) -> Flux2:
    """Returns the network that a folder's config.json describes; raises ValueError as `load_flux2`."""
    path = transformer_folder(folder) / "config.json"
    try:
        return network_of_config(read_json(path), dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_flux2(folder: str | os.PathLike, network: Flux2, params: Mapping[str, Any], largest: int = LARGEST) -> None:
    """Writes a folder that diffusers and `load_flux2` read, in the dtypes of `params`.

    Args:
      folder: to be made.
      network: whose config is written.
      params: {"params": its parameters}.
      largest: bytes of a file, see `write_sharded`.

    Raises:
      ValueError: `folder` is there already, or diffusers has no such network.
    """
    with new_folder(folder) as temporary:
        write_flux2(temporary, network, params, largest)


def write_flux2(folder: Path, network: Flux2, params: Mapping[str, Any], largest: int = LARGEST) -> None:
    """Writes config.json and weights into a folder that is there; see `save_flux2`."""
    write_json(folder / "config.json", config_of(network))
    write_sharded(folder, WEIGHTS, to_diffusers(params["params"]), largest)


def to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `Flux2` (the tree under "params") under diffusers' names and in its layouts."""
    return renamed(params, _NAMES)


def from_diffusers(weights: Mapping[str, Any], like: Mapping[str, Any], put: Put | None = None) -> dict[str, Any]:
    """Returns diffusers' weights as the tree that `to_diffusers` takes, in the dtypes they are read in.

    Args:
      weights: arrays by name, read one by one.
      like: such a tree, or its `shapes`.
      put: (path, array) -> what is kept of it: an array on a device, so that the whole is never on the host; None:
        the array.

    Raises:
      ValueError: a key is missing or left over, or a shape differs.
    """
    return taken(weights, like, _NAMES, put)


def module_names(block: str, module: str) -> list[str]:
    """Returns diffusers' names of a module in a block of ours: three for a fused q, k, v."""
    return [name.removesuffix(".weight") for name in _names(block, module, _NAMES)]


def renamed(params: Mapping[str, Any], names: Names) -> dict[str, np.ndarray]:
    """Returns the parameters in PyTorch's layout, [out, in], under the names of a table, split where it has several."""
    weights: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        theirs, weight = _theirs(path, names), np.asarray(leaf)
        if path[-1].key == "kernel":
            # Products from heads have several axes of inputs, and all others one.
            inputs = math.prod(weight.shape[:-1]) if path[-2].key.endswith("_out") else weight.shape[0]
            weight = weight.reshape(inputs, -1).T
        weights |= zip(theirs, np.split(weight, len(theirs)), strict=True)
    return weights


def taken(weights: Mapping[str, Any], like: Mapping[str, Any], names: Names, put: Put | None) -> dict[str, Any]:
    """Returns the tree of which `renamed` makes these weights; see `from_diffusers`."""
    expected = {name: weight.shape for name, weight in renamed(without_memory(like), names).items()}
    check_keys(weights, expected, "transformer of FLUX.2")

    def take(path: Any, leaf: Any) -> Any:
        parts = [np.asarray(weights[name]) for name in _theirs(path, names)]
        array = parts[0] if len(parts) == 1 else np.concatenate(parts)
        array = (array.T if path[-1].key == "kernel" else array).reshape(leaf.shape)
        return array if put is None else put(path, array)

    return jax.tree_util.tree_map_with_path(take, like)


def _theirs(path: Any, names: Names) -> list[str]:
    """Returns the names of the parameter at `path`."""
    *block, module, _ = (key.key for key in path)
    return _names(block[0] if block else "", module, names)


def _names(block: str, module: str, names: Names) -> list[str]:
    """Returns the names of a module's parameter; `block` is "" outside of blocks."""
    if not block:
        prefix, found = "", names[module]
    else:
        kind, number = block.rsplit("_", 1)
        prefix, found = f"{names[kind]}.{number}.", names[f"{kind}/{module}"]
    return [f"{prefix}{name}" for name in ((found,) if isinstance(found, str) else found)]
