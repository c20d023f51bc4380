"""DDPM's equations against Bayes' rule, numerical integrals and each other."""

import decimal
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError
from scipy import integrate, stats

from diffusion import gaussian
from diffusion.gaussian import Normal
from diffusion.schedules import cosine_beta, linear_beta, make_schedule

BETAS = {"linear": linear_beta(1000), "cosine": cosine_beta(1000), "short": linear_beta(5, 0.1, 0.9)}
LEVELS = np.arange(256) / 127.5 - 1

# Float64 keeps 16 digits; at t = T of the cosine chain alpha_bar is 2e-9, and its square root costs at most 5 of them.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(params=BETAS)
def chain(request):
    """A schedule, and t at its start, second step, middle and end."""
    beta = BETAS[request.param]
    return make_schedule(beta), jnp.asarray([1, 2, len(beta) // 2, len(beta)])


def images(seed=0, shape=(4, 2, 2, 1), dtype=np.float64):
    x_0, eps = np.random.default_rng(seed).standard_normal((2, *shape))
    return jnp.asarray(np.clip(x_0, -1, 1), dtype), jnp.asarray(eps, dtype)


@pytest.mark.parametrize("name", BETAS)
def test_q_sample_is_the_chain_of_single_steps(name):
    """q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t) applied t times to a mean and a variance (eq. 2)."""
    beta = BETAS[name]
    schedule = make_schedule(beta)
    x_0, zero, one = jnp.ones((1, 1)), jnp.zeros((1, 1)), jnp.ones((1, 1))
    mean, variance = 1.0, 0.0
    for t in range(1, len(beta) + 1):
        mean, variance = np.sqrt(1 - beta[t - 1]) * mean, (1 - beta[t - 1]) * variance + beta[t - 1]
        if t in (1, 2, len(beta) // 2, len(beta)):
            # A product of 1000 factors and the sum of their logarithms may differ by 1000 roundings of 1e-16.
            assert_close(gaussian.q_sample(schedule, x_0, t, zero), [[mean]], rtol=1e-12)
            assert_close(gaussian.q_sample(schedule, zero, t, one) ** 2, [[variance]], rtol=1e-12)
    assert_close(gaussian.q_sample(schedule, x_0, 0, one), x_0)  # t = 0 is the clean image


def test_q_posterior_is_bayes_rule(chain):
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add, means are weighted by them."""
    schedule, t = chain
    x_0, x_t = images()
    posterior = gaussian.q_posterior(schedule, x_0, x_t, t)
    for i in range(1, 4):
        now = int(t[i])
        alpha, beta = float(schedule.alpha[now]), float(schedule.beta[now])
        before, variance_before = float(schedule.alpha_bar[now - 1]), float(schedule.one_minus_alpha_bar[now - 1])
        precision = alpha / beta + 1 / variance_before
        mean = (np.sqrt(alpha) / beta * x_t[i] + np.sqrt(before) / variance_before * x_0[i]) / precision
        assert_close(posterior.mean[i], mean)
        assert_close(jnp.broadcast_to(posterior.variance, x_0.shape)[i], jnp.full_like(mean, 1 / precision))
    assert_close(posterior.mean[0], x_0[0])  # before step 1 there is x_0, and no doubt
    assert float(posterior.variance[0].squeeze()) == 0


def test_p_mean_of_the_true_noise_is_the_posteriors(chain):
    """Eq. 11 was derived so: the mean of q(x_{t-1} | x_t, x_0) with x_0 from eq. 15."""
    schedule, t = chain
    x_0, eps = images()
    x_t = gaussian.q_sample(schedule, x_0, t, eps)
    assert_close(gaussian.p_mean(schedule, eps, x_t, t), gaussian.q_posterior(schedule, x_0, x_t, t).mean)
    wrong = eps + 0.3
    x_0_hat = gaussian.predict_x_0(schedule, wrong, x_t, t)
    # x_0_hat is 1e5 times the images at the cosine chain's end, and only a 1e-8th of it counts: 1e-16 * 1e5.
    assert_close(
        gaussian.p_mean(schedule, wrong, x_t, t), gaussian.q_posterior(schedule, x_0_hat, x_t, t).mean, atol=1e-9
    )


def test_predict_x_0_undoes_q_sample(chain):
    schedule, t = chain
    x_0, eps = images()
    assert_close(gaussian.predict_x_0(schedule, eps, gaussian.q_sample(schedule, x_0, t, eps), t), x_0)


@pytest.mark.parametrize("variance", ["large", "small", "array"])
def test_p_sample_has_its_mean_and_variance(variance):
    schedule = make_schedule(BETAS["short"])
    x_t, eps_hat = jnp.full((4, 200, 200, 1), 0.7), jnp.full((4, 200, 200, 1), -0.2)
    t = jnp.asarray([2, 3, 4, 5])
    wanted = {
        "large": schedule.beta[t],
        "small": gaussian.q_posterior(schedule, x_t, x_t, t).variance.reshape(4),
        "array": jnp.asarray([0.1, 0.2, 0.3, 0.4]),
    }[variance]
    given = variance if variance != "array" else jnp.broadcast_to(wanted.reshape(4, 1, 1, 1), x_t.shape)
    x = gaussian.p_sample(jax.random.key(0), schedule, eps_hat, x_t, t, given)
    z = (x - gaussian.p_mean(schedule, eps_hat, x_t, t)) / jnp.sqrt(wanted).reshape(4, 1, 1, 1)
    # 40,000 numbers: the mean's error is 1 / 200, the variance's sqrt(2) / 200; 5 of each.
    np.testing.assert_allclose(z.mean(axis=(1, 2, 3)), 0, atol=5 / 200)
    np.testing.assert_allclose(z.var(axis=(1, 2, 3)), 1, atol=5 * np.sqrt(2) / 200)


def test_p_sample_adds_no_noise_at_the_last_step(chain):
    schedule, _ = chain
    x_t, eps_hat = images()
    t = jnp.asarray([1, 1, 2, 2])
    x = gaussian.p_sample(jax.random.key(0), schedule, eps_hat, x_t, t)
    mean = gaussian.p_mean(schedule, eps_hat, x_t, t)
    np.testing.assert_array_equal(x[:2], mean[:2])
    assert (x[2:] != mean[2:]).all()


def test_p_sample_with_one_key_per_image_does_not_depend_on_the_batch():
    schedule = make_schedule(BETAS["short"])
    x_t, eps_hat = images()
    keys = jax.random.split(jax.random.key(3), 4)
    together = gaussian.p_sample(keys, schedule, eps_hat, x_t, 3)
    alone = gaussian.p_sample(keys[2:3], schedule, eps_hat[2:3], x_t[2:3], 3)
    np.testing.assert_array_equal(together[2:3], alone)


def test_learned_variance_reaches_from_the_posteriors_to_beta(chain):
    schedule, t = chain
    one = jnp.ones((4, 2, 2, 1))
    large, middle, small = (gaussian.learned_variance(schedule, v * one, t)[:, 0, 0, 0] for v in (1, 0, -1))
    assert_close(large, schedule.beta[t])
    posterior = gaussian.q_posterior(schedule, one, one, t).variance.reshape(4)
    assert_close(small[1:], posterior[1:], rtol=1e-10)
    assert small[0] == small[1] or t[1] == 2  # t = 1 borrows from t = 2
    assert_close(middle, jnp.sqrt(large * small))


def test_normal_kl_is_the_integral():
    rng = np.random.default_rng(0)
    for _ in range(5):
        (m_p, m_q), (v_p, v_q) = rng.normal(size=2), rng.uniform(0.1, 3, size=2)
        p, q = (m_p, np.sqrt(v_p)), (m_q, np.sqrt(v_q))

        def integrand(x, p=p, q=q):
            return stats.norm.pdf(x, *p) * (stats.norm.logpdf(x, *p) - stats.norm.logpdf(x, *q))

        integral, _ = integrate.quad(integrand, -30, 30, epsabs=1e-10)
        kl = gaussian.normal_kl(
            *(Normal(jnp.full((1, 1), m), jnp.full((1, 1), v)) for m, v in ((m_p, v_p), (m_q, v_q)))
        )
        np.testing.assert_allclose(kl, [[integral]], atol=1e-8)
    same = Normal(jnp.zeros((1, 3)), jnp.ones((1, 3)))
    np.testing.assert_array_equal(gaussian.normal_kl(same, same), np.zeros((1, 3)))


@pytest.mark.parametrize("ratio", [4e-40, 4e-11, 1e-3, 0.3, 0.49, 0.51, 0.9, 1 + 1e-9, 2.5, 1e7, 3e30])
def test_normal_kl_keeps_its_digits_at_every_ratio_of_variances(ratio):
    """Against 50 digits. Near 1 it is (ratio - 1)^2 / 4, a difference of two numbers of size |ratio - 1|."""
    with decimal.localcontext(prec=50):
        exact = decimal.Decimal(ratio)
        expected = float((exact - 1 - exact.ln()) / 2)
    p, q = (Normal(jnp.zeros((1, 1)), jnp.full((1, 1), v)) for v in (ratio, 1.0))
    # Those are rounded to 1e-16 of their size each, which is 4e-16 / |ratio - 1| of the difference.
    np.testing.assert_allclose(gaussian.normal_kl(p, q), [[expected]], rtol=1e-15 / min(1, abs(ratio - 1)))
    _, derivative = jax.jvp(lambda v: gaussian.normal_kl(p._replace(variance=v), q), (p.variance,), (jnp.ones((1, 1)),))
    np.testing.assert_allclose(derivative, [[(1 - 1 / ratio) / 2]], rtol=1e-12, atol=1e-15)


def test_normal_kl_of_float32_and_of_a_variance_of_0():
    with jax.enable_x64(False):
        q = Normal(jnp.zeros(()), jnp.ones(()))
        tiny = gaussian.normal_kl(Normal(jnp.zeros(()), jnp.asarray(1e-12)), q)  # 1 - 1e-12 is 1 in float32
        np.testing.assert_allclose(tiny, (12 * np.log(10) - 1) / 2, rtol=1e-6)
        assert gaussian.normal_kl(Normal(jnp.zeros(()), jnp.zeros(())), q) == np.inf


@pytest.mark.parametrize("std", [1e-4, 1e-2, 0.1, 1.0, 30.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, 0.0123, 0.9, 2.0])
def test_the_decoder_is_a_distribution_over_the_levels(mean, std):
    p = Normal(jnp.full((1, 256), mean), jnp.full((1, 1), std**2))
    log_likelihood = gaussian.decoder_log_likelihood(jnp.asarray(LEVELS)[None], p)
    assert np.isfinite(log_likelihood).all()
    assert_close(jnp.exp(log_likelihood).sum(), 1.0)
    # The bins' masses where a plain difference of CDFs still has its digits
    edges = np.concatenate([[-np.inf], (LEVELS[1:] + LEVELS[:-1]) / 2, [np.inf]])
    mass = np.diff(stats.norm.cdf(edges, mean, std))
    np.testing.assert_allclose(jnp.exp(log_likelihood)[0], mass, atol=1e-14)


def test_the_decoder_keeps_its_digits_in_the_tails():
    """Where the mass is below the smallest float64, against the integral of pdf / pdf(nearest edge), in logarithms."""
    for x_0, mean, std in [(0.2, -0.9, 0.01), (-0.4, 0.9, 0.005)]:
        x_0 = LEVELS[np.abs(LEVELS - x_0).argmin()]
        near, far = sorted([x_0 - gaussian.HALF_BIN, x_0 + gaussian.HALF_BIN], key=lambda edge: abs(edge - mean))
        reference = stats.norm.logpdf(near, mean, std)

        def scaled(x, r=reference, m=mean, s=std):
            return np.exp(stats.norm.logpdf(x, m, s) - r)

        integral, _ = integrate.quad(scaled, *sorted([near, far]), epsabs=0, epsrel=1e-11, points=[near])
        p = Normal(jnp.full((1, 1), mean), jnp.full((1, 1), std**2))
        found = gaussian.decoder_log_likelihood(jnp.full((1, 1), x_0), p)
        np.testing.assert_allclose(found, [[reference + np.log(integral)]], rtol=1e-9)


def test_float32_tables_keep_the_first_steps_noise():
    """1 - float32(alpha_bar) is 1.7e-4 off at t = 1; rounding to float32 alone is 6e-8, twice over."""
    with jax.enable_x64(False):
        schedule = make_schedule(BETAS["linear"])
        found = gaussian.q_sample(schedule, jnp.zeros((1, 1)), 1, jnp.ones((1, 1)))
        assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, [[np.sqrt(1e-4)]], rtol=2e-7)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", BETAS)
def test_values_and_gradients_stay_finite_at_the_ends(name, dtype):
    with jax.enable_x64(False):
        schedule = make_schedule(BETAS[name])
        x_0, eps = images(dtype=dtype)
        last = len(BETAS[name])

        def everything(x_0, eps, t):
            x_t = gaussian.q_sample(schedule, x_0, t, eps)
            mean, _ = gaussian.q_posterior(schedule, x_0, x_t, t)
            variance = gaussian.learned_variance(schedule, eps, t)
            p = Normal(gaussian.p_mean(schedule, eps, x_t, t), variance)
            return [
                x_t,
                mean,
                variance,
                gaussian.predict_x_0(schedule, eps, x_t, t),
                gaussian.p_sample(jax.random.key(0), schedule, eps, x_t, t),
                gaussian.normal_kl(Normal(mean, variance), p),
                gaussian.decoder_log_likelihood(x_0, p),
            ]

        def total(*args):
            parts = everything(*args)
            return sum(part.astype(jnp.float32).mean() for part in parts), parts

        value_and_grad = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))
        for result in jax.tree.leaves(value_and_grad(x_0, eps, jnp.asarray([1, 2, last - 1, last]))):
            assert np.isfinite(result).all()


def test_one_step_and_one_image():
    schedule = make_schedule(np.asarray([0.5]))
    x_0, eps = images(shape=(1, 3))
    x_t = gaussian.q_sample(schedule, x_0, 1, eps)
    assert_close(gaussian.p_sample(jax.random.key(0), schedule, eps, x_t, 1), x_0)
    for variance in ("large", "small"):
        np.testing.assert_array_equal(gaussian.p_variance(schedule, variance)[1], 0.5)


def test_t_is_a_scalar_or_one_per_image_under_jit_and_vmap(chain):
    schedule, t = chain
    x_0, eps = images()
    together = jax.jit(gaussian.q_sample)(schedule, x_0, t, eps)
    for i in range(4):
        one = gaussian.q_sample(schedule, x_0[i : i + 1], int(t[i]), eps[i : i + 1])
        assert_close(together[i : i + 1], one)
    by_one = jax.vmap(lambda x_0, t, eps: gaussian.q_sample(schedule, x_0[None], t, eps[None])[0])(x_0, t, eps)
    assert_close(by_one, together)


def test_a_step_outside_the_chain_is_nan_and_not_its_last():
    schedule = make_schedule(BETAS["short"])
    x_0, eps = images()
    x_t = gaussian.q_sample(schedule, x_0, jnp.asarray([5, 6, -1, 0]), eps)
    assert np.isfinite(x_t[0]).all() and np.isfinite(x_t[3]).all() and np.isnan(x_t[1:3]).all()


def test_error_messages():
    schedule = make_schedule(BETAS["short"])
    x_0, eps = images()
    with pytest.raises(ValueError, match="unknown variance 'fixedlarge': choose 'large'"):
        gaussian.p_sample(jax.random.key(0), schedule, eps, x_0, 1, "fixedlarge")
    with pytest.raises((AssertionError, TypeCheckError)):  # chex's, or before it jaxtyping's, which only tests have
        gaussian.q_sample(schedule, x_0, 1, eps[:, :1])
    with pytest.raises(ValueError, match="one per image"):
        gaussian.p_sample(jax.random.split(jax.random.key(0), 3), schedule, eps, x_0, 1)
