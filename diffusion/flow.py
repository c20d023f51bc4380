"""Rectified flow: the straight path from image to noise, its velocity, and times on it.

Time is float, 0 for the clean image and 1 for noise. The distributions over times are in `weightings`.
"""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.predictions import diffuse
from diffusion.schedules import shift_time as shift_time  # defined beside `flow_grid`, which uses it
from diffusion.types import Images, Keys, Scalars
from diffusion.weightings import logit_normal_quantile, uniform


def interpolate(x_0: Images, eps: Images, t: Scalars) -> Float[Array, "B *shape"]:
    """Returns x_t = (1 - t) x_0 + t eps, for t a scalar or float[B].

    Source: Esser et al. 2024, eq. 13.

    Example:
      >>> print(interpolate(jnp.ones((1, 2)), -jnp.ones((1, 2)), 0.25))
      [[0.5 0.5]]
    """
    t = jnp.asarray(t)
    return diffuse(x_0, eps, 1 - t, t)


def velocity(x_0: Images, eps: Images) -> Float[Array, "B *shape"]:
    """Returns dx_t / dt = eps - x_0, the same all along the path.

    Source: Esser et al. 2024, eq. 13.

    Example:
      >>> print(velocity(jnp.ones((1, 2)), -jnp.ones((1, 2))))
      [[-2. -2.]]
    """
    chex.assert_equal_shape([x_0, eps])
    return jnp.asarray(eps) - x_0


def logit_normal_time(key: Keys, batch_size: int, mean: float = 0.0, std: float = 1.0) -> Float[Array, " B"]:
    """Draws times whose logit is N(mean, std^2).

    Source: Esser et al. 2024, section 3.1.

    Example:
      >>> logit_normal_time(jax.random.key(0), 4).shape
      (4,)
    """
    return logit_normal_quantile(uniform(key, batch_size), mean, std)
