"""The decoder of Qwen3 (Yang et al. 2025) as an encoder, which FLUX.2 [klein] reads with: hidden states of some layers.

Attention is causal, and padding is not attended: a token at a place of padding sees all tokens of the text, not itself.
"""

from functools import partial
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from diffusion.networks.layers import attention, cut_along_batch, merged_dot_general

normal = nn.initializers.normal(0.02)
# Sums leave products in float32, see `networks.t5`: what is added to the residual is not rounded first.
Dense = partial(
    nn.DenseGeneral,
    use_bias=False,
    kernel_init=normal,
    dot_general=partial(merged_dot_general, preferred_element_type=jnp.float32),
)
# How a mesh cuts the parameters, see `training.sharding`: heads and the MLP's hidden units over "tensor".
RULES = (
    (r"layer_\d+/(query|key|value)/kernel$", (None, "tensor", None)),
    (r"layer_\d+/out/kernel$", ("tensor", None, None)),
    (r"layer_\d+/(mlp_gate|mlp_1)/kernel$", (None, "tensor")),
    (r"layer_\d+/mlp_2/kernel$", ("tensor", None)),
)

Tokens = Float[Array, "B L W"]
Rotation = tuple[Float[Any, "L half"], Float[Any, "L half"]]


class Layer(nn.Module):
    """Attention of grouped queries, then a gated MLP, each after an RMS norm and added to its input, always float32."""

    num_heads: int
    num_kv_heads: int
    head_width: int
    mlp_width: int
    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Tokens, mask: Bool[Array, "B 1 L L"], rotation: Rotation) -> Tokens:
        """Returns the tokens after the layer; `mask` holds which key (last axis) each query attends to."""
        norm = partial(nn.RMSNorm, epsilon=self.epsilon)
        h = norm(dtype=self.dtype, name="norm_1")(x)
        query, key, value = (
            Dense((count, self.head_width), dtype=self.dtype, name=name)(h)
            for name, count in (("query", self.num_heads), ("key", self.num_kv_heads), ("value", self.num_kv_heads))
        )
        query = rotate(norm(dtype=jnp.float32, name="norm_query")(query), *rotation)
        key = rotate(norm(dtype=jnp.float32, name="norm_key")(key), *rotation)
        heads = (array.astype(self.dtype) for array in (query, key, value))
        h = attention(*heads, mask=mask)
        x = x + Dense(x.shape[-1], axis=(-2, -1), dtype=self.dtype, name="out")(h)
        h = norm(dtype=self.dtype, name="norm_2")(x)
        gate, h = (Dense(self.mlp_width, dtype=self.dtype, name=name)(h) for name in ("mlp_gate", "mlp_1"))
        return x + Dense(x.shape[-1], dtype=self.dtype, name="mlp_2")(nn.silu(gate) * h)


class Qwen3(nn.Module):
    """Token ids [B, L], of any length -> hidden states of each token. The defaults are Qwen3 4B's, as klein reads it.

    Attributes:
      width: of a token.
      depth: layers of the published model.
      num_heads, num_kv_heads: of queries, and of keys and values, each of which serves equally many queries.
      head_width: `num_heads` of these need not make `width`.
      theta: of the rotations, see `rotations`.
      epsilon: of the RMS norms.
      states: after how many layers the tokens are returned, in rising order, less than `depth` (the published model
        normalises what its last layer returns). No layer beyond the last of these is run.
      whole: whether new parameters hold what is not run too: the other layers, the last norm and, unless `tied`, the
        head, to be published again.
      tied: whether the head of the published model is its table of tokens.
      dtype: what products compute in, float32 or bfloat16. Their sums, residuals, norms, rotations and softmax are
        float32, and so are new parameters; parameters of other types are converted where they are used.
    """

    vocab_size: int = 151936
    width: int = 2560
    depth: int = 36
    num_heads: int = 32
    num_kv_heads: int = 8
    head_width: int = 128
    mlp_width: int = 9728
    theta: float = 1e6
    epsilon: float = 1e-6
    states: tuple[int, ...] = (9, 18, 27)
    whole: bool = False
    tied: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"], real: Bool[Array, "B L"] | None = None) -> Float[Array, "B L D"]:
        """Returns the states side by side, float32 [B, L, len(states) width], NaN for ids outside the vocabulary.

        `real` is False at padding, which follows the text; None: there is none. Places of padding have states too.

        Raises:
          ValueError: states that do not rise or that the model does not have, or heads that do not share evenly.
        """
        self.check()
        # Not nn.Embed, which would convert the whole table.
        table = self.param("token_embedding", normal, (self.vocab_size, self.width), jnp.float32)
        x = jnp.take(table, ids, axis=0, mode="fill").astype(jnp.float32)
        length = ids.shape[1]
        mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
        if real is not None:
            mask = mask & real[:, None, None]
        rotation = rotations(length, self.head_width, self.theta)
        layer = partial(
            Layer, self.num_heads, self.num_kv_heads, self.head_width, self.mlp_width, self.epsilon, self.dtype
        )
        unread = self.whole and self.is_initializing()
        found = []
        for i in range(self.depth if unread else self.states[-1]):
            x = layer(name=f"layer_{i}")(cut_along_batch(x), mask, rotation)
            if i + 1 in self.states:
                found.append(x)
        if unread:
            nn.RMSNorm(name="norm_out")(x)
            if not self.tied:
                self.param("head", normal, (self.vocab_size, self.width), jnp.float32)
        return jnp.concatenate(found, axis=-1)

    def check(self) -> None:
        """Raises ValueError for states that do not rise or are not there, heads that share unevenly, and float16."""
        states = self.states
        if not states or any(a >= b for a, b in pairwise((0, *states, self.depth))):
            raise ValueError(f"states are {tuple(states)}: give numbers that rise, from 1 to {self.depth - 1}")
        if self.num_heads % self.num_kv_heads or self.head_width % 2:
            raise ValueError(
                f"{self.num_heads} heads of width {self.head_width} cannot share {self.num_kv_heads} keys and values: "
                "num_kv_heads has to divide num_heads, and 2 head_width"
            )
        if self.dtype == jnp.float16:
            raise ValueError("float16 lacks the range that Qwen3 was trained with: compute in bfloat16 or float32")


def rotate(x: Float[Array, "B L N H"], cosine: Float[Any, "L half"], sine: Float[Any, "L half"]) -> Array:
    """Returns pairs of channels, one of the first half and one of the second, rotated by their place's angle."""
    first, second = jnp.split(x, 2, axis=-1)
    cosine, sine = cosine[:, None], sine[:, None]
    return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)


def rotations(length: int, width: int, theta: float) -> Rotation:
    """Returns cosines and sines, float32, of the angles p theta^(-2 k / width) of each place p and pair k.

    Source: Su et al. 2021, section 3.2.2.
    """
    angles = np.outer(np.arange(length), theta ** (-np.arange(0, width, 2) / width))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
