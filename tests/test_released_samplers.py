"""Samplers and grids against diffusers' schedulers, as golden/record_schedulers.py recorded them."""

import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from solvers import CHAIN, jitted

from diffusion import guidance, samplers, schedules
from diffusion.samplers import ancestral, ddim, dpm_solver_pp, heun, unipc
from diffusion.schedules import Grid

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "schedulers.npz")


def toy_network(x, time):
    """The "network" of golden/record_schedulers.py."""
    return 0.5 * x + 0.5 * jnp.tanh(x + jnp.sin(0.01 * time))


def golden_denoise(grid, name):
    """x_0_hat of the toy network, whose signal and noise at a time are the recorded ones."""

    def denoise(x, time):
        i = jnp.argmin(jnp.abs(grid.time - time))
        signal, noise = grid.signal[i], grid.noise[i]
        x_in = x / jnp.sqrt(signal**2 + noise**2) if name in ("euler", "heun") else x
        output = toy_network(x_in, time)
        if name == "flow_euler":
            return x - noise * output
        if name == "ddim_zero_snr":  # the one that predicts v
            return signal * x - noise * output
        x_0_hat = (x - noise * output) / signal
        return (x_0_hat, jnp.cos(3 * x_in + 0.01 * time)) if name == "ddpm_learned" else x_0_hat

    if name in ("ddim_clip", "ddim_clip_half"):
        return guidance.clip(denoise, keep_eps=True)
    return guidance.clip(denoise) if name in ("ddpm_small_clip", "ddim_clip_anew") else denoise


STABLE_DIFFUSION = schedules.sqrt_linear_beta(1000)
# Case -> the grid that diffusers' timesteps and final sigma are, on our interface.
RELEASED_GRIDS = {
    "ddpm_small_trailing": lambda: schedules.spaced_grid(CHAIN, 7, "trailing"),
    "ddpm_small_linspace": lambda: schedules.spaced_grid(CHAIN, 7, "linspace"),
    "ddim_clip": lambda: schedules.spaced_grid(CHAIN, 10, "leading"),
    "ddim_stable_diffusion": lambda: schedules.spaced_grid(
        schedules.make_schedule(STABLE_DIFFUSION), 10, "leading", steps_offset=1, final="sigma_min"
    ),
    "ddim_zero_snr": lambda: schedules.spaced_grid(
        schedules.make_schedule(schedules.rescale_zero_terminal_snr(schedules.linear_beta(1000))), 10, "trailing"
    ),
    "dpm_solver_pp_2": lambda: schedules.spaced_grid(CHAIN, 10, "linspace", skip_last=True),
    "dpm_solver_pp_leading": lambda: schedules.spaced_grid(CHAIN, 10, "leading", steps_offset=1, skip_last=True),
    "dpm_solver_pp_3_sigma_min_of_16": lambda: schedules.spaced_grid(
        CHAIN, 16, "linspace", final="sigma_min", skip_last=True
    ),
    "flow_euler": lambda: schedules.released_flow_grid(10, shift=3.0),
}


