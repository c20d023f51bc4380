"""The U-Net of DDPM (Ho, Jain & Abbeel 2020, appendix B, and its released code)."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion.networks.layers import (
    Attention,
    Conv,
    Dense,
    GroupNorm,
    sinusoidal_embedding,
    upsample,
    zeros_init,
)


class ResidualBlock(nn.Module):
    """norm, SiLU, conv; plus the embedding; norm, SiLU, dropout, conv (zero at the start); plus the input."""

    channels: int
    dropout: float
    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], embedding: Float[Array, "B E"], train: bool
    ) -> Float[Array, "B H W out"]:
        """`embedding` is SiLU(time and class embedding); with `train` dropout draws from the key "dropout"."""
        h = nn.silu(GroupNorm(self.num_groups, dtype=self.dtype, name="norm_1")(x))
        h = Conv(self.channels, dtype=self.dtype, name="conv_1")(h)
        h = h + Dense(self.channels, dtype=self.dtype, name="embedding")(embedding)[:, None, None]
        h = nn.silu(GroupNorm(self.num_groups, dtype=self.dtype, name="norm_2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = Conv(self.channels, dtype=self.dtype, kernel_init=zeros_init, name="conv_2")(h)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, size=1, dtype=self.dtype, name="shortcut")(x)
        return x + h


class CrossAttention(nn.Module):
    """Attention of all pixels to the tokens of a text, with its normalisation and residual; starts as the identity.

    Source: Rombach et al. 2022, section 3.3, without their feed-forward layer.
    """

    head_channels: int
    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], context: Float[Array, "B L D"]) -> Float[Array, "B H W C"]:
        """x + out(attention(norm(x), context))."""
        batch, height, width, channels = x.shape
        h = GroupNorm(self.num_groups, dtype=self.dtype, name="norm")(x).reshape(batch, height * width, channels)
        heads = (batch, -1, channels // self.head_channels, self.head_channels)
        query, key, value = (
            Dense(channels, dtype=self.dtype, name=name)(tokens).reshape(heads)
            for name, tokens in (("query", h), ("key", context), ("value", context))
        )
        h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        return x + Dense(channels, dtype=self.dtype, kernel_init=zeros_init, name="out")(h)


class UNet(nn.Module):
    """Image and time -> an image of the same height and width. The defaults are DDPM's CIFAR-10 network.

    Level i works at 1 / 2^i of the image's size with `channels * multipliers[i]` channels and `num_blocks` residual
    blocks (one more on the way up); where its height is in `attention_resolutions`, attention follows every block, as
    it does in the middle. Heads: `num_heads` of equal width, or heads of `head_channels` when that is given.

    `time_scale` multiplies `time` before its embedding: 1 for DDPM's t - 1, 1000 for a time in [0, 1].
    With `num_classes`, label `num_classes` is the null class ("no class"), and so is a label of None.
    With `context`, the features of a prompt's tokens, attention to them follows every self-attention (Rombach et al.
    2022), and `pooled`, those of the whole prompt, join the time embedding. A network is built with them or without.
    `dtype` is what convolutions and products compute in; parameters, normalisation statistics, softmax, the last
    layer and the output stay float32. `remat` recomputes every block's activations in the backward pass.

    Raises ValueError for image sizes that the levels do not divide, an attention resolution that no level has, groups
    or heads that do not divide the channels, and labels without `num_classes`.
    """

    channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    dropout: float = 0.1
    num_heads: int = 1
    head_channels: int | None = None
    num_classes: int | None = None
    out_channels: int | None = None
    num_groups: int = 32
    time_scale: float = 1.0
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "B H W C"],
        time: Float[Array, "B"],
        label: Int[Array, "B"] | None = None,
        *,
        context: Float[Array, "B L D"] | None = None,
        pooled: Float[Array, "B P"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B H W out"]:
        """The network's output, float32; `train` turns dropout on (pass `rngs={"dropout": key}` to apply)."""
        self._check(x_t, label)
        num_levels = len(self.multipliers)
        embedding = nn.silu(self._embedding(time, label, pooled))

        residual_block = nn.remat(ResidualBlock, static_argnums=(3,)) if self.remat else ResidualBlock
        attention = nn.remat(Attention) if self.remat else Attention
        cross_attention = nn.remat(CrossAttention) if self.remat else CrossAttention

        def block(h, level: int, name: str):
            channels = self.channels * self.multipliers[level]
            return residual_block(channels, self.dropout, self.num_groups, self.dtype, name=name)(h, embedding, train)

        def attend(h, name: str):
            head_channels = self.head_channels or h.shape[-1] // self.num_heads
            h = attention(head_channels, self.num_groups, self.dtype, name=name)(h)
            if context is None:
                return h
            return cross_attention(head_channels, self.num_groups, self.dtype, name=f"{name}_text")(h, context)

        h = Conv(self.channels, dtype=self.dtype, name="conv_in")(x_t)
        skips = [h]
        for level in range(num_levels):
            for i in range(self.num_blocks):
                h = block(h, level, f"down_{level}_block_{i}")
                if h.shape[1] in self.attention_resolutions:
                    h = attend(h, f"down_{level}_attention_{i}")
                skips.append(h)
            if level < num_levels - 1:
                h = Conv(h.shape[-1], stride=2, dtype=self.dtype, name=f"down_{level}_downsample")(h)
                skips.append(h)

        h = block(h, num_levels - 1, "middle_block_0")
        h = attend(h, "middle_attention")
        h = block(h, num_levels - 1, "middle_block_1")

        for level in reversed(range(num_levels)):
            for i in range(self.num_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up_{level}_block_{i}")
                if h.shape[1] in self.attention_resolutions:
                    h = attend(h, f"up_{level}_attention_{i}")
            if level > 0:
                h = Conv(h.shape[-1], dtype=self.dtype, name=f"up_{level}_upsample")(upsample(h))

        h = nn.silu(GroupNorm(self.num_groups, name="norm_out")(h))
        return Conv(self.out_channels or x_t.shape[-1], kernel_init=zeros_init, name="conv_out")(h)

    def _embedding(
        self, time: Float[Array, "B"], label: Int[Array, "B"] | None, pooled: Float[Array, "B P"] | None
    ) -> Float[Array, "B E"]:
        """Time embedding through two dense layers, plus those of the pooled text and of the class."""
        width = 4 * self.channels
        embedding = sinusoidal_embedding(time * self.time_scale, self.channels)
        embedding = nn.silu(Dense(width, dtype=self.dtype, name="time_1")(embedding))
        embedding = Dense(width, dtype=self.dtype, name="time_2")(embedding)
        if pooled is not None:
            embedding = embedding + Dense(width, dtype=self.dtype, name="pooled")(pooled)
        if self.num_classes is None:
            return embedding
        if label is None:
            label = jnp.full(time.shape, self.num_classes)
        table = nn.Embed(
            self.num_classes + 1,
            width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="class_embedding",
        )
        return embedding + table(label)

    def _check(self, x_t: Float[Array, "B H W C"], label: Int[Array, "B"] | None) -> None:
        height, width = x_t.shape[1:3]
        num_levels = len(self.multipliers)
        divisor = 2 ** (num_levels - 1)
        if height % divisor or width % divisor:
            raise ValueError(
                f"image size {height}x{width} cannot be halved {num_levels - 1} times for the U-Net's "
                f"{num_levels} levels: use multiples of {divisor}, or fewer multipliers"
            )
        resolutions = [height // 2**level for level in range(num_levels)]
        missing = sorted(set(self.attention_resolutions) - set(resolutions))
        if missing:
            raise ValueError(
                f"attention_resolutions {missing} are at no level of this U-Net: an image of height {height} has "
                f"levels of {resolutions}"
            )
        if label is not None and self.num_classes is None:
            raise ValueError("labels were given to a U-Net without classes: set num_classes")
