"""U-Net weights <-> diffusers' `UNet2DModel` (arrays by name; the matching of `google/ddpm-cifar10-32`)."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

# Our module names -> diffusers'. It counts the levels on the way up from the smallest image; `_name` turns them round.
_MODULES = [
    (r"time_(\d)", r"time_embedding.linear_\1"),
    (r"norm_out", r"conv_norm_out"),
    (r"(down|up)_(\d+)_block_(\d+)", r"\1_blocks.\2.resnets.\3"),
    (r"(down|up)_(\d+)_attention_(\d+)", r"\1_blocks.\2.attentions.\3"),
    (r"(down|up)_(\d+)_(down|up)sample", r"\1_blocks.\2.\3samplers.0.conv"),
    (r"middle_block_(\d)", r"mid_block.resnets.\1"),
    (r"middle_attention", r"mid_block.attentions.0"),
    (r"(conv_in|conv_out|class_embedding)", r"\1"),
]
_PARTS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "embedding": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
# The names of attention layers in files written before diffusers 0.15, google/ddpm-cifar10-32 among them.
_OLD_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of `UNet` (the tree under "params") under diffusers' names and in its layouts."""
    num_levels = _num_levels(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_name(path, num_levels): _transpose(path, np.asarray(leaf), "OIHW") for path, leaf in leaves}


def from_diffusers(weights: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' weights as parameters of `UNet`; `like` is its tree of parameters, or of their shapes.

    Raises ValueError when a key is missing, left over or given under its old name too, or when a shape differs.
    """
    modern = {_modern(name): weight for name, weight in weights.items()}
    if len(modern) < len(weights):
        raise ValueError("weights name the same attention layer twice, in the old way (query) and the new (to_q)")
    num_levels = _num_levels(like)
    names = {_name(path, num_levels) for path, _ in jax.tree_util.tree_leaves_with_path(like)}
    missing, left_over = sorted(names - set(modern)), sorted(set(modern) - names)
    if missing or left_over:
        raise ValueError(f"weights do not fit this U-Net: missing {missing or 'none'}, left over {left_over or 'none'}")

    def take(path, leaf):
        name = _name(path, num_levels)
        weight = _transpose(path, np.asarray(modern[name]), "HWIO")
        if weight.shape != leaf.shape:
            raise ValueError(f"{name} becomes {weight.shape} in our layout, but this U-Net needs {leaf.shape}")
        return weight

    return jax.tree_util.tree_map_with_path(take, like)


def _modern(name: str) -> str:
    """The name that diffusers gives now to an attention layer of an old file."""
    return re.sub(r"(attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_PARTS[m[2]]}.", name)


def _num_levels(params: Mapping[str, Any]) -> int:
    return sum(re.fullmatch(r"down_\d+_block_0", name) is not None for name in params)


def _name(path, num_levels: int) -> str:
    """Diffusers' name of the parameter at `path`."""
    module, *parts, leaf = (key.key for key in path)
    pattern, replacement = next(rule for rule in _MODULES if re.fullmatch(rule[0], module))
    name = re.sub(pattern, replacement, module)
    name = re.sub(r"(?<=^up_blocks\.)\d+", lambda level: str(num_levels - 1 - int(level[0])), name)
    return ".".join([name, *(_PARTS[part] for part in parts), "bias" if leaf == "bias" else "weight"])


def _transpose(path, weight: np.ndarray, layout: str) -> np.ndarray:
    """Kernels between HWIO (dense: IO) and OIHW (dense: OI); everything else as it is."""
    if path[-1].key != "kernel":
        return weight
    if weight.ndim == 2:
        return weight.T
    return weight.transpose((3, 2, 0, 1) if layout == "OIHW" else (2, 3, 1, 0))
