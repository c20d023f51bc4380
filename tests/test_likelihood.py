"""Likelihoods against closed forms on Gaussian data, where the exact denoiser is known."""

import functools

import closed_form
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion import gaussian, likelihood, schedules
from diffusion.likelihood import ode_likelihood, variational_bound
from diffusion.schedules import (
    cosine_beta,
    cosine_log_snr,
    ddpm_grid,
    discrete_process,
    edm_process,
    flow_grid,
    flow_process,
    karras_grid,
    linear_beta,
    make_schedule,
    process_grid,
    respaced_beta,
    vp_process,
)

LEVELS = np.arange(256) / 127.5 - 1
BITS_OF_A_BIN = np.log2(127.5)  # -log2 of the width 2 / 255
pytestmark = pytest.mark.usefixtures("float64")


def exact(data, schedule):
    return closed_form.exact_denoise(data, discrete_process(schedule))


@pytest.fixture
def quadrature(monkeypatch):
    """Takes the bound's noise from Gauss-Hermite nodes, one image per node; their weighted mean is the expectation."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    spread = lambda key, x: jnp.broadcast_to(jnp.asarray(nodes).reshape(-1, *[1] * (x.ndim - 1)), x.shape)  # noqa: E731
    monkeypatch.setattr(likelihood, "normal_like", spread)
    weights = weights / weights.sum()
    return len(nodes), lambda bound: jax.tree.map(lambda term: np.tensordot(weights, term, axes=1), bound)


def repeated(x_0, count):
    return jnp.broadcast_to(jnp.asarray(x_0), (count, len(x_0)))


def test_the_bound_is_the_likelihood_where_large_variance_is_exact(quadrature):
    """For unit Gaussian data the reverse process has variance beta exactly (DDPM, section 3.2): the bound is tight.

    The first beta is 0.01 so that a bin is 1/13 of the decoder's standard deviation. What a bin's mean density then
    misses of the density, (2/255)^2 / 24 / 0.01 nats of curvature, is 4e-4 bits.
    """
    count, expectation = quadrature
    data = closed_form.Gaussian(jnp.zeros(()), jnp.ones(()))
    # its sum of betas makes x_T Gaussian to 1e-9 whatever x_0 is
    schedule = make_schedule(linear_beta(60, 0.01, 0.7))
    for x_0 in (LEVELS[[100, 128]], LEVELS[[30, 240]]):
        bound = variational_bound(jax.random.key(0), exact(data, schedule), schedule, repeated(x_0, count), "large")
        found = expectation(bound)
        wanted = -stats.norm.logpdf(x_0).mean() / np.log(2) + BITS_OF_A_BIN
        np.testing.assert_allclose(found.prior + found.steps.sum() + found.decoder, wanted, atol=6e-4)


def test_the_bound_is_the_likelihood_where_the_learned_variance_is_exact(quadrature):
    """For other Gaussian data the reverse variance is the posterior's + slope^2 Var[x_0 | x_t]: v can represent it."""
    count, expectation = quadrature
    data = closed_form.Gaussian(jnp.asarray(0.1), jnp.asarray(0.4))
    schedule = make_schedule(linear_beta(60, 0.01, 0.7))

    def denoise(x_t, time):
        t = jnp.asarray(time + 1, jnp.int32)
        alpha_bar, noise_2 = schedule.alpha_bar[t], schedule.one_minus_alpha_bar[t]
        doubt = 0.4**2 * noise_2 / (alpha_bar * 0.4**2 + noise_2)  # Var[x_0 | x_t]
        slope = jnp.sqrt(schedule.alpha_bar[t - 1]) * schedule.beta[t] / noise_2
        small = schedule.beta[t] * schedule.one_minus_alpha_bar[t - 1] / noise_2
        wanted = small + slope**2 * doubt
        low = jnp.log(gaussian.p_variance(schedule, "small")[t])
        v = 2 * (jnp.log(wanted) - low) / (jnp.log(schedule.beta[t]) - low) - 1
        return exact(data, schedule)(x_t, time), jnp.full_like(x_t, v)

    x_0 = LEVELS[[100, 150]]
    found = expectation(variational_bound(jax.random.key(0), denoise, schedule, repeated(x_0, count), "learned"))
    wanted = -stats.norm.logpdf(x_0, 0.1, 0.4).mean() / np.log(2) + BITS_OF_A_BIN
    # the same 4e-4, and x_T's KL from its prior
    np.testing.assert_allclose(found.prior + found.steps.sum() + found.decoder, wanted, atol=6e-4)


