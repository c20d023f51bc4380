"""The one way in which all networks convolve: XLA's, but for wide 3x3 kernels on CPUs, by half of the products.

Winograd's minimal filtering F(4, 3) along the height: four rows of the output are made of six products, where the sum
itself takes twelve; its gradients likewise. DDPM's U-Net trains 1.2 and runs forward 1.4 times as fast on CPUs. What it
costs are three times the rounding errors of XLA's sums, themselves a few units of float32's last place, and that a
pixel that is not finite makes its neighbours in six rows so.

Source: Winograd 1980; Lavin & Gray 2015, "Fast algorithms for convolutional neural networks", section 4.3.
"""

import math
from collections.abc import Iterable, Iterator
from functools import reduce
from operator import add
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion.networks.tangents import make_tangent

Padding = str | tuple[tuple[int, int], tuple[int, int]]

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
PIXELS_PER_CHANNEL = 16  # of a batch, for the gradient by the image


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
    if not fits(x, kernel, stride, padding):
        return by_xla(x, kernel, stride, padding)
    return _on_device(x, kernel)


def fits(x: Array, kernel: Array, stride: int, padding: Padding) -> bool:
    """Returns whether `by_winograd` computes this convolution, and sooner than XLA on a CPU."""
    same = stride == 1 and padding in ("SAME", ((1, 1), (1, 1))) and kernel.shape[:2] == (3, 3)
    wide = min(kernel.shape[2:]) >= NARROWEST and x.shape[1] % 4 == 0
    return same and wide and x.dtype == kernel.dtype == jnp.float32


def by_xla(x: Array, kernel: Array, stride: int = 1, padding: Padding = "SAME") -> Array:
    """Returns the convolution, as XLA computes it."""
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=numbers)


@jax.jit  # layers of one shape share a trace
def by_winograd(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C K"]) -> Float[Array, "B H W K"]:
    """Returns the convolution padded to the size of x, whose height is a multiple of 4."""
    numbers = ("NHWC", "HWIO", "NHWC")
    products = [
        jax.lax.conv_general_dilated(v, u[None] * (1 / 24), (1, 1), ((0, 0), (1, 1)), dimension_numbers=numbers)
        for v, u in zip(_tiles(x), _combine(G_24, kernel), strict=True)
    ]
    return jnp.stack(list(_combine(A_T, products)), axis=2).reshape(*x.shape[:3], -1)


@jax.jit
def kernel_gradient(x: Float[Array, "B H W C"], dy: Float[Array, "B H W K"]) -> Float[Array, "3 3 C K"]:
    """Returns the gradient by the kernel: six products of matrices, each of the kernel's three columns at once."""
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


@jax.custom_jvp
def _on_device(x: Array, kernel: Array) -> Array:
    """Returns the convolution by what is faster where the program is compiled for."""
    return jax.lax.platform_dependent(x, kernel, cpu=by_winograd, default=by_xla)


def _on_device_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, kernel), (dx, dkernel) = primals, tangents
    terms = []
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        terms += _along_image(kernel, dx)
    if not isinstance(dkernel, jax.custom_derivatives.SymbolicZero):
        terms += _along_kernel(x, dkernel)
    y = _on_device(x, kernel)
    return y, reduce(add, terms) if terms else jnp.zeros_like(y)


_on_device.defjvp(_on_device_jvp, symbolic_zeros=True)


def _pull_image(cotangents: Any, kernel: Array) -> list[Array | None]:
    """Returns the gradient by the image.

    The kernel is turned around for it, which takes as long as the products save where there are few pixels.
    """
    (dy,) = cotangents
    image = jax.ShapeDtypeStruct((*dy.shape[:3], kernel.shape[2]), dy.dtype)

    def transposed(dy: Array, kernel: Array) -> Array:
        return jax.linear_transpose(lambda x: by_xla(x, kernel), image)(dy)[0]

    def turned(dy: Array, kernel: Array) -> Array:
        return by_winograd(dy, kernel[::-1, ::-1].swapaxes(2, 3))

    if math.prod(dy.shape[:3]) < PIXELS_PER_CHANNEL * max(kernel.shape):
        return [transposed(dy, kernel)]
    return [jax.lax.platform_dependent(dy, kernel, cpu=turned, default=transposed)]


def _pull_kernel(cotangents: Any, x: Array) -> list[Array | None]:
    (dy,) = cotangents
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[3], dy.shape[3]), dy.dtype)

    def transposed(x: Array, dy: Array) -> Array:
        return jax.linear_transpose(lambda kernel: by_xla(x, kernel), kernel)(dy)[0]

    return [jax.lax.platform_dependent(x, dy, cpu=kernel_gradient, default=transposed)]


_along_image = make_tangent(
    "convolution_along_image",
    1,
    push=lambda kernel, dx: [_on_device(dx, kernel)],
    pull=_pull_image,
    outputs=lambda kernel, dx: [dx.update(shape=(*dx.shape[:3], kernel.shape[3]))],
)
_along_kernel = make_tangent(
    "convolution_along_kernel",
    1,
    push=lambda x, dkernel: [_on_device(x, dkernel)],
    pull=_pull_kernel,
    outputs=lambda x, dkernel: [x.update(shape=(*x.shape[:3], dkernel.shape[3]))],
)
