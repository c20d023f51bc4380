"""Configs as data: plain JSON, copies, what of them the trainer reads, and the forms that older runs have stored."""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from diffusion.training import Settings, fully_sharded, replicated

Config = Any  # an ml_collections.ConfigDict, whose fields type checkers cannot know

SHARDINGS = {"replicated": replicated, "full": fully_sharded}


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
    rule = SHARDINGS[sharding]
    return Settings(seed=config.seed, rule=rule, **settings)


def round_up(count: int, multiple: int) -> int:
    """Returns the least multiple of `multiple` that is at least `count`."""
    return -(-count // multiple) * multiple
