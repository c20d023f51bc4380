"""The MM-DiT <-> diffusers' `SD3Transformer2DModel` (Stable Diffusion 3 and 3.5): folders, and arrays by name."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.networks.mmdit import MMDiT, position_table
from diffusion.pretrained.config_fields import check_counts, read_fields
from diffusion.pretrained.folder import read_json, read_weights, resolve, write_json, write_weights
from diffusion.pretrained.identify import identify
from diffusion.pretrained.strict import check_keys, shapes_of, without_memory

# Our modules -> diffusers'. Theirs has three layers where ours, "qkv", has one.
_MODULES = {
    "patch_in": "pos_embed.proj",
    "context_in": "context_embedder",
    "time_1": "time_text_embed.timestep_embedder.linear_1",
    "time_2": "time_text_embed.timestep_embedder.linear_2",
    "pooled_1": "time_text_embed.text_embedder.linear_1",
    "pooled_2": "time_text_embed.text_embedder.linear_2",
    "modulation_out": "norm_out.linear",
    "patch_out": "proj_out",
    "image_modulation": "norm1.linear",
    "image_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "image_norm_query": "attn.norm_q",
    "image_norm_key": "attn.norm_k",
    "image_out": "attn.to_out.0",
    "image_mlp_1": "ff.net.0.proj",
    "image_mlp_2": "ff.net.2",
    "text_modulation": "norm1_context.linear",
    "text_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "text_norm_query": "attn.norm_added_q",
    "text_norm_key": "attn.norm_added_k",
    "text_out": "attn.to_add_out",
    "text_mlp_1": "ff_context.net.0.proj",
    "text_mlp_2": "ff_context.net.2",
    "dual_qkv": ("attn2.to_q", "attn2.to_k", "attn2.to_v"),
    "dual_norm_query": "attn2.norm_q",
    "dual_norm_key": "attn2.norm_k",
    "dual_out": "attn2.to_out.0",
}
# A table computed by a formula and stored with the weights. Files of 16 bits round it by up to 2^-9.
_TABLE = "pos_embed.pos_embed"
_TABLE_TOLERANCE = 2**-8
_CLASS = "SD3Transformer2DModel"
# The fields of that class, and what holds where a config is silent.
_FIELDS: dict[str, Any] = dict(
    sample_size=128,
    patch_size=2,
    in_channels=16,
    num_layers=18,
    attention_head_dim=64,
    num_attention_heads=18,
    joint_attention_dim=4096,
    caption_projection_dim=1152,
    pooled_projection_dim=2048,
    out_channels=16,
    pos_embed_max_size=96,
    dual_attention_layers=(),
    qk_norm=None,
)


def shapes(network: MMDiT) -> dict[str, Any]:
    """Returns the network's tree of parameters as shapes (the one under "params"), nothing allocated."""
    size = network.patch
    inputs = (
        jax.ShapeDtypeStruct((1, size, size, network.out_channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, network.context_width), jnp.float32),
        jax.ShapeDtypeStruct((1, network.pooled_width), jnp.float32),
    )
    return shapes_of(network, *inputs)


