"""Layers that the networks share: convolution, group normalisation, attention, dropout, time embedding.

Parameters are float32 whatever the compute `dtype` is, and so are normalisation statistics and softmax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Weights of the released DDPM code. Its "zero" layers have scale 1e-10; here they are exactly zero.
ddpm_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
zeros_init = nn.initializers.zeros_init()


def merged_dot_general(
    x: Float[Array, "..."], kernel: Any, dimension_numbers: Any, **options: Any
) -> Float[Array, "..."]:
    """`jax.lax.dot_general` of x's last axes with the kernel's first, as one product over all of x's other axes.

    It says the same. But the gradient by the kernel of a product with several leading axes makes XLA on a CPU transpose
    what comes back, element by element, which takes several times as long as the product itself.

    For the `dot_general` of Flax's `Dense` and `DenseGeneral`.
    """
    count = len(dimension_numbers[0][0])
    batch, space = x.shape[:-count], x.shape[-count:]
    numbers = ((tuple(range(1, count + 1)), tuple(range(count))), ((), ()))
    y = jax.lax.dot_general(x.reshape(-1, *space), kernel, numbers, **options)
    return y.reshape(*batch, *y.shape[1:])


Dense = partial(nn.Dense, kernel_init=ddpm_init, dot_general=merged_dot_general)


def sinusoidal_embedding(time: Float[Array, "B"], width: int, longest: float = 10_000.0) -> Float[Array, "B width"]:
    """Sines, then cosines, of `time` at `width / 2` frequencies from 1 down to 1 / `longest`.

    float32 whatever the compute dtype: bfloat16 has no 750, and would give a network 752 instead.
    Source: the released DDPM code (after Vaswani et al. 2017, section 3.5); `width` must be even and at least 4.
    """
    if width % 2 or width < 4:
        raise ValueError(f"the time embedding needs an even width of at least 4, got {width}")
    frequency = np.exp(-np.log(longest) * np.linspace(0.0, 1.0, width // 2)).astype(np.float32)
    angle = time.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Conv(nn.Module):
    """Convolution with a square kernel over [B, H, W, C].

    A stride of 2 pads below and to the right only, as the released DDPM code (TensorFlow's SAME) and diffusers do.
    """

    channels: int
    size: int = 3
    stride: int = 1
    dtype: Any = jnp.float32
    kernel_init: Callable = ddpm_init

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B h w out"]:
        """Convolves and adds the bias, in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.channels), jnp.float32)
        bias = self.param("bias", zeros_init, (self.channels,), jnp.float32)
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.size == self.stride == 1:
            # A matrix product says the same, and XLA's gradient of it by the kernel is several times faster on CPUs.
            y = merged_dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
        else:
            strides = (self.stride, self.stride)
            y = jax.lax.conv_general_dilated(x, kernel, strides, "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        return y + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Group normalisation (Wu & He 2018) over [B, ..., C] with statistics in float32; the output is in `dtype`."""

    num_groups: int
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
        """Normalises; raises ValueError when the groups do not divide the channels."""
        channels = x.shape[-1]
        if channels % self.num_groups:
            raise ValueError(f"{self.num_groups} groups do not divide {channels} channels: choose another num_groups")
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", zeros_init, (channels,), jnp.float32)
        x = x.astype(jnp.float32)
        space = tuple(range(1, x.ndim - 1))
        # Per channel first, then per group: it reads x in the order it lies in memory. The mean is taken away before
        # squaring: E[x^2] - E[x]^2 would lose the variance of channels whose mean is large.
        mean_c = jnp.mean(x, axis=space, keepdims=True)
        variance_c = jnp.mean(jnp.square(x - mean_c), axis=space, keepdims=True)
        groups = (*mean_c.shape[:-1], self.num_groups, channels // self.num_groups)
        mean = jnp.mean(mean_c.reshape(groups), axis=-1, keepdims=True)
        variance = jnp.mean(variance_c.reshape(groups) + jnp.square(mean_c.reshape(groups) - mean), -1, keepdims=True)
        gain = jax.lax.rsqrt(variance + self.epsilon) * scale.reshape(groups[-2:])
        shift = bias.reshape(groups[-2:]) - mean * gain
        return (x * gain.reshape(mean_c.shape) + shift.reshape(mean_c.shape)).astype(self.dtype)


class Attention(nn.Module):
    """Self-attention over all pixels with its normalisation and residual; starts as the identity.

    `head_channels` is the width of one head. Source: the released DDPM code's `attn_block` (one head there).
    """

    head_channels: int
    num_groups: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """x + out(attention(norm(x))); raises ValueError when the heads do not divide the channels."""
        batch, height, width, channels = x.shape
        if channels % self.head_channels:
            raise ValueError(f"heads of {self.head_channels} channels do not divide {channels} channels")
        h = GroupNorm(self.num_groups, dtype=self.dtype, name="norm")(x)
        heads = (batch, height * width, channels // self.head_channels, self.head_channels)
        query, key, value = (
            Dense(channels, dtype=self.dtype, name=name)(h).reshape(heads) for name in ("query", "key", "value")
        )
        h = jax.nn.dot_product_attention(query, key, value).reshape(x.shape)
        return x + Dense(channels, dtype=self.dtype, kernel_init=zeros_init, name="out")(h)


def upsample(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Doubles height and width by repeating every pixel (nearest neighbour)."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)
