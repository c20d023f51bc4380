"""How all networks convolve: by XLA, but for wide 3x3 kernels on CPUs, by half of the products.

Of upsampled images CPUs convolve by still fewer, see `upsampling.convolve_upsampled`.

On CPUs gradients are written as convolutions of images NHWC with kernels HWIO, the form that XLA is fast of. JAX's own
are not, and XLA brings them into it, to the same bits, outside of loops alone. In a loop, over a likelihood's steps or
over micro-batches, they take up to 30 (by the image) and 200 times (by the kernel) as long.

Winograd's minimal filtering F(4, 3) along the height: four rows of the output are made of six products, where the sum
itself takes twelve; its gradients likewise. DDPM's U-Net trains 1.2 and runs forward 1.4 times as fast on CPUs. What it
costs are three times the rounding errors of XLA's sums, themselves a few units of float32's last place, and that a
pixel that is not finite makes its neighbours in six rows so.

Source: Winograd 1980; Lavin & Gray 2015, "Fast algorithms for convolutional neural networks", section 4.3.
"""

import math
from collections.abc import Iterable, Iterator
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion.networks.tangents import make_tangent

Size = tuple[int, ...]  # height and width
Sides = tuple[tuple[int, int], ...]  # pixels of zeros above and below, left and right
Padding = str | Sides

# Y = A^T [(G g) * (B^T d)]: six rows of the input d and three of the kernel g give four of the output.
B_T = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
G_24 = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]])  # 24 G
A_T = np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]])

NARROWEST = 64  # channels on both sides: below, XLA's own convolution is as fast
LEAST_PRODUCTS = 2**28  # of numbers: what fewer save repays compiling six products in thousands of steps only
PIXELS_PER_CHANNEL = 16  # of a batch, for the gradient by the image
NUMBERS = ("NHWC", "HWIO", "NHWC")


def convolve(
    x: Float[Array, "B H W C"], kernel: Float[Array, "h w C K"], stride: int = 1, padding: Padding = "SAME"
) -> Float[Array, "B _ _ K"]:
    """Returns the convolution of x and a kernel, as networks understand it: the kernel is not turned around.

    Args:
      x: images of channels.
      kernel: what they are convolved with.
      stride: of the pixels that the output has.
      padding: pixels of zeros on the sides; as `jax.lax.conv_general_dilated` reads it.
    """
    sides = padding
    if isinstance(sides, str):
        sides = tuple(jax.lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], (stride, stride), sides))
    return _convolve(x, kernel, stride, sides)


def fits(x: Any, kernel: Any, stride: int, padding: Sides) -> bool:
    """Returns whether `by_winograd` computes this convolution, and sooner than XLA on a CPU."""
    same = stride == 1 and padding == ((1, 1), (1, 1)) and kernel.shape[:2] == (3, 3)
    wide = min(kernel.shape[2:]) >= NARROWEST and x.shape[1] % 4 == 0
    many = math.prod(x.shape[:3]) * math.prod(kernel.shape) >= LEAST_PRODUCTS
    return same and wide and many and x.dtype == kernel.dtype == jnp.float32


def by_xla(x: Array, kernel: Array, stride: int = 1, padding: Padding = "SAME", spread: int = 1) -> Array:
    """Returns the convolution, as XLA computes it; `spread` - 1 zeros are between the pixels of x."""
    strides, dilation = (stride, stride), (spread, spread)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dilation, dimension_numbers=NUMBERS)


