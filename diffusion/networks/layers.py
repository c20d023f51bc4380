"""Layers that the networks share: convolution, group normalisation, residual block, attention, time embedding.

Parameters are float32 whatever the compute `dtype` is, and so are normalisation statistics and softmax.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from diffusion.networks.attention import attention

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
    """

    channels: int
    size: int = 3
    stride: int = 1
    padding: int | None = None
    dtype: Any = jnp.float32
    kernel_init: Callable = ddpm_init
    use_bias: bool = True

    @nn.compact
    def __call__(self, *parts: Float[Array, "B H W _"]) -> Float[Array, "B h w out"]:
        """Returns the convolution plus the bias, computed in `dtype`, of x, or of parts that are its channels."""
        shape = (self.size, self.size, sum(x.shape[-1] for x in parts), self.channels)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32).astype(self.dtype)
        kernels = jnp.split(kernel, np.cumsum([x.shape[-1] for x in parts])[:-1], axis=2)
        products = (self._convolve(x.astype(self.dtype), kernel) for x, kernel in zip(parts, kernels, strict=True))
        y = reduce(jnp.add, products)
        if not self.use_bias:
            return y
        return y + self.param("bias", zeros_init, (self.channels,), jnp.float32).astype(self.dtype)

    def _convolve(self, x: Float[Array, "B H W C"], kernel: Float[Array, "s s C out"]) -> Float[Array, "B h w out"]:
        if self.size == self.stride == 1:
            # The same as a matrix product, whose gradient by the kernel XLA computes several times faster on CPUs.
            return merged_dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))
        strides = (self.stride, self.stride)
        padding = "SAME" if self.padding is None else ((self.padding, self.padding),) * 2
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


