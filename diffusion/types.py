"""The types that the papers' modules share, each defined once, and how numbers per image meet images.

Images are float[B, ...]. Numbers (a signal, a time, a step) are scalars, or [B] with one number per image.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key, UInt32

Images = Float[Array | np.ndarray, "B *shape"]
Scalars = float | int | np.floating | Float[Array | np.ndarray, "..."]
Steps = int | np.integer | Int[Array | np.ndarray, ""] | Int[Array | np.ndarray, " B"]
Keys = Key[Array, "..."] | UInt32[Array, "..."]  # one key, or one key per image

Process = Callable[[Array], tuple[Array, Array]]  # time -> (signal, noise)
Network = Callable[[Array, Array], Any]  # (x_t, time) -> output, or (output, v) with a learned variance
Denoise = Callable[[Array, Any], Any]  # (x_t, time) -> x_0_hat, or a Denoised


class Denoised(NamedTuple):
    """What a `Denoise` may return. Read the fields by name.

    Attributes:
      x_0_hat: the clean images.
      v: the learned variance (`gaussian.learned_variance`), or None.
      unclipped: x_0_hat before it was clipped, for samplers to take eps_hat from, or None if they take it from x_0_hat.
    """

    x_0_hat: Array
    v: Array | None = None
    unclipped: Array | None = None

    def plain(self) -> "Array | Denoised":
        """Returns x_0_hat itself if the other fields are None."""
        return self if any(field is not None for field in self[1:]) else self.x_0_hat


def denoised(output: Any) -> Denoised:
    """Returns the output of a `Denoise`, which is x_0_hat, (x_0_hat, v) or a Denoised, as a Denoised.

    Example:
      >>> denoised((0.5, 0.1)).v, denoised(0.5).v
      (0.1, None)
    """
    return Denoised(*output) if isinstance(output, tuple) else Denoised(output)


def per_example(numbers: ArrayLike, images: Array | np.ndarray) -> Array:
    """Returns [B] numbers with the axes of `images`, so that the two multiply per image; other shapes unchanged.

    Example:
      >>> per_example(jnp.ones(2), jnp.ones((2, 4, 4, 3))).shape
      (2, 1, 1, 1)
    """
    numbers = jnp.asarray(numbers)
    return numbers.reshape(numbers.shape + (1,) * (images.ndim - numbers.ndim)) if numbers.ndim == 1 else numbers
