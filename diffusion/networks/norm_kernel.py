"""Group normalisation, SiLU and dropout as one kernel for GPUs, and its gradient as another (Pallas, by Triton).

A program takes one image and some of its groups. It reads them twice, the second time out of the GPU's cache: first
for sums over the pixels, then for what it writes. The formulas are `group_norm.in_steps`'s, in float32.

Small images are read once. A GPU waits for memory here, so a thread has several loads under way, and few instructions
between them: of `exp`, divisions and x y + z XLA has Triton make two to three times as many as the GPU's own are.

JAX 0.11 still has Pallas's way to Triton, and warns that a later version will not: then these kernels are to be written
for Mosaic GPU, or called through jax_triton.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from diffusion.networks.group_norm import Plan

NUMBERS = 8  # of a load of a thread: 16 bytes of bfloat16, the most that there is


class Cut(NamedTuple):
    """How images are cut into programs.

    Attributes:
      channels: of a program, at least where there are as many; whole groups.
      warps: of a program, of 32 threads each.
      loads: of each image that a thread waits for at once.
    """

    channels: int
    warps: int
    loads: int


# By pixels of an image: the fastest on an H100 for the exact U-Net (benchmarks/results/norms_h100.json).
FORWARD = {1024: Cut(64, 16, 2), 256: Cut(128, 16, 4), 64: Cut(64, 4, 4), 16: Cut(64, 2, 2)}
GRADIENT = {1024: Cut(64, 16, 4), 256: Cut(32, 4, 8), 64: Cut(64, 4, 4), 16: Cut(64, 1, 4)}


def cut_of(cuts: dict[int, Cut], pixels: int) -> Cut:
    """Returns the cut of the largest images that are not larger, or else of the smallest."""
    return cuts[max((size for size in cuts if size <= pixels), default=min(cuts))]


FMA = "fma.rn.f32 $0, $1, $2, $3;"
SIGMOID = """{
    .reg .f32 e;
    mul.f32 e, $1, 0fBFB8AA3B;  // -log2(e)
    ex2.approx.ftz.f32 e, e;
    add.f32 e, e, 0f3F800000;  // 1
    rcp.approx.ftz.f32 $0, e;
}"""


def channels_of(channels: int, groups: int, least: int) -> int:
    """Returns how many channels a program takes: whole groups that divide them, at least `least` if there are."""
    size = channels // groups
    return next(n for n in range(size, channels + 1, size) if channels % n == 0 and n >= min(least, channels))


class Tile:
    """The part of the images [B, P, C] that a program takes: its loops over pixels, what it reads and writes."""

    def __init__(self, pixels: int, channels: int, groups: int, cut: Cut, interpret: bool):
        from jax.experimental import pallas
        from jax.experimental.pallas import triton

        self.triton: Any = triton
        self.interpret = interpret
        self.pixels, self.size = pixels, channels // groups
        width = channels_of(channels, groups, cut.channels)
        self.column = jnp.arange(power_of_two(width))
        self.inside = self.column < width
        self.channel = pallas.program_id(0) * width + self.column
        self.rows = min(max(1, cut.warps * 32 * NUMBERS // len(self.column)), power_of_two(pixels))
        self.loads = min(cut.loads, -(-pixels // self.rows))
        self.turns = -(-pixels // (self.rows * self.loads))
        self.kept: dict[int, list[Array]] = {}

    def sums(self, refs: Sequence[Any], terms: Callable[..., tuple[Array, Array]]) -> tuple[Array, Array, Array]:
        """Returns the sums over all pixels of two terms, and of their product.

        `terms` are given what is read of [1, P, C].
        """

        def add(totals: tuple[Array, ...], at: Any, mask: Array, *arrays: Array) -> tuple[Array, ...]:
            x, y = terms(*arrays)
            if self.pixels % (self.rows * self.loads):  # else none is missing; of missing channels both are 0
                x, y = (jnp.where(mask, z, 0.0) for z in (x, y))
            return totals[0] + x, totals[1] + y, self.fma(x, y, totals[2])

        # Threads meet once, after the loop: each has sums of its own until then.
        zero = jnp.zeros((self.rows, *self.column.shape), jnp.float32)
        first, second, product = (total.sum(0) for total in self._loop(refs, add, (zero,) * 3, "evict_last"))
        return first, second, product

    def each(self, refs: Sequence[Any], terms: Callable[..., Array], out_ref: Any) -> None:
        """Writes, for all pixels, the term that is given what is read of [1, P, C]."""

        def write(_: None, at: Any, mask: Array, *arrays: Array) -> None:
            x = terms(*arrays).astype(out_ref.dtype)
            self.triton.store(out_ref.at[at], x, mask=mask, eviction_policy=self._policy("evict_first"))

        self._loop(refs, write, None, "evict_first")

    def _loop(self, refs: Sequence[Any], use: Callable[..., Any], carry: Any, policy: str) -> Any:
        """Returns the last of carry = use(carry, at, mask, *arrays), for all pixels; `policy` is for the cache."""

        def turn(i: Any, carry: Any) -> Any:
            # All loads are under way before the first is waited for.
            places = [self._pixels(i * self.loads + j) for j in range(self.loads)]
            arrays = [self._read(ref, places, policy) for ref in refs]
            for place, *loaded in zip(places, *arrays, strict=True):
                carry = use(carry, *place, *loaded)
            return carry

        return turn(0, carry) if self.turns == 1 else jax.lax.fori_loop(0, self.turns, turn, carry)

    def _read(self, ref: Any, places: Sequence[Any], policy: str) -> list[Array]:
        """Returns what is read of [1, P, C] at some places; of images that are read at once, once."""
        if id(ref) in self.kept:
            return self.kept[id(ref)]
        options: dict[str, Any] = {"other": 0, "eviction_policy": self._policy(policy)}
        found = [self.triton.load(ref.at[at], mask=mask, **options) for at, mask in places]
        if self.turns == 1:
            self.kept[id(ref)] = found
        return found

    def _policy(self, policy: str) -> str | None:
        """Returns what is to become of it in the cache, where images are read twice."""
        return policy if self.turns > 1 else None

    def _pixels(self, i: Any) -> tuple[Any, Array]:
        pixel = i * self.rows + jnp.arange(self.rows)
        return (0, pixel[:, None], self.channel[None, :]), (pixel < self.pixels)[:, None] & self.inside

    def mean_of_groups(self, x: Float[Array, "C"]) -> Float[Array, "C"]:
        """Returns the mean of each channel's group."""
        group = self.column // self.size
        share = jnp.where((group[:, None] == group) & self.inside, 1.0 / self.size, 0.0)
        return jnp.sum(share * x, axis=1)

    def read_row(self, ref: Any, *at: int) -> Float[Array, "C"]:
        """Returns the program's channels of an array [C], or of the row `at` of another, in float32."""
        return self.triton.load(ref.at[(*at, self.channel)], mask=self.inside, other=0).astype(jnp.float32)

    def write_row(self, ref: Any, x: Float[Array, "C"]) -> None:
        """Writes the program's channels of an array [1, C]."""
        self.triton.store(ref.at[0, self.channel], x, mask=self.inside)

    def fma(self, x: Array, y: Array, z: Array) -> Array:
        """Returns x y + z, of which XLA has Triton make two instructions."""
        return x * y + z if self.interpret else self._assembly(FMA, x, y, z)

    def sigmoid(self, x: Array) -> Array:
        """Returns 1 / (1 + exp(-x)) with an error of 1e-6 (1 + |x|), in a quarter of the usual instructions."""
        return jax.nn.sigmoid(x) if self.interpret else self._assembly(SIGMOID, x)

    def _assembly(self, instructions: str, *arrays: Array) -> Array:
        arrays = tuple(jnp.broadcast_arrays(*arrays))
        constraints = ",".join(["=f"] + ["f"] * len(arrays))
        out = [jax.ShapeDtypeStruct(arrays[0].shape, jnp.float32)]
        call = self.triton.elementwise_inline_asm
        return call(instructions, args=arrays, constraints=constraints, pack=1, result_shape_dtypes=out)[0]


