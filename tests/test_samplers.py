"""Samplers against exact solutions, and against each other."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import Gaussian, exact_denoise
from solvers import (
    CHAIN,
    DETERMINISTIC,
    GRIDS,
    VP,
    jitted,
    make_gaussian,
    make_mixture,
    noisy,
    sample,
)

from diffusion import gaussian, schedules
from diffusion.samplers import ancestral, ddim, dpm_solver_pp, heun, unipc
from diffusion.schedules import Grid


def path(name, num_steps):
    """A grid between two times of a process, with noise at both ends."""
    process, first, last = PATHS[name]
    time = jnp.linspace(first, last, num_steps + 1)
    signal, noise = process(time)
    return Grid(signal, noise, time)


# Interior parts of three processes. Solvers with a history start with a step of order 1, whose error is of order 2 in
# the whole; it does not show on "edm", where x_0_hat hardly changes with the time at first.
PATHS = {
    "vp": (VP, 0.9, 0.1),
    "flow": (schedules.flow_process, 0.9, 0.1),
    "edm": (schedules.edm_process, np.log(80.0) / 4, np.log(0.1) / 4),
}
# UniPC of order p corrects to order p + 1 (Zhao et al. 2023, theorem 3.1). as_released is the third-order formula with
# half of its second difference.
ORDERS = [
    ("ddim", ddim, 1, ["vp", "flow", "edm"]),
    ("heun", heun, 2, ["vp", "flow", "edm"]),
    ("dpm_solver_pp_1", partial(dpm_solver_pp, order=1), 1, ["vp", "flow", "edm"]),
    ("dpm_solver_pp_2", partial(dpm_solver_pp, order=2), 2, ["vp", "flow", "edm"]),
    ("dpm_solver_pp_2_heun", partial(dpm_solver_pp, order=2, solver_type="heun"), 2, ["vp", "flow", "edm"]),
    ("dpm_solver_pp_3", partial(dpm_solver_pp, order=3), 3, ["edm"]),
    ("dpm_solver_pp_3_released", partial(dpm_solver_pp, order=3, as_released=True), 2, ["edm"]),
    ("unipc_1", partial(unipc, order=1), 2, ["vp", "flow", "edm"]),
    ("unipc_2", partial(unipc, order=2), 3, ["edm"]),
]


@functools.cache
def exact_end(make_data, path_name):
    """Noise at the first point of a path, and where the exact solution of the ODE takes it; in float64."""
    grid = path(path_name, 1)
    start, end = [(grid.signal[i], grid.noise[i]) for i in (0, -1)]
    x_T = start[1] * jax.random.normal(jax.random.key(0), (8, 2))
    return x_T, make_data().flow(x_T, start, end)


@pytest.mark.parametrize(("name", "sampler", "order", "paths"), ORDERS, ids=[case[0] for case in ORDERS])
def test_order_of_convergence(float64, name, sampler, order, paths):
    for make_data, path_name in [(make_gaussian, name) for name in paths] + [(make_mixture, "edm")]:
        x_T, exact = exact_end(make_data, path_name)
        num_steps = [256, 384, 512]  # the asymptotic range; errors stay above 1e-9, round-off is at 1e-14
        errors = []
        for n in num_steps:
            x_0 = sample(sampler, make_data(), path(path_name, n), x_T)
            errors.append(np.sqrt(np.mean((x_0 - exact) ** 2)))
        slope = -np.polyfit(np.log(num_steps), np.log(errors), 1)[0]
        assert abs(slope - order) < 0.1, f"{path_name}: {slope:.3f}, errors {errors}"


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_full_grids_reach_the_exact_solution(float64, name):
    for _, make_grid in GRIDS.values():
        data, grid = make_gaussian(), make_grid(200)
        exact = data.flow(noisy(grid), (grid.signal[0], grid.noise[0]), (1.0, 0.0))
        # A method of order 1 leaves some 2% of the std at 200 steps, the others less.
        tolerance = 3e-2 if name in ("ddim", "dpm_solver_pp_1") else 1e-2
        np.testing.assert_allclose(sample(DETERMINISTIC[name], data, grid, noisy(grid)), exact, atol=tolerance)


@pytest.mark.parametrize(
    ("sampler", "grid_name"),
    [
        (partial(ancestral, variance="large"), "ddpm"),
        (partial(ancestral, variance="small"), "ddpm"),
        (partial(ancestral, variance="learned"), "ddpm"),
        (partial(ancestral, variance="small"), "flow"),
        (partial(ddim, eta=0.5), "vp"),
        (partial(heun, s_churn=100.0), "edm"),
    ],
)
def test_moments_of_stochastic_samplers(sampler, grid_name):
    # 1% is 3 standard errors of the mean, and 4.5 of the std, of 100,000 values.
    process, make_grid = GRIDS[grid_name]
    data, grid = Gaussian(jnp.asarray(0.3), jnp.asarray(0.6)), make_grid(1000)

    def denoise(x, time):
        x_0_hat = data.posterior_mean(x, *process(time))
        return (x_0_hat, 0.3 * jnp.ones_like(x)) if sampler.keywords.get("variance") == "learned" else x_0_hat

    x_T = grid.noise[0] * jax.random.normal(jax.random.key(0), (100_000,))
    x_0 = jitted(sampler, denoise, grid)(x_T, jax.random.key(1))
    assert abs(jnp.mean(x_0) - data.mean) < 0.01 * data.std
    assert abs(jnp.std(x_0) / data.std - 1) < 0.01


@pytest.mark.parametrize("variance", ["small", "large", "learned"])
def test_ancestral_on_every_step_is_ddpm(float64, variance):
    # Against Algorithm 2 as gaussian.py has it: the mean from eps_hat and the beta table, not from signal and noise.
    chain = schedules.make_schedule(schedules.linear_beta(8, 1e-3, 0.4))
    grid, process = schedules.ddpm_grid(chain, 8), schedules.discrete_process(chain)
    exact = exact_denoise(make_mixture(), process)

    def denoise(x, time):
        return (exact(x, time), jnp.sin(x)) if variance == "learned" else exact(x, time)

    key = jax.random.key(0)
    x_t = x_T = jax.random.normal(jax.random.key(1), (3, 2))
    for index, t in enumerate(range(8, 0, -1)):
        t = jnp.full(3, t)
        signal, noise = process(t[0] - 1.0)
        eps_hat = (x_t - signal * exact(x_t, t[0] - 1.0)) / noise
        sigma_2 = gaussian.learned_variance(chain, jnp.sin(x_t), t) if variance == "learned" else variance
        x_t = gaussian.p_sample(jax.random.fold_in(key, index), chain, eps_hat, x_t, t, sigma_2)
    np.testing.assert_allclose(ancestral(denoise, x_T, grid, key, variance), x_t, atol=1e-12)


@pytest.mark.parametrize(
    ("sampler", "same"),
    [(partial(ddim, eta=1.0), partial(ancestral, variance="small")), (partial(dpm_solver_pp, order=1), ddim)],
    ids=["ddim with eta 1 is ancestral", "dpm_solver_pp of order 1 is ddim"],
)
def test_equal_samplers(float64, sampler, same):
    for _, make_grid in GRIDS.values():
        grid, data, key = make_grid(10), make_mixture(), jax.random.key(1)
        expected = sample(same, data, grid, noisy(grid), key)
        np.testing.assert_allclose(sample(sampler, data, grid, noisy(grid), key), expected, atol=1e-12)


def test_ddim_on_a_flow_grid_is_euler_for_the_velocity(float64):
    grid = schedules.flow_grid(10, shift=3.0)
    denoise = exact_denoise(make_mixture(), schedules.flow_process)
    x_t = x_T = jax.random.normal(jax.random.key(0), (4, 2))
    for t, t_next in zip(grid.time[:-1], grid.time[1:], strict=True):
        velocity = (x_t - denoise(x_t, t)) / t
        x_t = x_t + (t_next - t) * velocity
    np.testing.assert_allclose(ddim(denoise, x_T, grid), x_t, atol=1e-12)


@pytest.mark.parametrize(("v", "variance"), [(-1.0, "small"), (1.0, "large")])
def test_learned_variance_spans_small_to_large(v, variance):
    grid, exact = schedules.ddpm_grid(CHAIN, 10), exact_denoise(make_gaussian(), schedules.discrete_process(CHAIN))

    def learned(x, time):
        return exact(x, time), v * jnp.ones_like(x)

    x_T, key = jax.random.normal(jax.random.key(1), (4, 2)), jax.random.key(0)
    expected = ancestral(exact, x_T, grid, key, variance=variance)
    np.testing.assert_allclose(ancestral(learned, x_T, grid, key, variance="learned"), expected, rtol=1e-5)
