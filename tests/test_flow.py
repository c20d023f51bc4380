"""Rectified flow: the path, its velocity, the logit-normal times and the time shift."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy import stats

from diffusion import flow

pytestmark = pytest.mark.usefixtures("float64")


def images(seed=0, shape=(3, 2, 2, 1)):
    x_0, eps = np.random.default_rng(seed).standard_normal((2, *shape))
    return jnp.asarray(x_0), jnp.asarray(eps)


def test_the_path_runs_straight_from_image_to_noise():
    x_0, eps = images()
    np.testing.assert_array_equal(flow.interpolate(x_0, eps, 0.0), x_0)
    np.testing.assert_array_equal(flow.interpolate(x_0, eps, 1.0), eps)
    middle = flow.interpolate(x_0, eps, jnp.asarray([0.0, 0.5, 1.0]))
    # a sum of two products, each rounded once
    np.testing.assert_allclose(middle, jnp.stack([x_0[0], (x_0[1] + eps[1]) / 2, eps[2]]), atol=1e-15)


def test_the_velocity_is_the_paths_derivative():
    x_0, eps = images()
    for t in (0.0, 0.3, 1.0):
        _, derivative = jax.jvp(lambda t: flow.interpolate(x_0, eps, t), (jnp.asarray(t),), (jnp.ones(()),))
        np.testing.assert_allclose(derivative, flow.velocity(x_0, eps), atol=1e-15)


@pytest.mark.parametrize("mean, std", [(0.0, 1.0), (-0.5, 0.6), (1.0, 2.0)])
def test_logit_normal_time(mean, std):
    t = flow.logit_normal_time(jax.random.key(0), 20_000, mean, std)
    # Kolmogorov-Smirnov: sqrt(n) D exceeds 2.2 with probability 2 exp(-2 * 2.2^2) = 1e-4, and the key is fixed.
    distance = stats.kstest(np.log(t) - np.log1p(-t), stats.norm(mean, std).cdf).statistic
    assert distance < 2.2 / np.sqrt(20_000)
    assert ((t > 0) & (t < 1)).all()


@pytest.mark.parametrize("shift", [0.2, 1.0, 3.0, 11.5])
def test_shift_time_multiplies_the_noise_to_signal_ratio(shift):
    t = jnp.linspace(0, 1, 11)
    shifted = flow.shift_time(t, shift)
    assert shifted[0] == 0 and shifted[-1] == 1
    np.testing.assert_allclose((shifted / (1 - shifted))[:-1], shift * (t / (1 - t))[:-1], rtol=1e-13)
    np.testing.assert_allclose(flow.shift_time(shifted, 1 / shift), t, atol=1e-15)
    np.testing.assert_allclose(jax.jit(flow.shift_time)(t, shift), shifted, atol=1e-15)


def test_shift_time_keeps_numpys_float64():
    with jax.enable_x64(False):
        t = np.linspace(0, 1, 11, endpoint=False)
        shifted = flow.shift_time(t, 3.0)
        assert isinstance(shifted, np.ndarray) and shifted.dtype == np.float64
        np.testing.assert_allclose(shifted / (1 - shifted), 3 * t / (1 - t), rtol=1e-13)
        assert flow.shift_time(jnp.asarray(t, jnp.bfloat16), 3.0).dtype == jnp.bfloat16


def test_bfloat16_and_gradients_at_the_ends():
    x_0, eps = (x.astype(jnp.bfloat16) for x in images())
    for t in (0.0, 1.0):
        t = jnp.asarray(t, jnp.float32)
        assert np.isfinite(flow.interpolate(x_0, eps, t)).all() and np.isfinite(flow.velocity(x_0, eps)).all()
        assert np.isfinite(jax.grad(flow.shift_time)(t, 3.0))
        assert np.isfinite(jax.grad(lambda t: flow.interpolate(x_0, eps, t).astype(jnp.float32).sum())(t))


def test_error_messages():
    x_0, eps = images()
    for shift in (0, -1.0):
        with pytest.raises(ValueError, match="give a number above 0"):
            flow.shift_time(0.5, shift)
    for call in (lambda: flow.velocity(x_0, eps[:, :1]), lambda: flow.interpolate(x_0, eps[:, :1], 0.5)):
        with pytest.raises((AssertionError, TypeCheckError)):  # chex's, or before it jaxtyping's, which only tests have
            call()
