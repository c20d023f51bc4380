"""Loss weights: the same loss whatever is predicted, and the papers' formulas. Times: quantiles against densities."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from scipy import integrate, stats

from diffusion import gaussian, losses, predictions, weightings
from diffusion.gaussian import Normal
from diffusion.schedules import linear_beta, make_schedule, rescale_zero_terminal_snr

KINDS = predictions.KINDS
ANGLES = np.asarray([1e-2, 0.4, 0.8, 1.2, 1.56])
PROCESSES = {
    "vp": (np.cos(ANGLES), np.sin(ANGLES)),
    "ve": (np.ones(5), np.asarray([0.002, 0.1, 1.0, 10.0, 80.0])),
    "flow": (1 - np.asarray([0.01, 0.3, 0.5, 0.9, 0.99]), np.asarray([0.01, 0.3, 0.5, 0.9, 0.99])),
}
WEIGHTINGS = {
    "simple": weightings.simple,
    "min_snr": weightings.min_snr,
    "p2": weightings.p2,
    "edm": weightings.edm,
    "x_0": weightings.x_0_mse,
}

# A handful of float64 operations each, and quotients of squares that cost 4 digits at most
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-11)
pytestmark = pytest.mark.usefixtures("float64")


@pytest.fixture(params=PROCESSES)
def levels(request):
    """signal[5] and noise[5] of a process."""
    return noise_levels(request.param)


def noise_levels(process):
    signal, noise = PROCESSES[process]
    return jnp.asarray(signal), jnp.asarray(noise)


def predicted(levels):
    """x_0, x_t and an imperfect x_0_hat at five noise levels."""
    x_0, eps, error = (jnp.asarray(x) for x in np.random.default_rng(0).standard_normal((3, 5, 2, 2, 1)))
    signal, noise = (predictions.per_example(part, x_0) for part in levels)
    return x_0, eps, signal * x_0 + noise * eps, x_0 + noise * error


def mse(levels, kind):
    """The mse of a network that predicts `kind`, with the x_0_hat of `predicted`."""
    x_0, eps, x_t, x_0_hat = predicted(levels)
    output = predictions.from_x_0(kind, x_0_hat, x_t, *levels)
    return losses.weighted_mse(1.0, predictions.target(kind, x_0, eps, *levels), output)


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_weighting_is_the_same_loss_for_every_prediction(weighting, levels):
    weight = WEIGHTINGS[weighting]
    for kind in KINDS:
        assert_close(weight(kind, *levels) * mse(levels, kind), weight("x_0", *levels) * mse(levels, "x_0"))


def test_the_v_loss_is_the_snr_plus_1_weighted_x_0_loss():
    levels = noise_levels("vp")
    snr = levels[0] ** 2 / levels[1] ** 2
    assert_close(mse(levels, "v"), (snr + 1) * mse(levels, "x_0"))
    assert_close(mse(levels, "eps"), snr * mse(levels, "x_0"))
    assert_close(weightings.x_0_mse("v", *levels), 1 / (snr + 1))
    assert_close(weightings.x_0_mse("eps", *levels), 1 / snr)


def test_simple_is_the_mse_of_eps(levels):
    _, eps, x_t, x_0_hat = predicted(levels)
    eps_hat = predictions.to_eps("x_0", x_0_hat, x_t, *levels)
    for kind in KINDS:
        assert_close(weightings.simple(kind, *levels) * mse(levels, kind), losses.simple_loss(eps, eps_hat))


def test_the_papers_formulas(levels):
    signal, noise = levels
    snr = signal**2 / noise**2
    assert_close(weightings.simple("eps", *levels), np.ones(5))
    assert_close(weightings.min_snr("x_0", *levels), np.minimum(snr, 5))  # Hang et al. 2023, section 3.4
    assert_close(weightings.min_snr("eps", *levels, gamma=2.0), np.minimum(snr, 2) / snr)
    assert_close(weightings.p2("eps", *levels, k=2.0, gamma=0.5), 1 / np.sqrt(2 + snr))  # Choi et al. 2022, eq. 8
    assert_close(weightings.edm("F", *levels, sigma_data=0.3), np.ones(5))  # Karras et al. 2022: lambda = 1 / c_out^2
    sigma = noise / signal
    edm = (sigma**2 + 0.3**2) / (sigma * 0.3) ** 2
    assert_close(weightings.edm("x_0", *levels, sigma_data=0.3), edm)


def test_min_snr_of_v():
    levels = noise_levels("vp")
    snr = levels[0] ** 2 / levels[1] ** 2
    assert_close(weightings.min_snr("v", *levels), np.minimum(snr, 5) / (snr + 1))


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("kind", KINDS)
def test_vlb_weights_make_the_mse_the_bounds_term(kind, variance):
    """Against the KL of the two Gaussians itself, from which a perfect network's KL is taken for its constant."""
    schedule = make_schedule(linear_beta(100, 1e-3, 0.1))
    t = jnp.asarray([2, 3, 50, 99, 100])
    levels = jnp.sqrt(schedule.alpha_bar[t]), jnp.sqrt(schedule.one_minus_alpha_bar[t])
    x_0, _, x_t, x_0_hat = predicted(levels)
    posterior = gaussian.q_posterior(schedule, x_0, x_t, t)
    sigma_2 = gaussian.at(gaussian.p_variance(schedule, variance), t, x_t)

    def kl(x_0_hat):
        p = Normal(gaussian.q_posterior(schedule, x_0_hat, x_t, t).mean, sigma_2)
        return gaussian.normal_kl(posterior, p).mean(axis=(1, 2, 3))

    constant = kl(x_0)
    assert_close(weightings.vlb(kind, schedule, t, variance) * mse(levels, kind), kl(x_0_hat) - constant, rtol=1e-9)
    if variance == "small":
        np.testing.assert_allclose(constant, 0, atol=1e-14)


