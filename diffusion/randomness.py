"""Random draws whose value for an image does not depend on the batch the image is in.

A `key` is one JAX key for the whole batch, or an array of keys [B], one per image; legacy uint32 keys are accepted.
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
    """Returns the key for `data` (a step, a purpose), derived from `key`: [B] keys if there is one per image.

    Args:
      key: one key or one per image.
      data: an integer, or [B] with one per image: then [B] keys are returned, and one `key` gives each image its own.

    Example:
      >>> fold_in(jax.random.key(0), jnp.asarray([5, 5])).shape
      (2,)
    """
    keys, data = _typed(key), jnp.asarray(data)
    if not keys.ndim and not data.ndim:
        return jax.random.fold_in(keys, data)
    if not keys.ndim:
        keys = jax.vmap(partial(jax.random.fold_in, keys))(jnp.arange(len(data)))
    return jax.vmap(jax.random.fold_in, (0, 0 if data.ndim else None))(keys, data)


def normal_like(key: Keys, x: Images) -> Float[Array, "B *shape"]:
    """Draws standard normal noise of the shape and dtype of `x`.

    Example:
      >>> normal_like(jax.random.key(0), jnp.zeros((2, 4), jnp.bfloat16)).dtype
      dtype(bfloat16)
    """
    return draw_like(jax.random.normal, key, x)


def draw_like(
    sampler: Callable[..., Array], key: Keys, x: Shaped[Array | np.ndarray, "B *shape"]
) -> Shaped[Array, "B *shape"]:
    """Draws `sampler(key, shape, dtype)`, a function of jax.random, for all of `x`, or per image with [B] keys.

    Raises:
      ValueError: the number of keys is not the batch size.

    Example:
      >>> x, keys = jnp.zeros((3, 4)), jax.random.split(jax.random.key(0), 3)
      >>> alone = draw_like(jax.random.normal, keys[1:2], x[1:2])
      >>> print(jnp.array_equal(draw_like(jax.random.normal, keys, x)[1:2], alone))
      True
    """
    keys = _typed(key)
    if not keys.ndim:
        return sampler(keys, x.shape, x.dtype)
    if keys.shape != x.shape[:1]:
        raise ValueError(f"key has shape {keys.shape}: give one key, or one per image of the batch, {x.shape[:1]}.")
    return jax.vmap(lambda key: sampler(key, x.shape[1:], x.dtype))(keys)


def _typed(key: Keys) -> Array:
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)
