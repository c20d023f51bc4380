"""The U-Net of DDPM (Ho, Jain & Abbeel 2020, appendix B, and its released code), with the switches of its successors.

They are what published networks differ in: those of diffusers' `UNet2DModel`, and of ADM (Dhariwal & Nichol 2021).
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion.networks.layers import (
    Attention,
    Conv,
    Dense,
    FusedNorm,
    GroupNorm,
    ResidualBlock,
    attention,
    average_pool,
    interval_embedding,
    sinusoidal_embedding,
    zeros_init,
)
from diffusion.networks.upsampling import upsample

# How a mesh cuts the parameters, see `training.sharding`: residual blocks are tensor parallel in the channels between
# their two convolutions. Attention has one head in DDPM's network, and stays whole.
RULES = (
    (r"_block_\d+/conv_1/kernel$", (None, None, None, "tensor")),
    (r"_block_\d+/conv_1/bias$", ("tensor",)),
    (r"_block_\d+/conv_2/kernel$", (None, None, "tensor", None)),
)


class CrossAttention(nn.Module):
    """Applies attention of all pixels to the tokens of a text, with its normalisation and residual.

    Starts as the identity. Source: Rombach et al. 2022, section 3.3, without their feed-forward layer.
    """

    head_channels: int
    num_groups: int
    dtype: Any = jnp.float32
    norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], context: Float[Array, "B L D"]) -> Float[Array, "B H W C"]:
        """Returns x + out(attention(norm(x), context))."""
        batch, height, width, channels = x.shape
        h = GroupNorm(self.num_groups, self.norm_eps, self.dtype, name="norm")(x)
        h = h.reshape(batch, height * width, channels)
        heads = (batch, -1, channels // self.head_channels, self.head_channels)
        query, key, value = (
            Dense(channels, dtype=self.dtype, name=name)(tokens).reshape(heads)
            for name, tokens in (("query", h), ("key", context), ("value", context))
        )
        h = attention(query, key, value).reshape(x.shape)
        return x + Dense(channels, dtype=self.dtype, kernel_init=zeros_init, name="out")(h)


class UNet(nn.Module):
    """Maps an image and a time to an image of the same height and width. The defaults are DDPM's CIFAR-10 network.

    Level i works at 1 / 2^i of the image's size with `channels * multipliers[i]` channels and `num_blocks` residual
    blocks (one more on the way up). A network is built with the text inputs `context` and `pooled`, or without:
    attention to `context`, the features of a prompt's tokens, follows every self-attention (Rombach et al. 2022), and
    `pooled`, those of the whole prompt, join the time embedding.

    Attributes:
      channels: width of the sines and cosines of the time, and a quarter of the embedding's.
      widths: channels of the levels where they are no multiples, else None, 0 or (); the first convolution has those
        of level 0 then.
      attention_resolutions: heights at which attention follows every block.
      up_attention_resolutions: the same on the way up; None or 0 for the same heights, () for none.
      middle_attention: whether there is attention in the middle.
      middle_norm: whether that has a normalisation.
      middle_groups: groups of it; None or 0 for `num_groups`.
      num_heads: heads of equal width, where `head_channels` is None or 0.
      head_channels: width of one head, or one for each level.
      num_classes: label `num_classes` is the null class ("no class"), and so is a label of None.
      null_class: False for a network without a null class, which cannot go without labels.
      out_channels: None or 0 for as many as the image has.
      norm_eps: epsilon of the normalisations; 1e-5 in PyTorch and ADM.
      time_scale: multiplies `time` before its embedding: 1 for DDPM's t - 1, 1000 for a time in [0, 1].
      two_times: whether it is told the time at which a step ends, too, as a flow map is.
      freq_shift, flip_sin_to_cos: of the time embedding, see `sinusoidal_embedding`; 0 and True in ADM.
      downsample_padding: of the convolutions with stride 2: 0 pads below and to the right only, 1 on every side.
      scale_shift: see `ResidualBlock`; ADM's `use_scale_shift_norm`.
      resblock_updown: residual blocks change the resolution instead of convolutions, as in ADM.
      center_input_sample: whether images come in [0, 1] and are mapped to [-1, 1] first.
      dtype: what convolutions and products compute in; parameters, normalisation statistics, softmax, the last layer
        and the output stay float32.
      remat: recomputes every block's activations in the backward pass.
      fused_norms: normalisation, SiLU and dropout are one kernel on GPUs, see `fused_norm`; not in blocks that change
        the resolution, nor before attention to a text.

    Raises:
      ValueError: image sizes that the levels do not divide, an attention resolution that no level has, groups or heads
        that do not divide the channels, labels without `num_classes`, or fused norms of blocks that the embedding
        scales and shifts.
    """

    channels: int = 128
    multipliers: Sequence[int] = (1, 2, 2, 2)
    widths: Sequence[int] | int | None = None
    num_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    up_attention_resolutions: Sequence[int] | int | None = None
    middle_attention: bool = True
    middle_norm: bool = True
    middle_groups: int | None = None
    dropout: float = 0.1
    num_heads: int = 1
    head_channels: int | Sequence[int] | None = None
    num_classes: int | None = None
    null_class: bool = True
    out_channels: int | None = None
    num_groups: int = 32
    norm_eps: float = 1e-6
    time_scale: float = 1.0
    two_times: bool = False
    freq_shift: int = 1
    flip_sin_to_cos: bool = False
    downsample_padding: int = 0
    scale_shift: bool = False
    resblock_updown: bool = False
    center_input_sample: bool = False
    dtype: Any = jnp.float32
    remat: bool = False
    fused_norms: bool = False

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "B H W C"],
        time: Float[Array, "B"],
        label: Int[Array, "B"] | None = None,
        *,
        context: Float[Array, "B L D"] | None = None,
        pooled: Float[Array, "B P"] | None = None,
        next_time: Float[Array, "B"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B H W out"]:
        """Returns the output, float32; `train` turns dropout on (pass `rngs={"dropout": key}` to apply).

        A network of `two_times` may be told `next_time`, where a step from `time` ends; None: at `time`.
        """
        widths, (down, up) = self.level_widths(), self.attention_heights()
        num_levels = len(widths)
        self._check(x_t, label, num_levels, {*down, *up}, next_time)
        embedding = nn.silu(self._embedding(time, label, pooled, next_time))

        residual_block = nn.remat(ResidualBlock, static_argnums=(3,)) if self.remat else ResidualBlock
        self_attention = nn.remat(Attention) if self.remat else Attention
        cross_attention = nn.remat(CrossAttention) if self.remat else CrossAttention

        def block(h, level: int, name: str, resample=None):
            settings = self.dropout, self.num_groups, self.dtype, self.norm_eps, self.scale_shift, resample
            return residual_block(widths[level], *settings, self.fused_norms, name=name)(h, embedding, train)

        def attend(h, level: int, name: str, groups: int = self.num_groups):
            head_channels = self.head_channels or h.shape[-1] // self.num_heads
            head_channels = head_channels if isinstance(head_channels, int) else head_channels[level]
            h = self_attention(head_channels, groups, self.dtype, self.norm_eps, self.fused_norms, name=name)(h)
            if context is None:
                return h
            text = cross_attention(head_channels, self.num_groups, self.dtype, self.norm_eps, name=f"{name}_text")
            return text(h, context)

        x_t = 2 * x_t - 1 if self.center_input_sample else x_t
        h = Conv(widths[0] if self.widths else self.channels, dtype=self.dtype, name="conv_in")(x_t)
        skips = [h]
        for level in range(num_levels):
            for i in range(self.num_blocks):
                h = block(h, level, f"down_{level}_block_{i}")
                if h.shape[1] in down:
                    h = attend(h, level, f"down_{level}_attention_{i}")
                skips.append(h)
            if level < num_levels - 1:
                name, padding = f"down_{level}_downsample", self.downsample_padding or None
                if self.resblock_updown:
                    h = block(h, level, name, average_pool)
                else:
                    h = Conv(h.shape[-1], stride=2, padding=padding, dtype=self.dtype, name=name)(h)
                skips.append(h)

        h = block(h, num_levels - 1, "middle_block_0")
        if self.middle_attention:
            groups = (self.middle_groups or self.num_groups) if self.middle_norm else 0
            h = attend(h, num_levels - 1, "middle_attention", groups)
        h = block(h, num_levels - 1, "middle_block_1")

        for level in reversed(range(num_levels)):
            for i in range(self.num_blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up_{level}_block_{i}")
                if h.shape[1] in up:
                    h = attend(h, level, f"up_{level}_attention_{i}")
            if level > 0:
                name = f"up_{level}_upsample"
                if self.resblock_updown:
                    h = block(h, level, name, upsample)
                else:
                    h = Conv(h.shape[-1], dtype=self.dtype, upsampled=True, name=name)(h)

        if self.fused_norms:
            _, h = FusedNorm(self.num_groups, self.norm_eps, name="norm_out")(h)
        else:
            h = nn.silu(GroupNorm(self.num_groups, self.norm_eps, name="norm_out")(h))
        return Conv(self.out_channels or x_t.shape[-1], kernel_init=zeros_init, name="conv_out")(h)

    def level_widths(self) -> list[int]:
        """Returns the channels of every level."""
        return (
            list(self.widths)
            if isinstance(self.widths, Sequence) and self.widths
            else [self.channels * multiplier for multiplier in self.multipliers]
        )

    def attention_heights(self) -> tuple[Sequence[int], Sequence[int]]:
        """Returns the heights at which attention follows every block on the way down, and on the way up."""
        up = self.up_attention_resolutions
        return self.attention_resolutions, up if isinstance(up, Sequence) else self.attention_resolutions

    def _embedding(
        self,
        time: Float[Array, "B"],
        label: Int[Array, "B"] | None,
        pooled: Float[Array, "B P"] | None,
        next_time: Float[Array, "B"] | None,
    ) -> Float[Array, "B E"]:
        """Returns the time embedding through two dense layers, plus those of the step, the text and the class."""
        width = 4 * self.channels
        dense = partial(Dense, width, dtype=self.dtype)

        def embed(time: Float[Array, "B"]) -> Float[Array, "B C"]:
            options = {"freq_shift": self.freq_shift, "flip_sin_to_cos": self.flip_sin_to_cos}
            return sinusoidal_embedding(time * self.time_scale, self.channels, **options)

        embedding = dense(name="time_2")(nn.silu(dense(name="time_1")(embed(time))))
        if self.two_times:
            embedding = embedding + interval_embedding(embed, dense, time, next_time)
        if pooled is not None:
            embedding = embedding + dense(name="pooled")(pooled)
        if self.num_classes is None:
            return embedding
        if label is None:
            label = jnp.full(time.shape, self.num_classes)
        table = nn.Embed(
            self.num_classes + self.null_class,
            width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(1.0),
            name="class_embedding",
        )
        return embedding + table(label)

    def _check(
        self,
        x_t: Array,
        label: Array | None,
        num_levels: int,
        attention_resolutions: set[int],
        next_time: Array | None,
    ) -> None:
        if next_time is not None and not self.two_times:
            raise ValueError("next_time was given to a U-Net of one time: set two_times")
        if self.fused_norms and self.scale_shift:
            raise ValueError("fused_norms has no kernel for the blocks of scale_shift: leave one of them out")
        height, width = x_t.shape[1:3]
        divisor = 2 ** (num_levels - 1)
        if height % divisor or width % divisor:
            raise ValueError(
                f"image size {height}x{width} cannot be halved {num_levels - 1} times for the U-Net's "
                f"{num_levels} levels: use multiples of {divisor}, or fewer multipliers"
            )
        resolutions = [height // 2**level for level in range(num_levels)]
        missing = sorted(attention_resolutions - set(resolutions))
        if missing:
            raise ValueError(
                f"attention_resolutions {missing} are at no level of this U-Net: an image of height {height} has "
                f"levels of {resolutions}"
            )
        if not isinstance(self.head_channels, int | None) and len(self.head_channels) != num_levels:
            raise ValueError(f"head_channels {list(self.head_channels)} must be one width, or {num_levels}: per level")
        if label is not None and self.num_classes is None:
            raise ValueError("labels were given to a U-Net without classes: set num_classes")
        if label is None and self.num_classes is not None and not self.null_class:
            raise ValueError("this U-Net has classes and no null class: labels must be given")
