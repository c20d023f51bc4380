"""Noise schedules, processes and time grids: how much signal and how much noise there is, and where a sampler steps.

Every process speaks of x_t = signal * x_0 + noise * eps. Tables are computed in float64 on the host and become arrays
of JAX's default float. DDPM's chain is in `chains`, the grids are in `grids`, and this page has all of their names.

    beta table --make_schedule--> Schedule --ddpm_grid--> Grid --> sampler
                                  Schedule --discrete_process--> process: time -> (signal, noise)

`time` is always what the network is given: t - 1 in 0..T-1 for DDPM's chain, u in [0, 1] for the continuous
variance-preserving process and for rectified flow, ln(sigma) / 4 for EDM.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from diffusion.chains import (
    Schedule,
    cosine_beta,
    discrete_process,
    linear_beta,
    linear_beta_for,
    make_schedule,
    rescale_zero_terminal_snr,
    respaced_beta,
    sigmoid_beta,
    sqrt_linear_beta,
)
from diffusion.grids import (
    Grid,
    ddpm_grid,
    flow_grid,
    flux2_grid,
    karras_grid,
    process_grid,
    released_flow_grid,
    respace,
    shift_time,
    spaced_grid,
)
from diffusion.types import Process

__all__ = [
    "Grid",
    "Process",
    "Schedule",
    "cosine_beta",
    "cosine_log_snr",
    "ddpm_grid",
    "discrete_process",
    "edm_process",
    "flow_grid",
    "flow_process",
    "flux2_grid",
    "karras_grid",
    "linear_beta",
    "linear_beta_for",
    "linear_beta_log_snr",
    "make_schedule",
    "process_grid",
    "released_flow_grid",
    "rescale_zero_terminal_snr",
    "respace",
    "respaced_beta",
    "shift_time",
    "sigmoid_beta",
    "spaced_grid",
    "sqrt_linear_beta",
    "vp_process",
]


def vp_process(log_snr: Callable[[Array], Array]) -> Process:
    """Returns the variance-preserving process of a log-SNR(u): signal^2 = sigmoid(log_snr).

    Source: Kingma et al. 2021, eq. 4.

    Example:
      >>> signal, noise = vp_process(cosine_log_snr())(jnp.asarray(0.5))
      >>> print(np.asarray([signal, noise]).round(3))
      [0.707 0.707]
    """

    def process(time: Array) -> tuple[Array, Array]:
        log_snr_t = log_snr(time)
        return jnp.exp(0.5 * jax.nn.log_sigmoid(log_snr_t)), jnp.exp(0.5 * jax.nn.log_sigmoid(-log_snr_t))

    return process


def linear_beta_log_snr(beta_min: float = 0.1, beta_max: float = 20.0) -> Callable[[Array], Array]:
    """Returns log-SNR(u) of the VP SDE whose beta rises linearly in u; infinite at u = 0.

    Source: Song et al. 2021, eq. 33.

    Example:
      >>> print(np.asarray(linear_beta_log_snr()(jnp.asarray([0.1, 1.0]))).round(2))
      [  2.16 -10.05]
    """
    return lambda time: -jnp.log(jnp.expm1(time * (beta_min + 0.5 * time * (beta_max - beta_min))))


def cosine_log_snr(smallest: float = -15.0, largest: float = 15.0, shift: float = 0.0) -> Callable[[Array], Array]:
    """Returns log-SNR(u) = -2 log tan of an angle linear in u.

    It falls from `largest` at u = 0 to `smallest` at u = 1, then `shift` is added: 2 log(64 / d) for images of d x d
    pixels.

    Source: Hoogeboom et al. 2023, "simple diffusion", eq. 5.

    Example:
      >>> print(np.asarray(cosine_log_snr()(jnp.asarray([0.0, 0.25, 1.0]))).round(2))
      [ 15.     1.76 -15.  ]
    """
    first, left = math.atan(math.exp(-0.5 * largest)), math.atan(math.exp(0.5 * smallest))
    span = 0.5 * math.pi - first - left
    # log tan as a difference of sines of the angle and its complement, so that float32 is precise at both ends.
    return lambda time: (
        2 * jnp.log(jnp.sin(left + (1 - time) * span)) - 2 * jnp.log(jnp.sin(first + time * span)) + shift
    )


def edm_process(time: Array) -> tuple[Array, Array]:
    """Returns signal 1 and noise sigma of EDM's variance-exploding process; time is c_noise = ln(sigma) / 4.

    Source: Karras et al. 2022, table 1.

    Example:
      >>> print(np.asarray(edm_process(jnp.log(80.0) / 4)).round(2))
      [ 1. 80.]
    """
    return jnp.ones_like(time), jnp.exp(4 * time)


def flow_process(time: Array) -> tuple[Array, Array]:
    """Returns 1 - time and time: rectified flow's straight path from data at time 0 to noise at time 1.

    Source: Liu et al. 2022, eq. 1.

    Example:
      >>> print(np.asarray(flow_process(jnp.asarray(0.25))))
      [0.75 0.25]
    """
    return 1 - time, time