@pytest.mark.parametrize("name", RELEASED_GRIDS)
def test_grids_of_published_pipelines(name):
    grid, expected = RELEASED_GRIDS[name](), GOLDEN[f"{name}/grid"]
    if name == "flow_euler":
        # Its shift is applied in float32 twice: 4 roundings of 6e-8 each.
        np.testing.assert_allclose(jnp.stack(grid[:2]), expected[:2], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(1000 * grid.time[:-1], expected[2, :-1], rtol=1e-6)  # the last is not used
        return
    # Their alpha_bar is a product of 1000 float32 numbers, off by 1000 roundings of 6e-8 at most, and 1 - alpha_bar
    # cancels at t = 1. rescale_zero_snr subtracts and divides such products: at its smallest signal, 0.01, by 1e-5.
    rtol = 1e-3 if name == "ddim_zero_snr" else 1e-4
    np.testing.assert_allclose(jnp.stack(grid[:2]), expected[:2], rtol=rtol)
    np.testing.assert_array_equal(grid.time, expected[2])


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("family", ["ddim", "dpm"])
def test_spaced_times_are_diffusers(family, spacing):
    num_steps = [int(name.split("/")[-1]) for name in GOLDEN if name.startswith(f"times/{family}/{spacing}/")]
    assert len(num_steps) == 12
    for n in num_steps:
        grid = schedules.spaced_grid(CHAIN, n, spacing, skip_last=family == "dpm")
        np.testing.assert_array_equal(grid.time[:-1], GOLDEN[f"times/{family}/{spacing}/{n}"], err_msg=str(n))


@pytest.mark.parametrize(
    ("name", "sampler"),
    [
        ("ddpm_small", partial(ancestral, variance="small")),
        ("ddpm_large", partial(ancestral, variance="large")),
        ("ddpm_learned", partial(ancestral, variance="learned")),
        ("ddpm_large_1000", partial(ancestral, variance="large")),
        ("ddpm_small_clip", partial(ancestral, variance="small")),
        ("ddim_0", ddim),
        ("ddim_half", partial(ddim, eta=0.5)),
        ("ddim_1", partial(ddim, eta=1.0)),
        ("euler", ddim),
        ("heun", heun),
        ("dpm_solver_pp_2", partial(dpm_solver_pp, order=2)),
        ("dpm_solver_pp_3", partial(dpm_solver_pp, order=3, as_released=True)),
        ("unipc_2", partial(unipc, order=2)),
        ("unipc_3", partial(unipc, order=3)),
        ("flow_euler", ddim),
        ("ddpm_small_trailing", partial(ancestral, variance="small")),
        ("ddpm_small_linspace", partial(ancestral, variance="small")),
        ("ddim_clip", ddim),
        ("ddim_clip_half", partial(ddim, eta=0.5)),
        ("ddim_clip_anew", ddim),
        ("ddim_stable_diffusion", ddim),
        ("ddim_zero_snr", ddim),
        ("dpm_solver_pp_heun", partial(dpm_solver_pp, order=2, solver_type="heun")),
        ("dpm_solver_pp_3_of_20", partial(dpm_solver_pp, order=3, as_released=True)),
        ("dpm_solver_pp_leading", dpm_solver_pp),
        ("dpm_solver_pp_sigma_min", partial(dpm_solver_pp, as_released=True)),
        ("dpm_solver_pp_3_sigma_min_of_16", partial(dpm_solver_pp, order=3, as_released=True)),
    ],
)
def test_parity_with_diffusers(monkeypatch, name, sampler):
    # Both sides are float32: 1e-5 of the largest value is some 80 roundings, 1e-4 what 1000 random steps may add up to.
    tolerance = 1e-4 if name == "ddpm_large_1000" else 1e-5
    grid = Grid(*map(jnp.asarray, GOLDEN[f"{name}/grid"]))
    noise = jnp.asarray(GOLDEN["noise"])
    monkeypatch.setattr(samplers, "fold_in", lambda key, index: index)
    monkeypatch.setattr(samplers, "normal_like", lambda index, x: noise[index])
    run = jitted(sampler, golden_denoise(grid, name), grid, trajectory=True)
    x_0, x_0_hats = run(grid.noise[0] * GOLDEN["x_T"], jax.random.key(0))
    expected = GOLDEN[f"{name}/x_0"]
    np.testing.assert_allclose(x_0, expected, atol=tolerance * np.abs(expected).max())
    if name == "ddpm_large_1000":  # not recorded
        return
    expected = GOLDEN[f"{name}/x_0_hats"]
    if "clip" in name:  # recorded before it is clipped
        expected = np.clip(expected, -1, 1)
    if name == "heun":  # recorded for both evaluations of a step
        expected = expected[::2]
    for hat, expected_hat in zip(x_0_hats, expected, strict=True):
        np.testing.assert_allclose(hat, expected_hat, atol=tolerance * np.abs(expected_hat).max())


def test_ddpm_grid_is_the_trailing_spacing_of_diffusers():
    grid = schedules.ddpm_grid(CHAIN, 10)
    np.testing.assert_allclose(jnp.stack(grid), GOLDEN["ddim_0/grid"], rtol=1e-4)
    full = schedules.ddpm_grid(CHAIN, 1000)
    np.testing.assert_allclose(jnp.stack(full), GOLDEN["ddpm_large_1000/grid"], rtol=1e-3)  # its 1 - alpha_bar cancels
