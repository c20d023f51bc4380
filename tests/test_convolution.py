"""Wide convolutions on CPUs: XLA's values and derivatives, exactly on integers, else to bounds of rounding."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks import convolution
from diffusion.networks.convolution import (
    A_T,
    B_T,
    G_24,
    by_winograd,
    by_xla,
    convolve,
    fits,
    kernel_gradient_by_winograd,
)
from diffusion.networks.layers import Conv
from diffusion.training import make_mesh
from diffusion.training.flops import count_flops

UNIT = 2.0**-24  # of float32's rounding


@pytest.fixture(autouse=True)
def few_products(monkeypatch):
    """Small convolutions are made as large ones are."""
    monkeypatch.setattr(convolution, "LEAST_PRODUCTS", 0)


def drawn(shape: tuple[int, ...] = (2, 8, 6, 64), channels: int = 80) -> tuple[Any, Any]:
    random = np.random.RandomState(0)
    x = random.randn(*shape).astype(np.float32)
    kernel = random.randn(3, 3, shape[-1], channels) / np.sqrt(9 * shape[-1])
    return jnp.asarray(x), jnp.asarray(kernel, jnp.float32)


def exact(x: Any, kernel: Any) -> Any:
    """Returns the convolution in float64, by its definition."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    shifted = ((row, column) for row in range(3) for column in range(3))
    return sum(padded[:, i : i + height, j : j + width] @ kernel[i, j] for i, j in shifted)


