"""Losses of autoencoders against closed forms, numerical integrals and gradients of finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, stats

from diffusion import autoencoding
from diffusion.gaussian import Normal, normal_kl


@pytest.mark.parametrize("mean, log_variance", [(0.0, 0.0), (1.5, -2.0), (-0.3, 1.2), (0.0, 1e-3)])
def test_kl_is_the_integral(mean, log_variance):
    def integrand(z):
        log_q = stats.norm.logpdf(z, mean, np.exp(log_variance / 2))
        return np.exp(log_q) * (log_q - stats.norm.logpdf(z))

    expected, _ = integrate.quad(integrand, -12, 12, epsabs=1e-12)
    found = autoencoding.kl_to_unit_normal(jnp.full((2, 3, 4), mean), jnp.full((2, 3, 4), log_variance))
    # Near 0 what remains of expm1 is its rounding, 2^-23 of the log-variance.
    np.testing.assert_allclose(found, [12 * expected] * 2, rtol=1e-6, atol=12 * 2**-23 * abs(log_variance))


def test_kl_is_that_of_the_papers_normals():
    random = np.random.RandomState(0)
    mean, log_variance = (jnp.asarray(random.randn(3, 2, 5), jnp.float32) for _ in range(2))
    expected = normal_kl(Normal(mean, jnp.exp(log_variance)), Normal(jnp.zeros(()), jnp.ones(()))).sum(axis=(1, 2))
    np.testing.assert_allclose(autoencoding.kl_to_unit_normal(mean, log_variance), expected, rtol=1e-5)


def test_kl_of_clamped_variances_is_finite():
    ends = jnp.asarray([[-30.0], [20.0]])
    np.testing.assert_allclose(
        autoencoding.kl_to_unit_normal(jnp.zeros((2, 1)), ends), [14.5, 0.5 * (np.exp(20) - 21)], rtol=1e-6
    )


def test_reconstruction_is_a_laplace_likelihood():
    random = np.random.RandomState(0)
    x, x_hat = random.uniform(-1, 1, (2, 3, 4, 4, 3))
    found = autoencoding.reconstruction_loss(x, x_hat, log_scale=-1.3)
    expected = -stats.laplace.logpdf(x, x_hat, np.exp(-1.3)).sum(axis=(1, 2, 3)) - 48 * np.log(2)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    perceptual = np.array([0.1, 0.2, 0.3], np.float32)
    more = autoencoding.reconstruction_loss(x, x_hat, log_scale=-1.3, perceptual=perceptual)
    np.testing.assert_allclose(more - found, 48 * perceptual * np.exp(1.3), rtol=1e-4)


def test_the_best_scale_is_the_mean_distance():
    x, x_hat = np.random.RandomState(0).uniform(-1, 1, (2, 1, 100))
    slope = jax.grad(lambda log_scale: autoencoding.reconstruction_loss(x, x_hat, log_scale).sum())
    assert abs(slope(np.log(np.abs(x - x_hat).mean()))) < 1e-4  # of sums of 100 in float32


def test_the_equilibrium_of_the_hinge_game_is_zero_logits():
    """With p_data = p_model a discriminator is best where it says 0; the generator then has no pull by its level."""
    logits = jnp.linspace(-2, 2, 9)[:, None]
    loss = autoencoding.discriminator_loss(logits, logits)
    assert loss.min() == 1 and (loss[jnp.abs(logits[:, 0]) <= 1] == 1).all() and loss[0] > 1
    patches = jnp.asarray([[[0.5, -0.5], [2.0, 0.0]]])
    np.testing.assert_allclose(autoencoding.discriminator_loss(patches, patches), [0.5 * (0.75 + 1.5)])
    np.testing.assert_allclose(autoencoding.generator_loss(patches), [-0.5])


def test_weighted_gradients_have_the_ratio():
    random = np.random.RandomState(0)
    pull, push = ({"kernel": random.randn(3, 4), "bias": random.randn(4)} for _ in range(2))
    weight = autoencoding.adaptive_weight(pull, push)

    def norm(tree):
        return np.sqrt(sum(np.square(leaf).sum() for leaf in tree.values()))

    # The 1e-4 in the divisor is 1 in 40,000 of it.
    np.testing.assert_allclose(weight * norm(push) / norm(pull), 0.5, rtol=1e-4)
    assert autoencoding.adaptive_weight(jnp.ones(1), jnp.zeros(1)) == 0.5 * 1e4  # at most
    assert jax.grad(lambda x: autoencoding.adaptive_weight(x, jnp.ones(2)))(jnp.ones(2)).tolist() == [0, 0]
