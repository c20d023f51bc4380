"""MM-DiT weights <-> diffusers' `SD3Transformer2DModel` (Stable Diffusion 3 and 3.5), arrays by name."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.networks.mmdit import MMDiT, position_table
from diffusion.pretrained.strict import check_keys, without_memory

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


def shapes(network: MMDiT) -> dict[str, Any]:
    """Returns the network's tree of parameters as shapes (the one under "params"), nothing allocated."""
    size = network.patch
    inputs = (
        jax.ShapeDtypeStruct((1, size, size, network.out_channels), jnp.float32),
        jax.ShapeDtypeStruct((1,), jnp.float32),
        jax.ShapeDtypeStruct((1, 1, network.context_width), jnp.float32),
        jax.ShapeDtypeStruct((1, network.pooled_width), jnp.float32),
    )
    return jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]


def to_diffusers(network: MMDiT, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `network` (the tree under "params") under diffusers' names and in its layouts."""
    weights = {_TABLE: _table(network)}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names, leaf = _names(path), np.asarray(leaf)
        parts = np.moveaxis(leaf, -3, 0) if len(names) == 3 else [leaf]
        for name, part in zip(names, parts, strict=True):
            weights[name] = _to_torch(network, path, part)
    return weights


def from_diffusers(network: MMDiT, weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns diffusers' weights as parameters of `network`, in the dtypes they are read in.

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

    def take(path: Any, leaf: Any) -> np.ndarray:
        parts = [_from_torch(path, np.asarray(weights[name])) for name in _names(path)]
        return (parts[0] if len(parts) == 1 else np.stack(parts, axis=-2)).reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(take, like)


def _names(path: Any) -> list[str]:
    """Returns diffusers' names of the parameter at `path`: three for a fused q, k, v."""
    *block, module, leaf = (key.key for key in path)
    prefix = re.sub(r"block_(\d+)", r"transformer_blocks.\1.", block[0]) if block else ""
    names = _MODULES[module]
    suffix = "bias" if leaf == "bias" else "weight"
    return [f"{prefix}{name}.{suffix}" for name in ((names,) if isinstance(names, str) else names)]


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