@jax.jit  # layers of one shape share a trace
def by_winograd(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C K"]) -> Float[Array, "B H W K"]:
    """Returns the convolution padded to the size of x, whose height is a multiple of 4."""
    products = [
        by_xla(v, u[None] * (1 / 24), padding=((0, 0), (1, 1)))
        for v, u in zip(_tiles(x), _combine(G_24, kernel), strict=True)
    ]
    return jnp.stack(list(_combine(A_T, products)), axis=2).reshape(*x.shape[:3], -1)


@jax.jit
def kernel_gradient_by_winograd(x: Float[Array, "B H W C"], dy: Float[Array, "B H W K"]) -> Float[Array, "3 3 C K"]:
    """Returns the gradient by a 3x3 kernel: six products of matrices, each of the kernel's three columns at once."""
    v = jnp.stack(list(_tiles(x)))
    m = jnp.stack(list(_combine(A_T.T, (dy[:, row::4] for row in range(4)))))
    none = (0, 0, 0)
    sides = [(none, none, none, (column, -column, 0), none) for column in (-1, 0, 1)]
    columns = jnp.concatenate([jax.lax.pad(m, jnp.float32(0), side) for side in sides], axis=-1)
    # As matrices: where there are several axes to sum over XLA copies one side of the product, transposed.
    u = jnp.einsum("tnc,tnk->tck", *(part.reshape(6, -1, part.shape[-1]) for part in (v, columns)))
    g = jnp.stack(list(_combine(G_24.T, u))) * (1 / 24)
    return g.reshape(3, x.shape[-1], 3, dy.shape[-1]).swapaxes(1, 2)


def _tiles(x: Float[Array, "B H W C"]) -> Iterator[Float[Array, "B _ W C"]]:
    """Yields B^T d of all tiles of six rows, which overlap by two."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0), (0, 0)))
    return _combine(B_T, (padded[:, row : row + x.shape[1] - 3 : 4] for row in range(6)))


def _combine(matrix: Any, parts: Iterable[Array]) -> Iterator[Array]:
    """Yields the rows of the product of a matrix and what it combines, without the terms that are 0."""
    parts = list(parts)
    for row in matrix.tolist():
        terms = (part if factor == 1 else factor * part for factor, part in zip(row, parts, strict=True) if factor)
        yield reduce(add, terms)


def image_gradient(
    dy: Float[Array, "B _ _ K"], kernel: Float[Array, "h w C K"], size: Size, stride: int, padding: Sides
) -> Float[Array, "B H W C"]:
    """Returns the gradient by an image of this height and width: dy convolved with the kernel turned around.

    To turn it takes as long as Winograd's products save where there are few pixels.
    """
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    if fits(dy, turned, stride, padding) and math.prod(dy.shape[:3]) >= PIXELS_PER_CHANNEL * max(kernel.shape):
        return by_winograd(dy, turned)
    axes = zip(size, dy.shape[1:3], kernel.shape[:2], padding, strict=True)
    sides = tuple((k - 1 - before, n - (m - 1) * stride - 1 + before) for n, m, k, (before, _) in axes)
    return by_xla(dy, turned, 1, sides, spread=stride)


def kernel_gradient(
    x: Float[Array, "B H W C"], dy: Float[Array, "B _ _ K"], size: Size, stride: int, padding: Sides
) -> Float[Array, "h w C K"]:
    """Returns the gradient by a kernel of this height and width: channels of x, as images, convolved with dy."""
    kernel = jax.ShapeDtypeStruct((*size, x.shape[3], dy.shape[3]), dy.dtype)
    if fits(x, kernel, stride, padding):
        return kernel_gradient_by_winograd(x, dy)
    axes = zip(x.shape[1:3], dy.shape[1:3], size, padding, strict=True)
    sides = tuple((before, k + (m - 1) * stride - n - before) for n, m, k, (before, _) in axes)
    images, kernel, between = x.transpose(3, 1, 2, 0), dy.transpose(1, 2, 0, 3), (stride, stride)
    y = jax.lax.conv_general_dilated(images, kernel, (1, 1), sides, None, between, dimension_numbers=NUMBERS)
    return y.transpose(1, 2, 0, 3)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _convolve(x: Array, kernel: Array, stride: int, padding: Sides) -> Array:
    """Returns the convolution by what is faster where the program is compiled for."""
    if not fits(x, kernel, stride, padding):
        return by_xla(x, kernel, stride, padding)
    return jax.lax.platform_dependent(x, kernel, cpu=by_winograd, default=by_xla)


def _convolve_jvp(stride: int, padding: Sides, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    options: Any = {"stride": stride, "padding": padding}
    terms = []
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        terms += _along_image(kernel, dx, size=dx.shape[1:3], **options)
    if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
        terms += _along_kernel(x, dkernel, size=dkernel.shape[:2], **options)
    y = _convolve(x, kernel, stride, padding)
    return y, reduce(add, terms) if terms else jnp.zeros_like(y)


_convolve.defjvp(_convolve_jvp, symbolic_zeros=True)


def _pull_image(cotangents: Any, kernel: Array, size: Size, stride: int, padding: Sides) -> list[Array | None]:
    (dy,) = cotangents
    image = jax.ShapeDtypeStruct((dy.shape[0], *size, kernel.shape[2]), dy.dtype)

    def transposed(dy: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: by_xla(x, kernel, stride, padding), image)(dy)[0]

    ours = partial(image_gradient, size=size, stride=stride, padding=padding)
    return [jax.lax.platform_dependent(dy, kernel, cpu=ours, default=transposed)]


def _pull_kernel(cotangents: Any, x: Array, size: Size, stride: int, padding: Sides) -> list[Array | None]:
    (dy,) = cotangents
    kernel = jax.ShapeDtypeStruct((*size, x.shape[3], dy.shape[3]), dy.dtype)

    def transposed(x: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda kernel: by_xla(x, kernel, stride, padding), kernel)(dy)[0]

    ours = partial(kernel_gradient, size=size, stride=stride, padding=padding)
    return [jax.lax.platform_dependent(x, dy, cpu=ours, default=transposed)]


def _outputs(x: Any, kernel: Any, size: Size, stride: int, padding: Sides) -> list[Any]:
    return [x.update(shape=jax.eval_shape(partial(by_xla, stride=stride, padding=padding), x, kernel).shape)]


# `size` is that of the tangent, which its gradient has again.
_along_image = make_tangent(
    "convolution_along_image",
    1,
    push=lambda kernel, dx, size, stride, padding: [_convolve(dx, kernel, stride, padding)],
    pull=_pull_image,
    outputs=lambda kernel, dx, **options: _outputs(dx, kernel, **options),
)
_along_kernel = make_tangent(
    "convolution_along_kernel",
    1,
    push=lambda x, dkernel, size, stride, padding: [_convolve(x, dkernel, stride, padding)],
    pull=_pull_kernel,
    outputs=_outputs,
)
