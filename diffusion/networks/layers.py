"""Layers that the networks share: convolution, group normalisation, residual block, attention, time embedding.

Parameters are float32 whatever the compute `dtype` is, and so are normalisation statistics and softmax.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from diffusion.networks.attention import attention
from diffusion.networks.convolution import convolve
from diffusion.networks.fused_norm import BATCH, norm_silu_dropout
from diffusion.networks.group_norm import Plan, group_norm
from diffusion.networks.upsampling import convolve_upsampled, upsample

# Weights of the released DDPM code. Its "zero" layers have scale 1e-10; here they are exactly zero.
ddpm_init = nn.initializers.variance_scaling(1.0, "fan_avg", "uniform")
zeros_init = nn.initializers.zeros_init()


def merged_dot_general(
    x: Float[Array, "..."], kernel: Any, dimension_numbers: Any, **options: Any
) -> Float[Array, "..."]:
    """Returns `jax.lax.dot_general` of x's last axes with the kernel's first, as one product over x's other axes.

    The result is the same. But for a product with several leading axes the gradient by the kernel makes XLA on a CPU
    transpose element by element, which takes several times as long as the product itself.

    For the `dot_general` of Flax's `Dense` and `DenseGeneral`.
    """
    count = len(dimension_numbers[0][0])
    batch, space = x.shape[:-count], x.shape[-count:]
    numbers = ((tuple(range(1, count + 1)), tuple(range(count))), ((), ()))
    product = partial(jax.lax.dot_general, dimension_numbers=numbers, **options)
    x = x.reshape(-1, *space)
    if x.dtype == kernel.dtype == jnp.bfloat16 and not options.get("preferred_element_type"):
        # XLA on a CPU multiplies bfloat16 natively only where the result is float32; else it converts both, and keeps
        # a copy of all weights in float32 where they do not change in a loop, as in sampling.
        y = jax.lax.platform_dependent(x, kernel, cpu=partial(_native_product, product), default=product)
    else:
        y = product(x, kernel)
    return y.reshape(*batch, *y.shape[1:])


def _native_product(product: Any, x: Array, kernel: Array) -> Array:
    return product(x, kernel, preferred_element_type=jnp.float32).astype(x.dtype)


Dense = partial(nn.Dense, kernel_init=ddpm_init, dot_general=merged_dot_general)


def sinusoidal_embedding(
    time: Float[Array, "B"], width: int, longest: float = 10_000.0, freq_shift: int = 1, flip_sin_to_cos: bool = False
) -> Float[Array, "B width"]:
    """Returns sines, then cosines, of `time` at `width / 2` geometrically spaced frequencies, the first of them 1.

    Computed in float32 whatever the compute dtype: bfloat16 has no 750, and would give a network 752 instead.

    Args:
      time: in the units that the network was trained with.
      width: even and at least 4.
      longest: frequency k is longest^(-k / (width / 2 - freq_shift)).
      freq_shift: 1 ends at 1 / `longest`, as DDPM does; 0 ends one step before it, as ADM does.
      flip_sin_to_cos: puts the cosines first, as ADM does.

    Raises:
      ValueError: `width` is odd or below 4.

    Source: the released code of DDPM and ADM (after Vaswani et al. 2017, section 3.5).
    """
    if width % 2 or width < 4:
        raise ValueError(f"the time embedding needs an even width of at least 4, got {width}")
    half = width // 2
    # One linspace for both: for freq_shift 1 its end is exactly 1, and rounding decides which bits a network sees.
    exponent = np.linspace(0.0, (half - 1) / (half - freq_shift), half)
    frequency = np.exp(-np.log(longest) * exponent).astype(np.float32)
    angle = time.astype(jnp.float32)[:, None] * frequency
    parts = [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class Conv(nn.Module):
    """Convolves [B, H, W, C] with a square kernel.

    Attributes:
      padding: pixels of zeros on every side. None pads as TensorFlow's SAME: equally for a stride of 1, and below and
        to the right only for a stride of 2 on an even size (the released DDPM code).
      use_bias: whether a bias is added.
      upsampled: what is convolved is x at twice its size, see `upsample`; with a kernel of 3x3 and a stride of 1.

    Raises:
      ValueError: `upsampled` with another size, stride or padding.
    """

    channels: int
    size: int = 3
    stride: int = 1
    padding: int | None = None
    dtype: Any = jnp.float32
    kernel_init: Callable = ddpm_init
    use_bias: bool = True
    upsampled: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"], apart: bool = False) -> Any:
        """Returns the convolution plus the bias, computed in `dtype`; or both, not added, if asked `apart`."""
        kernel = self.param("kernel", self.kernel_init, (self.size, self.size, x.shape[-1], self.channels), jnp.float32)
        x, kernel = jnp.asarray(x, self.dtype), jnp.asarray(kernel, self.dtype)
        if self.upsampled:
            if (self.size, self.stride, self.padding) != (3, 1, None):
                raise ValueError("an upsampled image is convolved with a 3x3 kernel, a stride of 1, and padded as SAME")
            y = convolve_upsampled(x, kernel)
        elif self.size == self.stride == 1:
            # The same as a matrix product, whose gradient by the kernel XLA computes several times faster on CPUs.
            y = merged_dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
        else:
            side = self.padding
            padding = "SAME" if side is None else ((side, side), (side, side))
            y = convolve(x, kernel, self.stride, padding)
        bias = self.param("bias", zeros_init, (self.channels,), jnp.float32) if self.use_bias else None
        if apart:
            return y, bias
        return y if bias is None else y + bias.astype(self.dtype)


class GroupNorm(nn.Module):
    """Normalises groups of channels of [B, ..., C] with statistics in float32; the output is in `dtype`.

    Source: Wu & He 2018.
    """

    num_groups: int
    epsilon: float = 1e-6
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "B *space C"]) -> Float[Array, "B *space C"]:
        """Returns x normalised; raises ValueError when the groups do not divide the channels."""
        scale, bias = norm_params(self, x.shape[-1], self.num_groups)
        return group_norm(x.astype(jnp.float32), scale, bias, self.num_groups, self.epsilon).astype(self.dtype)


class FusedNorm(nn.Module):
    """`GroupNorm` with what surrounds it, as one kernel on GPUs; its parameters are those of `GroupNorm`.

    Attributes:
      silu: whether SiLU follows.
    """

    num_groups: int
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    silu: bool = True

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B *space C"],
        shift: Float[Array, "#B C"] | None = None,
        rate: float = 0.0,
        keep: Bool[Array, "B *space C"] | None = None,
    ) -> tuple[Float[Array, "B *space C"], Float[Array, "B *space C"]]:
        """Returns x, to go past it, and what becomes of x + shift; dropout of a rate lets pass what `keep` has True."""
        scale, bias = norm_params(self, x.shape[-1], self.num_groups)
        shift = jnp.zeros((1, x.shape[-1])) if shift is None else shift
        return norm_silu_dropout(
            x, shift, scale, bias, keep, Plan(self.num_groups, self.epsilon, self.silu, rate, self.dtype)
        )


class DropoutMask(nn.Module):
    """Draws what Flax's `Dropout` of the same name lets pass."""

    rate: float

    @nn.compact
    def __call__(self, shape: tuple[int, ...]) -> Bool[Array, "..."]:
        """Returns True with the probability 1 - rate, drawn from the key "dropout"."""
        return jax.random.bernoulli(self.make_rng("dropout"), 1.0 - self.rate, shape)


