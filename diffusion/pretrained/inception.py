"""The public weights of FID's Inception-v3, as pytorch-fid and torch-fidelity publish them (the same file)."""

import functools
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.networks.inception import Inception
from diffusion.pretrained.public import PublicFile, obtain
from diffusion.pretrained.strict import check_keys, shapes_of
from diffusion.pretrained.torch_files import read_torch_file

FILE = "pt_inception-2015-12-05-6726825d.pth"
ADDRESS = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{FILE}"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_NORM = ("weight", "bias", "running_mean", "running_var")
_EPS = 1e-3  # of this graph's batch normalisation


def load_inception(path: str | os.PathLike | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Returns the parameters of `Inception` of the public file (96 MB): at `path`, or fetched once into the cache.

    Raises:
      ValueError: there is no such file, it cannot be fetched, or it is not the public one to the last bit.
    """
    return from_torch(read_torch_file(obtain(PublicFile(FILE, ADDRESS, SHA256), path)))


def from_torch(weights: Mapping[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Returns a state dict of pytorch-fid's module as parameters of `Inception`.

    Batch normalisation is folded in, in float64. `num_batches_tracked`, which inference does not read and older files
    lack, may be there or not.

    Raises:
      ValueError: a key is missing or left over, or a shape differs.
    """
    kernels = _kernels()
    expected = {key: shape for name, kernel in kernels.items() for key, shape in _shapes(name, kernel)}
    counters = {f"{name}.bn.num_batches_tracked": () for name in kernels if f"{name}.bn.weight" in expected}
    check_keys(weights, expected, "Inception", optional=counters)
    return {name: _layer(weights, name) for name in kernels}


@functools.cache
def _kernels() -> dict[str, tuple[int, ...]]:
    """Returns the shape of every layer's kernel."""
    image = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    return {name: layer["kernel"].shape for name, layer in shapes_of(Inception(), image).items()}


def _shapes(name: str, kernel: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the keys of one layer of the file and their shapes, given our kernel's shape: HWIO (dense: IO)."""
    *size, channels_in, channels = kernel
    if not size:
        return [(f"{name}.weight", (channels, channels_in)), (f"{name}.bias", (channels,))]
    norm = [(f"{name}.bn.{part}", (channels,)) for part in _NORM]
    return [(f"{name}.conv.weight", (channels, channels_in, *size)), *norm]


def _layer(weights: Mapping[str, np.ndarray], name: str) -> dict[str, np.ndarray]:
    """Returns kernel and bias of one layer: gain (conv(x) - mean) / sqrt(variance + eps) + shift as one convolution."""
    if f"{name}.weight" in weights:
        kernel, bias = weights[f"{name}.weight"].T, weights[f"{name}.bias"]
    else:
        gain, shift, mean, variance = (
            weights[f"{name}.bn.{part}"].astype(np.float64)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        scale = gain / np.sqrt(variance + _EPS)
        kernel, bias = weights[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * scale, shift - mean * scale
    return {"kernel": kernel.astype(np.float32), "bias": bias.astype(np.float32)}
