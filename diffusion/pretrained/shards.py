"""Weights written in several files, as hubs keep large models; `folder.read_weights` reads them."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from diffusion.pretrained.folder import write_json, write_weights

LARGEST = 2 * 10**9  # bytes of a file: about twice that is needed beside the weights while it is written


def write_sharded(folder: Path, stem: str, weights: Mapping[str, np.ndarray], largest: int = LARGEST) -> None:
    """Writes STEM.safetensors, or where that were larger than `largest` bytes, shards and their index.

    Args:
      folder: that is there.
      stem: of the files' names.
      weights: arrays by name, in the order in which they are shared out. Only a shard's are copied at a time.
      largest: bytes of arrays in a file, unless a single array has more.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name, weight in weights.items():
        if shards[-1] and size + weight.nbytes > largest:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += weight.nbytes
    if len(shards) == 1:
        return write_weights(folder / f"{stem}.safetensors", weights)
    places = {}
    for i, names in enumerate(shards, 1):
        file = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        write_weights(folder / file, {name: weights[name] for name in names})
        places |= dict.fromkeys(names, file)
    total = sum(weight.nbytes for weight in weights.values())
    write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
