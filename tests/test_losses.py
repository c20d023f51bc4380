"""Losses: their means, the bound's terms, and which gradient reaches what in L_hybrid."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from diffusion import gaussian, losses
from diffusion.gaussian import Normal
from diffusion.schedules import cosine_beta, linear_beta, make_schedule

LEVELS = np.arange(256) / 127.5 - 1
pytestmark = pytest.mark.usefixtures("float64")


def images(count, seed=0, shape=(5, 3, 2, 1), dtype="float64"):
    """Images on the 256 levels, and `count` arrays of noise."""
    rng = np.random.default_rng(seed)
    x_0 = LEVELS[rng.integers(256, size=shape)]
    return [jnp.asarray(x, dtype) for x in (x_0, *rng.standard_normal((count, *shape)))]


def test_simple_loss_is_the_mean_over_each_image():
    eps = jnp.zeros((2, 4, 4, 3))
    eps_hat = eps.at[0].set(2.0).at[1, 0, 0, 0].set(12.0)
    np.testing.assert_allclose(losses.simple_loss(eps, eps_hat), [4.0, 144 / 48])
    np.testing.assert_allclose(losses.weighted_mse(jnp.asarray([0.5, 2.0]), eps, eps_hat), [2.0, 6.0])
    np.testing.assert_allclose(losses.weighted_mse(3.0, eps, eps_hat), [12.0, 9.0])


def test_bfloat16_is_summed_in_float32():
    """Adding 1e-3 to 4 a thousand times does nothing in bfloat16, whose digits end at 4 / 256."""
    error = jnp.full((1, 1001), 1e-3**0.5, jnp.bfloat16).at[0, 0].set(2.0)
    loss = losses.simple_loss(jnp.zeros_like(error), error)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, np.mean(np.asarray(error, np.float64) ** 2, keepdims=True)[0], rtol=1e-6)


@pytest.mark.parametrize("beta", [linear_beta(10, 0.01, 0.5), cosine_beta(50)])
def test_a_perfect_network_costs_only_the_decoders_term(beta):
    schedule = make_schedule(beta)
    x_0, eps = images(1)
    t = jnp.asarray([1, 2, 3, len(beta) - 1, len(beta)])
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    mean = gaussian.q_posterior(schedule, x_0, x_t, t).mean
    variance = gaussian.at(gaussian.p_variance(schedule, "small"), t, x_t)
    term = losses.variational_term(schedule, x_0, x_t, t, Normal(mean, variance))
    np.testing.assert_allclose(term[1:], 0, atol=1e-13)
    # At t = 1 the mean is x_0: the bits of the bin around the mean of the Gaussian, and of one tail more at the ends
    expected = -gaussian.decoder_log_likelihood(x_0[:1], Normal(x_0[:1], variance[:1])).mean() / np.log(2)
    np.testing.assert_allclose(term[0], expected, rtol=1e-12)


def test_the_terms_gradient_is_finite_at_every_step():
    for dtype in ("float32", "bfloat16"):
        with jax.enable_x64(False):
            schedule = make_schedule(cosine_beta(1000))
            x_0, eps, eps_hat, v = images(3, dtype=dtype)
            t = jnp.asarray([1, 2, 500, 999, 1000])

            def loss(eps_hat, v, schedule=schedule, x_0=x_0, eps=eps, t=t):
                x_t = gaussian.q_sample(schedule, x_0, t, eps)
                x_0_hat = gaussian.predict_x_0(schedule, eps_hat, x_t, t)
                return losses.hybrid_loss(losses.simple_loss(eps, eps_hat), schedule, x_0, x_t, t, x_0_hat, v)

            value, pullback = jax.vjp(loss, eps_hat, v)  # not under jit, where XLA may simplify a NaN away
            assert value.dtype == jnp.float32 and np.isfinite(value).all()
            for part in pullback(jnp.ones_like(value)):
                assert np.isfinite(part).all()


def test_hybrid_gradients_reach_what_the_paper_says():
    """eps_hat learns from L_simple alone and v from L_vlb alone (Nichol & Dhariwal 2021, section 3.1)."""
    schedule = make_schedule(linear_beta(20, 0.01, 0.3))
    x_0, eps, eps_hat, v = images(3)
    t = jnp.asarray([1, 2, 5, 19, 20])
    x_t = gaussian.q_sample(schedule, x_0, t, eps)

    def hybrid(eps_hat, v):
        x_0_hat = gaussian.predict_x_0(schedule, eps_hat, x_t, t)
        simple = losses.simple_loss(eps, eps_hat)
        return losses.hybrid_loss(simple, schedule, x_0, x_t, t, x_0_hat, v, weight=0.01).sum()

    def term(v):
        p = Normal(gaussian.p_mean(schedule, eps_hat, x_t, t), gaussian.learned_variance(schedule, v, t))
        return losses.variational_term(schedule, x_0, x_t, t, p).sum()

    of_eps_hat, of_v = jax.grad(hybrid, (0, 1))(eps_hat, v)
    alone = jax.grad(lambda eps_hat: losses.simple_loss(eps, eps_hat).sum())(eps_hat)
    np.testing.assert_allclose(of_eps_hat, alone, rtol=1e-12)
    # 20 steps times the weight; p_mean (eq. 11) and the posterior's mean differ by roundings of x_0_hat
    np.testing.assert_allclose(of_v, 20 * 0.01 * jax.grad(term)(v), rtol=1e-8, atol=1e-12)
    simple = losses.simple_loss(eps, eps_hat).sum()
    np.testing.assert_allclose(hybrid(eps_hat, v), simple + 20 * 0.01 * term(v), rtol=1e-10)


def test_the_learned_variance_is_best_where_theory_has_it():
    """KL(q || p) is least over p's variance at q's variance + (the means' difference)^2."""
    schedule = make_schedule(linear_beta(20, 0.01, 0.3))
    x_0, eps, error = images(2)
    t = jnp.asarray([2, 3, 5, 19, 20])
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    x_0_hat = x_0 + error
    posterior = gaussian.q_posterior(schedule, x_0, x_t, t)
    best = posterior.variance + (gaussian.q_posterior(schedule, x_0_hat, x_t, t).mean - posterior.mean) ** 2
    small, large = (gaussian.learned_variance(schedule, v * jnp.ones_like(x_0), t) for v in (-1, 1))
    v = 2 * jnp.log(best / small) / jnp.log(large / small) - 1
    gradient = jax.grad(lambda v: losses.learned_variance_loss(schedule, x_0, x_t, t, x_0_hat, v).sum())
    np.testing.assert_allclose(gradient(v), 0, atol=1e-12)
    assert (gradient(v + 0.1) > 0).all() and (gradient(v - 0.1) < 0).all()


def test_error_messages():
    x_0, eps = images(1)
    with pytest.raises((AssertionError, TypeCheckError)):  # chex's, or before it jaxtyping's, which only tests have
        losses.simple_loss(x_0, eps[:, :1])
