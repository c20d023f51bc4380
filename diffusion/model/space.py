"""Where a process runs: between images as people see them and the x_0 of the papers."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from diffusion.data.images import to_float, to_uint8


class Space(NamedTuple):
    """The space of x_0.

    Attributes:
      image_shape: (height, width, channels) of images.
      shape: of one x_0.
      encode: uint8 images [B, *image_shape] -> x_0 [B, *shape].
      decode: x_0 [..., *shape] -> uint8 images.
    """

    image_shape: tuple[int, int, int]
    shape: tuple[int, ...]
    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


def pixels(image_shape: tuple[int, int, int]) -> Space:
    """Returns the space of images scaled to [-1, 1], as in DDPM, section 3.3."""
    return Space(image_shape, image_shape, to_float, to_uint8)