def largest_error(x: Any, kernel: Any) -> Any:
    """Returns what rounding can make of `by_winograd` at most, pixel by pixel.

    Every product passes so many roundings: in B^T d 4, in G g 3 and 2 by the factor 1 / 24, in the sum of products 3 C,
    in A^T m 5; to first order the error is as many units of what the sum would be without signs.
    """
    height = x.shape[1]
    padded = np.pad(np.abs(x).astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    d = np.stack([padded[:, row : row + height - 3 : 4] for row in range(6)])
    v = np.einsum("ij,jbhwc->ibhwc", np.abs(B_T), d)
    u = np.einsum("ij,jwck->iwck", np.abs(G_24) / 24, np.abs(kernel).astype(np.float64))
    m = sum(np.einsum("ibhwc,ick->ibhwk", v[:, :, :, j : j + x.shape[2]], u[:, j]) for j in range(3))
    bound = np.einsum("ij,jbhwk->bhiwk", np.abs(A_T), m).reshape(*x.shape[:3], -1)
    return (4 + 5 + 3 * x.shape[-1] + 5) * UNIT * bound


@pytest.mark.parametrize("shape", [(2, 8, 6, 64), (1, 4, 1, 96), (3, 12, 5, 64)])
def test_within_the_bound_of_rounding(shape):
    x, kernel = drawn(shape)
    error = np.abs(np.asarray(by_winograd(x, kernel), np.float64) - exact(x, kernel))
    assert np.all(error <= largest_error(x, kernel))


def test_errors_are_a_few_times_those_of_the_sums(float64):
    """Root mean squares over many outputs, where the bound of one is a hundred times what it has."""
    x, kernel = drawn((4, 16, 16, 64))
    dy = by_xla(*drawn((4, 16, 16, 64)))

    def gradient(x: Any, dy: Any) -> Any:
        return jax.vjp(lambda kernel: by_xla(x, kernel), jnp.zeros(kernel.shape, x.dtype))[1](dy)[0]

    for ours, plain, arguments in (
        (by_winograd, by_xla, (x, kernel)),
        (kernel_gradient_by_winograd, gradient, (x, dy)),
    ):
        first, second = (jnp.asarray(one, jnp.float64) for one in arguments)
        right = plain(first, second)
        one, other = (jnp.sqrt(jnp.mean((jax.jit(f)(*arguments) - right) ** 2)) for f in (ours, plain))
        assert 0 < one < 5 * other


def test_matrices_are_exact():
    """The identity of the source: a filter of three taps by six products, in integers over 24."""
    g, d = np.array([2, -3, 5]), np.array([1, 7, -2, 4, 9, -6])
    np.testing.assert_array_equal(A_T @ ((G_24 @ g) * (B_T @ d)), 24 * np.correlate(d, g, "valid"))


def integers(shape: tuple[int, ...] = (2, 8, 6, 64), channels: int = 80) -> tuple[Any, Any, Any, Any]:
    """Returns x, a kernel and tangents of both, of which float32 makes no rounding error: G of 24 is integers."""
    random = np.random.RandomState(0)
    kernel = (3, 3, shape[-1], channels)
    draw = lambda shape, unit: jnp.asarray(unit * random.randint(-2, 3, shape), jnp.float32)  # noqa: E731
    return draw(shape, 1), draw(kernel, 24), draw(shape, 1), draw(kernel, 24)


@pytest.mark.parametrize("pixels", [0, 10**9], ids=["image by Winograd", "image by XLA"])
def test_derivatives_are_exact(monkeypatch, pixels):
    """In both modes, also one of the other: what convolves is linear in the image and in the kernel."""
    monkeypatch.setattr(convolution, "PIXELS_PER_CHANNEL", pixels)
    x, kernel, dx, dkernel = integers()
    dy = jnp.asarray(np.random.RandomState(1).randint(-2, 3, (2, 8, 6, 80)), jnp.float32)

    def pull(f: Any, x: Any, kernel: Any) -> Any:
        return jax.vjp(f, x, kernel)[1](dy)

    for name, mode in {
        "value": lambda f: f(x, kernel),
        "gradients": lambda f: pull(f, x, kernel),
        "tangent": lambda f: jax.jvp(f, (x, kernel), (dx, dkernel)),
        "of the image": lambda f: jax.jvp(lambda x: f(x, kernel), (x,), (dx,)),
        "of the kernel": lambda f: jax.jvp(lambda kernel: f(x, kernel), (kernel,), (dkernel,)),
        # as flow maps are trained
        "gradient of a tangent": lambda f: jax.vjp(lambda k: jax.jvp(lambda x: f(x, k), (x,), (dx,))[1], kernel)[1](dy),
        "tangent of gradients": lambda f: jax.jvp(partial(pull, f), (x, kernel), (dx, dkernel)),
    }.items():
        ours, plain = (jax.tree.leaves(jax.jit(partial(mode, f))()) for f in (convolve, by_xla))
        for one, other in zip(ours, plain, strict=True):
            assert np.abs(other).max() < 2**20  # sums of up to 16 as many stay integers of float32
            np.testing.assert_array_equal(one, other, err_msg=name)


def test_batched():
    x, kernel, *_ = integers()
    images, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
    for axes in ((0, 0), (0, None), (None, 0)):
        arguments = (images if axes[0] == 0 else x, kernels if axes[1] == 0 else kernel)
        np.testing.assert_array_equal(jax.vmap(convolve, axes)(*arguments), jax.vmap(by_xla, axes)(*arguments))


@pytest.mark.parametrize(
    ("x", "kernel", "stride", "padding", "fitting"),
    [
        ((2, 8, 6, 64), (3, 3, 64, 64), 1, ((1, 1), (1, 1)), True),
        ((2, 8, 6, 64), (3, 3, 64, 64), 1, ((0, 0), (0, 0)), False),
        ((2, 8, 6, 64), (3, 3, 64, 64), 2, ((1, 1), (1, 1)), False),
        ((2, 6, 8, 64), (3, 3, 64, 64), 1, ((1, 1), (1, 1)), False),
        ((2, 8, 6, 32), (3, 3, 32, 64), 1, ((1, 1), (1, 1)), False),
        ((2, 8, 6, 64), (3, 3, 64, 3), 1, ((1, 1), (1, 1)), False),
        ((2, 8, 6, 64), (4, 4, 64, 64), 1, ((1, 2), (1, 2)), False),
    ],
)
def test_what_fits(x, kernel, stride, padding, fitting):
    one, other = jnp.ones(x), jnp.ones(kernel)
    assert fits(one, other, stride, padding) == fitting
    if not fitting:
        np.testing.assert_array_equal(convolve(one, other, stride, padding), by_xla(one, other, stride, padding))
    assert not fits(one.astype(jnp.bfloat16), other.astype(jnp.bfloat16), stride, padding)


def test_small_convolutions_are_left_to_xla(monkeypatch):
    monkeypatch.undo()
    kernel = jnp.ones((3, 3, 64, 64))
    for size, fitting in ((64, True), (32, False)):
        x = jax.ShapeDtypeStruct((2, size, 64, 64), jnp.float32)
        assert fits(x, kernel, 1, ((1, 1), (1, 1))) == fitting


OTHERS = [
    # images, kernels, strides, paddings
    ((3, 8, 6, 5), (3, 3, 5, 7), 1, "SAME"),
    ((3, 8, 6, 5), (3, 3, 5, 7), 1, ((0, 0), (2, 1))),
    ((3, 8, 6, 5), (3, 3, 5, 7), 2, "SAME"),
    ((3, 7, 9, 5), (3, 3, 5, 7), 2, ((1, 1), (1, 1))),
    ((3, 8, 6, 5), (3, 3, 5, 7), 3, "VALID"),  # the last pixels are in no product
    ((3, 8, 6, 5), (2, 2, 5, 7), 2, "VALID"),
    ((3, 8, 6, 5), (5, 1, 5, 7), 1, "SAME"),
    ((3, 8, 6, 5), (4, 4, 5, 7), 2, ((1, 1), (1, 1))),
]


@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), OTHERS)
def test_other_convolutions_have_the_bits_of_xla(shape, kernel, stride, padding):
    random = np.random.RandomState(0)
    x, kernel = (jnp.asarray(random.randn(*one), jnp.float32) for one in (shape, kernel))
    dy = jnp.asarray(random.randn(*by_xla(x, kernel, stride, padding).shape), jnp.float32)

    def gradients(f: Any, x: Any, kernel: Any) -> Any:
        return jax.vjp(lambda *xs: f(xs[0], xs[1], stride, padding), x, kernel)[1](dy)

    for ours, plain in zip(*(jax.jit(partial(gradients, f))(x, kernel) for f in (convolve, by_xla)), strict=True):
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [5, 64])
def test_in_a_loop_gradients_are_made_by_the_fast_convolution_too(channels, stride):
    """XLA on CPUs has one for images NHWC and kernels HWIO alone, and arranges others so only outside of loops."""
    x, kernel, *_ = integers((2, 8, 6, channels), channels)
    dy = by_xla(x, kernel, stride)

    def gradients(x: Any, kernel: Any) -> Any:
        return jax.vjp(lambda x, kernel: convolve(x, kernel, stride), x, kernel)[1](dy)

    def looped(x: Any, kernel: Any) -> Any:
        def step(before, _):
            now = gradients(*before)
            return jax.tree.map(lambda one, gradient: one + 0 * gradient, before, now), now

        return jax.lax.scan(step, (x, kernel), None, length=3)[1]

    compiled = jax.jit(looped).lower(x, kernel).compile()
    numbers = re.findall(r" convolution\(.*dim_labels=([^,]*)", str(compiled.as_text()))
    assert set(numbers) == {"b01f_01io->b01f"}
    for ours, plain in zip(compiled(x, kernel), gradients(x, kernel), strict=True):
        np.testing.assert_array_equal(ours[-1], plain)


