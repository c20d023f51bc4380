"""Autoencoders in files of their authors: ae.safetensors of FLUX, single-file Stable Diffusion.

Names are CompVis's; there are no settings, and the architecture follows from names and shapes.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.networks.vae import Autoencoder
from diffusion.pretrained.folder import Stored, read_file
from diffusion.pretrained.identify import identify
from diffusion.pretrained.vae import STATISTICS, PublishedAutoencoder, published_of
from diffusion.pretrained.vae_config import BATCH_NORM_EPS, Settings

# The authors' names -> diffusers', in this order.
_ORIGINAL = [
    (r"^(?:encoder|decoder)\.((?:post_)?quant_conv)\.", r"\1."),
    (r"\.(down|up)\.(\d+)\.block\.(\d+)\.", r".\1_blocks.\2.resnets.\3."),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\.", r".\1_blocks.\2.\3samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
]


def load_original(
    path: str | os.PathLike,
    scaling_factor: float | None = None,
    shift_factor: float = 0.0,
    prefix: str = "",
    groups: int = 32,
    dtype: Any = np.float32,
) -> PublishedAutoencoder:
    """Returns the autoencoder in a file of its authors: ae.safetensors of FLUX, or a single-file Stable Diffusion.

    Args:
      path: safetensors, or a state dict of PyTorch.
      scaling_factor: of latents; None for FLUX.2's, whose file holds the statistics.
      shift_factor: of latents.
      prefix: of the autoencoder's names in the file, as "first_stage_model."; all others are left out.
      groups: of the normalisations, which leave no trace in the file.
      dtype: of the parameters.

    Raises:
      ValueError: the file is missing or damaged or holds no such autoencoder, or the scaling factor is not known.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"cannot read {path}: there is no such file")
    found = {name: weight for name, weight in read_file(path, dtype).items() if name.startswith(prefix)}
    weights = from_original({name.removeprefix(prefix): weight for name, weight in found.items()})
    module = _module_of(weights, groups)
    if module is None:
        raise ValueError(f"{path} is {identify(path)}: with prefix={prefix!r} it holds no autoencoder")
    if STATISTICS["mean"] in weights:
        patch = round((np.prod(weights[STATISTICS["mean"]].shape) / module.latent_channels) ** 0.5)
        return published_of(Settings(module, patch, None, None, BATCH_NORM_EPS), weights)
    if scaling_factor is None:
        raise ValueError(
            f"{path} does not hold the scaling factor of its latents: name it, and the shift factor (Stable Diffusion "
            "1 and 2: 0.18215; XL: 0.13025; 3: 1.5305 and 0.0609; FLUX.1: 0.3611 and 0.1159)"
        )
    shift, scale = (np.full(module.latent_channels, number, np.float32) for number in (shift_factor, scaling_factor))
    return published_of(Settings(module, 1, shift, scale, BATCH_NORM_EPS), weights)


def from_original(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Returns weights in the authors' names and layouts under diffusers': attention is a matrix, levels turn round."""
    renamed = {}
    for name, weight in weights.items():
        for pattern, replacement in _ORIGINAL:
            name = re.sub(pattern, replacement, name)
        attention = re.search(r"\.attentions\.0\.to_.*weight$", name)
        renamed[name] = _matrix(weight) if attention and len(weight.shape) == 4 else weight
    last = max((int(match[1]) for name in renamed if (match := re.search(r"\.up_blocks\.(\d+)\.", name))), default=0)

    def turned(name: str) -> str:
        return re.sub(r"(?<=\.up_blocks\.)\d+", lambda level: str(last - int(level[0])), name)

    return {turned(name): weight for name, weight in renamed.items()}


def _module_of(weights: Mapping[str, Any], groups: int) -> Autoencoder | None:
    """Returns the network that has such weights, in diffusers' names; None where there is none."""
    counts = [0, 0]
    for name in weights:
        if match := re.match(r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\.", name):
            counts = [max(counts[i], int(match[i + 1]) + 1) for i in range(2)]
    levels, blocks = counts
    try:
        channels = [weights[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)]
        decoder = [weights[f"decoder.up_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(levels)][::-1]
        latent, image = weights["decoder.conv_in.weight"].shape[1], weights["encoder.conv_in.weight"].shape[1]
    except KeyError:
        return None
    if not levels:
        return None
    return Autoencoder(
        image_channels=image,
        latent_channels=latent,
        channels=tuple(channels),
        decoder_channels=None if decoder == channels else tuple(decoder),
        blocks_per_level=blocks,
        groups=groups,
        middle_attention=any(name.startswith("encoder.mid_block.attentions.") for name in weights),
        quant_conv="quant_conv.weight" in weights,
        post_quant_conv="post_quant_conv.weight" in weights,
    )


def _matrix(weight: Any) -> Any:
    """Returns the kernel [out, in, 1, 1] of a convolution as [out, in]; one that is in its file stays there."""
    shape = tuple(weight.shape[:2])
    if isinstance(weight, Stored):
        return replace(weight, shape=shape, read=lambda: weight.read().reshape(shape))
    return weight.reshape(shape)
