"""Names and layouts of what diffusers' U-Nets and autoencoders are made of: levels of residual blocks and attention."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

# Our module names -> diffusers'. It counts the levels on the way up from the smallest image; `block_name` turns them
# round.
_MODULES = [
    (r"time_(\d)", r"time_embedding.linear_\1"),
    (r"norm_out", r"conv_norm_out"),
    (r"(down|up)_(\d+)_block_(\d+)", r"\1_blocks.\2.resnets.\3"),
    (r"(down|up)_(\d+)_attention_(\d+)", r"\1_blocks.\2.attentions.\3"),
    (r"(down|up)_(\d+)_(down|up)sample", r"\1_blocks.\2.\3samplers.0"),
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


def block_name(path: Sequence[str], num_levels: int) -> str | None:
    """Returns diffusers' name of the parameter at `path`, as ("up_0_block_1", "conv_1", "kernel"); None for none."""
    module, *parts, leaf = path
    for pattern, replacement in _MODULES:
        if re.fullmatch(pattern, module):
            name = re.sub(pattern, replacement, module)
            name = re.sub(r"(?<=^up_blocks\.)\d+", lambda level: str(num_levels - 1 - int(level[0])), name)
            # What changes the resolution is a convolution, or a whole residual block.
            parts = [_PARTS[part] for part in parts] or ["conv"] * name.endswith("samplers.0")
            return ".".join([name, *parts, "bias" if leaf == "bias" else "weight"])
    return None


def with_modern_names(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns weights under the names that diffusers gives now to the attention layers of old files.

    Raises:
      ValueError: one is there under both names.
    """

    def modern(name: str) -> str:
        pattern = r"(attentions\.\d+\.)(query|key|value|proj_attn)\."
        return re.sub(pattern, lambda match: f"{match[1]}{_OLD_PARTS[match[2]]}.", name)

    renamed = {modern(name): weight for name, weight in weights.items()}
    if len(renamed) < len(weights):
        raise ValueError("weights name the same attention layer twice, in the old way (query) and the new (to_q)")
    return renamed


def count_levels(params: Mapping[str, Any], way: str = "down") -> int:
    """Returns how many levels a network's parameters have on the way "down", or "up"."""
    return sum(re.fullmatch(rf"{way}_\d+_block_0", name) is not None for name in params)


def to_torch(path: Any, weight: np.ndarray) -> np.ndarray:
    """Returns our kernels in PyTorch's layout, HWIO as OIHW and IO as OI; everything else as it is."""
    return _transpose(path, weight, (3, 2, 0, 1))


def from_torch(path: Any, weight: np.ndarray) -> np.ndarray:
    """Returns what `to_torch` was given."""
    return _transpose(path, weight, (2, 3, 1, 0))


def _transpose(path: Any, weight: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    if path[-1].key != "kernel":
        return weight
    return weight.T if weight.ndim == 2 else weight.transpose(axes)
