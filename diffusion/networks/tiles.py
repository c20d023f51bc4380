"""Decoding in tiles: the memory is that of one tile, whatever the size of the image."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Array, Float


def decode_tiled(
    decode: Callable[[Any], Float[Array | np.ndarray, "B H W C"]],
    z: Float[Array | np.ndarray, "B h w c"],
    tile: int,
    overlap: int,
) -> Float[np.ndarray, "B H W C"]:
    """Returns `decode(z)`, made of tiles whose seams are blended; of latents that fit in one tile, `decode(z)` itself.

    All tiles have one shape, so that a jitted `decode` is compiled once for all sizes of latents. The image is put
    together on the host; not to be called under `jit`.

    A decoder that looks at the whole image (its normalisation, its attention) sees a tile instead, so that tiles differ
    in brightness: the overlap is what this is spread over.

    Args:
      decode: makes images that are a whole number of times as large as their latents.
      z: latents of any size.
      tile: side of a tile, in pixels of latents.
      overlap: of neighbouring tiles at least, in the same pixels; weights rise and fall linearly over it.

    Raises:
      ValueError: the overlap is negative, or more than half a tile.

    Example:
      >>> double = lambda z: np.repeat(np.repeat(z, 2, axis=1), 2, axis=2)
      >>> z = np.arange(48.0).reshape(1, 6, 8, 1)
      >>> print(np.allclose(decode_tiled(double, z, tile=4, overlap=1), double(z)))
      True
    """
    if tile < 1 or not 0 <= overlap <= tile // 2:
        raise ValueError(f"tiles of {tile} cannot overlap by {overlap}: use at least 0, at most half of a tile")
    batch, height, width, _ = z.shape
    if max(height, width) <= tile:
        return np.asarray(decode(z))
    rows, columns = min(tile, height), min(tile, width)
    total, weight = np.zeros(0, np.float32), np.zeros(0, np.float32)
    for top in _starts(height, rows, overlap):
        for left in _starts(width, columns, overlap):
            part = np.asarray(decode(z[:, top : top + rows, left : left + columns]), np.float32)
            factor = part.shape[1] // rows
            if not total.size:
                total = np.zeros((batch, height * factor, width * factor, part.shape[-1]), np.float32)
                weight = np.zeros((height * factor, width * factor, 1), np.float32)
            window = np.outer(
                _window(rows * factor, overlap * factor, top > 0, top + rows < height),
                _window(columns * factor, overlap * factor, left > 0, left + columns < width),
            )[..., None]
            place = np.s_[top * factor : (top + rows) * factor, left * factor : (left + columns) * factor]
            total[:, *place] += window * part
            weight[place] += window
    return total / weight


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    """Returns where tiles start; the last ends at the end, and overlaps more where it must."""
    return [*range(0, length - tile, tile - overlap), length - tile]


def _window(size: int, ramp: int, rises: bool, falls: bool) -> Float[np.ndarray, "size"]:
    """Returns the weights along one axis of a tile: 1, but for `ramp` pixels at an end that is not the image's."""
    up = np.minimum((np.arange(size) + 0.5) / max(ramp, 0.5), 1).astype(np.float32)
    return (up if rises else np.ones_like(up)) * (up[::-1] if falls else np.ones_like(up))
