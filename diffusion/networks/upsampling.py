"""Images at twice their size by repeating pixels, and the convolution that follows, on CPUs without the large image.

Two neighbouring pixels of the output see two pixels of the small image each. Along one axis, of a kernel w,

    y[2i]     = w_0 x[i-1] + (w_1 + w_2) x[i] = (w_0 + w_1 + w_2) x[i] - w_0 (x[i] - x[i-1])
    y[2i + 1] = (w_0 + w_1) x[i] + w_2 x[i+1] = (w_0 + w_1 + w_2) x[i] + w_2 (x[i+1] - x[i])

in three products for the sum's six, as the differences are shared. Along both axes four pixels take 9 products for 36.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.networks.convolution import convolve


def upsample(x: Float[Array, "B H W C"]) -> Float[Array, "B h w C"]:
    """Returns x at twice its height and width, every pixel repeated (nearest neighbour)."""
    batch, height, width, channels = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None], (batch, height, 2, width, 2, channels))
    return x.reshape(batch, 2 * height, 2 * width, channels)


def convolve_upsampled(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C K"]) -> Float[Array, "B h w K"]:
    """Returns `upsample(x)` convolved with a kernel, padded to its size, by what is faster where it is compiled for."""
    return jax.lax.platform_dependent(x, kernel, cpu=by_differences, default=by_repeating)


def by_repeating(x: Float[Array, "B H W C"], kernel: Float[Array, "3 3 C K"]) -> Float[Array, "B h w K"]:
    """Returns it as it is defined."""
    return convolve(upsample(x), kernel)


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
