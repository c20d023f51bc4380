"""Schedules, processes and grids: exact ends, precision, monotonicity, and error messages."""

import math
import pathlib
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.schedules import (
    cosine_beta,
    ddpm_grid,
    discrete_process,
    flow_grid,
    karras_grid,
    linear_beta,
    linear_beta_for,
    make_schedule,
    process_grid,
    rescale_zero_terminal_snr,
    respace,
    respaced_beta,
    vp_process,
)

CHAIN = make_schedule(linear_beta(1000))
GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "schedulers.npz")


def test_linear_beta_is_ddpms():
    beta = linear_beta(1000)
    assert beta.dtype == np.float64 and beta.shape == (1000,)
    assert (beta[0], beta[-1]) == (1e-4, 0.02)
    np.testing.assert_allclose(np.diff(beta), (0.02 - 1e-4) / 999)
    # The prior term of DDPM's bound on CIFAR-10 depends on this end: alpha_bar_T = 4.0358e-5.
    np.testing.assert_allclose(CHAIN.alpha_bar[-1], 4.0358297e-05, rtol=1e-5)


def test_cosine_beta_has_the_papers_alpha_bar():
    # beta is computed by an identity of the sine; alpha_bar straight from eq. 17 is the independent route.
    t = np.arange(1, 900)
    with jax.enable_x64(True):
        alpha_bar = make_schedule(cosine_beta(1000)).alpha_bar[t]
        f = np.cos((t / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
        np.testing.assert_allclose(alpha_bar, f / np.cos(0.008 / 1.008 * np.pi / 2) ** 2, rtol=1e-12)
    assert cosine_beta(1000).max() == 0.999
    assert cosine_beta(4000, largest=0.5).max() == 0.5


def test_linear_beta_for_any_length_is_ddpms_at_1000_and_ends_in_the_same_noise():
    np.testing.assert_allclose(linear_beta_for(1000), linear_beta(1000), rtol=1e-14)
    # -log alpha_bar_T is the sum of beta + beta^2 / 2 + ...: that of beta is 10.05 at every T, and that of beta^2 / 2
    # is 0.067 * 1000 / T; twice as much leaves room for the higher powers.
    for num_steps in (100, 250, 4000):
        log_alpha_bar = np.log1p(-linear_beta_for(num_steps)).sum()
        np.testing.assert_allclose(log_alpha_bar, -10.05, atol=0.14 * 1000 / num_steps)
    beta = linear_beta_for(10)
    assert beta.max() == 0.999 and np.all(np.isfinite(make_schedule(beta).alpha_bar))


def test_beta_tables_are_diffusers():
    # theirs are float32: a rounding of the table's numbers, and, where a root is squared, of twice that
    np.testing.assert_allclose(schedules.sigmoid_beta(1000), GOLDEN["beta/sigmoid"], rtol=1e-6)
    np.testing.assert_allclose(schedules.sqrt_linear_beta(1000), GOLDEN["beta/sqrt_linear"], rtol=1e-6)
    # At the end roots of 6e-3, rounded to 4e-10, differ by 1e-4: 4e-6 of it, and twice that in the square.
    np.testing.assert_allclose(rescale_zero_terminal_snr(linear_beta(1000)), GOLDEN["beta/zero_snr"], atol=1e-5)


def test_sigmoid_and_sqrt_linear_beta_by_their_definitions():
    beta = schedules.sigmoid_beta(13, 0.1, 0.3)
    share = (beta - 0.1) / 0.2
    np.testing.assert_allclose(np.log(share / (1 - share)), np.arange(-6, 7), atol=1e-12)
    roots = np.sqrt(schedules.sqrt_linear_beta(11, 0.01, 0.04))
    np.testing.assert_allclose(roots, 0.1 + 0.01 * np.arange(11), rtol=1e-14)


@pytest.mark.parametrize("beta", [linear_beta(1000), cosine_beta(50), schedules.sqrt_linear_beta(1000)])
def test_rescaled_chains_end_in_pure_noise(beta):
    rescaled = rescale_zero_terminal_snr(beta)
    assert rescaled[-1] == 1 and rescaled[0] == beta[0]
    with jax.enable_x64(True):
        before, after = make_schedule(beta), make_schedule(rescaled)
        assert (after.alpha_bar[-1], after.one_minus_alpha_bar[-1]) == (0, 1)
        # The root of alpha_bar is an affine function of what it was, the first one kept (Algorithm 1).
        root, expected = np.sqrt(after.alpha_bar[1:]), np.sqrt(before.alpha_bar[1:])
        expected = (expected - expected[-1]) * expected[0] / (expected[0] - expected[-1])
        np.testing.assert_allclose(root, expected, rtol=1e-9, atol=1e-12)
        short = make_schedule(respaced_beta(rescaled, np.asarray([1, len(beta)])))
        assert short.alpha_bar[-1] == 0 and np.all(np.isfinite(jnp.stack(short)))
    grid = ddpm_grid(make_schedule(rescaled), 5)
    assert (grid.signal[0], grid.noise[0]) == (0, 1)


def test_schedule_begins_with_clean_data():
    assert [float(field[0]) for field in CHAIN] == [0, 1, 1, 0]
    assert all(field.shape == (1001,) and field.dtype == jnp.float32 for field in CHAIN)


def test_one_minus_alpha_bar_has_no_cancellation():
    # Exact rational arithmetic; float32 rounds once, by at most 2^-24 of the value.
    beta = linear_beta(1000)
    product = Fraction(1)
    for t in range(1, 40):
        product *= 1 - Fraction(float(beta[t - 1]))
        exact = float(1 - product)
        assert abs(float(CHAIN.one_minus_alpha_bar[t]) / exact - 1) < 1e-7
        assert abs(float(CHAIN.alpha_bar[t]) / float(product) - 1) < 1e-7


def test_schedule_is_float64_where_jax_is():
    with jax.enable_x64(True):
        chain = make_schedule(linear_beta(1000))
        assert chain.beta.dtype == jnp.float64
        np.testing.assert_allclose(chain.alpha_bar + chain.one_minus_alpha_bar, 1, rtol=1e-15)
        np.testing.assert_allclose(np.cumprod(chain.alpha), chain.alpha_bar, rtol=1e-12)
        assert flow_grid(3).time.dtype == karras_grid(3).noise.dtype == ddpm_grid(chain, 3).signal.dtype == jnp.float64


def test_respaced_chain_keeps_alpha_bar():
    steps = np.asarray([10, 250, 251, 1000])
    with jax.enable_x64(True):
        beta = linear_beta(1000)
        expected = make_schedule(beta).alpha_bar[steps]
        np.testing.assert_allclose(make_schedule(respaced_beta(beta, steps)).alpha_bar[1:], expected, rtol=1e-12)
        np.testing.assert_allclose(respaced_beta(beta, np.arange(1, 1001)), beta, rtol=1e-10)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 50, 333, 999, 1000])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_ddpm_grid(num_steps, power):
    grid = ddpm_grid(CHAIN, num_steps, power)
    t = np.asarray(grid.time).astype(int) + 1
    assert t.shape == (num_steps + 1,) and t[0] == 1000 and t[-1] == 0 and np.all(np.diff(t) < 0)
    np.testing.assert_allclose(grid.signal, np.sqrt(CHAIN.alpha_bar[t]), rtol=1e-6)
    assert (grid.signal[-1], grid.noise[-1]) == (1, 0)
    np.testing.assert_allclose(np.square(grid.signal) + np.square(grid.noise), 1, rtol=1e-6)
    if power == 1:  # evenly spaced, to the nearest step
        assert np.abs(t - np.linspace(1000, 0, num_steps + 1)).max() <= 0.5 + 1e-9


