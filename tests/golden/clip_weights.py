"""Weights that are a function of their name and shape, so that a golden need not hold them."""

import zlib

import numpy as np


def weight_of(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random, of a size that keeps activations near 1: gains about 1, biases small, matrices by their fan-in."""
    random = np.random.RandomState(zlib.crc32(name.encode()))
    if name == "logit_scale":
        return np.array(2.0, np.float32)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 and "embedding" not in name else 4
    gain = "norm" in name and name.endswith("weight")
    return (gain + random.standard_normal(shape) * (0.2 if len(shape) == 1 else fan_in**-0.5)).astype(np.float32)
