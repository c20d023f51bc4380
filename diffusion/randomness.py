"""Random draws whose value for an image does not depend on the batch the image is in.

A `key` is one JAX key for the whole batch, or an array of keys `[B]`, one an image. Legacy uint32 keys do too.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Float, Shaped

from diffusion.types import Images, Keys


def fold_in(key: Keys, data: ArrayLike) -> Array:
    """Derives the key for `data` (a step, a purpose) from `key`, for each image where there is a key an image.

    `data` may be an array [B], one an image: then there are as many keys, and one `key` gives each image its own.
    """
    keys, data = _typed(key), jnp.asarray(data)
    if not keys.ndim and not data.ndim:
        return jax.random.fold_in(keys, data)
    if not keys.ndim:
        keys = jax.vmap(partial(jax.random.fold_in, keys))(jnp.arange(len(data)))
    return jax.vmap(jax.random.fold_in, (0, 0 if data.ndim else None))(keys, data)


def normal_like(key: Keys, x: Images) -> Float[Array, "B *shape"]:
    """Draws standard normal noise of the shape and dtype of `x`."""
    return draw_like(jax.random.normal, key, x)


def draw_like(
    sampler: Callable[..., Array], key: Keys, x: Shaped[Array | np.ndarray, "B *shape"]
) -> Shaped[Array, "B *shape"]:
    """Draws `sampler(key, shape, dtype)` (a function of jax.random) for all of `x`, or image by image with `B` keys.

    Raises ValueError where the number of keys is not the batch size.
    """
    keys = _typed(key)
    if not keys.ndim:
        return sampler(keys, x.shape, x.dtype)
    if keys.shape != x.shape[:1]:
        raise ValueError(f"key has shape {keys.shape}: give one key, or one an image of the batch, {x.shape[:1]}.")
    return jax.vmap(lambda key: sampler(key, x.shape[1:], x.dtype))(keys)


def _typed(key: Keys) -> Array:
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
