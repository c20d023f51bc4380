"""Wide convolutions on CPUs: the values and derivatives of XLA's, to bounds of their rounding errors."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks import convolution
from diffusion.networks.convolution import A_T, B_T, G, by_winograd, by_xla, convolve, fits
from diffusion.networks.layers import Conv
from diffusion.training.flops import count_flops

UNIT = 2.0**-24  # of float32's rounding


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

    Every product passes so many roundings: B^T d has 4 terms, G g 3 with factors that are rounded, the sums of products
    3 C, A^T m 5; to first order the error is as many units of what the sum would be without signs.
    """
    height = x.shape[1]
    padded = np.pad(np.abs(x).astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    d = np.stack([padded[:, row : row + height - 3 : 4] for row in range(6)])
    v = np.einsum("ij,jbhwc->ibhwc", np.abs(B_T), d)
    u = np.einsum("ij,jwck->iwck", np.abs(G), np.abs(kernel).astype(np.float64))
    m = sum(np.einsum("ibhwc,ick->ibhwk", v[:, :, :, j : j + x.shape[2]], u[:, j]) for j in range(3))
    bound = np.einsum("ij,jbhwk->bhiwk", np.abs(A_T), m).reshape(*x.shape[:3], -1)
    return (4 + 5 + 3 * x.shape[-1] + 5) * UNIT * bound


@pytest.mark.parametrize("shape", [(2, 8, 6, 64), (1, 4, 1, 96), (3, 12, 5, 64)])
def test_within_the_bound_of_rounding(shape):
    x, kernel = drawn(shape)
    error = np.abs(np.asarray(by_winograd(x, kernel), np.float64) - exact(x, kernel))
    assert np.all(error <= largest_error(x, kernel))


def test_errors_are_a_few_times_those_of_the_sum():
    x, kernel = drawn((4, 16, 16, 64))
    spread = lambda y: np.sqrt(np.mean((np.asarray(y, np.float64) - exact(x, kernel)) ** 2))  # noqa: E731
    assert spread(by_winograd(x, kernel)) < 5 * spread(jax.jit(by_xla)(x, kernel))


def test_matrices_are_exact():
    """The identity of the source: a filter of three taps by six products, in integers over 24."""
    g, d = np.array([2, -3, 5]), np.array([1, 7, -2, 4, 9, -6])
    np.testing.assert_allclose(A_T @ ((G @ g) * (B_T @ d)), np.correlate(d, g, "valid"), rtol=1e-15)


def loss(convolve: Any, x: Any, kernel: Any) -> Any:
    return jnp.sum(jnp.sin(convolve(x, kernel)))


def agree(one: Any, other: Any, x: Any, kernel: Any) -> None:
    """Both within what rounding can change: of the output, and of what a sum over the output makes of it."""
    scale = float(largest_error(x, kernel).max())
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        count = 9 * max(kernel.shape)  # terms of a gradient, each of which has such an error
        np.testing.assert_allclose(a, b, rtol=0, atol=scale * np.sqrt(count) * max(1.0, float(np.abs(b).max())))


@pytest.mark.parametrize("pixels", [0, 10**9], ids=["image by Winograd", "image by XLA"])
def test_derivatives(monkeypatch, pixels):
    monkeypatch.setattr(convolution, "PIXELS_PER_CHANNEL", pixels)
    x, kernel = drawn()
    tangents = (jnp.cos(x), jnp.cos(9 * kernel))
    for mode in (
        lambda f: jax.grad(partial(loss, f), argnums=(0, 1))(x, kernel),
        lambda f: jax.jvp(partial(loss, f), (x, kernel), tangents),
        lambda f: jax.jvp(lambda x: f(x, kernel), (x,), tangents[:1]),
        # a gradient through a derivative, as flow maps are trained; a derivative of a gradient
        lambda f: jax.grad(lambda kernel: jax.jvp(lambda x: loss(f, x, kernel), (x,), tangents[:1])[1])(kernel),
        lambda f: jax.jvp(jax.grad(partial(loss, f), argnums=(0, 1)), (x, kernel), tangents)[1],
    ):
        agree(jax.jit(partial(mode, convolve))(), jax.jit(partial(mode, by_xla))(), x, kernel)


def test_batched():
    x, kernel = drawn()
    images, kernels = jnp.stack([x, 2 * x]), jnp.stack([kernel, -kernel])
    for axes in ((0, 0), (0, None), (None, 0)):
        arguments = (images if axes[0] == 0 else x, kernels if axes[1] == 0 else kernel)
        one, other = (jax.vmap(partial(loss, f), axes)(*arguments) for f in (convolve, by_xla))
        np.testing.assert_allclose(one, other, atol=1e-2)  # sums of 7,680 sines with errors below 1e-6


@pytest.mark.parametrize(
    ("x", "kernel", "stride", "padding", "fitting"),
    [
        ((2, 8, 6, 64), (3, 3, 64, 64), 1, "SAME", True),
        ((2, 8, 6, 64), (3, 3, 64, 64), 1, ((1, 1), (1, 1)), True),
        ((2, 8, 6, 64), (3, 3, 64, 64), 1, ((0, 0), (0, 0)), False),
        ((2, 8, 6, 64), (3, 3, 64, 64), 2, "SAME", False),
        ((2, 6, 8, 64), (3, 3, 64, 64), 1, "SAME", False),
        ((2, 8, 6, 32), (3, 3, 32, 64), 1, "SAME", False),
        ((2, 8, 6, 64), (3, 3, 64, 3), 1, "SAME", False),
        ((2, 8, 6, 64), (4, 4, 64, 64), 1, "SAME", False),
    ],
)
def test_what_fits(x, kernel, stride, padding, fitting):
    one, other = jnp.ones(x), jnp.ones(kernel)
    assert fits(one, other, stride, padding) == fitting
    if not fitting:
        np.testing.assert_array_equal(convolve(one, other, stride, padding), by_xla(one, other, stride, padding))
    assert not fits(one.astype(jnp.bfloat16), other.astype(jnp.bfloat16), stride, padding)


def test_other_devices_convolve_as_before():
    x, kernel = drawn()

    def text(f: Any, platform: str) -> str:
        return jax.jit(f).trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()

    gradient = lambda f: jax.grad(partial(loss, f), argnums=(0, 1))  # noqa: E731
    for platform in ("cuda", "tpu"):
        for mode in (lambda f: f, gradient):
            count = text(mode(by_xla), platform).count("stablehlo.convolution")
            assert text(mode(convolve), platform).count("stablehlo.convolution") == count
    assert text(convolve, "cpu").count("stablehlo.convolution") == 6


def test_flops_are_those_of_the_sum():
    x, kernel = drawn()
    for mode in (lambda f: f, lambda f: jax.grad(partial(loss, f))):
        ours, plain = (count_flops(jax.make_jaxpr(mode(f))(x, kernel)) for f in (convolve, by_xla))
        assert ours == plain


def test_a_layer_of_zeros_returns_zeros():
    layer = Conv(64, kernel_init=jax.nn.initializers.zeros)
    x = drawn()[0]
    y = layer.apply(layer.init(jax.random.key(0), x), x)
    np.testing.assert_array_equal(y, np.zeros((2, 8, 6, 64)))


def test_a_batch_stays_where_it_is():
    """On several devices each convolves its images; none are gathered."""
    mesh = jax.make_mesh((len(jax.devices()),), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x, kernel = drawn((len(jax.devices()), 8, 6, 64))
    compiled = jax.jit(convolve).lower(jax.device_put(x, sharding), kernel).compile()
    assert "all-gather" not in str(compiled.as_text())
    np.testing.assert_allclose(compiled(jax.device_put(x, sharding), kernel), convolve(x, kernel), atol=1e-5)
