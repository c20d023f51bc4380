"""Guidance: identities, exact answers on Gaussian data, and every wrapper inside a sampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import Gaussian, exact_denoise

from diffusion import samplers, schedules
from diffusion.guidance import autoguidance, classifier_free, clip, drop_labels, dynamic_threshold, limited_interval

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2)) * 3


def network_a(x, time):
    return jnp.tanh(x + time)


def network_b(x, time):
    return 0.3 * x - time


def never(x, time):
    raise AssertionError("called")


def bits(x):
    return np.asarray(x).view(np.uint32)


def test_scale_1_changes_no_bit():
    def signed_zero(x, time):
        return network_a(x, time).at[0, 0, 0, 0].set(-0.0)

    def traced(scale, x):
        return classifier_free(signed_zero, network_b, scale)(x, 0.5)

    assert classifier_free(signed_zero, never, 1) is signed_zero
    assert classifier_free(signed_zero, never, 1.0) is signed_zero
    np.testing.assert_array_equal(bits(traced(jnp.float32(1), X)), bits(signed_zero(X, 0.5)))
    np.testing.assert_array_equal(bits(jax.jit(traced)(1.0, X)), bits(jax.jit(signed_zero)(X, 0.5)))


def test_scale_0_is_unconditional_and_scales_are_linear():
    guided = [np.asarray(classifier_free(network_a, network_b, scale)(X, 0.5)) for scale in (0.0, 1.0, 2.0, 3.0)]
    np.testing.assert_allclose(guided[0], network_b(X, 0.5), rtol=1e-6)
    np.testing.assert_allclose(guided[2] - guided[1], guided[1] - guided[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(guided[3] - guided[2], guided[1] - guided[0], rtol=1e-4, atol=1e-5)


def test_a_scale_for_each_image():
    scales = jnp.asarray([0.0, 1.0, 4.0])
    together = classifier_free(network_a, network_b, scales)(X, 0.5)
    for i, scale in enumerate(scales):
        np.testing.assert_allclose(
            together[i], classifier_free(network_a, network_b, float(scale))(X, 0.5)[i], rtol=1e-5
        )
    np.testing.assert_array_equal(together[1], network_a(X, 0.5)[1])


def test_guidance_samples_the_sharpened_gaussian():
    # The score of p(x|c) (p(x|c) / p(x))^(w - 1) of two Gaussians of one std is linear with the same slope, so guided
    # sampling is sampling a Gaussian whose mean is extrapolated in the same way, at every time.
    with jax.enable_x64(True):
        denoise = [
            exact_denoise(Gaussian(jnp.asarray(mean), jnp.asarray(0.5)), schedules.edm_process)
            for mean in (0.4, 0.1, 0.1 + 3 * (0.4 - 0.1))
        ]
        grid, x_T = schedules.karras_grid(8), 80 * jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)
        guided = samplers.heun(classifier_free(denoise[0], denoise[1], 3.0), x_T, grid)
        np.testing.assert_allclose(guided, samplers.heun(denoise[2], x_T, grid), rtol=1e-10)
        np.testing.assert_allclose(samplers.heun(autoguidance(denoise[0], denoise[1], 3.0), x_T, grid), guided)


def test_a_learned_variance_passes_through():
    def with_v(x, time):
        return network_a(x, time), x

    for denoise in (
        classifier_free(with_v, network_b, 2.0),
        classifier_free(with_v, with_v, 2.0),
        limited_interval(with_v, with_v, 0.0, 1.0),
        clip(with_v),
        dynamic_threshold(with_v),
    ):
        output = denoise(X, jnp.float32(0.5))
        assert output.x_0_hat.shape == X.shape
        np.testing.assert_array_equal(output.v, X)


def test_interval():
    guided = limited_interval(network_a, network_b, 0.2, 0.8)
    for time, expected in ((0.1, network_b), (0.2, network_a), (0.5, network_a), (0.8, network_a), (0.9, network_b)):
        time = jnp.float32(time)
        np.testing.assert_allclose(guided(X, time), expected(X, time), rtol=1e-5)
    times = jnp.asarray([0.1, 0.5, 0.9])
    each = guided(X, times[:, None, None, None])
    for i, denoise in enumerate((network_b, network_a, network_b)):
        np.testing.assert_array_equal(each[i], denoise(X, times[i])[i])


def test_interval_calls_only_the_one_it_needs():
    calls = []

    def counted(name):
        def denoise(x, time):
            jax.debug.callback(lambda: calls.append(name))
            return x

        return denoise

    guided = jax.jit(limited_interval(counted("inside"), counted("outside"), 0.2, 0.8))
    for time in (0.1, 0.5, 0.9):
        guided(X, jnp.float32(time))
        jax.effects_barrier()
    assert calls == ["outside", "inside", "outside"]


def test_clip():
    x_0_hat = clip(lambda x, time: x)(X, jnp.float32(0))
    assert x_0_hat.min() == -1 and x_0_hat.max() == 1
    inside = jnp.abs(X) < 1
    np.testing.assert_array_equal(x_0_hat[inside], X[inside])
    np.testing.assert_array_equal(clip(lambda x, time: x, 0.0, 2.0)(X, jnp.float32(0)), jnp.clip(X, 0, 2))


def test_ddim_takes_eps_from_the_unclipped_x_0_hat_with_keep_eps():
    # x = 2 is 0.6 x_0_hat + 0.8 eps_hat with x_0_hat = 2 and eps_hat = 1. Clipped, a step to (1, 0.5) gives
    # 1 + 0.5 * 1, and with eps_hat of the clipped x_0_hat 1 + 0.5 * (2 - 0.6) / 0.8.
    grid = schedules.Grid(jnp.asarray([0.6, 1.0]), jnp.asarray([0.8, 0.5]), jnp.asarray([1.0, 0.0]))
    x, twice = jnp.full((1, 3), 2.0), lambda x, time: (2 * jnp.ones_like(x), -x)
    for wrap in (clip, dynamic_threshold):
        kept = wrap(twice, keep_eps=True)
        np.testing.assert_allclose(samplers.ddim(kept, x, grid), 1.5, rtol=1e-6)
        np.testing.assert_allclose(samplers.ddim(wrap(twice), x, grid), 1 + 0.5 * 1.4 / 0.8, rtol=1e-6)
        assert wrap(twice)(x, 0.0).unclipped is None
        np.testing.assert_array_equal(kept(x, 0.0).v, -x)
        for sampler in (samplers.heun, samplers.dpm_solver_pp):  # they have one x_0_hat, and take the clipped one
            np.testing.assert_array_equal(sampler(kept, x, grid), sampler(wrap(twice), x, grid))
    # Guidance after clipping changes x_0_hat, and eps_hat is taken from the new one.
    assert classifier_free(clip(twice, keep_eps=True), network_b, 2.0)(x, 0.0).unclipped is None


def test_an_interval_of_two_forms_of_output():
    """A pair on one side and a Denoised on the other are the same thing."""
    pair = lambda x, time: (x, -x)  # noqa: E731
    guided = jax.jit(limited_interval(classifier_free(pair, network_b, 2.0), pair, 0.2, 0.8))
    np.testing.assert_allclose(guided(X, jnp.float32(0.5)).x_0_hat, 2 * X - network_b(X, 0.5), rtol=1e-5)
    np.testing.assert_array_equal(guided(X, jnp.float32(0.9)).x_0_hat, X)


def test_dynamic_threshold():
    small = X / jnp.abs(X).max()
    np.testing.assert_array_equal(dynamic_threshold(lambda x, time: x)(small, jnp.float32(0)), small)
    # Image by image: the largest value at quantile 1 becomes 1, and nothing is cut.
    scaled = dynamic_threshold(lambda x, time: x, 1.0)(X, jnp.float32(0))
    np.testing.assert_allclose(scaled, X / jnp.abs(X).max(axis=(1, 2, 3), keepdims=True), rtol=1e-6)
    # A quarter of the 32 values, 8, lies above the quantile 0.75, and ends at +-1.
    scaled = np.abs(dynamic_threshold(lambda x, time: x, 0.75)(X, jnp.float32(0)))
    np.testing.assert_array_equal((scaled > 1 - 1e-6).sum(axis=(1, 2, 3)), [8, 8, 8])
    assert dynamic_threshold(lambda x, time: x)(X.astype(jnp.bfloat16), jnp.float32(0)).dtype == jnp.bfloat16


def test_wrappers_in_a_sampler_compile_and_stay_in_range():
    grid = schedules.flow_grid(6)
    exact = exact_denoise(Gaussian(jnp.asarray(0.9), jnp.asarray(0.3)), schedules.flow_process)
    other = exact_denoise(Gaussian(jnp.asarray(-0.3), jnp.asarray(0.6)), schedules.flow_process)
    for wrap in (clip, dynamic_threshold):
        denoise = wrap(limited_interval(classifier_free(exact, other, 5.0), exact, 0.2, 0.9))
        x_0 = jax.jit(lambda x, denoise=denoise: samplers.ddim(denoise, x, grid))(X)
        assert jnp.abs(x_0).max() <= 1 + 1e-6 and jnp.all(jnp.isfinite(x_0))


def test_drop_labels():
    labels = jnp.arange(100_000) % 10
    dropped = drop_labels(jax.random.key(0), labels, 10, 0.1)
    kept = dropped != 10
    np.testing.assert_array_equal(dropped[kept], labels[kept])
    assert abs(1 - kept.mean() - 0.1) < 0.003  # 3 standard errors
    np.testing.assert_array_equal(drop_labels(jax.random.key(0), labels, 10, 0.0), labels)
    assert jnp.all(drop_labels(jax.random.key(0), labels, 10, 1.0) == 10)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: limited_interval(network_a, network_b, 0.8, 0.2), "smaller time first"),
        (lambda: dynamic_threshold(network_a, 1.5), "quantile"),
        (lambda: drop_labels(jax.random.key(0), jnp.arange(3), 10, 1.5), "rate"),
    ],
)
def test_error_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