def power_of_two(size: int) -> int:
    """Returns the least power of two that is not below `size`: the sizes of Triton's arrays."""
    return 1 << (size - 1).bit_length()


def forward_kernel(
    plan: Plan, cut: Cut, interpret: bool, x_ref: Any, shift_ref: Any, scale_ref: Any, bias_ref: Any, *refs: Any
) -> None:
    """Writes the output of a program's image and channels, and its groups' moments; see `forward`."""
    *keep, y_ref, mean_ref, rstd_ref = refs
    _, pixels, channels = x_ref.shape
    tile = Tile(pixels, channels, plan.num_groups, cut, interpret)
    shift = tile.read_row(shift_ref, 0)
    # Sums of differences from the first pixel: E[x^2] - E[x]^2 would lose the variance where the mean is large.
    pixel = tile.read_row(x_ref, 0, 0)

    def differences(x: Array) -> tuple[Array, Array]:
        difference = x.astype(jnp.float32) - pixel
        return difference, difference

    first, _, second = (total / tile.pixels for total in tile.sums([x_ref], differences))
    mean_c, variance_c = pixel + first + shift, second - jnp.square(first)
    mean = tile.mean_of_groups(mean_c)
    variance = tile.mean_of_groups(variance_c + jnp.square(mean_c - mean))
    rstd = jax.lax.rsqrt(variance + plan.epsilon)
    gain = rstd * tile.read_row(scale_ref)
    offset = tile.read_row(bias_ref) + (shift - mean) * gain

    def output(x: Array, *keep: Array) -> Array:
        y = tile.fma(x.astype(jnp.float32), gain, offset)
        y = y * tile.sigmoid(y) if plan.silu else y
        return jnp.where(keep[0] > 0, y * plan.gain, 0.0) if keep else y

    tile.each([x_ref, *keep], output, y_ref)
    tile.write_row(mean_ref, mean)
    tile.write_row(rstd_ref, rstd)