def norm_params(module: nn.Module, channels: int, num_groups: int) -> tuple[Any, Any]:
    """Returns the scale and the bias [C] of a module that normalises; raises ValueError for groups that do not fit."""
    if channels % num_groups:
        raise ValueError(f"{num_groups} groups do not divide {channels} channels: choose another num_groups")
    scale = module.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
    return scale, module.param("bias", zeros_init, (channels,), jnp.float32)


class ResidualBlock(nn.Module):
    """Adds to x: norm, SiLU, conv; plus the embedding, if any; norm, SiLU, dropout, conv (zero at the start).

    Attributes:
      channels: of the output; x passes a convolution of size 1 where it has others.
      scale_shift: the embedding scales and shifts what the second norm returns, instead of being added before it.
      resample: changes the resolution of x, and of what follows the first norm and SiLU, as ADM's blocks do.
      fused: norm, SiLU and dropout are `FusedNorm`; not with scale_shift, resample or without an embedding.
    """

    channels: int
    dropout: float
    num_groups: int
    dtype: Any = jnp.float32
    norm_eps: float = 1e-6
    scale_shift: bool = False
    resample: Callable | None = None
    fused: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "B H W C"], embedding: Float[Array, "B E"] | None = None, train: bool = False
    ) -> Float[Array, "B h w out"]:
        """`embedding` is SiLU(time and class embedding), or None; with `train` dropout draws from the key "dropout"."""
        if self.fused and embedding is not None and self.resample is None and not self.scale_shift:
            x, h = self._fused(x, embedding, self.dropout if train else 0.0)
        else:
            x, h = self._in_steps(x, embedding, train)
        h = Conv(self.channels, dtype=self.dtype, kernel_init=zeros_init, name="conv_2")(h)
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, size=1, dtype=self.dtype, name="shortcut")(x)
        return x + h

    def _in_steps(self, x: Array, embedding: Array | None, train: bool) -> tuple[Array, Array]:
        h = nn.silu(GroupNorm(self.num_groups, self.norm_eps, self.dtype, name="norm_1")(x))
        upsampled = self.resample is upsample
        if self.resample is not None:
            x, h = self.resample(x), h if upsampled else self.resample(h)
        h = Conv(self.channels, dtype=self.dtype, upsampled=upsampled, name="conv_1")(h)
        norm_2 = GroupNorm(self.num_groups, self.norm_eps, self.dtype, name="norm_2")
        if embedding is None:
            h = norm_2(h)
        else:
            width = 2 * self.channels if self.scale_shift else self.channels
            shift = Dense(width, dtype=self.dtype, name="embedding")(embedding)[:, None, None]
            if self.scale_shift:
                scale, shift = jnp.split(shift, 2, axis=-1)
                h = norm_2(h) * (1 + scale) + shift
            else:
                h = norm_2(h + shift)
        return x, nn.Dropout(self.dropout, deterministic=not train)(nn.silu(h))

    def _fused(self, x: Array, embedding: Array, rate: float) -> tuple[Array, Array]:
        norm = partial(FusedNorm, self.num_groups, self.norm_eps, self.dtype)
        x, h = norm(name="norm_1")(x)
        h, bias = Conv(self.channels, dtype=self.dtype, name="conv_1")(h, apart=True)
        shift = Dense(self.channels, dtype=self.dtype, name="embedding")(embedding) + bias
        keep = DropoutMask(rate, name="Dropout_0")(h.shape) if rate else None
        return x, norm(name="norm_2")(h, shift, rate, keep)[1]