class GroupNorm(nn.Module):
    """Normalises groups of channels of [B, ..., C] with statistics in float32; the output is in `dtype`.

    Reads x once for the statistics and once for the result. On accelerators the backward pass keeps x and two numbers
    for each channel of each example, and computes all else again, which is less work than to read it from memory.

    Attributes:
      activation: of what is normalised, in float32.

    Source: Wu & He 2018.
    """

    num_groups: int
    epsilon: float = 1e-6
    dtype: Any = jnp.float32
    activation: Callable[[Array], Array] | None = None

    @nn.compact
    def __call__(
        self,
        *parts: Float[Array, "B *space _"],
        before: Float[Array, "B C"] | None = None,
        after: tuple[Float[Array, "B C"], Float[Array, "B C"]] | None = None,
        dropped: tuple[Bool[Array, "B *space C"], float] | None = None,
    ) -> Float[Array, "B *space C"]:
        """Returns activation(normalised (x + before) (1 + scale) + shift), with zeros where `dropped` says.

        Args:
          *parts: of x, which are its channels one after the other; they are not joined in memory.
          before: is added to x.
          after: scale and shift.
          dropped: which features are kept, and what they are divided by; see `Dropout`.

        Raises:
          ValueError: the groups do not divide the channels.
        """
        channels = sum(x.shape[-1] for x in parts)
        if channels % self.num_groups:
            raise ValueError(f"{self.num_groups} groups do not divide {channels} channels: choose another num_groups")
        scale = self.param("scale", nn.initializers.ones_init(), (channels,), jnp.float32)
        bias = self.param("bias", zeros_init, (channels,), jnp.float32)
        # Per channel first, then per group, which reads x in the order of memory.
        mean_c, variance_c = (jnp.concatenate(of, axis=-1) for of in zip(*map(moments, parts), strict=True))
        before = jnp.zeros(()) if before is None else before.astype(jnp.float32)
        mean_c = mean_c + before
        groups = (len(mean_c), self.num_groups, channels // self.num_groups)
        mean, variance = moments_of_groups(mean_c.reshape(groups), variance_c.reshape(groups))
        gain = (jax.lax.rsqrt(variance + self.epsilon) * scale.reshape(groups[1:])).reshape(mean_c.shape)
        shift = bias + (before - jnp.broadcast_to(mean, groups).reshape(mean_c.shape)) * gain
        if after is not None:
            more = 1 + after[0].astype(jnp.float32)
            gain, shift = gain * more, shift * more + after[1].astype(jnp.float32)
        ends = np.cumsum([x.shape[-1] for x in parts])[:-1]
        affine = [jnp.split(y, ends, axis=-1) for y in (gain, shift)]

        def finish(parts: Any, affine: Any, dropped: Any) -> Array:
            pieces = []
            for x, gain, shift in zip(parts, *affine, strict=True):
                gain, shift = (jnp.expand_dims(y, range(1, x.ndim - 1)) for y in (gain, shift))
                y = x.astype(jnp.float32) * gain + shift
                pieces.append(y if self.activation is None else self.activation(y))
            y = jnp.concatenate(pieces, axis=-1)
            return (y if dropped is None else jnp.where(dropped[0], y / dropped[1], 0)).astype(self.dtype)

        if is_for_cpu():
            return finish(parts, affine, dropped)
        return jax.checkpoint(partial(apart, finish))(parts, affine, dropped)


def is_for_cpu() -> bool:
    """Returns whether what is traced will run on a CPU: by the mesh where one is known, else as JAX does."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return (device.platform if device is not None else jax.default_backend()) == "cpu"


def moments(x: Float[Array, "B *space C"]) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Returns means and variances over space, float32, of one pass over x.

    E[d^2] - E[d]^2 of differences d from one of the pixels: that of x itself would lose the variance of channels whose
    mean is large. One of n pixels is at most sqrt(n) standard deviations off their mean, so at least 1 / n of E[d^2] is
    left, and mostly about half.
    """
    space = tuple(range(1, x.ndim - 1))
    pixel = jax.lax.stop_gradient(x[(slice(None), *(slice(1) for _ in space))]).astype(jnp.float32)
    d = x.astype(jnp.float32) - pixel
    mean, square = jnp.mean(d, axis=space), jnp.mean(jnp.square(d), axis=space)
    return pixel.reshape(mean.shape) + mean, square - jnp.square(mean)


def moments_of_groups(
    mean_c: Float[Array, "B groups C"], variance_c: Float[Array, "B groups C"]
) -> tuple[Float[Array, "B groups 1"], Float[Array, "B groups 1"]]:
    """Returns means and variances of groups of channels by those of each channel, as `moments`: from the first one."""
    first = jax.lax.stop_gradient(mean_c[..., :1])
    d = mean_c - first
    mean = jnp.mean(d, axis=-1, keepdims=True)
    return first + mean, jnp.mean(variance_c + jnp.square(d), axis=-1, keepdims=True) - jnp.square(mean)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def apart(function: Callable[..., Array], x: Any, affine: Any, fixed: Any) -> Array:
    """Returns function(x, affine, fixed), whose derivatives by x and by `affine` share no results.

    The gradient by `affine` is a sum, and that by x waits for it. What both share would be written to memory, in
    float32, where computing it twice is cheaper.
    """
    return function(x, affine, fixed)


@apart.defjvp
def _apart_jvp(function: Callable[..., Array], primals: Any, tangents: Any) -> tuple[Array, Array]:
    x, affine, fixed = primals
    out, by_x = jax.jvp(lambda x: function(x, affine, fixed), (x,), tangents[:1])
    again = jax.lax.optimization_barrier(x)
    return out, by_x + jax.jvp(lambda affine: function(again, affine, fixed), (affine,), tangents[1:2])[1]


class Dropout(nn.Module):
    """Draws from the key "dropout" which features are kept, all of `shape` with the share 1 - rate, and that share."""

    rate: float

    @nn.compact
    def __call__(self, shape: tuple[int, ...]) -> tuple[Array, float]:
        """Returns bool[shape] and what to divide by."""
        kept = 1.0 - self.rate
        return jax.random.bernoulli(self.make_rng("dropout"), kept, shape), kept


class ResidualBlock(nn.Module):
    """Adds to x: norm, SiLU, conv; plus the embedding, if any; norm, SiLU, dropout, conv (zero at the start).

    Attributes:
      channels: of the output; x passes a convolution of size 1 where it has others.
      scale_shift: the embedding scales and shifts what the second norm returns, instead of being added before it.
      resample: changes the resolution of x, and of what follows the first norm and SiLU, as ADM's blocks do.
    """

    channels: int
    dropout: float
    num_groups: int
    dtype: Any = jnp.float32
    norm_eps: float = 1e-6
    scale_shift: bool = False
    resample: Callable | None = None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B H W _"] | tuple[Float[Array, "B H W _"], ...],
        embedding: Float[Array, "B E"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B h w out"]:
        """Returns the block of x, or of parts of it that are joined along their channels.

        `embedding` is SiLU(time and class embedding), or None; with `train` dropout draws from the key "dropout".
        """
        parts = x if isinstance(x, tuple) else (x,)
        resample = self.resample or (lambda x: x)
        norm = partial(GroupNorm, self.num_groups, self.norm_eps, self.dtype, nn.silu)
        shortcut = resample(parts[0])
        if len(parts) > 1 or shortcut.shape[-1] != self.channels:
            # Before the norm, so that in the backward pass its product is added to the norm's gradient, not before it.
            shortcut = Conv(self.channels, size=1, dtype=self.dtype, name="shortcut")(*map(resample, parts))
        h = resample(norm(name="norm_1")(*parts))
        h = Conv(self.channels, dtype=self.dtype, name="conv_1")(h)
        told: dict[str, Any] = {}
        if embedding is not None:
            width = 2 * self.channels if self.scale_shift else self.channels
            shift = Dense(width, dtype=self.dtype, name="embedding")(embedding)
            told = {"after": tuple(jnp.split(shift, 2, axis=-1))} if self.scale_shift else {"before": shift}
        if train and self.dropout:
            told["dropped"] = Dropout(self.dropout)(h.shape)
        h = norm(name="norm_2")(h, **told)
        h = Conv(self.channels, dtype=self.dtype, kernel_init=zeros_init, name="conv_2")(h)
        return shortcut + h


class Attention(nn.Module):
    """Applies self-attention over all pixels, with its normalisation and residual; starts as the identity.

    Attributes:
      head_channels: width of one head.
      num_groups: of the normalisation; 0 for none.
      norm_eps: epsilon of the normalisation.

    Source: the released DDPM code's `attn_block` (one head there).
    """

    head_channels: int
    num_groups: int
    dtype: Any = jnp.float32
    norm_eps: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W C"]:
        """Returns x + out(attention(norm(x))); raises ValueError when the heads do not divide the channels."""
        batch, height, width, channels = x.shape
        if channels % self.head_channels:
            raise ValueError(f"heads of {self.head_channels} channels do not divide {channels} channels")
        h = GroupNorm(self.num_groups, self.norm_eps, self.dtype, name="norm")(x) if self.num_groups else x
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


def upsample(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Returns x at twice its height and width, every pixel repeated (nearest neighbour)."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


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
    return jax.lax.with_sharding_constraint(x, PartitionSpec(("data", "fsdp"), *free))