def test_ddpm_grid_at_every_step_is_the_chain():
    for power in (1.0, 2.0):
        np.testing.assert_array_equal(ddpm_grid(CHAIN, 1000, power).time, np.arange(999, -2, -1))
    assert np.diff(ddpm_grid(CHAIN, 20, 2.0).time)[-1] > np.diff(ddpm_grid(CHAIN, 20, 2.0).time)[0]


def test_trailing_spacing_is_the_even_ddpm_grid():
    for num_steps in (1, 10, 1000):
        spaced = schedules.spaced_grid(CHAIN, num_steps, "trailing")
        np.testing.assert_array_equal(jnp.stack(spaced), jnp.stack(ddpm_grid(CHAIN, num_steps)))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_spaced_grids_for_any_number_of_steps(spacing):
    for num_steps in (1, 2, 3, 7, 64, 499):
        for skip_last in (False, True):
            grid = schedules.spaced_grid(CHAIN, num_steps, spacing, skip_last=skip_last)
            t = np.asarray(grid.time, int) + 1
            assert t.shape == (num_steps + 1,) and t[-2] >= 1 and t[0] <= 1000 and np.all(np.diff(t) < 0)
    np.testing.assert_array_equal(grid.signal, jnp.sqrt(CHAIN.alpha_bar[t]))


