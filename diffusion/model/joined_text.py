"""The joined text of Stable Diffusion 3 (Esser et al. 2024, figure 2): where two CLIPs' and a T5's features are in it.

context  [B, 77 + 256, 4096]: side by side the last hidden states but one of CLIP-L (768) and OpenCLIP bigG (1280),
         then zeros; below them T5's features
pooled   [B, 2048]: the pooled vectors of both CLIPs

The numbers are the published model's. An encoder that is absent leaves zeros in its place, so shapes do not change.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from diffusion.model.prompts import Text

ENCODERS = ("clip_l", "clip_g", "t5")


class Layout(NamedTuple):
    """Where in the joined text each encoder's features are.

    Attributes:
      clip_length: tokens of the CLIPs, before those of T5.
      t5_length: tokens of T5.
      clip_l, clip_g, context: widths of the CLIPs' features, and of the joined ones, which is T5's.
      pooled_l, pooled_g: widths of their pooled vectors.
    """

    clip_length: int
    t5_length: int
    clip_l: int
    clip_g: int
    context: int
    pooled_l: int
    pooled_g: int


def join(layout: Layout, batch: int, found: Mapping[str, tuple[jax.Array, jax.Array | None]]) -> Text:
    """Returns the joined text of features (of tokens, pooled) by encoder: float32, zeros for what is not there."""

    def tokens(name: str, length: int, width: int) -> jax.Array:
        return found[name][0].astype(jnp.float32) if name in found else jnp.zeros((batch, length, width))

    def pooled(name: str, width: int) -> jax.Array:
        return jnp.asarray(found[name][1], jnp.float32) if name in found else jnp.zeros((batch, width))

    both = [tokens(name, layout.clip_length, getattr(layout, name)) for name in ("clip_l", "clip_g")]
    both = jnp.concatenate(both, axis=-1)
    both = jnp.pad(both, ((0, 0), (0, 0), (0, layout.context - both.shape[-1])))
    context = jnp.concatenate([both, tokens("t5", layout.t5_length, layout.context)], axis=1)
    return Text(
        context, jnp.concatenate([pooled("clip_l", layout.pooled_l), pooled("clip_g", layout.pooled_g)], axis=-1)
    )


def keep(layout: Layout, joined: Text, kept: Bool[Array, "B 3"]) -> Text:
    """Returns the joined text with zeros for the encoders, in the order of `ENCODERS`, that are not kept."""
    clip_l, clip_g, of_t5 = (kept[:, i, None, None] for i in range(3))
    above, below = jnp.split(joined.context, [layout.clip_length], axis=1)
    is_l = jnp.arange(layout.context) < layout.clip_l
    above = jnp.where(jnp.where(is_l, clip_l, clip_g), above, 0)
    context = jnp.concatenate([above, jnp.where(of_t5, below, 0)], axis=1)
    is_l = jnp.arange(joined.pooled.shape[-1]) < layout.pooled_l
    return Text(context, jnp.where(jnp.where(is_l, clip_l[:, 0], clip_g[:, 0]), joined.pooled, 0))
