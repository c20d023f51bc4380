"""Weights as a whole: a digest that identifies them, and the check that every number is finite."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from diffusion.training.errors import RunError
from diffusion.training.experiment import Params


def digest(params: Params) -> str:
    """Returns "sha256:HEX" over all weights: each one's path in the tree and its bytes, in the tree's order.

    The value does not depend on how the weights are sharded. Every process of a run must call this.

    Args:
      params: a pytree of arrays, of JAX (sharded or not) or NumPy. One leaf at a time is gathered to the host.

    Returns:
      "sha256:" and 64 hexadecimal digits.

    Example:
      >>> digest({"w": np.zeros(2, np.float32)})[:15]
      'sha256:28830559'
    """
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)  # of others, it would join the processes' copies
        total.update(np.ascontiguousarray(leaf).tobytes())
    return f"sha256:{total.hexdigest()}"


def check_finite(params: Params, what: str) -> None:
    """Refuses weights of which some are not finite.

    The numbers are counted on the devices that hold them; only the counts come to the host. Every process of a run
    must call this.

    Args:
      params: a pytree of arrays.
      what: the weights are, for the message, such as "checkpoint runs/x/checkpoints/12".

    Raises:
      RunError: with the number of weights that are nan or infinite and the path of the first array with any.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    # An array at a time: few shapes are compiled, once each, and not a program for the whole tree.
    counts = jax.device_get([count_not_finite(leaf) for _, leaf in leaves])
    bad = {
        jax.tree_util.keystr(path, simple=True, separator="/"): int(n)
        for (path, _), n in zip(leaves, counts, strict=True)
        if n
    }
    if bad:
        arrays = f"{len(bad)} of {len(leaves)} arrays"
        raise RunError(
            f"{what} cannot be used: {sum(bad.values())} of its weights are not finite, in {arrays}, the first in "
            f"{next(iter(bad))}. Use another copy or an earlier checkpoint"
        )


@jax.jit
def count_not_finite(x: jax.Array) -> jax.Array:
    """Returns how many numbers of an array are nan or infinite, int32[]."""
    return jnp.sum(~jnp.isfinite(x), dtype=jnp.int32)