class Attention(nn.Module):
    """Applies self-attention over all pixels, with its normalisation and residual; starts as the identity.

    Attributes:
      head_channels: width of one head.
      num_groups: of the normalisation; 0 for none.
      norm_eps: epsilon of the normalisation.
      fused: the normalisation is `FusedNorm`.

    Source: the released DDPM code's `attn_block` (one head there).
    """

    head_channels: int
    num_groups: int
    dtype: Any = jnp.float32
    norm_eps: float = 1e-6
    fused: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Returns x + out(attention(norm(x))); raises ValueError when the heads do not divide the channels."""
        batch, height, width, channels = x.shape
        if channels % self.head_channels:
            raise ValueError(f"heads of {self.head_channels} channels do not divide {channels} channels")
        h = x
        if self.num_groups and self.fused:
            x, h = FusedNorm(self.num_groups, self.norm_eps, self.dtype, silu=False, name="norm")(x)
        elif self.num_groups:
            h = GroupNorm(self.num_groups, self.norm_eps, self.dtype, name="norm")(x)
        heads = (batch, height * width, channels // self.head_channels, self.head_channels)
        query, key, value = (
            Dense(channels, dtype=self.dtype, name=name)(h).reshape(heads) for name in ("query", "key", "value")
        )
        h = attention(query, key, value).reshape(x.shape)
        return x + Dense(channels, dtype=self.dtype, kernel_init=zeros_init, name="out")(h)


def interval_embedding(
    embed: Callable[[Array], Array], dense: Callable[..., nn.Module], time: Float[Array, "B"], next_time: Any
) -> Float[Array, "B E"]:
    """Returns what is added to the embedding of `time` for a step from there to `next_time`: 0 at first.

    So a network of one time, with these layers added, begins as what it was: as a flow model, u(z, r, t) = v(z, t).

    Args:
      embed: an interval -> its sines and cosines.
      dense: (name=..., **options) -> a dense layer of the embedding's width.
      time: where the step begins.
      next_time: where it ends, [B]; None: there too, where an average velocity is the velocity.
    """
    interval = jnp.zeros_like(time) if next_time is None else time - next_time
    h = nn.silu(dense(name="interval_1")(embed(interval)))
    return dense(name="interval_2", kernel_init=zeros_init)(h)


def average_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Returns x at half its height and width (both even), every pixel the mean of four."""
    batch, height, width, channels = x.shape
    return jnp.mean(x.reshape(batch, height // 2, 2, width // 2, 2, channels), axis=(2, 4))


def cut_along_batch(x: Float[Array, "B *shape"]) -> Float[Array, "B *shape"]:
    """Returns x, cut along its first axis over the mesh's "data" and "fsdp" where a mesh that has "fsdp" is known.

    Weights that are cut over "fsdp" are then gathered where they are used. Left alone, the compiler may as well gather
    the batch, above all inside a loop.
    """
    sizes = jax.sharding.get_abstract_mesh().shape
    if sizes.get("fsdp", 1) == 1:
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH, *free))
