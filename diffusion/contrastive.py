"""Losses of paired embeddings x_i, y_i of length 1 over a whole batch: CLIP's softmax and SigLIP's sigmoid.

The B x B similarities are never held: they are made a few rows at a time, forward and backward, so memory grows as B
times `rows`. Under a global `jit` the batch is the global one on any number of devices.

In the examples

>>> x, y = jnp.eye(2), jnp.eye(2)
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST_LOG_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5: to keep training stable


class Contrast(NamedTuple):
    """Per pair, float32[B]: the loss, and 1 where x finds its y among all B, and where y finds its x."""

    loss: Float[Array, "B"]
    x_to_y: Float[Array, "B"]
    y_to_x: Float[Array, "B"]


def softmax_loss(
    x: Float[Array, "B E"], y: Float[Array, "B E"], scale: Float[Array, ""] | float, rows: int | None = None
) -> Contrast:
    """Returns (-log p(y_i | x_i) - log p(x_i | y_i)) / 2, each a softmax of scale x.y over the batch.

    Args:
      x: embeddings of length 1.
      y: their partners.
      scale: the inverse temperature.
      rows: how many rows of similarities are made at a time, all by default.

    Source: Radford et al. 2021 (CLIP), figure 3.

    Raises:
      ValueError: `rows` does not divide the batch.

    Example:
      >>> print(np.asarray(softmax_loss(x, y, 1.0).loss).round(3))  # log(1 + 1 / e)
      [0.313 0.313]
    """

    def cross_entropy(x_rows: Float[Array, "r E"], y_rows: Float[Array, "r E"], y: Float[Array, "B E"]):
        logits = scale * (x_rows @ y.T)
        own = scale * jnp.sum(x_rows * y_rows, axis=-1)
        return jax.nn.logsumexp(logits, axis=-1) - own, _is_best(own, logits)

    there, x_to_y = _by_rows(cross_entropy, x, y, rows)
    back, y_to_x = _by_rows(cross_entropy, y, x, rows)
    return Contrast((there + back) / 2, x_to_y, y_to_x)


def sigmoid_loss(
    x: Float[Array, "B E"],
    y: Float[Array, "B E"],
    scale: Float[Array, ""] | float,
    bias: Float[Array, ""] | float,
    rows: int | None = None,
) -> Contrast:
    """Returns -sum_j log sigmoid(z_ij (scale x_i.y_j + bias)), z_ij = 1 where i = j, else -1.

    Args:
      x: embeddings of length 1.
      y: their partners.
      scale: the inverse temperature; the paper starts at 10.
      bias: added to all logits; the paper starts at -10.
      rows: as in `softmax_loss`.

    Source: Zhai et al. 2023 (SigLIP), equation 1.

    Raises:
      ValueError: `rows` does not divide the batch.

    Example:
      >>> print(np.asarray(sigmoid_loss(x, y, 10.0, -10.0).loss).round(3))  # log 2
      [0.693 0.693]
    """

    def binary(x_rows: Float[Array, "r E"], y_rows: Float[Array, "r E"], y: Float[Array, "B E"]):
        logits = scale * (x_rows @ y.T) + bias
        own = scale * jnp.sum(x_rows * y_rows, axis=-1) + bias
        # -log sigmoid(-l) = softplus(l) for all, then -log sigmoid(l) = softplus(l) - l for the pairs.
        return jnp.sum(jax.nn.softplus(logits), axis=-1) - own, _is_best(own, logits)

    def find(y_rows: Float[Array, "r E"], x_rows: Float[Array, "r E"], x: Float[Array, "B E"]):
        return (_is_best(jnp.sum(x_rows * y_rows, axis=-1), y_rows @ x.T),)

    loss, x_to_y = _by_rows(binary, x, y, rows)
    (y_to_x,) = _by_rows(find, y, x, rows)
    return Contrast(loss, x_to_y, y_to_x)


def _is_best(own: Float[Array, "r"], logits: Float[Array, "r B"]) -> Float[Array, "r"]:
    """Returns 1 where no logit of the row is above the pair's own, but for rounding."""
    return (own >= jnp.max(logits, axis=-1) - 1e-5 * jnp.abs(own)).astype(jnp.float32)


def _by_rows(function: Callable, x: Float[Array, "B E"], y: Float[Array, "B E"], rows: int | None):
    """Returns a tuple of [B] from function(some rows of x, the same rows of y, all y), which returns one of [rows]."""
    batch, width = x.shape
    rows = rows or batch
    if batch % rows:
        raise ValueError(f"{rows} rows at a time do not divide a batch of {batch}: choose a divisor")
    if rows == batch:
        return function(x, y, y)
    parts = batch // rows

    # Part number i holds the rows i, i + parts, ...: every row stays on its device, and all devices work.
    def split(z: Float[Array, "B E"]) -> Float[Array, "parts rows E"]:
        return z.reshape(rows, parts, width).swapaxes(0, 1)

    remade = jax.checkpoint(lambda part: function(*part, y))
    return tuple(z.swapaxes(0, 1).reshape(batch) for z in jax.lax.map(remade, (split(x), split(y))))
