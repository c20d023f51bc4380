"""Group normalisation, SiLU and dropout as one kernel for GPUs, and its gradient as another (Pallas, by Triton).

A program takes one image and some of its groups. It reads them twice, the second time out of the GPU's cache: first
for sums over the pixels, then for what it writes. The formulas are `group_norm.in_steps`'s, in float32.

JAX 0.11 still has Pallas's way to Triton, and warns that a later version will not: then these kernels are to be written
for Mosaic GPU, or called through jax_triton.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from diffusion.networks.group_norm import Plan

PIXELS = 32  # that a program reads at once
CHANNELS = 64  # of a program, at least where there are as many
WARPS = 8


def channels_of(channels: int, groups: int) -> int:
    """Returns how many channels a program takes: whole groups that divide them, at least `CHANNELS` if there are."""
    size = channels // groups
    return next(n for n in range(size, channels + 1, size) if channels % n == 0 and n >= min(CHANNELS, channels))


class Tile:
    """The part of the images [B, P, C] that a program takes: its loops over pixels, what it reads and writes."""

    def __init__(self, pixels: int, channels: int, groups: int):
        from jax.experimental import pallas
        from jax.experimental.pallas import triton

        self.memory: Any = triton
        self.pixels, self.size = pixels, channels // groups
        width = channels_of(channels, groups)
        self.column = jnp.arange(power_of_two(width))
        self.inside = self.column < width
        self.channel = pallas.program_id(1) * width + self.column
        self.rows = min(PIXELS, power_of_two(pixels))
        self.turns = -(-pixels // self.rows)

    def sums(self, terms: Callable[[Any, Array], tuple[Array, ...]], count: int) -> tuple[Array, ...]:
        """Returns the sums over all pixels of `count` terms, which are given where pixels are, and a mask of them."""

        def add(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            at, mask = self._pixels(i)
            return tuple(total + jnp.where(mask, x, 0.0) for total, x in zip(totals, terms(at, mask), strict=True))

        # Threads meet once, after the loop: each has sums of its own until then.
        zero = jnp.zeros((self.rows, *self.column.shape), jnp.float32)
        totals = jax.lax.fori_loop(0, self.turns, add, (zero,) * count)
        return tuple(total.sum(0) for total in totals)

    def each(self, write: Callable[[Any, Array], None]) -> None:
        """Calls `write` for all pixels, with where they are, and a mask of them."""
        jax.lax.fori_loop(0, self.turns, lambda i, _: write(*self._pixels(i)), None)

    def mean_of_groups(self, x: Float[Array, "C"]) -> Float[Array, "C"]:
        """Returns the mean of each channel's group."""
        group = self.column // self.size
        share = jnp.where((group[:, None] == group) & self.inside, 1.0 / self.size, 0.0)
        return jnp.sum(share * x, axis=1)

    def read(self, ref: Any, at: Any, mask: Array) -> Float[Array, "P C"]:
        """Returns pixels of an array [1, P, C], in float32."""
        return self.memory.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)

    def write(self, ref: Any, at: Any, mask: Array, x: Float[Array, "P C"]) -> None:
        """Writes pixels of an array [1, P, C]."""
        self.memory.store(ref.at[at], x.astype(ref.dtype), mask=mask)

    def read_row(self, ref: Any, *at: int) -> Float[Array, "C"]:
        """Returns the program's channels of an array [C], or of the row `at` of another, in float32."""
        return self.memory.load(ref.at[(*at, self.channel)], mask=self.inside, other=0).astype(jnp.float32)

    def write_row(self, ref: Any, x: Float[Array, "C"]) -> None:
        """Writes the program's channels of an array [1, C]."""
        self.memory.store(ref.at[0, self.channel], x, mask=self.inside)

    def _pixels(self, i: Array) -> tuple[Any, Array]:
        pixel = i * self.rows + jnp.arange(self.rows)
        return (0, pixel[:, None], self.channel[None, :]), (pixel < self.pixels)[:, None] & self.inside


def power_of_two(size: int) -> int:
    """Returns the least power of two that is not below `size`: the sizes of Triton's arrays."""
    return 1 << (size - 1).bit_length()


def forward_kernel(plan: Plan, x_ref: Any, shift_ref: Any, scale_ref: Any, bias_ref: Any, *refs: Any) -> None:
    """Writes the output of a program's image and channels, and its groups' moments; see `forward`."""
    *keep, y_ref, mean_ref, rstd_ref = refs
    _, pixels, channels = x_ref.shape
    tile = Tile(pixels, channels, plan.num_groups)
    shift = tile.read_row(shift_ref, 0)
    # Sums of differences from the first pixel: E[x^2] - E[x]^2 would lose the variance where the mean is large.
    pixel = tile.read_row(x_ref, 0, 0)

    def moments(at: Any, mask: Array) -> tuple[Array, Array]:
        difference = tile.read(x_ref, at, mask) - pixel
        return difference, jnp.square(difference)

    first, second = (total / tile.pixels for total in tile.sums(moments, 2))
    mean_c, variance_c = pixel + first + shift, second - jnp.square(first)
    mean = tile.mean_of_groups(mean_c)
    variance = tile.mean_of_groups(variance_c + jnp.square(mean_c - mean))
    rstd = jax.lax.rsqrt(variance + plan.epsilon)
    gain = rstd * tile.read_row(scale_ref)
    offset = tile.read_row(bias_ref) + (shift - mean) * gain

    def write(at: Any, mask: Array) -> None:
        y = tile.read(x_ref, at, mask) * gain + offset
        y = y * jax.nn.sigmoid(y) if plan.silu else y
        y = jnp.where(tile.read(keep[0], at, mask) > 0, y * plan.gain, 0.0) if keep else y
        tile.write(y_ref, at, mask, y)

    tile.each(write)
    tile.write_row(mean_ref, mean)
    tile.write_row(rstd_ref, rstd)


