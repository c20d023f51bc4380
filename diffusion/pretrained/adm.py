"""U-Nets of OpenAI's guided-diffusion (ADM) and improved-diffusion: a state dict in one file -> ours.

The file holds arrays alone. The architecture follows from their names and shapes, but for what leaves no trace in
them: the size of the images, the heads and their order, the dropout and the noise schedule.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion.networks.unet import UNet
from diffusion.pretrained.folder import read_file
from diffusion.pretrained.identify import identify_names
from diffusion.pretrained.pipeline import Published
from diffusion.pretrained.scheduler import Chain
from diffusion.pretrained.strict import check_keys
from diffusion.pretrained.unet import shapes

_LAYERS = {
    "time_1": "time_embed.0",
    "time_2": "time_embed.2",
    "class_embedding": "label_emb",
    "conv_in": "input_blocks.0.0",
    "middle_block_0": "middle_block.0",
    "middle_attention": "middle_block.1",
    "middle_block_1": "middle_block.2",
    "norm_out": "out.0",
    "conv_out": "out.2",
}
_PARTS = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",
    "embedding": "emb_layers.1",
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",
    "shortcut": "skip_connection",
    "norm": "norm",
    "query": "qkv",
    "key": "qkv",
    "value": "qkv",
    "out": "proj_out",
}
_QKV = ("query", "key", "value")


def load_adm(
    path: str | os.PathLike,
    image_size: int,
    *,
    new_attention_order: bool,
    num_heads: int | None = None,
    head_channels: int | None = None,
    null_class: bool = False,
    dropout: float = 0.0,
    noise_schedule: str = "linear",
    num_steps: int = 1000,
) -> Published:
    """Returns the model of a checkpoint; the arguments are the flags that it was trained with.

    Args:
      path: of the state dict (.pt, or .safetensors).
      image_size: --image_size, height and width in pixels.
      new_attention_order: --use_new_attention_order.
      num_heads: --num_heads; either this or `head_channels`.
      head_channels: --num_head_channels.
      null_class: whether the last class means "no class". Not in OpenAI's code.
      dropout: --dropout, for training further.
      noise_schedule: --noise_schedule, "linear" or "cosine".
      num_steps: --diffusion_steps.

    Raises:
      ValueError: another kind of file, which is named; arguments that do not fit; weights that are missing, left over,
        misshapen or not finite.

    Example:
      load_adm("64x64_diffusion.pt", 64, new_attention_order=True, head_channels=64, noise_schedule="cosine")
    """
    if noise_schedule not in ("linear", "cosine"):
        raise ValueError(f"unknown noise_schedule {noise_schedule!r}: choose linear or cosine")
    if [num_heads, head_channels].count(None) != 1 or (num_heads or head_channels or 0) < 1:
        raise ValueError("how many heads the attention has is not in the weights: give num_heads or head_channels")
    weights = read_file(Path(path).expanduser())
    found = {name: weight.shape for name, weight in weights.items()}
    try:
        network, image_shape = _network(found, image_size)
        network = network.clone(dropout=dropout, num_heads=num_heads or 1, head_channels=head_channels)
        if network.num_classes is not None and null_class:
            network = network.clone(num_classes=network.num_classes - 1, null_class=True)
        like = shapes(network, image_shape)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    params = from_adm(weights, network, like, new_attention_order)
    scale = 1000 / num_steps
    chain = Chain(
        num_steps=num_steps,
        beta=noise_schedule,
        first=scale * 1e-4,
        last=scale * 0.02,
        variance="learned" if network.out_channels == 2 * image_shape[-1] else "large",
        spacing="linspace",
    )
    return Published(network, params, image_shape, chain)


def from_adm(
    weights: Mapping[str, Any], network: UNet, like: Mapping[str, Any], new_attention_order: bool
) -> dict[str, Any]:
    """Returns ADM's weights as parameters of `network`; `like` is its tree of parameters, or of their shapes.

    Raises:
      ValueError: a key is missing or left over, or a shape differs.
    """
    layers = _layers(network, like)
    expected: dict[str, tuple[int, ...]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(like):
        name, part, shape = _name(path, layers), path[-2].key, leaf.shape
        if path[-1].key == "kernel":
            shape = shape[::-1] if len(shape) == 2 else (*shape[:1:-1], *shape[:2])
        if part in _QKV:
            shape = (3 * shape[0], *shape[1:])
        if part in (*_QKV, "out") and len(shape) == 2:
            shape = (*shape, 1)  # their attention's products are convolutions of size 1
        expected[name] = shape
    check_keys(weights, expected, "U-Net")

    def take(path: Any, leaf: Any) -> np.ndarray:
        weight, part = np.asarray(weights[_name(path, layers)]), path[-2].key
        if part in _QKV:
            weight = _split(weight, _heads(network, len(weight) // 3), new_attention_order)[_QKV.index(part)]
        if path[-1].key != "kernel":
            return weight
        return weight.reshape(leaf.shape[::-1]).T if len(leaf.shape) == 2 else weight.transpose(2, 3, 1, 0)

    return jax.tree_util.tree_map_with_path(take, like)


def _network(found: Mapping[str, tuple[int, ...]], image_size: int) -> tuple[UNet, tuple[int, int, int]]:
    """Returns the network that has arrays of these shapes, but for its heads, and its images' shape."""
    ends = [name + ".weight" for name in ("time_embed.0", "input_blocks.0.0", "output_blocks.0.0.in_layers.2", "out.2")]
    if any(name not in found for name in ends):
        raise ValueError(f"it is {identify_names(found)}: needed is a U-Net of guided-diffusion or improved-diffusion")
    num_down, num_up = (
        1 + max(int(match[1]) for name in found if (match := re.match(rf"{way}_blocks\.(\d+)\.", name)))
        for way in ("input", "output")
    )
    ups = [re.match(r"output_blocks\.\d+\.[12]\.(conv|in_layers\.2)\.weight", name) for name in found]
    kinds = [match[1] for match in ups if match]
    num_levels = len(kinds) + 1
    num_blocks = num_up // num_levels - 1
    if num_up != num_levels * (num_blocks + 1) or num_down != num_up:
        raise ValueError(f"{num_down} input blocks and {num_up} output blocks are not a U-Net of {num_levels} levels")
    first = [f"input_blocks.{1 + level * (num_blocks + 1)}" for level in range(num_levels)]
    last = [f"output_blocks.{(num_levels - 1 - level) * (num_blocks + 1)}" for level in range(num_levels)]
    if missing := [name for name in first if f"{name}.0.in_layers.2.weight" not in found]:
        raise ValueError(f"{missing[0]} is no residual block: this is no U-Net of {num_blocks} blocks at every level")
    widths = [found[f"{name}.0.in_layers.2.weight"][0] for name in first]
    channels, start = found["time_embed.0.weight"][1], found["input_blocks.0.0.weight"]
    out_channels = found["out.2.weight"][0]
    if out_channels not in (start[1], 2 * start[1]) or start[1] == 6:
        raise ValueError(
            f"it maps {start[1]} channels to {out_channels}: an upsampler, whose input holds the small image too"
        )
    multiples = start[0] == channels and all(width % channels == 0 for width in widths)
    down, up = (
        tuple(image_size // 2**level for level, name in enumerate(names) if f"{name}.1.qkv.weight" in found)
        for names in (first, last)
    )
    if down != up:
        raise ValueError(
            f"there is attention at heights {list(down)} on the way down and {list(up)} up: arrays are missing"
        )
    network = UNet(
        channels=channels,
        multipliers=tuple(width // channels for width in widths) if multiples else (),
        widths=None if multiples else tuple(widths),
        num_blocks=num_blocks,
        attention_resolutions=down,
        num_classes=found["label_emb.weight"][0] if "label_emb.weight" in found else None,
        null_class="label_emb.weight" not in found,
        out_channels=out_channels,
        norm_eps=1e-5,
        freq_shift=0,
        flip_sin_to_cos=True,
        downsample_padding=1,
        scale_shift=found[f"{first[0]}.0.emb_layers.1.weight"][0] == 2 * widths[0],
        resblock_updown="in_layers.2" in kinds,
    )
    return network, (image_size, image_size, start[1])


def _layers(network: UNet, like: Mapping[str, Any]) -> dict[str, str]:
    """Returns their names of our modules: they number blocks from the first to the last, on the way down and up."""
    names, num_levels = dict(_LAYERS), len(network.level_widths())
    number = 1
    for level in range(num_levels):
        for i in range(network.num_blocks):
            names[f"down_{level}_block_{i}"] = f"input_blocks.{number}.0"
            names[f"down_{level}_attention_{i}"] = f"input_blocks.{number}.1"
            number += 1
        names[f"down_{level}_downsample"] = f"input_blocks.{number}.0" + ("" if network.resblock_updown else ".op")
        number += 1
    number = 0
    for level in reversed(range(num_levels)):
        for i in range(network.num_blocks + 1):
            names[f"up_{level}_block_{i}"] = f"output_blocks.{number}.0"
            names[f"up_{level}_attention_{i}"] = f"output_blocks.{number}.1"
            number += 1
        place = 1 + (f"up_{level}_attention_0" in like)
        names[f"up_{level}_upsample"] = f"output_blocks.{number - 1}.{place}" + (
            "" if network.resblock_updown else ".conv"
        )
    return names


def _name(path: Any, layers: Mapping[str, str]) -> str:
    """Returns their name of the parameter at `path`."""
    module, *parts, leaf = (key.key for key in path)
    return ".".join([layers[module], *(_PARTS[part] for part in parts), "bias" if leaf == "bias" else "weight"])


def _heads(network: UNet, channels: int) -> int:
    given = network.head_channels
    return channels // given if given and isinstance(given, int) else network.num_heads


def _split(weight: np.ndarray, num_heads: int, new_attention_order: bool) -> np.ndarray:
    """Returns query, key and value of one layer's rows, [3, channels, ...]: the old order has the heads outermost."""
    channels, rest = len(weight) // 3, weight.shape[1:]
    if channels % num_heads:
        raise ValueError(f"{num_heads} heads do not divide {channels} channels")
    if new_attention_order:
        return weight.reshape(3, channels, *rest)
    split = weight.reshape(num_heads, 3, channels // num_heads, *rest)
    return np.moveaxis(split, 1, 0).reshape(3, channels, *rest)