def test_other_devices_convolve_as_before():
    x, kernel, *_ = integers()

    def text(f: Any, platform: str) -> str:
        return jax.jit(f).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    gradient = lambda f: jax.grad(lambda *xs: jnp.sum(jnp.sin(f(*xs))), argnums=(0, 1))  # noqa: E731
    for platform in ("cuda", "tpu"):
        for mode in (lambda f: f, gradient):
            count = text(mode(by_xla), platform).count("stablehlo.convolution")
            assert text(mode(convolve), platform).count("stablehlo.convolution") == count
    assert text(convolve, "cpu").count("stablehlo.convolution") == 6


def test_flops_are_those_of_the_sum():
    x, kernel = drawn()
    for mode in (lambda f: f, lambda f: jax.grad(lambda *xs: jnp.sum(jnp.sin(f(*xs))), argnums=(0, 1))):
        ours, plain = (count_flops(jax.make_jaxpr(mode(f))(x, kernel)) for f in (convolve, by_xla))
        assert ours == plain


def test_a_layer_of_zeros_returns_zeros():
    layer = Conv(64, kernel_init=jax.nn.initializers.zeros)
    x = drawn()[0]
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    np.testing.assert_array_equal(y, np.zeros((2, 8, 6, 64)))


def test_a_batch_stays_where_it_is():
    """On several devices each convolves its images, and sums gradients; none are gathered."""
    sharding = jax.sharding.NamedSharding(make_mesh(), jax.sharding.PartitionSpec("data"))
    x, kernel, *_ = integers((len(jax.devices()), 8, 6, 64))
    compiled = jax.jit(convolve).lower(jax.device_put(x, sharding), kernel).compile()
    assert "all-gather" not in str(compiled.as_text())
    np.testing.assert_array_equal(compiled(jax.device_put(x, sharding), kernel), by_xla(x, kernel))

    gradient = jax.jit(jax.grad(lambda kernel, x: jnp.sum(convolve(x, kernel) ** 2)))
    assert "all-gather" not in str(gradient.lower(kernel, jax.device_put(x, sharding)).compile().as_text())