def gradient_kernel(plan: Plan, has_past: bool, *refs: Any) -> None:
    """Writes the gradients of a program's image and channels; see `gradients`."""
    x_ref, shift_ref, scale_ref, bias_ref, mean_ref, rstd_ref, dy_ref, *others = refs
    *others, dx_ref, dshift_ref, dscale_ref, dbias_ref = others
    past_ref = others.pop() if has_past else None
    keep_ref = others.pop() if others else None
    _, pixels, channels = x_ref.shape
    tile = Tile(pixels, channels, plan.num_groups)
    scale, bias, rstd = tile.read_row(scale_ref), tile.read_row(bias_ref), tile.read_row(rstd_ref, 0)
    centre = tile.read_row(shift_ref, 0) - tile.read_row(mean_ref, 0)

    def parts(at: Any, mask: Array) -> tuple[Array, Array]:
        """Returns what was normalised, and the gradient by what scale and bias made of it."""
        normal, slope = (tile.read(x_ref, at, mask) + centre) * rstd, tile.read(dy_ref, at, mask)
        if keep_ref is not None:
            slope = jnp.where(tile.read(keep_ref, at, mask) > 0, slope * plan.gain, 0.0)
        if plan.silu:
            h = normal * scale + bias
            s = jax.nn.sigmoid(h)
            slope = slope * s * (1 + h * (1 - s))
        return normal, slope

    def terms(at: Any, mask: Array) -> tuple[Array, Array, Array]:
        normal, slope = parts(at, mask)
        return slope, slope * normal, normal

    dbias, dscale, normals = tile.sums(terms, 3)
    along_mean = tile.mean_of_groups(scale * dbias) / tile.pixels
    along_normal = tile.mean_of_groups(scale * dscale) / tile.pixels

    def write(at: Any, mask: Array) -> None:
        normal, slope = parts(at, mask)
        dx = rstd * (scale * slope - along_mean - normal * along_normal)
        dx = dx + tile.read(past_ref, at, mask) if past_ref is not None else dx
        tile.write(dx_ref, at, mask, dx)

    tile.each(write)
    tile.write_row(dscale_ref, dscale)
    tile.write_row(dbias_ref, dbias)
    tile.write_row(dshift_ref, rstd * (scale * dbias - tile.pixels * along_mean - normals * along_normal))


def forward(
    plan: Plan,
    x: Float[Array, "B P C"],
    shift: Float[Array, "B C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    *keep: UInt8[Array, "B P C"],
    interpret: bool = False,
) -> tuple[Float[Array, "B P C"], Float[Array, "B C"], Float[Array, "B C"]]:
    """Returns the output, and for each image and channel the mean of its group and 1 / its standard deviation.

    Args:
      plan: what is computed.
      x: images.
      shift: added to their pixels.
      scale: of what was normalised.
      bias: added to that.
      *keep: what dropout lets pass, if there is dropout.
      interpret: computes it anywhere, slowly, in JAX.
    """
    row = jax.ShapeDtypeStruct(shift.shape, jnp.float32)
    outputs = (jax.ShapeDtypeStruct(x.shape, plan.dtype), row, row)
    return _call(partial(forward_kernel, plan), plan, outputs, interpret, x, shift, scale, bias, *keep)


def gradients(
    plan: Plan,
    has_past: bool,
    x: Float[Array, "B P C"],
    shift: Float[Array, "B C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    mean: Float[Array, "B C"],
    rstd: Float[Array, "B C"],
    dy: Float[Array, "B P C"],
    *others: Array,
    interpret: bool = False,
) -> tuple[Float[Array, "B P C"], Float[Array, "B C"], Float[Array, "B C"], Float[Array, "B C"]]:
    """Returns the gradients by x, and those by shift, scale and bias of each image alone.

    Args:
      plan: what is computed.
      has_past: whether a gradient is given that is added to that by x.
      x: as in `forward`.
      shift, scale, bias: the same.
      mean, rstd: what `forward` returned.
      dy: the gradient by the output.
      *others: `forward`'s keep, if there is dropout; then the gradient to be added.
      interpret: see `forward`.
    """
    row = jax.ShapeDtypeStruct(shift.shape, jnp.float32)
    outputs = (jax.ShapeDtypeStruct(x.shape, x.dtype), row, row, row)
    kernel = partial(gradient_kernel, plan, has_past)
    return _call(kernel, plan, outputs, interpret, x, shift, scale, bias, mean, rstd, dy, *others)


def _call(kernel: Any, plan: Plan, outputs: tuple[Any, ...], interpret: bool, *arrays: Array) -> Any:
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    batch, _, channels = arrays[0].shape
    specs = {
        1: lambda x: pallas.BlockSpec(x.shape, lambda b, c: (0,)),
        2: lambda x: pallas.BlockSpec((1, *x.shape[1:]), lambda b, c: (b, 0)),
        3: lambda x: pallas.BlockSpec((1, *x.shape[1:]), lambda b, c: (b, 0, 0)),
    }
    return pallas.pallas_call(
        kernel,
        outputs,
        grid=(batch, channels // channels_of(channels, plan.num_groups)),
        in_specs=[specs[x.ndim](x) for x in arrays],
        out_specs=[specs[x.ndim](x) for x in outputs],
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        name=kernel.func.__name__,
    )(*arrays)
