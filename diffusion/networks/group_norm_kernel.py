"""Group normalisation, SiLU and dropout as one kernel for GPUs, and its gradient as another (Pallas, by Triton).

A program takes one image and some of its groups. It reads them twice, the second time out of the GPU's cache: first
for sums over the pixels, then for what it writes. The formulas are `group_norm.in_steps`'s, in float32.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton
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
    """The part of the images [B, P, C] that a program takes, and its loops over pixels."""

    def __init__(self, pixels: int, channels: int, groups: int):
        self.pixels, self.size = pixels, channels // groups
        width = channels_of(channels, groups)
        self.column = jnp.arange(pl.next_power_of_2(width))  # Triton's arrays have powers of two
        self.inside = self.column < width
        self.channel = pl.program_id(1) * width + self.column
        self.rows = min(PIXELS, pl.next_power_of_2(pixels))

    def sums(self, terms: Callable[[Any, Array], tuple[Array, ...]], count: int) -> tuple[Array, ...]:
        """Returns the sums over all pixels of `count` terms, which are given where pixels are, and a mask of them."""

        def add(i: Array, totals: tuple[Array, ...]) -> tuple[Array, ...]:
            at, mask = self._pixels(i)
            return tuple(total + jnp.where(mask, x, 0.0) for total, x in zip(totals, terms(at, mask), strict=True))

        # Threads meet once, after the loop: each has sums of its own until then.
        zero = jnp.zeros((self.rows, *self.column.shape), jnp.float32)
        totals = jax.lax.fori_loop(0, pl.cdiv(self.pixels, self.rows), add, (zero,) * count)
        return tuple(total.sum(0) for total in totals)

    def each(self, write: Callable[[Any, Array], None]) -> None:
        """Calls `write` for all pixels, with where they are, and a mask of them."""
        jax.lax.fori_loop(0, pl.cdiv(self.pixels, self.rows), lambda i, _: write(*self._pixels(i)), None)

    def mean_of_groups(self, x: Float[Array, "C"]) -> Float[Array, "C"]:
        """Returns the mean of each channel's group."""
        group = self.column // self.size
        share = jnp.where((group[:, None] == group) & self.inside, 1.0 / self.size, 0.0)
        return jnp.sum(share * x, axis=1)

    def load(self, ref: Any) -> Float[Array, "C"]:
        """Returns the numbers of an array [C]."""
        return triton.load(ref.at[self.channel], mask=self.inside, other=0.0)

    def load_row(self, ref: Any) -> Float[Array, "C"]:
        """Returns the image's numbers of an array [1, C]."""
        return triton.load(ref.at[0, self.channel], mask=self.inside, other=0.0)

    def store_row(self, ref: Any, x: Float[Array, "C"]) -> None:
        """Writes the image's numbers of an array [1, C]."""
        triton.store(ref.at[0, self.channel], x, mask=self.inside)

    def _pixels(self, i: Array) -> tuple[Any, Array]:
        pixel = i * self.rows + jnp.arange(self.rows)
        return (0, pixel[:, None], self.channel[None, :]), (pixel < self.pixels)[:, None] & self.inside


def read(ref: Any, at: Any, mask: Array) -> Float[Array, "P C"]:
    """Returns some pixels of an array [1, P, C], in float32."""
    return triton.load(ref.at[at], mask=mask, other=0).astype(jnp.float32)


def forward_kernel(plan: Plan, x_ref: Any, shift_ref: Any, scale_ref: Any, bias_ref: Any, *refs: Any) -> None:
    """Writes the output of a program's image and channels, and its groups' moments; see `forward`."""
    *keep, y_ref, mean_ref, rstd_ref = refs
    _, pixels, channels = x_ref.shape
    tile = Tile(pixels, channels, plan.num_groups)
    shift = tile.load_row(shift_ref)
    # Sums of differences from the first pixel: E[x^2] - E[x]^2 would lose the variance where the mean is large.
    pixel = triton.load(x_ref.at[0, 0, tile.channel], mask=tile.inside, other=0).astype(jnp.float32)

    def moments(at: Any, mask: Array) -> tuple[Array, Array]:
        difference = read(x_ref, at, mask) - pixel
        return difference, jnp.square(difference)

    first, second = (total / tile.pixels for total in tile.sums(moments, 2))
    mean_c, variance_c = pixel + first + shift, second - jnp.square(first)
    mean = tile.mean_of_groups(mean_c)
    variance = tile.mean_of_groups(variance_c + jnp.square(mean_c - mean))
    rstd = jax.lax.rsqrt(variance + plan.epsilon)
    gain = rstd * tile.load(scale_ref)
    offset = tile.load(bias_ref) + (shift - mean) * gain

    def write(at: Any, mask: Array) -> None:
        y = read(x_ref, at, mask) * gain + offset
        y = y * jax.nn.sigmoid(y) if plan.silu else y
        y = jnp.where(read(keep[0], at, mask) > 0, y * (1 / (1 - plan.rate)), 0.0) if keep else y
        triton.store(y_ref.at[at], y.astype(y_ref.dtype), mask=mask)

    tile.each(write)
    tile.store_row(mean_ref, mean)
    tile.store_row(rstd_ref, rstd)


def gradient_kernel(plan: Plan, has_past: bool, *refs: Any) -> None:
    """Writes the gradients of a program's image and channels; see `gradients`."""
    x_ref, shift_ref, scale_ref, bias_ref, mean_ref, rstd_ref, dy_ref, *others = refs
    *others, dx_ref, dshift_ref, dscale_ref, dbias_ref = others
    past_ref = others.pop() if has_past else None
    keep_ref = others.pop() if others else None
    _, pixels, channels = x_ref.shape
    tile = Tile(pixels, channels, plan.num_groups)
    scale, bias, rstd = tile.load(scale_ref), tile.load(bias_ref), tile.load_row(rstd_ref)
    centre = tile.load_row(shift_ref) - tile.load_row(mean_ref)

    def parts(at: Any, mask: Array) -> tuple[Array, Array]:
        """Returns what was normalised, and the gradient by what scale and bias made of it."""
        normal, slope = (read(x_ref, at, mask) + centre) * rstd, read(dy_ref, at, mask)
        if keep_ref is not None:
            slope = jnp.where(read(keep_ref, at, mask) > 0, slope * (1 / (1 - plan.rate)), 0.0)
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
        dx = dx + read(past_ref, at, mask) if past_ref is not None else dx
        triton.store(dx_ref.at[at], dx.astype(dx_ref.dtype), mask=mask)

    tile.each(write)
    tile.store_row(dscale_ref, dscale)
    tile.store_row(dbias_ref, dbias)
    tile.store_row(dshift_ref, rstd * (scale * dbias - tile.pixels * along_mean - normals * along_normal))


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
    batch, _, channels = arrays[0].shape
    specs = {
        1: lambda x: pl.BlockSpec(x.shape, lambda b, c: (0,)),
        2: lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda b, c: (b, 0)),
        3: lambda x: pl.BlockSpec((1, *x.shape[1:]), lambda b, c: (b, 0, 0)),
    }
    return pl.pallas_call(
        kernel,
        outputs,
        grid=(batch, channels // channels_of(channels, plan.num_groups)),
        in_specs=[specs[x.ndim](x) for x in arrays],
        out_specs=[specs[x.ndim](x) for x in outputs],
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=WARPS, num_stages=2),
        name=kernel.func.__name__,
    )(*arrays)
