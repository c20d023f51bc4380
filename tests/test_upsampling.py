"""The convolution of an upsampled image, without that image: exactly on integers, else to bounds of rounding."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.unet import by_transposition
from diffusion.networks.layers import Conv
from diffusion.networks.upsampling import by_differences, by_repeating, convolve_upsampled


def integers(shape: tuple[int, ...], channels: int, seed: int = 0) -> tuple[Any, Any]:
    """Returns an image and a kernel whose products and sums float32 does not round."""
    random = np.random.RandomState(seed)
    draw = lambda shape: jnp.asarray(random.randint(-8, 9, shape), jnp.float32)  # noqa: E731
    return draw(shape), draw((3, 3, shape[-1], channels))


def normal(shape: tuple[int, ...], channels: int) -> tuple[Any, Any]:
    random = np.random.RandomState(0)
    x, kernel = (jnp.asarray(random.randn(*size), jnp.float32) for size in (shape, (3, 3, shape[-1], channels)))
    return x, kernel


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (1, 5, 2, 7), (3, 1, 3, 2)])
def test_it_is_the_convolution_of_the_upsampled_image(shape):
    x, kernel = integers(shape, 5)
    np.testing.assert_array_equal(by_differences(x, kernel), by_repeating(x, kernel))


def test_derivatives_are_exact():
    """In both modes, also one of the other, as flow maps are trained."""
    (x, kernel), (dx, dkernel) = integers((2, 4, 3, 4), 5), integers((2, 4, 3, 4), 5, seed=1)
    dy = by_repeating(*integers((2, 4, 3, 4), 5, seed=2))

    def pull(f: Any, x: Any, kernel: Any) -> Any:
        return jax.vjp(f, x, kernel)[1](dy)

    for mode in (
        lambda f: pull(f, x, kernel),
        lambda f: jax.jvp(f, (x, kernel), (dx, dkernel)),
        lambda f: jax.vjp(lambda k: jax.jvp(lambda x: f(x, k), (x,), (dx,))[1], kernel)[1](dy),
        lambda f: jax.jvp(partial(pull, f), (x, kernel), (dx, dkernel)),
    ):
        ours, others = (jax.tree.leaves(jax.jit(partial(mode, f))()) for f in (by_differences, by_repeating))
        for one, other in zip(ours, others, strict=True):
            assert np.abs(other).max() < 2**22  # of which a few are summed: below 2^24 all are numbers of float32
            np.testing.assert_array_equal(one, other)


def test_batched():
    x, kernel = integers((2, 4, 3, 4), 5)
    images, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
    y = jax.vmap(convolve_upsampled)(images, kernels)
    np.testing.assert_array_equal(y, jax.vmap(by_repeating)(images, kernels))


def test_errors_of_rounding(float64):
    """The differences have, along an axis, |x| in five terms for the sum's three."""
    arguments = normal((4, 8, 8, 64), 64)
    right = by_repeating(*(jnp.asarray(one, jnp.float64) for one in arguments))
    one, other = (jnp.sqrt(jnp.mean((f(*arguments) - right) ** 2)) for f in (by_differences, by_repeating))
    assert 0 < one < (5 / 3) ** 2 * other


def test_bfloat16_is_rounded_once(float64):
    x, kernel = (array.astype(jnp.bfloat16) for array in normal((4, 8, 8, 64), 64))
    right = by_repeating(x.astype(jnp.float64), kernel.astype(jnp.float64))
    y = by_differences(x, kernel)
    assert y.dtype == jnp.bfloat16
    # Half a unit of its last place, and what float32 rounded before.
    assert np.all(np.abs(y.astype(jnp.float64) - right) <= 2.0**-8 * np.abs(right) + 1e-4)


def test_the_benchmarks_transposed_convolution_is_the_same():
    for shape in ((2, 4, 4, 3), (1, 5, 2, 7)):
        x, kernel = integers(shape, 5)
        np.testing.assert_array_equal(by_transposition(x, kernel), by_repeating(x, kernel))


def test_no_large_image_on_cpus():
    """Nothing has 14 rows of 6 channels, forward or in the gradients."""

    def program(f: Any) -> str:
        loss = lambda x, kernel: jnp.sum(jnp.sin(f(x, kernel)))  # noqa: E731
        return str(jax.jit(jax.grad(loss, argnums=(0, 1))).lower(*normal((2, 7, 5, 6), 9)).compile().as_text())

    large = "2,14,10,6]"
    assert large in program(by_repeating)
    assert large not in program(convolve_upsampled)


@pytest.mark.parametrize("options", [{"size": 1}, {"stride": 2}, {"padding": 1}])
def test_another_kernel_or_stride_is_refused(options):
    with pytest.raises(ValueError, match="3x3 kernel, a stride of 1"):
        Conv(4, upsampled=True, **options).init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)))