@pytest.mark.parametrize("variance", ["large", "small"])
@pytest.mark.parametrize("beta", [linear_beta(1000), cosine_beta(40)], ids=["linear 1000", "cosine 40"])
def test_every_term_of_the_bound(quadrature, variance, beta):
    """Against the expected KL of two scalar Gaussians, and the decoder's integral, all in SciPy."""
    count, expectation = quadrature
    mean, std, x_0 = 0.1, 0.4, LEVELS[[100, 0, 255]]
    data = closed_form.Gaussian(jnp.asarray(mean), jnp.asarray(std))
    schedule = make_schedule(beta)
    found = expectation(
        variational_bound(jax.random.key(0), exact(data, schedule), schedule, repeated(x_0, count), variance)
    )
    alpha_bar = np.concatenate([[1.0], np.cumprod(1 - beta)])
    assert found.steps.shape == (len(beta),) and found.steps[0] == 0
    for t in (2, 3, len(beta) // 2, len(beta)):
        # q(x_{t-1} | x_t, x_0) by conditioning the joint Gaussian of x_{t-1} and x_t given x_0
        variance_before, variance_now = 1 - alpha_bar[t - 1], 1 - alpha_bar[t]
        covariance = np.sqrt(1 - beta[t - 1]) * variance_before
        posterior_variance = variance_before - covariance**2 / variance_now
        sigma_2 = beta[t - 1] if variance == "large" else posterior_variance
        # the mean's slope in x_0 at fixed x_t
        slope = np.sqrt(alpha_bar[t - 1]) - covariance / variance_now * np.sqrt(alpha_bar[t])
        gain = np.sqrt(alpha_bar[t]) * std**2 / (alpha_bar[t] * std**2 + variance_now)
        # x_0_hat - x_0 = (1 - gain sqrt(alpha_bar)) (mean - x_0) + gain noise eps
        error_2 = ((1 - gain * np.sqrt(alpha_bar[t])) * (mean - x_0)) ** 2 + gain**2 * variance_now
        ratio = posterior_variance / sigma_2
        nats = 0.5 * (ratio - 1 - np.log(ratio) + slope**2 * error_2 / sigma_2)
        # 1 - cumprod has 1e-16 of absolute error in 1e-4 at t = 2, and the logarithm's difference keeps 1e-11
        np.testing.assert_allclose(found.steps[t - 1], nats.mean() / np.log(2), rtol=1e-7, atol=1e-10)
    x_T = stats.norm(np.sqrt(alpha_bar[-1]) * x_0, np.sqrt(1 - alpha_bar[-1]))
    prior = -x_T.entropy() + 0.5 * np.log(2 * np.pi) + 0.5 * (x_T.mean() ** 2 + x_T.var())
    np.testing.assert_allclose(found.prior, prior.mean() / np.log(2), rtol=1e-7, atol=1e-12)
    gain = np.sqrt(alpha_bar[1]) * std**2 / (alpha_bar[1] * std**2 + beta[0])
    sigma = np.sqrt(beta[0] if variance == "large" else beta[1] * beta[0] / (1 - alpha_bar[2]))
    eps, weights = np.polynomial.hermite_e.hermegauss(60)
    x_0_hat = mean + gain * (np.sqrt(alpha_bar[1]) * (x_0 - mean) + np.sqrt(beta[0]) * eps[:, None])
    right = np.where(x_0 == 1, np.inf, x_0 + 1 / 255)
    left = np.where(x_0 == -1, -np.inf, x_0 - 1 / 255)
    mass = stats.norm.cdf(right, x_0_hat, sigma) - stats.norm.cdf(left, x_0_hat, sigma)
    likely = weights > 1e-10 * weights.sum()  # the farthest nodes count 1e-12 of it, and there this mass is 0
    decoder = -(weights[likely] @ np.log(mass[likely])) / weights.sum()
    np.testing.assert_allclose(found.decoder, decoder.mean() / np.log(2), rtol=1e-6)


def test_the_decoders_variance_may_be_the_papers(quadrature):
    count, _ = quadrature
    schedule = make_schedule(linear_beta(1000))
    data = closed_form.Gaussian(jnp.asarray(0.1), jnp.asarray(0.4))
    x_0 = repeated(LEVELS[[100, 0]], count)
    bound = functools.partial(variational_bound, jax.random.key(0), exact(data, schedule), schedule, x_0)
    small = gaussian.p_variance(schedule, "small")[1]
    large_with_small = bound("large", decoder_variance=small)
    np.testing.assert_array_equal(large_with_small.decoder, bound("small").decoder)
    np.testing.assert_array_equal(large_with_small.steps, bound("large").steps)


def test_drawn_terms_have_the_expectation(quadrature, monkeypatch):
    """The noise drawn for real: 100,000 numbers, so a term's relative error is sqrt(2 / 1e5) at most; 5 of them."""
    count, expectation = quadrature
    schedule = make_schedule(linear_beta(8, 0.01, 0.5))
    data = closed_form.Gaussian(jnp.asarray(0.1), jnp.asarray(0.4))
    bound = functools.partial(variational_bound, jax.random.key(1), exact(data, schedule), schedule)
    wanted = expectation(bound(repeated(LEVELS[[100]], count)))
    monkeypatch.undo()
    found = bound(jnp.full((200, 500), LEVELS[100]))
    assert found.steps.shape == (200, 8)
    np.testing.assert_allclose(found.steps.mean(axis=0), wanted.steps, rtol=5 * np.sqrt(2e-5))
    np.testing.assert_allclose(found.decoder.mean(), wanted.decoder, rtol=5 * np.sqrt(2e-5))
    # Every step draws its own noise: 200 pairs of independent numbers correlate by 1 / sqrt(200) at random.
    assert abs(np.corrcoef(found.steps[:, 3], found.steps[:, 4])[0, 1]) < 5 / np.sqrt(200)
    np.testing.assert_allclose(found.total, found.prior + found.steps.sum(axis=1) + found.decoder, rtol=1e-15)


def test_a_respaced_chain_is_given_the_long_chains_times():
    beta, t = linear_beta(100), np.asarray([10, 40, 100])
    seen = []

    def denoise(x_t, time):
        jax.debug.callback(lambda time: seen.append(float(time)), time)
        return x_t

    schedule = make_schedule(respaced_beta(beta, t))
    variational_bound(jax.random.key(0), denoise, schedule, jnp.zeros((1, 2)), time=jnp.asarray(t - 1.0))
    jax.effects_barrier()
    assert sorted(seen) == [9, 39, 99]


def test_the_bound_of_an_image_does_not_depend_on_its_batch_with_its_own_key():
    schedule = make_schedule(linear_beta(8, 0.01, 0.5))
    denoise = exact(closed_form.Gaussian(jnp.zeros(()), jnp.asarray(0.4)), schedule)
    keys, x_0 = jax.random.split(jax.random.key(0), 4), jnp.asarray(LEVELS[:256:16].reshape(4, 4))
    bits = jax.jit(lambda key, x_0: variational_bound(key, denoise, schedule, x_0).total)
    np.testing.assert_allclose(bits(keys, x_0)[2:3], bits(keys[2:3], x_0[2:3]), rtol=1e-12)


def test_memory_does_not_grow_with_the_steps():
    def bytes_at_once(num_steps):
        schedule = make_schedule(linear_beta(num_steps))
        bound = functools.partial(variational_bound, denoise=lambda x, time: x * 0.9, schedule=schedule)
        compiled = jax.jit(lambda key, x_0: bound(key, x_0=x_0)).lower(jax.random.key(0), jnp.zeros((2, 10_000)))
        memory = compiled.compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    # what may grow is tables of T numbers: far less than one image per step
    assert bytes_at_once(1000) - bytes_at_once(100) < 900 * 10_000


GAUSSIAN = closed_form.Gaussian(jnp.zeros(3), jnp.asarray([0.5, 0.2, 0.35]))
# two modes that are not along the axes, so that the Jacobian is not diagonal
MIXTURE = closed_form.Mixture(jnp.asarray([0.3, 0.7]), jnp.asarray([[0.5, -0.4], [-0.3, 0.6]]), jnp.asarray([0.1, 0.2]))
COSINE_VP = vp_process(cosine_log_snr())
PROCESSES = {
    "vp": (functools.partial(process_grid, COSINE_VP), COSINE_VP),
    "ve": (karras_grid, edm_process),
    "flow": (flow_grid, flow_process),
}


def ode_bits(data, x_0, grid, process, key=0, **options):
    denoise = closed_form.exact_denoise(data, process)
    options = {"num_probes": None, "bin_width": 1.0} | options
    return jax.jit(lambda x_0: ode_likelihood(jax.random.key(key), denoise, x_0, grid, **options))(x_0)


def models_bits(data, x_0, grid):
    """-log2 / D of the exact density of what the exact flow makes of x_T ~ N(0, noise^2): an affine map's image."""
    start = grid.signal[0], grid.noise[0]
    offset = data.flow(jnp.zeros(x_0.shape), start, (1.0, 0.0))
    slope = data.flow(jnp.ones(x_0.shape), start, (1.0, 0.0)) - offset
    return -stats.norm.logpdf(x_0, offset, slope * start[1]).mean(axis=1) / np.log(2)


def data_bits(data, x_0):
    return -data.log_likelihood(x_0) / x_0.shape[1] / np.log(2)


@pytest.mark.parametrize("process", PROCESSES)
def test_the_ode_gives_the_density_of_gaussian_data(process):
    """To 1e-3 bits/dim: image by image the model's own, with its prior, and the data's on the whole. Of order 2."""
    make_grid, process = PROCESSES[process]
    x_0, num_steps, errors = GAUSSIAN.sample(jax.random.key(0), 500, (3,)), [100, 200, 400], []
    for n in num_steps:
        grid = make_grid(n)
        found = ode_bits(GAUSSIAN, x_0, grid, process)
        errors.append(jnp.abs(found - models_bits(GAUSSIAN, x_0, grid)))
    np.testing.assert_allclose(errors[-1], 0, atol=1e-3)
    np.testing.assert_allclose(found.mean(), data_bits(GAUSSIAN, x_0).mean(), atol=1e-3)
    slope = np.polyfit(np.log(num_steps), [np.log(error.mean()) for error in errors], 1)[0]
    np.testing.assert_allclose(slope, -2, atol=0.1)


def test_the_ode_on_ddpms_own_chain():
    schedule = make_schedule(linear_beta(1000))
    x_0, grid = GAUSSIAN.sample(jax.random.key(0), 500, (3,)), ddpm_grid(schedule, 1000)
    found = ode_bits(GAUSSIAN, x_0, grid, discrete_process(schedule))
    # the chain's even steps are 3e-4 apart in angle where the data's smallest std, 0.2, turns: 1e-3 in the middle of it
    np.testing.assert_allclose(found.mean(), data_bits(GAUSSIAN, x_0).mean(), atol=1e-3)


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_the_ode_gives_the_density_of_a_mixture(process):
    """400 steps to 1e-3 bits/dim on the whole; the priors' own mismatch, which is odd in x_T, averages out."""
    make_grid, process = PROCESSES[process]
    x_0 = MIXTURE.sample(jax.random.key(0), 1000)
    found, wanted = ode_bits(MIXTURE, x_0, make_grid(400), process), data_bits(MIXTURE, x_0)
    np.testing.assert_allclose(found.mean(), wanted.mean(), atol=1e-3)
    np.testing.assert_allclose(found, wanted, atol=0.03)


def test_probes_estimate_the_divergence_without_bias():
    make_grid, process = PROCESSES["flow"]
    x_0, grid = jnp.broadcast_to(jnp.asarray([0.1, 0.2]), (4000, 2)), make_grid(40)
    exact = ode_bits(MIXTURE, x_0, grid, process)
    spread = {}
    for num_probes in (1, 4):
        estimates = ode_bits(MIXTURE, x_0, grid, process, num_probes=num_probes)
        spread[num_probes] = estimates.std()
        assert spread[num_probes] > 1e-3  # or else there is no estimate to test
        # 4000 estimates of one image: 5 of their mean's standard errors
        np.testing.assert_allclose(estimates.mean(), exact[0], atol=5 * estimates.std() / np.sqrt(4000))
    # a standard deviation of 4000 draws is good to 1 / sqrt(8000); 5 of them, in both
    np.testing.assert_allclose(spread[1] / spread[4], 2, rtol=0.12)


def test_an_images_probes_do_not_depend_on_its_batch_with_its_own_key():
    make_grid, process = PROCESSES["flow"]
    denoise, grid = closed_form.exact_denoise(MIXTURE, process), make_grid(5)
    keys, x_0 = jax.random.split(jax.random.key(0), 4), MIXTURE.sample(jax.random.key(1), 4)
    bits = jax.jit(lambda key, x_0: ode_likelihood(key, denoise, x_0, grid))
    np.testing.assert_allclose(bits(keys, x_0)[1:2], bits(keys[1:2], x_0[1:2]), rtol=1e-12)


def test_bins_turn_densities_into_probabilities():
    """The bits of the density are off by the bin's log-width, 2 / 255 by default, as the bound's decoder counts."""
    make_grid, process = PROCESSES["flow"]
    x_0, grid = GAUSSIAN.sample(jax.random.key(0), 5, (3,)), make_grid(10)
    denoise = closed_form.exact_denoise(GAUSSIAN, process)
    eight_bit = jax.jit(lambda x_0: ode_likelihood(jax.random.key(0), denoise, x_0, grid, num_probes=None))(x_0)
    np.testing.assert_allclose(eight_bit, ode_bits(GAUSSIAN, x_0, grid, process) + BITS_OF_A_BIN, rtol=1e-12)


def test_the_bound_and_the_ode_agree_on_the_same_model(quadrature):
    """Unit Gaussian data, where both are the likelihood: the bound's 6e-4 of above, and the ODE of 60 steps."""
    count, expectation = quadrature
    data = closed_form.Gaussian(jnp.zeros(2), jnp.ones(2))
    schedule = make_schedule(linear_beta(60, 0.01, 0.7))
    x_0 = jnp.asarray(LEVELS[[[100, 30]]])
    bound = expectation(
        variational_bound(jax.random.key(0), exact(data, schedule), schedule, repeated(x_0[0], count), "large")
    )
    ode = ode_likelihood(jax.random.key(0), exact(data, schedule), x_0, ddpm_grid(schedule, 60))
    np.testing.assert_allclose(bound.prior + bound.steps.sum() + bound.decoder, ode[0], atol=1e-3)


def test_dequantized_images_fill_their_bins():
    x_0 = jnp.asarray(LEVELS)[:, None] * jnp.ones((1, 400))
    spread = (likelihood.dequantize(jax.random.key(0), x_0) - x_0) * 127.5
    # sqrt(n) D above 2.2 has probability 1e-4 (Kolmogorov)
    assert stats.kstest(np.ravel(spread) + 0.5, "uniform").statistic < 2.2 / np.sqrt(spread.size)
    assert (jnp.abs(spread) <= 0.5 + 1e-12).all()


@pytest.mark.parametrize("process", ["ve", "flow"])
def test_float32_and_a_bfloat16_network(process):
    make_grid, process = PROCESSES[process]
    with jax.enable_x64(False):
        x_0, grid = GAUSSIAN.sample(jax.random.key(0), 20, (3,)), make_grid(50)
        perfect = closed_form.exact_denoise(GAUSSIAN, process)
        bits = jax.jit(ode_likelihood, static_argnums=1)
        found = bits(jax.random.key(0), perfect, x_0, grid)
        rough = bits(jax.random.key(0), lambda *args: perfect(*args).astype(jnp.bfloat16), x_0, grid)
        assert found.dtype == rough.dtype == jnp.float32 and np.isfinite(rough).all()
    with jax.enable_x64(True):
        wide = ode_bits(GAUSSIAN, jnp.asarray(x_0, jnp.float64), make_grid(50), process) + BITS_OF_A_BIN
    # x_0_hat rounded to 6e-8 is divided by a noise of 0.002 (EDM's last point) and summed over 50 steps
    np.testing.assert_allclose(found, wide, atol=5e-3)


def test_extremes_of_the_bound_stay_finite():
    with jax.enable_x64(False):
        x_0 = jnp.asarray(LEVELS[[[0, 100, 255]]], jnp.float32)
        for beta, variance in ((cosine_beta(1000), "large"), ([0.5], "small"), ([1e-6, 0.999], "small")):
            schedule = make_schedule(np.asarray(beta))
            denoise = lambda x, time: (0.5 * x).astype(jnp.bfloat16)  # noqa: E731
            bound = variational_bound(jax.random.key(0), denoise, schedule, x_0, variance)
            assert all(np.isfinite(term).all() for term in bound)


def test_a_learned_variance_is_only_used_where_asked_for():
    schedule, x_0 = make_schedule(linear_beta(4, 0.1, 0.5)), jnp.asarray(LEVELS[[[10, 100]]])
    plain, both = (lambda x, time: 0.5 * x), (lambda x, time: (0.5 * x, 0.1 * x))
    key, grid = jax.random.key(0), ddpm_grid(schedule, 4)
    bound = functools.partial(variational_bound, key, schedule=schedule, x_0=x_0)
    np.testing.assert_array_equal(bound(both, variance="large").total, bound(plain, variance="large").total)
    assert (bound(both, variance="learned").total != bound(plain, variance="large").total).all()
    np.testing.assert_array_equal(ode_likelihood(key, both, x_0, grid), ode_likelihood(key, plain, x_0, grid))


def test_error_messages():
    schedule, x_0 = make_schedule(linear_beta(4)), jnp.zeros((1, 2))
    plain, key = (lambda x, time: x), jax.random.key(0)
    with pytest.raises(ValueError, match="unknown variance 'medium'"):
        variational_bound(key, plain, schedule, x_0, "medium")
    with pytest.raises(ValueError, match="variance='learned' needs a denoise that returns"):
        variational_bound(key, plain, schedule, x_0, "learned")
    with pytest.raises(ValueError, match="num_probes is 0: give at least 1"):
        ode_likelihood(key, plain, x_0, flow_grid(2), num_probes=0)


def test_the_bound_from_a_few_steps_is_the_bound_on_average():
    # A schedule of 20 steps, a poor denoiser: the mean over even offsets u of the estimate is the full sum, to the
    # spread of the noise draws. 4000 copies of one image, so that its standard error is known from the draws.
    schedule = schedules.make_schedule(schedules.linear_beta(20, 1e-3, 0.4))
    x_0 = jnp.broadcast_to(jnp.round(jnp.linspace(0, 255, 6)) / 127.5 - 1, (4000, 6))
    denoise = lambda x_t, time: 0.5 * x_t  # noqa: E731
    full = likelihood.variational_bound(jax.random.key(0), denoise, schedule, x_0)
    u = (jnp.arange(4000) + 0.5) / 4000
    estimate = likelihood.estimate_bound(jax.random.key(1), denoise, schedule, x_0, u, 5)
    error = jnp.hypot(full.total.std(), estimate.total.std()) / 4000**0.5
    assert abs(full.total.mean() - estimate.total.mean()) < 4 * error < 0.02 * full.total.mean()
    assert estimate.t.shape == (4000, 5) and estimate.t.min() == 2 and estimate.t.max() == 20
    np.testing.assert_allclose(estimate.prior, full.prior, rtol=1e-6)
    # Each step's own mean, where the estimate drew it, is the full bound's.
    for t in (2, 7, 20):
        drawn = estimate.steps[estimate.t == t]
        spread = float(jnp.hypot(drawn.std() / len(drawn) ** 0.5, full.steps[:, t - 1].std() / 4000**0.5))
        assert abs(float(drawn.mean() - full.steps[:, t - 1].mean())) < 4 * spread + 1e-6
    # Images of several channels, and the decoder's own variance: it moves the decoder's term and no other.
    image = x_0.reshape(4000, 1, 2, 3)
    same = likelihood.estimate_bound(jax.random.key(1), denoise, schedule, image, u, 5)
    other = likelihood.estimate_bound(jax.random.key(1), denoise, schedule, image, u, 5, decoder_variance=1e-2)
    np.testing.assert_array_equal(other.steps, same.steps)
    assert (other.decoder != same.decoder).all() and other.steps.shape == (4000, 5)
    with pytest.raises(ValueError, match="0 terms"):
        likelihood.estimate_bound(jax.random.key(1), denoise, schedule, x_0, u, 0)
