"""Every sampler and every kind of grid, with data whose denoiser is known, for the tests of samplers."""

from functools import partial

import jax
import jax.numpy as jnp
from closed_form import Gaussian, Mixture, exact_denoise

from diffusion import schedules
from diffusion.samplers import ancestral, ddim, dpm_solver_pp, heun, unipc

VP = schedules.vp_process(schedules.cosine_log_snr())
DETERMINISTIC = {
    "ddim": ddim,
    "heun": heun,
    "dpm_solver_pp_1": partial(dpm_solver_pp, order=1),
    "dpm_solver_pp_2": partial(dpm_solver_pp, order=2),
    "dpm_solver_pp_3": partial(dpm_solver_pp, order=3),
    "unipc_1": partial(unipc, order=1),
    "unipc_2": partial(unipc, order=2),
    "unipc_3": partial(unipc, order=3),
}
STOCHASTIC = {
    "ancestral_small": partial(ancestral, variance="small"),
    "ddim_eta": partial(ddim, eta=0.7),
    "heun_churn": partial(heun, s_churn=10.0),
}
EVERY = {**DETERMINISTIC, **STOCHASTIC}
CHAIN = schedules.make_schedule(schedules.linear_beta(1000))


def discrete(time):
    return schedules.discrete_process(schedules.make_schedule(schedules.linear_beta(1000)))(time)


def ddpm_grid(num_steps):
    """On a chain of the float that is on, which CHAIN is not in the tests with float64."""
    return schedules.ddpm_grid(schedules.make_schedule(schedules.linear_beta(1000)), num_steps)


# Every kind of grid, each with its process.
GRIDS = {
    "ddpm": (discrete, ddpm_grid),
    "vp": (VP, partial(schedules.process_grid, VP)),
    "edm": (schedules.edm_process, schedules.karras_grid),
    "flow": (schedules.flow_process, schedules.flow_grid),
}


def make_gaussian():
    return Gaussian(jnp.asarray([0.3, -0.5]), jnp.asarray([0.7, 0.2]))


def make_mixture():
    return Mixture(jnp.asarray([0.3, 0.7]), jnp.asarray([[0.8, 0.2], [-0.5, -0.1]]), jnp.asarray([0.3, 0.25]))


def jitted(sampler, denoise, grid, **keywords):
    return jax.jit(lambda x_T, key=None: sampler(denoise, x_T, grid, key, **keywords))


@partial(jax.jit, static_argnames=("sampler", "dtype"))
def sample(sampler, data, grid, x_T, key=None, dtype=None):
    """Samples with the exact denoiser. Data and grid are arguments, so that a sampler is compiled once for all of them:

    signal and noise at a time are looked up in the grid.
    """

    def process(time):
        i = jnp.argmin(jnp.abs(grid.time - time))
        return grid.signal[i], grid.noise[i]

    exact = exact_denoise(data, process)
    return sampler(lambda x, time: exact(x, time).astype(dtype or x.dtype), x_T, grid, key)


def noisy(grid, batch_size=4):
    """An x_T of the grid's first noise level."""
    return grid.noise[0] * jax.random.normal(jax.random.key(7), (batch_size, 2))
