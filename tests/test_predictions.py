"""Conversions between predictions: every cycle, the definitions by other routes, the ends, and the wrapped network."""

import functools

import closed_form
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import flow, predictions

KINDS = predictions.KINDS
# signal, noise at clean-ish, middle and noisy points of each process; the last is neither VP, VE nor flow
PROCESSES = {
    "vp": [(np.cos(angle), np.sin(angle)) for angle in (1e-2, 0.5, 1.2, 1.56)],
    "ve": [(1.0, 0.002), (1.0, 1.0), (1.0, 80.0)],
    "flow": [(0.99, 0.01), (0.5, 0.5), (0.01, 0.99)],
    "other": [(0.3, 0.2), (2.0, 3.0)],
}
POINTS = [point for points in PROCESSES.values() for point in points]
pytestmark = pytest.mark.usefixtures("float64")


def images(seed=0, shape=(3, 2, 2, 1), dtype=np.float64):
    x_0, eps = np.random.default_rng(seed).standard_normal((2, *shape))
    return jnp.asarray(x_0, dtype), jnp.asarray(eps, dtype)


# Numbers are O(1) and one division by signal or noise >= 0.002 loses less than 3 digits of float64's 16.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("signal, noise", POINTS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_conversion_round_trips(kind, signal, noise):
    x_0, eps = images()
    x_t = signal * x_0 + noise * eps
    output = predictions.target(kind, x_0, eps, signal, noise)
    assert_close(predictions.to_x_0(kind, output, x_t, signal, noise), x_0)
    assert_close(predictions.to_eps(kind, output, x_t, signal, noise), eps)
    assert_close(predictions.from_x_0(kind, x_0, x_t, signal, noise), output)
    for other in KINDS:
        x_0_hat = predictions.to_x_0(kind, output, x_t, signal, noise)
        there = predictions.from_x_0(other, x_0_hat, x_t, signal, noise)
        assert_close(there, predictions.target(other, x_0, eps, signal, noise))


def test_numbers_per_image_act_on_their_own_image():
    x_0, eps = images()
    signal, noise = jnp.asarray([0.9, 0.5, 0.1]), jnp.asarray([0.1, 0.6, 0.99])
    for kind in KINDS:
        together = predictions.target(kind, x_0, eps, signal, noise)
        rows = [(x_0[i : i + 1], eps[i : i + 1], float(signal[i]), float(noise[i])) for i in range(3)]
        apart = [predictions.target(kind, *row) for row in rows]
        np.testing.assert_array_equal(together, jnp.concatenate(apart))
        as_images = predictions.target(kind, x_0, eps, signal[:, None, None, None], noise[:, None, None, None])
        np.testing.assert_array_equal(together, as_images)


def test_v_is_the_velocity_in_the_angle():
    x_0, eps = images()
    for angle in (0.0, 0.4, np.pi / 2):
        _, velocity = jax.jvp(
            lambda angle: jnp.cos(angle) * x_0 + jnp.sin(angle) * eps, (jnp.asarray(angle),), (jnp.ones(()),)
        )
        assert_close(predictions.target("v", x_0, eps, np.cos(angle), np.sin(angle)), velocity)


def test_velocity_is_rectified_flows():
    x_0, eps = images()
    for signal, noise in POINTS:
        np.testing.assert_array_equal(predictions.target("velocity", x_0, eps, signal, noise), flow.velocity(x_0, eps))


