"""Rectified flow: the straight path from image to noise, its velocity, and times on it (Esser et al. 2024).

Time is float, 0 for the clean image and 1 for noise. The distributions over times are in `weightings`.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key, UInt32

from diffusion.predictions import per_example

Images = Float[Array | np.ndarray, "B *shape"]
Times = float | int | np.floating | Float[Array | np.ndarray, "..."]
Keys = Key[Array, ""] | UInt32[Array, "2"]


def interpolate(x_0: Images, eps: Images, t: Times) -> Float[Array, "B *shape"]:
    """Returns x_t = (1 - t) x_0 + t eps, for t a scalar or float[B] (eq. 13)."""
    chex.assert_equal_shape([x_0, eps])
    t = per_example(t, x_0)
    return (1 - t) * x_0 + t * eps


def velocity(x_0: Images, eps: Images) -> Float[Array, "B *shape"]:
    """Returns dx_t / dt = eps - x_0, the same all along the path (eq. 13)."""
    chex.assert_equal_shape([x_0, eps])
    return jnp.asarray(eps) - x_0


def logit_normal_time(key: Keys, batch_size: int, mean: float = 0.0, std: float = 1.0) -> Float[Array, " B"]:
    """Draws times whose logit is N(mean, std^2) (section 3.1)."""
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, (batch_size,)))


def shift_time(t: Times, shift: Times) -> Float[Array, "..."]:
    """Moves times towards noise by shift > 1: shift t / (1 + (shift - 1) t), which keeps 0 and 1 (eq. 23).

    It multiplies noise / signal by `shift`; its inverse is the shift by 1 / shift. Raises ValueError if shift <= 0.
    """
    if isinstance(shift, int | float) and shift <= 0:
        raise ValueError(f"shift is {shift}: give a number above 0 (1 leaves the times as they are)")
    t, shift = jnp.asarray(t), jnp.asarray(shift)
    return shift * t / (shift * t + (1 - t))  # which is 1 + (shift - 1) t, but keeps t = 1 to the bit
