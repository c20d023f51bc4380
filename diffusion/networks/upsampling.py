"""Images at twice their size by repeating pixels, and the convolution that follows, without making the large image.

Two neighbouring pixels of the output see two pixels of the small image each. Along one axis, of a kernel w,

    y[2i]     = w_0 x[i-1] + (w_1 + w_2) x[i] = (w_0 + w_1 + w_2) x[i] - w_0 (x[i] - x[i-1])
    y[2i + 1] = (w_0 + w_1) x[i] + w_2 x[i+1] = (w_0 + w_1 + w_2) x[i] + w_2 (x[i+1] - x[i])

As a transposed convolution, of the left form, four pixels take 16 products in place of 36: what GPUs and TPUs have
programs for. The right form shares the differences: 9 products, of matrices, for CPUs.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.networks.convolution import by_xla


def upsample(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Returns x at twice its height and width, every pixel repeated (nearest neighbour)."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def convolve_upsampled(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C K"]) -> Float[Array, "B h w K"]:
    """Returns `upsample(x)` convolved with a kernel, padded to its size, by what is faster where it is compiled for.

    Args:
      x: images of channels.
      kernel: in float32 whatever the dtype of x is: its sums are rounded, not what they are of.
    """
    return jax.lax.platform_dependent(x, kernel, cpu=by_differences, default=by_transposition)


def by_transposition(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C K"]) -> Float[Array, "B h w K"]:
    """Returns it as the gradient of a convolution of stride 2, whose kernel has four rows and columns.

    As a gradient, since XLA on GPUs fills the image with zeros for any other convolution with a spread input.
    """
    batch, height, width, _ = x.shape
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    shifts = [((row, 1 - row), (column, 1 - column), (0, 0), (0, 0)) for row in (0, 1) for column in (0, 1)]
    wide = jnp.stack([jnp.pad(turned, shift) for shift in shifts]).sum(axis=0).astype(x.dtype)
    y = jax.ShapeDtypeStruct((batch, 2 * height, 2 * width, kernel.shape[3]), x.dtype)
    return jax.linear_transpose(partial(by_xla, kernel=wide, stride=2, padding=((1, 1), (1, 1))), y)(x)[0]


def by_differences(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C K"]) -> Float[Array, "B h w K"]:
    """Returns it by nine products of matrices, computed in float32 at least.

    Of float32 its rounding errors are at most 2.8 times those of the plain sum: along an axis five units of what three
    are there.
    """
    dtype, (batch, height, width, channels) = x.dtype, x.shape
    x, kernel = (array.astype(jnp.result_type(x, kernel, jnp.float32)) for array in (x, kernel))
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    down, right = jnp.diff(padded, axis=1), jnp.diff(padded, axis=2)
    both = jnp.diff(down, axis=2)
    (w, *w_right), *rows = [_weights(row) for row in _weights(kernel)]

    def product(image: Array, w: Array) -> Array:
        return (image.reshape(-1, channels) @ w).reshape(*image.shape[:3], -1)

    of_image = product(x, w)
    of_down = [product(down[:, :, 1:-1], w_down) for w_down, *_ in rows]
    of_right = [product(right[:, 1:-1], w) for w in w_right]
    of_both = [[product(both, w) for w in w_both] for _, *w_both in rows]

    def pixels(a: int, b: int) -> Array:
        """Returns y[2i + a, 2j + b]."""
        i, j = slice(a, a + height), slice(b, b + width)
        return of_image + of_down[a][:, i] + of_right[b][:, :, j] + of_both[a][b][:, i, j]

    y = jnp.stack([jnp.stack([pixels(a, b) for b in (0, 1)], axis=3) for a in (0, 1)], axis=2)
    return y.reshape(batch, 2 * height, 2 * width, -1).astype(dtype)


def _weights(w: Array) -> tuple[Array, Array, Array]:
    """Returns the weights, along the first axis, of a pixel, of its difference to the one before, and to the next."""
    return w.sum(axis=0), -w[0], w[2]
