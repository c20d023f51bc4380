"""The settings of FLUX.2's transformer <-> the config.json of diffusers' `Flux2Transformer2DModel`."""

import math
import reprlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from diffusion.networks.flux2 import Flux2
from diffusion.pretrained.config_fields import check_counts, read_fields

CLASS = "Flux2Transformer2DModel"
# The fields of config.json: the arguments of diffusers' class and their defaults.
_FIELDS: dict[str, Any] = dict(
    patch_size=1,
    in_channels=128,
    out_channels=None,
    num_layers=8,
    num_single_layers=48,
    attention_head_dim=128,
    num_attention_heads=48,
    joint_attention_dim=15360,
    timestep_guidance_channels=256,
    mlp_ratio=3.0,
    axes_dims_rope=[32, 32, 32, 32],
    rope_theta=2000,
    eps=1e-6,
    guidance_embeds=True,
)
_COUNTS = {
    "in_channels": "out_channels",
    "num_layers": "num_double",
    "num_single_layers": "num_single",
    "attention_head_dim": "head_width",
    "num_attention_heads": "num_heads",
    "joint_attention_dim": "context_width",
    "timestep_guidance_channels": "time_channels",
}


def network_of_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> Flux2:
    """Returns the network of the content of a config.json; raises ValueError for what ours cannot be."""
    fields = read_fields(config, CLASS, _FIELDS, {"patch_size": (1,), "eps": (1e-6,), "guidance_embeds": (False, True)})
    check_counts({field: fields[field] for field in _COUNTS})
    if fields["out_channels"] not in (None, fields["in_channels"]):
        raise ValueError(f"out_channels is {reprlib.repr(fields['out_channels'])}: ours has those of in_channels")
    ratio, theta, axes = fields["mlp_ratio"], fields["rope_theta"], fields["axes_dims_rope"]
    for name, number in (("mlp_ratio", ratio), ("rope_theta", theta)):
        if type(number) not in (int, float) or not math.isfinite(number) or number < 1:
            raise ValueError(f"{name} is {reprlib.repr(number)}, not a number of at least 1")
    if ratio != int(ratio):
        raise ValueError(f"mlp_ratio is {ratio}: ours is a whole number")
    if not isinstance(axes, list | tuple) or len(axes) != 4 or sum(map(_even, axes)) != fields["attention_head_dim"]:
        raise ValueError(
            f"axes_dims_rope is {reprlib.repr(axes)}, not four even numbers whose sum is attention_head_dim="
            f"{fields['attention_head_dim']}"
        )
    return Flux2(
        **{ours: fields[theirs] for theirs, ours in _COUNTS.items()},
        mlp_ratio=int(ratio),
        axes=tuple(axes),
        theta=float(theta),
        guidance_embedding=fields["guidance_embeds"],
        dtype=dtype,
    )


def config_of(network: Flux2) -> dict[str, Any]:
    """Returns the config.json of a network; raises ValueError where diffusers has none."""
    if network.time_scale != 1000:
        raise ValueError(f"diffusers' {CLASS} multiplies time by 1000, and this network by {network.time_scale:g}")
    return {
        **_FIELDS,
        "_class_name": CLASS,
        **{theirs: getattr(network, ours) for theirs, ours in _COUNTS.items()},
        "mlp_ratio": float(network.mlp_ratio),
        "axes_dims_rope": list(network.axes),
        "rope_theta": int(network.theta) if network.theta == int(network.theta) else network.theta,
        "guidance_embeds": network.guidance_embedding,
    }


def _even(number: Any) -> int:
    if type(number) is not int or number < 2 or number % 2:
        raise ValueError(f"axes_dims_rope has {reprlib.repr(number)}, not an even number of at least 2")
    return number