def test_a_spaced_grid_may_end_at_the_noise_of_the_first_step():
    grid = schedules.spaced_grid(CHAIN, 4, "leading", steps_offset=1, final="sigma_min")
    np.testing.assert_array_equal(grid.time, [751, 501, 251, 1, -1])
    np.testing.assert_array_equal(jnp.stack(grid)[:2, -1], jnp.stack(ddpm_grid(CHAIN, 1000))[:2, -2])


def test_discrete_process_gathers_the_chain():
    process = discrete_process(CHAIN)
    time = jnp.asarray([999.0, 499.4, 499.6, 0.0, -1.0])
    signal, noise = process(time)
    t = np.asarray([1000, 500, 501, 1, 0])
    np.testing.assert_allclose(signal, np.sqrt(CHAIN.alpha_bar[t]), rtol=1e-6)
    np.testing.assert_allclose(noise, np.sqrt(CHAIN.one_minus_alpha_bar[t]), rtol=1e-6)
    assert process(jnp.float32(7.0))[0].shape == ()
    for outside in (-2.0, 1000.0):  # no silent clamp
        assert np.all(np.isnan(process(jnp.float32(outside))))
    grid = ddpm_grid(CHAIN, 10)
    np.testing.assert_allclose(jnp.stack(process(grid.time)), jnp.stack(grid[:2]), rtol=1e-6)


def test_linear_beta_log_snr_is_the_sde():
    # log alpha_bar(u) is minus the integral of beta(u), here by quadrature.
    with jax.enable_x64(True):
        for u in (1e-3, 0.1, 0.5, 1.0):
            s = np.linspace(0, u, 10_001)
            integral = np.trapezoid(0.1 + s * 19.9, s)
            signal, noise = vp_process(schedules.linear_beta_log_snr())(jnp.asarray(u))
            np.testing.assert_allclose(signal**2, np.exp(-integral), rtol=1e-10)
            np.testing.assert_allclose(noise**2, -np.expm1(-integral), rtol=1e-10)
    # DDPM's chain is its discretisation.
    signal, _ = vp_process(schedules.linear_beta_log_snr())(jnp.arange(0, 1001) / 1000)
    np.testing.assert_allclose(signal, np.sqrt(CHAIN.alpha_bar), atol=1e-3)


def test_cosine_log_snr_is_the_cosine():
    with jax.enable_x64(True):
        u = jnp.linspace(0.05, 0.95, 19)
        signal, noise = vp_process(schedules.cosine_log_snr(-60.0, 60.0))(u)  # its ends cut off next to nothing
        np.testing.assert_allclose(signal, np.cos(np.pi / 2 * u), rtol=1e-10)
        np.testing.assert_allclose(noise, np.sin(np.pi / 2 * u), rtol=1e-10)
        signal, noise = vp_process(schedules.cosine_log_snr(-9.0, 12.0, shift=0.5))(jnp.asarray([0.0, 1.0]))
        np.testing.assert_allclose(2 * np.log(signal / noise), [12.5, -8.5], rtol=1e-10)