@pytest.mark.parametrize("sigma_data", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sigma", [0.002, 0.5, 80.0])
def test_f_is_edms_preconditioned_network(sigma, sigma_data):
    """D(x) = c_skip x + c_out F(c_in x) with the four coefficients of Karras et al. 2022, table 1."""
    f_hat, x_t = images()
    total = sigma**2 + sigma_data**2
    c_skip, c_out, c_in = sigma_data**2 / total, sigma * sigma_data / np.sqrt(total), 1 / np.sqrt(total)
    denoised = predictions.to_x_0("F", f_hat, x_t, 1.0, sigma, sigma_data)
    assert_close(denoised, c_skip * x_t + c_out * f_hat)
    assert_close(predictions.network_input("F", x_t, 1.0, sigma, sigma_data), c_in * x_t)


@pytest.mark.parametrize("signal, noise", POINTS)
def test_f_has_unit_variance_at_every_noise_level(signal, noise):
    """What the coefficients are chosen for: data of std sigma_data make input and target of variance 1."""
    a, b = predictions.coefficients("F", signal, noise, sigma_data=0.3)
    assert_close((0.3 * a) ** 2 + b**2, 1.0)
    scale = predictions.network_input("F", jnp.ones((1, 1)), signal, noise, sigma_data=0.3)
    assert_close(scale**2 * ((0.3 * signal) ** 2 + noise**2), 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("signal, noise", [(0.0, 1.0), (1.0, 0.0), (0.0, 80.0)])
def test_the_ends_are_exact_where_the_prediction_holds_the_answer(kind, signal, noise):
    x_0, eps = images()
    x_t = signal * x_0 + noise * eps
    output = predictions.target(kind, x_0, eps, signal, noise)
    assert np.isfinite(output).all()
    x_0_hat = predictions.to_x_0(kind, output, x_t, signal, noise)
    if kind == "eps" and signal == 0:
        assert not np.isfinite(x_0_hat).any(), "x_t is eps alone and does not determine x_0"
    else:
        assert_close(x_0_hat, x_0)
    eps_hat = predictions.to_eps(kind, output, x_t, signal, noise)
    if kind == "x_0" and noise == 0:
        assert not np.isfinite(eps_hat).any()
    else:
        assert_close(eps_hat, eps)
    x_0_back = predictions.from_x_0(kind, x_0, x_t, signal, noise)
    if kind != "x_0" and noise == 0:
        assert not np.isfinite(x_0_back).any()
    else:
        assert_close(x_0_back, output)


@pytest.mark.parametrize("kind", KINDS)
def test_low_precision_is_computed_in_float32_without_nan(kind):
    x_0, eps = images(dtype=jnp.bfloat16)
    for signal, noise in [(np.float32(1e-3), np.float32(1.0)), (np.float32(1.0), np.float32(1e-3)), *PROCESSES["flow"]]:
        x_t = (signal * x_0 + noise * eps).astype(jnp.bfloat16)
        for result in (
            predictions.to_x_0(kind, eps, x_t, float(signal), float(noise)),
            predictions.to_eps(kind, eps, x_t, float(signal), float(noise)),
            predictions.target(kind, x_0, eps, float(signal), float(noise)),
        ):
            assert result.dtype == jnp.float32 and np.isfinite(result).all()


@pytest.mark.parametrize("kind", KINDS)
def test_jit_vmap_and_grad(kind):
    x_0, eps = images()
    signal, noise = jnp.asarray([0.9, 0.5, 0.1]), jnp.asarray([0.1, 0.5, 0.9])
    x_t = predictions.per_example(signal, x_0) * x_0 + predictions.per_example(noise, x_0) * eps
    to_x_0 = functools.partial(predictions.to_x_0, kind)
    plain = to_x_0(x_0, x_t, signal, noise)
    assert_close(jax.jit(to_x_0)(x_0, x_t, signal, noise), plain)
    by_one = jax.vmap(lambda *args: to_x_0(args[0][None], args[1][None], *args[2:])[0])(x_0, x_t, signal, noise)
    assert_close(by_one, plain)
    grad = jax.grad(lambda output: to_x_0(output, x_t, signal, noise).sum())(x_0)
    # The result is linear in the output: the slope is its change for a change of 1 in the output.
    np.testing.assert_allclose(grad, to_x_0(x_0 + 1, x_t, signal, noise) - plain, rtol=1e-10)


PROCESS_OF = {
    "vp": (lambda time: (jnp.cos(time), jnp.sin(time)), 1.2),
    "ve": (lambda time: (jnp.ones_like(time), jnp.exp(4 * time)), 0.3),
    "flow": (lambda time: (1 - time, time), 0.7),
}


@pytest.mark.parametrize("process", PROCESS_OF)
@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_network_of_any_kind_is_the_perfect_denoiser(kind, process):
    process, time = PROCESS_OF[process]
    data = closed_form.Gaussian(jnp.asarray(0.3), jnp.asarray(0.7))
    x_t, _ = images()
    signal, noise = process(jnp.asarray(time))

    def network(x, time):
        assert time.shape == (3,)
        # undo the scaling of the input, which is the identity but for "F"
        x = x / predictions.network_input(kind, jnp.ones_like(x), signal, noise)
        return predictions.from_x_0(kind, data.posterior_mean(x, signal, noise), x, signal, noise)

    denoise = predictions.denoiser(kind, network, process)
    for given in (time, jnp.asarray(time), jnp.full(3, time)):
        assert_close(denoise(x_t, given), data.posterior_mean(x_t, signal, noise))


def test_the_network_is_given_times_as_they_are():
    """Time 750 is 752 in bfloat16: it must not take the images' type."""
    seen = []

    def network(x, time):
        seen.append(time)
        return x

    denoise = predictions.denoiser("x_0", network, lambda time: (jnp.ones_like(time), jnp.ones_like(time)))
    denoise(jnp.ones((2, 4), jnp.bfloat16), 750)
    denoise(jnp.ones((2, 4), jnp.bfloat16), jnp.asarray([750.0, 3.0], jnp.float32))
    np.testing.assert_array_equal(seen, [[750, 750], [750, 3]])


def test_a_network_with_learned_variance_gives_both():
    x_t, v = images()
    denoise = predictions.denoiser("eps", lambda x, time: (x, v), PROCESS_OF["vp"][0])
    x_0_hat, v_hat, _ = denoise(x_t, 0.3)
    plain = predictions.denoiser("eps", lambda x, time: x, PROCESS_OF["vp"][0])(x_t, 0.3)
    np.testing.assert_array_equal(x_0_hat, plain)
    np.testing.assert_array_equal(v_hat, v)


def test_a_bfloat16_network_gives_float32_images():
    x_t = images()[0].astype(jnp.float32)
    for kind in KINDS:
        denoise = predictions.denoiser(kind, lambda x, time: x.astype(jnp.bfloat16), PROCESS_OF["flow"][0])
        x_0_hat = jax.jit(denoise)(x_t, jnp.asarray(0.5, jnp.float32))
        assert x_0_hat.dtype == jnp.float32 and np.isfinite(x_0_hat).all()


def test_error_messages():
    x_0, eps = images()
    calls = [
        lambda: predictions.to_x_0("epsilon", x_0, eps, 0.6, 0.8),
        lambda: predictions.to_eps("epsilon", x_0, eps, 0.6, 0.8),
        lambda: predictions.from_x_0("epsilon", x_0, eps, 0.6, 0.8),
        lambda: predictions.target("epsilon", x_0, eps, 0.6, 0.8),
        lambda: predictions.denoiser("epsilon", lambda x, time: x, PROCESS_OF["vp"][0]),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="unknown prediction 'epsilon': choose from eps, x_0, v, velocity, F"):
            call()
    denoise = predictions.denoiser("eps", lambda x, time: jnp.concatenate([x, x], -1), PROCESS_OF["vp"][0])
    with pytest.raises(AssertionError):
        denoise(x_0, 0.5)