def to_diffusers(network: MMDiT, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `network` (the tree under "params") under diffusers' names and in its layouts."""
    weights = {_TABLE: _table(network)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names, leaf = _names(path), np.asarray(leaf)
        parts = np.moveaxis(leaf, -3, 0) if len(names) == 3 else [leaf]
        for name, part in zip(names, parts, strict=True):
            weights[name] = _to_torch(network, path, part)
    return weights


def from_diffusers(
    network: MMDiT, weights: Mapping[str, Any], put: Callable[[Any, np.ndarray], Any] | None = None
) -> dict[str, Any]:
    """Returns diffusers' weights as parameters of `network`, in the dtypes they are read in.

    Args:
      network: what they are for.
      weights: arrays by name, read one by one.
      put: (path, array) -> what is kept of it: an array on a device, so that the whole is never on the host; None:
        the array.

    Raises:
      ValueError: a key is missing or left over, a shape differs, or the position table is another one.
    """
    like = shapes(network)
    expected = to_diffusers(network, without_memory(like))
    check_keys(weights, {name: array.shape for name, array in expected.items()}, "MM-DiT")
    if np.abs(np.asarray(weights[_TABLE], np.float32) - expected[_TABLE]).max() > _TABLE_TOLERANCE:
        raise ValueError(
            f"{_TABLE} is not the sin-cos table of base_size={network.base_size}: set that of the weights' config, "
            "sample_size / patch_size"
        )

    def take(path: Any, leaf: Any) -> Any:
        parts = [_from_torch(path, np.asarray(weights[name])) for name in _names(path)]
        array = (parts[0] if len(parts) == 1 else np.stack(parts, axis=-2)).reshape(leaf.shape)
        return array if put is None else put(path, array)

    return jax.tree_util.tree_map_with_path(take, like)


def load_mmdit(
    folder: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    weights_dtype: Any = np.float32,
    variant: str | None = None,
    put: Callable[[Any, np.ndarray], Any] | None = None,
    read: bool = True,
) -> tuple[MMDiT, dict[str, Any]]:
    """Returns the network of a published `SD3Transformer2DModel` and its parameters.

    Args:
      folder: of it.
      dtype: what the network computes in.
      weights_dtype: what weights are converted to; None: as they are stored.
      variant: see `folder.read_weights`.
      put: see `from_diffusers`.
      read: whether arrays are read; else names and shapes in the files are checked, and parameters are zeros that take
        no memory.

    Raises:
      ValueError: a file is missing, it is another kind of model (which is named), or weights do not fit the config.
    """
    network = read_network(folder, dtype)
    stored = read_weights(folder, variant=variant, dtype=weights_dtype)
    weights = stored if read else {**without_memory(stored), _TABLE: stored.get(_TABLE)}
    return network, {"params": from_diffusers(network, weights, put)}


def read_network(folder: str | os.PathLike, dtype: Any = jnp.float32) -> MMDiT:
    """Returns the network that a folder's config.json describes; raises ValueError as `load_mmdit`."""
    folder = resolve(folder)
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"cannot read {path}: {folder} is {identify(folder)}; needed is that of a {_CLASS}")
    try:
        fields = read_fields(read_json(path), _CLASS, _FIELDS, {"qk_norm": (None, "rms_norm")})
        names = [name for name in _FIELDS if name not in ("dual_attention_layers", "qk_norm", "out_channels")]
        check_counts({name: fields[name] for name in names})
        width = fields["num_attention_heads"] * fields["attention_head_dim"]
        dual = list(fields["dual_attention_layers"])
        if dual != list(range(len(dual))) or len(dual) > fields["num_layers"]:
            raise ValueError(f"dual_attention_layers={dual}: ours are the first blocks, 0, 1, ...")
        if fields["sample_size"] % fields["patch_size"]:
            raise ValueError("patch_size does not divide sample_size")
        for name, needed in (("caption_projection_dim", width), ("out_channels", fields["in_channels"])):
            if (fields[name] or needed) != needed:
                raise ValueError(f"{name} is {fields[name]}: ours is {needed} in such a network")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return MMDiT(
        width=width,
        depth=fields["num_layers"],
        num_heads=fields["num_attention_heads"],
        patch=fields["patch_size"],
        out_channels=fields["in_channels"],
        context_width=fields["joint_attention_dim"],
        pooled_width=fields["pooled_projection_dim"],
        table_size=fields["pos_embed_max_size"],
        base_size=fields["sample_size"] // fields["patch_size"],
        qk_norm=fields["qk_norm"] is not None,
        dual_attention=len(dual),
        dtype=dtype,
    )


def write_mmdit(folder: Path, network: MMDiT, params: Mapping[str, Any]) -> None:
    """Writes config.json and the weights, in the dtypes of `params`, into a folder that is there."""
    config = dict(
        _class_name=_CLASS,
        sample_size=network.base_size * network.patch,
        patch_size=network.patch,
        in_channels=network.out_channels,
        out_channels=network.out_channels,
        num_layers=network.depth,
        attention_head_dim=network.width // network.num_heads,
        num_attention_heads=network.num_heads,
        joint_attention_dim=network.context_width,
        caption_projection_dim=network.width,
        pooled_projection_dim=network.pooled_width,
        pos_embed_max_size=network.table_size,
        dual_attention_layers=list(range(network.dual_attention)),
        qk_norm="rms_norm" if network.qk_norm else None,
    )
    write_json(folder / "config.json", config)
    weights = to_diffusers(network, params["params"])
    weights[_TABLE] = weights[_TABLE].astype(weights["pos_embed.proj.weight"].dtype)
    write_weights(folder / "diffusion_pytorch_model.safetensors", weights)


def _names(path: Any) -> list[str]:
    """Returns diffusers' names of the parameter at `path`: three for a fused q, k, v."""
    *block, module, leaf = (key.key for key in path)
    suffix = "bias" if leaf == "bias" else "weight"
    return [f"{name}.{suffix}" for name in module_names(block[0] if block else "", module)]


def module_names(block: str, module: str) -> list[str]:
    """Returns diffusers' names of one of our modules: three for a fused q, k, v. `block` is "" outside of blocks."""
    prefix = re.sub(r"block_(\d+)", r"transformer_blocks.\1.", block)
    names = _MODULES[module]
    return [f"{prefix}{name}" for name in ((names,) if isinstance(names, str) else names)]


def _to_torch(network: MMDiT, path: Any, weight: np.ndarray) -> np.ndarray:
    """Returns our kernel [in..., out...] as PyTorch's [out, in], or [out, in, height, width] for the patches."""
    if path[-1].key != "kernel":
        return weight.reshape(-1)
    if path[-2].key == "patch_in":
        return weight.reshape(network.patch, network.patch, network.out_channels, -1).transpose(3, 2, 0, 1)
    out = weight.shape[-1] if path[-2].key.endswith("_out") else np.prod(weight.shape[1:])
    return weight.reshape(-1, out).T


def _from_torch(path: Any, weight: np.ndarray) -> np.ndarray:
    """Returns PyTorch's kernel as [in, out], the patches' pixels and channels in one axis."""
    if path[-1].key != "kernel":
        return weight
    if weight.ndim == 4:
        return weight.transpose(2, 3, 1, 0).reshape(-1, weight.shape[0])
    return weight.T


def _table(network: MMDiT) -> np.ndarray:
    size = network.table_size
    return position_table(size, size, network.width, size, network.base_size)[None]
