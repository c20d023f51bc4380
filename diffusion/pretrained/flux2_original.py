"""FLUX.2's transformer in the file of its authors, flux-2-klein-4b.safetensors say.

It holds what diffusers' folder holds under other names, with q, k and v as one array and the last shift before the last
scale. There are no settings: the architecture follows from shapes.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion.networks.flux2 import Flux2
from diffusion.pretrained.flux2 import Names, Put, renamed, shapes, taken
from diffusion.pretrained.folder import read_file
from diffusion.pretrained.identify import identify

# Our modules -> the authors'.
_NAMES: Names = {
    "double": "double_blocks",
    "single": "single_blocks",
    "image_in": "img_in.weight",
    "context_in": "txt_in.weight",
    "time_1": "time_in.in_layer.weight",
    "time_2": "time_in.out_layer.weight",
    "guidance_1": "guidance_in.in_layer.weight",
    "guidance_2": "guidance_in.out_layer.weight",
    "image_modulation": "double_stream_modulation_img.lin.weight",
    "text_modulation": "double_stream_modulation_txt.lin.weight",
    "single_modulation": "single_stream_modulation.lin.weight",
    "out_modulation": "final_layer.adaLN_modulation.1.weight",
    "image_out": "final_layer.linear.weight",
    "double/image_qkv": "img_attn.qkv.weight",
    "double/image_norm_query": "img_attn.norm.query_norm.scale",
    "double/image_norm_key": "img_attn.norm.key_norm.scale",
    "double/image_out": "img_attn.proj.weight",
    "double/image_mlp_1": "img_mlp.0.weight",
    "double/image_mlp_2": "img_mlp.2.weight",
    "double/text_qkv": "txt_attn.qkv.weight",
    "double/text_norm_query": "txt_attn.norm.query_norm.scale",
    "double/text_norm_key": "txt_attn.norm.key_norm.scale",
    "double/text_out": "txt_attn.proj.weight",
    "double/text_mlp_1": "txt_mlp.0.weight",
    "double/text_mlp_2": "txt_mlp.2.weight",
    "single/parallel_in": "linear1.weight",
    "single/norm_query": "norm.query_norm.scale",
    "single/norm_key": "norm.key_norm.scale",
    "single/parallel_out": "linear2.weight",
}
_LAST = "final_layer.adaLN_modulation.1.weight"  # shift, then scale: ours is scale, then shift


def load_original(
    path: str | os.PathLike,
    dtype: Any = jnp.float32,
    *,
    weights_dtype: Any = np.float32,
    prefix: str = "",
    put: Put | None = None,
) -> tuple[Flux2, dict[str, Any]]:
    """Returns the network in a file of its authors, flux-2-klein-4b.safetensors say, and its parameters.

    Args:
      path: of the file.
      dtype: what the network computes in.
      weights_dtype: what weights are converted to; None: as they are stored.
      prefix: of the transformer's names in the file, as "model.diffusion_model."; all others are left out.
      put: see `flux2.from_diffusers`.

    Raises:
      ValueError: the file is missing or damaged, or holds something else (which is named).
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"cannot read {path}: there is no such file")
    named = {name: weight for name, weight in read_file(path, weights_dtype).items() if name.startswith(prefix)}
    weights = {name.removeprefix(prefix): weight for name, weight in named.items()}
    try:
        found = network_of_original(weights, dtype)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is {identify(path)}: with prefix={prefix!r} it holds no FLUX.2") from error
    return found, {"params": from_original(weights, shapes(found), put)}


def network_of_original(weights: Mapping[str, Any], dtype: Any = jnp.float32) -> Flux2:
    """Returns the network that weights in the authors' names are for: the four axes are equal there.

    Raises:
      KeyError, ValueError: they are not those of FLUX.2.
    """

    def count(blocks: str) -> int:
        return len({match[1] for name in weights if (match := re.match(rf"{blocks}\.(\d+)\.", name))})

    width, channels = weights["img_in.weight"].shape
    _, hidden = weights["double_blocks.0.img_mlp.2.weight"].shape
    (head_width,) = weights["double_blocks.0.img_attn.norm.query_norm.scale"].shape
    return Flux2(
        num_double=count("double_blocks"),
        num_single=count("single_blocks"),
        num_heads=width // head_width,
        head_width=head_width,
        mlp_ratio=hidden // width,
        out_channels=channels,
        context_width=weights["txt_in.weight"].shape[1],
        axes=(head_width // 4,) * 4,
        time_channels=weights["time_in.in_layer.weight"].shape[1],
        guidance_embedding="guidance_in.in_layer.weight" in weights,
        dtype=dtype,
    )


def to_original(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `Flux2` (the tree under "params") under the authors' names and in their layouts."""
    weights = renamed(params, _NAMES)
    return weights | {_LAST: _swapped(weights[_LAST])}


def from_original(weights: Mapping[str, Any], like: Mapping[str, Any], put: Put | None = None) -> dict[str, Any]:
    """Returns weights in the authors' names as the tree that `to_original` takes; see `flux2.from_diffusers`."""
    turned = {_LAST: _swapped(np.asarray(weights[_LAST]))} if _LAST in weights else {}
    return taken({**weights, **turned}, like, _NAMES, put)


def _swapped(weight: np.ndarray) -> np.ndarray:
    """Returns the rows with the second half first."""
    return np.roll(weight, weight.size // 2)