def gradient_kernel(plan: Plan, has_past: bool, cut: Cut, interpret: bool, *refs: Any) -> None:
    """Writes the gradients of a program's image and channels; see `gradients`."""
    x_ref, shift_ref, scale_ref, bias_ref, mean_ref, rstd_ref, *images = refs
    *images, dx_ref, dshift_ref, dscale_ref, dbias_ref = images
    past = [images.pop()] if has_past else []
    _, pixels, channels = x_ref.shape
    tile = Tile(pixels, channels, plan.num_groups, cut, interpret)
    scale, bias, rstd = tile.read_row(scale_ref), tile.read_row(bias_ref), tile.read_row(rstd_ref, 0)
    centre = tile.read_row(shift_ref, 0) - tile.read_row(mean_ref, 0)
    gain = rstd * scale
    kept = plan.gain if plan.rate else 1.0  # what remains to be multiplied by of slopes

    def parts(x: Array, dy: Array, *keep: Array) -> tuple[Array, Array]:
        """Returns the difference from the mean, and the gradient by what scale and bias made of it."""
        difference, slope = x.astype(jnp.float32) + centre, dy.astype(jnp.float32)
        if keep:
            slope = jnp.where(keep[0] > 0, slope, 0.0)
        if plan.silu:
            h = tile.fma(difference, gain, bias)
            s = tile.sigmoid(h)
            slope = slope * tile.fma(h * s, 1 - s, s)
        return difference, slope

    differences, dbias, dscale = tile.sums([x_ref, *images], parts)
    dbias, dscale = dbias * kept, dscale * rstd * kept
    along_mean = tile.mean_of_groups(scale * dbias) / tile.pixels
    along_normal = tile.mean_of_groups(scale * dscale) / tile.pixels
    of_slope, of_mean, of_normal = gain * kept, rstd * along_mean, jnp.square(rstd) * along_normal

    def by_x(*arrays: Array) -> Array:
        difference, slope = parts(*arrays[: len(arrays) - has_past])
        past = arrays[-1].astype(jnp.float32) - of_mean if has_past else -of_mean
        return tile.fma(slope, of_slope, tile.fma(difference, -of_normal, past))

    tile.each([x_ref, *images, *past], by_x, dx_ref)
    tile.write_row(dscale_ref, dscale)
    tile.write_row(dbias_ref, dbias)
    tile.write_row(dshift_ref, gain * dbias - tile.pixels * of_mean - differences * of_normal)


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
    cut = cut_of(FORWARD, x.shape[1])
    return _call(partial(forward_kernel, plan), plan, cut, outputs, interpret, x, shift, scale, bias, *keep)


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
    kernel, cut = partial(gradient_kernel, plan, has_past), cut_of(GRADIENT, x.shape[1])
    return _call(kernel, plan, cut, outputs, interpret, x, shift, scale, bias, mean, rstd, dy, *others)


def _call(kernel: Any, plan: Plan, cut: Cut, outputs: tuple[Any, ...], interpret: bool, *arrays: Array) -> Any:
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    batch, _, channels = arrays[0].shape
    specs = {
        1: lambda x: pallas.BlockSpec(x.shape, lambda c, b: (0,)),
        2: lambda x: pallas.BlockSpec((1, *x.shape[1:]), lambda c, b: (b, 0)),
        3: lambda x: pallas.BlockSpec((1, *x.shape[1:]), lambda c, b: (b, 0, 0)),
    }
    return pallas.pallas_call(
        partial(kernel, cut, interpret),
        outputs,
        # Programs of one image run at the same time: together they read whole rows of memory.
        grid=(channels // channels_of(channels, plan.num_groups, cut.channels), batch),
        in_specs=[specs[x.ndim](x) for x in arrays],
        out_specs=[specs[x.ndim](x) for x in outputs],
        interpret=interpret,
        compiler_params=triton.CompilerParams(num_warps=cut.warps, num_stages=2),
        name=kernel.func.__name__,
    )(*arrays)
