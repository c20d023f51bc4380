"""The encoder of T5 v1.1 (Raffel et al. 2020; Shazeer 2020 for its gated MLP), which Stable Diffusion 3 reads with.

Nothing is masked: Stable Diffusion 3 lets padding be attended, and reads the features at its places too.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion.networks.layers import attention, merged_dot_general

normal = nn.initializers.normal
# Sums leave products in float32. What is added to the residual is so not rounded first; and on CPUs XLA multiplies
# bfloat16 natively this way alone, 2.5 times as fast and without a copy of the weights in float32.
whole_dot_general = partial(merged_dot_general, preferred_element_type=jnp.float32)
Dense = partial(nn.Dense, use_bias=False, dot_general=whole_dot_general)
RMSNorm = partial(nn.RMSNorm, epsilon=1e-6)
# How a mesh cuts the parameters, see `training.sharding`: heads and the MLP's hidden units over "tensor".
RULES = (
    (r"block_\d+/(query|key|value|mlp_gate|mlp_1)/kernel$", (None, "tensor")),
    (r"block_\d+/(out|mlp_2)/kernel$", ("tensor", None)),
)


class Block(nn.Module):
    """Attention, then a gated MLP, each after an RMS norm and added to its input, which stays float32."""

    num_heads: int
    head_width: int
    mlp_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B L W"], bias: Float[Array, "1 heads L L"]) -> Float[Array, "B L W"]:
        """Returns the tokens after the block; `bias` is added to the logits of attention."""
        width, inner = x.shape[-1], self.num_heads * self.head_width

        def dense(name: str, features: int, std: float) -> nn.Dense:
            return Dense(features, kernel_init=normal(std), dtype=self.dtype, name=name)

        h = RMSNorm(dtype=self.dtype, name="norm_1")(x)
        query = dense("query", inner, (width * self.head_width) ** -0.5)(h)
        key, value = (dense(name, inner, width**-0.5)(h) for name in ("key", "value"))
        heads = (*x.shape[:2], self.num_heads, self.head_width)
        query, key, value = (array.astype(self.dtype).reshape(heads) for array in (query, key, value))
        # No 1 / sqrt(head_width): T5 has it in the initial weights of the query.
        h = attention(query, key, value, bias, scale=1.0).reshape(*x.shape[:2], inner)
        x = x + dense("out", width, inner**-0.5)(h)
        h = RMSNorm(dtype=self.dtype, name="norm_2")(x)
        gate, h = (dense(name, self.mlp_width, width**-0.5)(h) for name in ("mlp_gate", "mlp_1"))
        return x + dense("mlp_2", width, self.mlp_width**-0.5)(nn.gelu(gate) * h)


class T5Encoder(nn.Module):
    """Token ids [B, L], of any length -> features of each token. The defaults are T5 v1.1 XXL's.

    Attributes:
      width: of a token.
      head_width: `num_heads` of these need not make `width`.
      num_buckets, max_distance: see `relative_buckets`; one table of `num_buckets` biases per head serves all blocks.
      dtype: what products compute in, float32 or bfloat16. Their sums, residuals, norms and softmax are float32, and
        so are new parameters; parameters of other types are converted where they are used. float16 is refused:
        activations of the published weights overflow it. Weights that are stored in it may be computed with in others.
    """

    vocab_size: int = 32128
    width: int = 4096
    depth: int = 24
    num_heads: int = 64
    head_width: int = 64
    mlp_width: int = 10240
    num_buckets: int = 32
    max_distance: int = 128
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "B L"]) -> Float[Array, "B L W"]:
        """Returns float32 features, NaN for ids outside the vocabulary; raises ValueError for a dtype of float16."""
        if self.dtype == jnp.float16:
            raise ValueError("T5's activations overflow float16: compute in bfloat16 or float32")
        # Not nn.Embed, which would convert the whole table.
        table = self.param("token_embedding", normal(1.0), (self.vocab_size, self.width), jnp.float32)
        x = jnp.take(table, ids, axis=0, mode="fill").astype(jnp.float32)
        shape = (self.num_buckets, self.num_heads)
        biases = self.param("relative_bias", normal(self.width**-0.5), shape, jnp.float32)
        buckets = relative_buckets(ids.shape[1], self.num_buckets, self.max_distance)
        bias = jnp.moveaxis(biases[buckets], -1, 0)[None].astype(jnp.float32)
        for i in range(self.depth):
            x = Block(self.num_heads, self.head_width, self.mlp_width, self.dtype, name=f"block_{i}")(x, bias)
        return RMSNorm(dtype=jnp.float32, name="norm_out")(x)


def relative_buckets(length: int, num_buckets: int = 32, max_distance: int = 128) -> Int[np.ndarray, "L L"]:
    """Returns the bucket of each (query, key) by how far the key is from the query.

    Half of the buckets are for keys after the query. Of each half one half holds a distance each, the other ranges
    that grow geometrically up to `max_distance`; what is farther shares the last.

    Raises:
      ValueError: `num_buckets` is not a multiple of 4, or `max_distance` leaves no range to the second half.

    Source: Raffel et al. 2020, section 2.1, and the released code.
    """
    half, exact = num_buckets // 2, num_buckets // 4
    if num_buckets % 4 or not 0 < exact < max_distance:
        raise ValueError(
            f"{num_buckets} buckets up to a distance of {max_distance}: num_buckets has to be a multiple of 4, and "
            "max_distance larger than a quarter of it"
        )
    relative = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(relative)
    # float32 as in the released code: where a range ends is decided by its rounding.
    fraction = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    fraction = fraction / np.float32(np.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + fraction.astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + half * (relative > 0)).astype(np.int32)
