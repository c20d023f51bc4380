"""A digest over weights: by it a result names the network that made it."""

import hashlib

import jax
import numpy as np
from jax.experimental import multihost_utils

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
        total.update(np.ascontiguousarray(multihost_utils.process_allgather(leaf, tiled=True)).tobytes())
    return f"sha256:{total.hexdigest()}"
