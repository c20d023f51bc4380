"""Configs as data: plain JSON, copies, what of them the trainer reads, and the forms that older runs have stored."""

import json
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion.training import Settings

Config = Any  # an ml_collections.ConfigDict, whose fields type checkers cannot know

SHARDINGS = {"replicated": ("fsdp",), "full": ("data", "fsdp")}  # mesh axes over which parameters are cut


# Of each number: the smallest value and, where there is one, the value that it must remain below.
RANGES = {
    "network.channels": (1, None),
    "network.multipliers": (1, None),
    "network.attention_resolutions": (1, None),
    "network.num_blocks": (1, None),
    "network.num_groups": (1, None),
    "network.num_heads": (1, None),
    "network.head_channels": (0, None),
    "network.dropout": (0, 1),
    "network.width": (1, None),
    "network.depth": (1, None),
    "network.patch": (1, None),
    "condition.width": (1, None),
    "condition.length": (1, None),
    "condition.size": (0, None),
    "condition.phrases": (0, None),
    "network.latent_channels": (1, None),
    "network.blocks_per_level": (1, None),
    "network.groups": (1, None),
    "discriminator.width": (1, None),
    "discriminator.layers": (1, None),
    "discriminator.groups": (1, None),
    "loss.vlb_weight": (0, math.inf),
    "loss.kl_weight": (0, math.inf),
    "loss.adversarial": (0, math.inf),
    "loss.adversarial_start": (0, None),
    "optimizer.learning_rate": (1e-300, math.inf),
    "optimizer.warmup_steps": (0, None),
    "optimizer.cooldown_steps": (0, None),
    "optimizer.clip_norm": (1e-300, None),
    "optimizer.b1": (0, 1),
    "optimizer.b2": (0, 1),
    "optimizer.eps": (1e-300, math.inf),
    "optimizer.muon_rate": (0, math.inf),
    "optimizer.weight_decay": (0, math.inf),
    "optimizer.momentum": (0, 1),
    "network.projection": (1, None),
    "network.dual_attention": (0, None),
    "loss.rows": (0, None),
    "optimizer.decay_steps": (1, None),
    "evaluation.num_sets": (1, None),
    "evaluation.num_candidates": (1, None),
    "evaluation.num_single": (1, None),
    "evaluation.num_samples": (1, None),
    "evaluation.num_images": (1, None),
    "evaluation.num_latents": (1, None),
    "evaluation.batch_size": (1, None),
    "evaluation.num_swept": (1, None),
    "evaluation.likelihood_images": (1, None),
    "evaluation.bound_terms": (0, None),
    "evaluation.ode_steps": (1, None),
    "data.num_examples": (1, None),
    "data.batch_size": (1, None),
    "data.buckets": (0, None),
    "data.references": (0, None),
    "data.image_size": (0, None),
    "data.std": (1e-300, math.inf),
    "training.num_previews": (0, None),
    "sampling.num_steps": (1, None),
    "sampling.batch_size": (1, None),
    "text.size": (258, 10_000_000),  # of a vocabulary of tokens, 256 bytes and two ends among them
}
WHOLE = (
    "network.channels",
    "network.multipliers",
    "network.attention_resolutions",
)  # a field of one number has a type that is kept


def check_ranges(config: Config) -> None:
    """Raises ValueError, naming the field, where a number is out of its range."""
    for name in ("mean", "std"):
        value = config.get("data", {}).get(name, (0, 0, 0))
        if len(value) != 3 or not all(map(math.isfinite, value)):
            raise ValueError(f"data.{name} is {value}: give 3 finite numbers, for red, green and blue")
    size = config.get("data", {}).get("image_size", 0)
    if isinstance(size, tuple) and (len(size) != 2 or not all(isinstance(side, int) and side > 0 for side in size)):
        raise ValueError(f"data.image_size is {size}: give one side, as 64, or height and width, as (48, 64)")
    for field, (smallest, limit) in RANGES.items():
        block, name = field.split(".")
        value = config.get(block, {}).get(name)
        for number in () if value is None else value if isinstance(value, tuple) else (value,):
            if field in WHOLE and not isinstance(number, int):
                raise ValueError(f"{field} is {value}: whole numbers are needed")
            if not (number >= smallest and (limit is None or number < limit)):  # in this form nan is refused too
                least = f"at least {smallest}" if smallest >= 1 or smallest == 0 else "above 0"
                below = "" if limit is None else " and finite" if limit == math.inf else f" and less than {limit}"
                raise ValueError(f"{field} is {value}: it must be {least}{below}")


DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def dtype_of(config: Config) -> Any:
    """Returns the NumPy dtype that `network.dtype` names. Raises ValueError, naming the choices, for others."""
    name = DTYPES.get(config.network.dtype, config.network.dtype)
    if name not in DTYPES.values():
        raise ValueError(f"network.dtype is {name!r}: choose from {', '.join(DTYPES.values())}")
    return jnp.dtype(name)


def plain(config: Config) -> dict[str, Any]:
    """Returns a config as JSON holds it (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def from_plain(tree: Mapping[str, Any]) -> Config:
    """Returns the config that `plain` was made of: every list was a tuple."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: restore(child) for name, child in value.items()}
        return tuple(restore(child) for child in value) if isinstance(value, list) else value

    return ConfigDict(restore(dict(tree))).lock()


def copy(config: Config, **blocks: Mapping[str, Any]) -> Config:
    """Returns a copy with some fields of its blocks changed: copy(config, sampling={"num_steps": 10})."""
    copied = from_plain(plain(config))
    for block, fields in blocks.items():
        copied[block].update(fields)
    return copied


def make_settings(config: Config) -> Settings:
    """Returns how long, and with which reports, `config.training` trains."""
    settings = dict(config.training)
    settings.pop("num_previews")
    sharding = settings.pop("sharding")
    if sharding not in SHARDINGS:
        raise ValueError(f"training.sharding is {sharding!r}: choose from {', '.join(SHARDINGS)}")
    settings.pop("mesh", None)
    return Settings(seed=config.seed, spread=SHARDINGS[sharding], **settings)


def round_up(count: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