@pytest.mark.parametrize("log_snr", [schedules.linear_beta_log_snr(), schedules.cosine_log_snr()])
def test_vp_process_is_precise_at_its_ends(log_snr):
    u = np.asarray([0.0, 1e-6, 1e-4, 0.5, 1.0])
    signal, noise = vp_process(log_snr)(jnp.asarray(u, jnp.float32))
    with jax.enable_x64(True):
        exact_signal, exact_noise = vp_process(log_snr)(jnp.asarray(u))
    np.testing.assert_allclose(signal, exact_signal, rtol=3e-6)
    np.testing.assert_allclose(noise, exact_noise, rtol=3e-6)  # some roundings of a log-SNR of up to 15


def test_flow_grid():
    grid = flow_grid(4)
    np.testing.assert_array_equal(grid.time, [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_array_equal(grid.noise, grid.time)
    np.testing.assert_array_equal(grid.signal, 1 - grid.time)
    shifted = flow_grid(4, shift=3.0)
    # A shift multiplies noise / signal, but for the ends.
    ratio = (shifted.noise / shifted.signal)[1:-1] / (grid.noise / grid.signal)[1:-1]
    np.testing.assert_allclose(ratio, 3, rtol=1e-5)
    assert (shifted.time[0], shifted.time[-1]) == (1, 0)


def test_released_flow_grid_is_shifted_twice_at_its_end():
    # A shift multiplies noise / signal: 1 / 999 at the end of 1000 training times, twice shifted by 3.
    grid = schedules.released_flow_grid(10, shift=3.0)
    np.testing.assert_allclose(grid.noise[-2] / grid.signal[-2], 9 / 999, rtol=1e-5)
    assert (grid.noise[0], grid.noise[-1], grid.signal[-1]) == (1, 0, 1)
    even = schedules.released_flow_grid(10, shift=1.0)
    np.testing.assert_allclose(even.time[:-1], 1 - 0.999 * np.arange(10) / 9, rtol=1e-6)


def test_karras_grid():
    grid = karras_grid(18)
    assert np.all(grid.signal == 1) and grid.noise[-1] == 0 and grid.time[-1] == -np.inf
    np.testing.assert_allclose(jnp.stack([grid.noise[0], grid.noise[-2]]), [80, 0.002], rtol=1e-6)
    np.testing.assert_allclose(np.diff(grid.noise[:-1] ** (1 / 7)), np.diff(grid.noise[:2] ** (1 / 7))[0], rtol=1e-4)
    np.testing.assert_allclose(np.exp(4 * grid.time[:-1]), grid.noise[:-1], rtol=1e-5)
    np.testing.assert_allclose(jnp.stack(schedules.edm_process(grid.time)), jnp.stack(grid[:2]), rtol=1e-5)
    even = np.diff(np.log(karras_grid(18, rho=math.inf).noise[:-1]))
    np.testing.assert_allclose(even, even[0], rtol=1e-4)
    assert karras_grid(1).noise.tolist() == [80, 0]


def test_process_grid():
    process = vp_process(schedules.cosine_log_snr())
    grid = process_grid(process, 8)
    np.testing.assert_array_equal(grid.time, np.arange(8, -1, -1) / 8)
    np.testing.assert_array_equal(jnp.stack(grid[:2])[:, :-1], jnp.stack(process(grid.time))[:, :-1])
    assert (grid.signal[-1], grid.noise[-1]) == (1, 0)
    np.testing.assert_allclose(process_grid(process, 8, 2.0).time, np.square(grid.time))
    flow = process_grid(schedules.flow_process, 8)
    np.testing.assert_allclose(jnp.stack(flow), jnp.stack(flow_grid(8)), atol=1e-7)


@pytest.mark.parametrize("rho", [7.0, math.inf])
@pytest.mark.parametrize("num_steps", [1, 2, 10, 100, 1000])
def test_respace_picks_points(rho, num_steps):
    for fine in (ddpm_grid(CHAIN, 1000), flow_grid(1000), karras_grid(1000)):
        grid = respace(fine, num_steps, rho)
        points = set(zip(*(np.asarray(field).tolist() for field in fine), strict=True))
        assert len(grid.time) == num_steps + 1
        assert all(point in points for point in zip(*(np.asarray(field).tolist() for field in grid), strict=True))
        assert np.all(np.diff(grid.time) < 0) and np.all(np.diff(grid.noise) < 0)
        assert (grid.time[0], grid.noise[-1]) == (fine.time[0], 0)


def test_respace_is_even_in_log_snr_or_karras():
    fine = karras_grid(2000, rho=4.0)
    sigma = np.asarray(respace(fine, 10).noise[:-1])
    np.testing.assert_allclose(sigma, karras_grid(10, rho=math.inf).noise[:-1], rtol=0.01)
    sigma = np.asarray(respace(fine, 10, 7.0).noise[:-1])
    np.testing.assert_allclose(sigma, karras_grid(10).noise[:-1], rtol=0.01)


def test_jit_and_vmap():
    grid = jax.jit(lambda beta: ddpm_grid(CHAIN._replace(beta=beta), 5))(CHAIN.beta)
    np.testing.assert_array_equal(jnp.stack(grid), jnp.stack(ddpm_grid(CHAIN, 5)))
    np.testing.assert_array_equal(
        jnp.stack(jax.vmap(discrete_process(CHAIN))(jnp.arange(5.0))),
        jnp.stack(discrete_process(CHAIN)(jnp.arange(5.0))),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: linear_beta(0), "at least 1"),
        (lambda: cosine_beta(-1), "at least 1"),
        (lambda: flow_grid(0), "at least 1"),
        (lambda: karras_grid(0), "at least 1"),
        (lambda: process_grid(schedules.flow_process, 0), "at least 1"),
        (lambda: ddpm_grid(CHAIN, 0), r"within 1\.\.1000"),
        (lambda: ddpm_grid(CHAIN, 1001), r"within 1\.\.1000"),
        (lambda: ddpm_grid(CHAIN, 10, 0.5), "power"),
        (lambda: respace(flow_grid(10), 11), r"within 1\.\.10"),
        (lambda: schedules.released_flow_grid(0), "at least 1"),
        (lambda: schedules.linear_beta_for(0), "at least 1"),
        (lambda: schedules.sqrt_linear_beta(0), "at least 1"),
        (lambda: schedules.sigmoid_beta(0), "at least 1"),
        (lambda: schedules.spaced_grid(CHAIN, 1001, "leading"), r"within 1\.\.1000"),
        (lambda: schedules.spaced_grid(CHAIN, 10, "karras"), "choose from leading, trailing, linspace"),
        (lambda: schedules.spaced_grid(CHAIN, 10, "leading", final="one"), "choose from zero, sigma_min"),
        (lambda: schedules.spaced_grid(CHAIN, 1000, "leading", steps_offset=1), r"do not fall within 0\.\.999"),
        (lambda: schedules.spaced_grid(CHAIN, 1000, "leading", skip_last=True), r"do not fall within 0\.\.999"),
        (lambda: rescale_zero_terminal_snr(np.asarray([0.1])), "at least 2"),
        (lambda: rescale_zero_terminal_snr(np.asarray([0.1, 0.0])), r"\(0, 1\)"),
        (lambda: karras_grid(5, sigma_min=0.0), "sigma_min"),
        (lambda: karras_grid(5, sigma_min=2.0, sigma_max=1.0), "sigma_min"),
        (lambda: make_schedule(np.asarray([0.1, 0.0])), r"\(0, 1\)"),
        (lambda: make_schedule(np.asarray([1.0, 0.1])), r"\(0, 1\)"),
        (lambda: make_schedule(np.asarray([0.1, -0.1])), r"\(0, 1\)"),
        (lambda: make_schedule(np.asarray([0.1, np.nan])), r"\(0, 1\)"),
        (lambda: make_schedule(linear_beta(10, 1e-4, 1.5)), r"\(0, 1\)"),
        (lambda: respaced_beta(linear_beta(10), np.asarray([0, 5])), "increase"),
        (lambda: respaced_beta(linear_beta(10), np.asarray([5, 5])), "increase"),
        (lambda: respaced_beta(linear_beta(10), np.asarray([5, 11])), "increase"),
    ],
)
def test_error_messages(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
