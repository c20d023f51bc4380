"""Losses of paired embeddings x_i, y_i of length 1 over a whole batch: CLIP's softmax and SigLIP's sigmoid.

The B x B similarities are never held: they are made a few rows at a time, forward and backward, so memory grows as B
times `rows`. Under a global `jit` the batch is the global one, whatever the devices.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

LARGEST_LOG_SCALE = math.log(100.0)  # Radford et al. 2021, section 2.5: to keep training stable


class Contrast(NamedTuple):
    """Per pair, float32[B]: the loss, and 1 where a member finds its partner among all B, either way."""

    loss: Float[Array, "B"]
    x_to_y: Float[Array, "B"]
    y_to_x: Float[Array, "B"]


def softmax_loss(
    x: Float[Array, "B E"], y: Float[Array, "B E"], scale: Float[Array, ""] | float, rows: int | None = None
) -> Contrast:
    """(-log p(y_i | x_i) - log p(x_i | y_i)) / 2, each a softmax of scale x.y over the batch (CLIP, figure 3).

    Raises:
      ValueError: if `rows` (default: all) do not divide the batch.
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
    """-sum_j log sigmoid(z_ij (scale x_i.y_j + bias)), z_ij = 1 where i = j, else -1 (Zhai et al. 2023, equation 1).

    The paper starts at scale = 10, bias = -10. Raises ValueError as `softmax_loss`.
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
    """1 where no logit of the row is above the pair's own, but for rounding."""
    return (own >= jnp.max(logits, axis=-1) - 1e-5 * jnp.abs(own)).astype(jnp.float32)


def _by_rows(function: Callable, x: Float[Array, "B E"], y: Float[Array, "B E"], rows: int | None):
    """function(some rows of x, the same rows of y, all y), a tuple of [rows], for all rows: a tuple of [B]."""
    batch, width = x.shape
    rows = rows or batch
    if batch % rows:
        raise ValueError(f"{rows} rows at a time do not divide a batch of {batch}: choose a divisor")
    if rows == batch:
        return function(x, y, y)
    parts = batch // rows

    # Part number i holds the rows i, i + parts, ...: every row stays on the device it is on, and all devices work.
    def split(z: Float[Array, "B E"]) -> Float[Array, "parts rows E"]:
        return z.reshape(rows, parts, width).swapaxes(0, 1)

    remade = jax.checkpoint(lambda part: function(*part, y))
    return tuple(z.swapaxes(0, 1).reshape(batch) for z in jax.lax.map(remade, (split(x), split(y))))