@pytest.mark.parametrize("kind", ["x_0", "v", "velocity", "F"])
def test_vlb_weights_of_a_chain_that_ends_in_pure_noise(kind):
    schedule = make_schedule(rescale_zero_terminal_snr(linear_beta(100, 1e-3, 0.1)))
    t = jnp.asarray([99, 100, 100, 100, 100])
    levels = jnp.sqrt(schedule.alpha_bar[t]), jnp.sqrt(schedule.one_minus_alpha_bar[t])
    x_0, _, x_t, x_0_hat = predicted(levels)
    sigma_2 = gaussian.at(gaussian.p_variance(schedule, "small"), t, x_t)
    q, p = (Normal(gaussian.q_posterior(schedule, x, x_t, t).mean, sigma_2) for x in (x_0, x_0_hat))
    expected = gaussian.normal_kl(q, p).mean(axis=(1, 2, 3))
    assert_close(weightings.vlb(kind, schedule, t, "small") * mse(levels, kind), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", ["x_0", "v", "velocity", "F"])
def test_weights_at_the_ends(kind):
    """Pure noise has SNR 0 and counts nothing in x_0; a clean image has infinite SNR, which min-SNR and P2 bound."""
    noisy, clean = (jnp.zeros(1), jnp.ones(1)), (jnp.ones(1), jnp.zeros(1))
    for weight in (weightings.simple, weightings.min_snr, weightings.p2):
        np.testing.assert_array_equal(weight(kind, *noisy), [0])
    assert np.isfinite(weightings.edm(kind, *noisy)).all()
    if kind == "x_0":
        np.testing.assert_array_equal(weightings.min_snr(kind, *clean), [5])
        assert np.isinf(weightings.simple(kind, *clean)).all()
    else:
        for weight in (weightings.simple, weightings.min_snr, weightings.edm, weightings.p2):
            assert np.isfinite(weight(kind, *clean)).all()


@pytest.mark.parametrize("batch_size", [1, 7, 128, 4096])
@pytest.mark.parametrize("x64", [False, True])
def test_uniform_and_stratified_draws_stay_inside(batch_size, x64):
    with jax.enable_x64(x64):
        for seed in range(5):
            for draw in (weightings.uniform, weightings.stratified):
                u = draw(jax.random.key(seed), batch_size)
                assert u.shape == (batch_size,) and ((u > 0) & (u < 1)).all()
            # one in each part; only rounding may put a draw on the part's own end
            np.testing.assert_array_less(np.arange(batch_size) - 1e-3, batch_size * np.asarray(u, np.float64))
            np.testing.assert_array_less(batch_size * np.asarray(u, np.float64), np.arange(batch_size) + 1 + 1e-3)


def test_each_stratum_is_even():
    u = jax.vmap(lambda key: weightings.stratified(key, 4))(jax.random.split(jax.random.key(0), 2000))
    for part in range(4):
        # sqrt(n) D above 2.2 has probability 1e-4 (Kolmogorov)
        assert stats.kstest(4 * u[:, part] - part, "uniform").statistic < 2.2 / np.sqrt(2000)
    # parts are drawn apart: a correlation of 2000 pairs has std 1 / sqrt(2000)
    assert abs(np.corrcoef(u[:, 0], u[:, 1])[0, 1]) < 5 / np.sqrt(2000)


def test_stratified_is_over_the_global_batch_on_any_number_of_devices():
    draw = functools.partial(weightings.stratified, batch_size=64)
    key = jax.random.key(5)
    sharding = NamedSharding(Mesh(np.asarray(jax.devices()), "data"), PartitionSpec("data"))
    sharded = jax.jit(draw, out_shardings=sharding)(key)
    assert len(sharded.addressable_shards) == 8
    np.testing.assert_array_equal(sharded, jax.jit(draw)(key))
    np.testing.assert_array_equal(np.floor(64 * np.asarray(sharded)), np.arange(64))


QUANTILES = {
    "logit_normal": (weightings.logit_normal_quantile, weightings.logit_normal_density, {"mean": -0.3, "std": 0.8}),
    "mode": (weightings.mode_quantile, weightings.mode_density, {"scale": 1.29}),
    "mode at the ends": (weightings.mode_quantile, weightings.mode_density, {"scale": -0.9}),
    "cosmap": (weightings.cosmap_quantile, weightings.cosmap_density, {}),
}


@pytest.mark.parametrize("name", QUANTILES)
def test_quantiles_have_their_densities(name):
    quantile, density, options = QUANTILES[name]
    quantile, density = functools.partial(quantile, **options), functools.partial(density, **options)
    u = jnp.linspace(0.001, 0.999, 101)
    t, slope = jax.jit(jax.vmap(jax.value_and_grad(quantile)))(u)
    assert (jnp.diff(t) > 0).all()
    assert_close(density(t), 1 / slope, rtol=1e-9)  # the derivative of the quantile's inverse is the density
    # The trapezoidal rule is off by step^2 / 12 times the change of slope, at most 9,000 (mode at the ends): 2e-6.
    grid = np.linspace(0, 1, 20_001)
    cumulated = integrate.cumulative_trapezoid(density(jnp.asarray(grid)), grid, initial=0)
    np.testing.assert_allclose(cumulated[-1], 1, atol=1e-5)
    drawn = jax.jit(quantile)(weightings.uniform(jax.random.key(1), 20_000))
    distance = stats.kstest(drawn, lambda t: np.interp(t, grid, cumulated)).statistic
    assert distance < 2.2 / np.sqrt(20_000)  # probability 1e-4, and the key is fixed


@pytest.mark.parametrize("name", QUANTILES)
def test_densities_and_quantiles_at_the_ends(name):
    quantile, density, options = QUANTILES[name]
    with jax.enable_x64(False):
        for u, t in ((0.0, 0.0), (1.0, 1.0)):
            np.testing.assert_allclose(quantile(u, **options), t, atol=1e-7)
            assert np.isfinite(density(t, **options))
            assert np.isfinite(jax.grad(lambda t: density(t, **options))(t))
        for outside in (-0.1, 1.1):
            assert density(outside, **options) == 0


def test_cosmap_has_the_cosine_schedules_log_snr():
    """Flow's noise / signal at the quantile of u is the cosine schedule's at time u, tan(pi u / 2)."""
    u = jnp.linspace(0.01, 0.99, 50)
    t = weightings.cosmap_quantile(u)
    assert_close(t / (1 - t), np.tan(np.pi / 2 * u))


def test_mode_in_the_papers_own_form():
    u = jnp.linspace(0, 1, 50)
    paper = 1 - u - 0.8 * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
    np.testing.assert_allclose(weightings.mode_quantile(1 - u, 0.8), paper, atol=1e-14)


def test_log_normal_sigma():
    u = jnp.linspace(0.01, 0.99, 50)
    sigma = jnp.exp(4 * jax.jit(weightings.log_normal_quantile)(u))
    assert_close(sigma, stats.lognorm(s=1.2, scale=np.exp(-1.2)).ppf(u))
    assert_close(weightings.log_normal_quantile(0.5, mean=-0.4), -0.1)


@pytest.mark.parametrize("num_steps", [1, 3, 1000])
def test_steps_are_even_on_1_to_T(num_steps):
    u = (jnp.arange(30 * num_steps) + 0.5) / (30 * num_steps)
    t = weightings.step_quantile(u, num_steps)
    assert t.dtype == jnp.int32
    np.testing.assert_array_equal(np.bincount(t, minlength=num_steps + 1), [0] + [30] * num_steps)


@pytest.mark.parametrize("x64", [False, True])
def test_the_least_and_the_largest_draws_stay_inside(monkeypatch, x64):
    """jax draws k * eps, for k from 0 to 1 / eps - 1: both ends are as likely as any other, about 1e-7 in float32."""
    with jax.enable_x64(x64):
        eps = jnp.finfo(jnp.zeros(()).dtype).eps
        for end in (0.0, 1 - eps):
            monkeypatch.setattr(jax.random, "uniform", lambda key, shape, end=end: jnp.full(shape, end, float))
            u = jnp.append(weightings.uniform(jax.random.key(0), 3), weightings.stratified(jax.random.key(0), 128))
            assert ((u > 0) & (u < 1)).all()
            assert np.isfinite(jax.jit(weightings.log_normal_quantile)(u)).all()
            for num_steps in (1, 3, 1000, 1024, 4000):
                t = weightings.step_quantile(u, num_steps)
                assert ((t >= 1) & (t <= num_steps)).all()


def test_error_messages():
    schedule = make_schedule(linear_beta(10))
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        weightings.min_snr("noise", 0.6, 0.8)
    with pytest.raises(ValueError, match="unknown variance 'medium'"):
        weightings.vlb("eps", schedule, jnp.asarray([1]), "medium")
    with pytest.raises(ValueError, match="num_steps is 0: give at least 1"):
        weightings.step_quantile(0.5, 0)
    for scale in (-1.1, 1.8):
        with pytest.raises(ValueError, match=r"mode sampling needs one within \[-1, 1.752\]"):
            weightings.mode_quantile(0.5, scale)
        with pytest.raises(ValueError, match="mode sampling needs one within"):
            weightings.mode_density(0.5, scale)
