"""Noise schedules, processes and time grids: how much signal and how much noise there is, and where a sampler steps.

Every process speaks of x_t = signal * x_0 + noise * eps. Tables are computed in float64 on the host and become arrays
of JAX's default float.

    beta table --make_schedule--> Schedule --ddpm_grid--> Grid --> sampler
                                  Schedule --discrete_process--> process: time -> (signal, noise)

`time` is always what the network is given: t - 1 in 0..T-1 for DDPM's chain, u in [0, 1] for the continuous
variance-preserving process and for rectified flow, ln(sigma) / 4 for EDM.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float64, Int

from diffusion.types import Process, Scalars


class Schedule(NamedTuple):
    """DDPM's chain of T steps; entry t belongs to x_t, and entry 0 to clean data (beta 0, alpha_bar 1)."""

    beta: Float[Array, "T_plus_1"]
    alpha: Float[Array, "T_plus_1"]
    alpha_bar: Float[Array, "T_plus_1"]
    one_minus_alpha_bar: Float[Array, "T_plus_1"]


class Grid(NamedTuple):
    """The N + 1 points a sampler visits, from noise to data: x = signal * x_0 + noise * eps at each of them.

    The last point is clean data (signal 1, noise 0); no sampler calls the network there, so its time is only a name.
    A part of a grid, `Grid(*(field[i:j] for field in grid))`, is a grid too.
    """

    signal: Float[Array, "N_plus_1"]
    noise: Float[Array, "N_plus_1"]
    time: Float[Array, "N_plus_1"]


def linear_beta(num_steps: int, first: float = 1e-4, last: float = 0.02) -> Float64[np.ndarray, "T"]:
    """beta_1..beta_T evenly spaced (Ho et al. 2020, section 4)."""
    _check_num_steps(num_steps)
    return np.linspace(first, last, num_steps, dtype=np.float64)


def cosine_beta(num_steps: int, offset: float = 0.008, largest: float = 0.999) -> Float64[np.ndarray, "T"]:
    """beta of alpha_bar = cos^2(pi / 2 * (t / T + offset) / (1 + offset)) (Nichol & Dhariwal 2021, eq. 17)."""
    _check_num_steps(num_steps)
    angle = (np.arange(num_steps + 1) / num_steps + offset) / (1 + offset) * np.pi / 2
    # 1 - cos^2(b) / cos^2(a) = sin(b + a) sin(b - a) / cos^2(a): no cancellation where the steps are small.
    beta = np.sin(angle[1:] + angle[:-1]) * np.sin(angle[1:] - angle[:-1]) / np.cos(angle[:-1]) ** 2
    return np.minimum(beta, largest)


def respaced_beta(beta: Float64[np.ndarray, "T"], t: Int[np.ndarray, "N"]) -> Float64[np.ndarray, "N"]:
    """beta of the chain that visits only the steps `t` of the chain of `beta` (Nichol & Dhariwal 2021, section 4).

    `t` is increasing and within 1..T; the network of the long chain is given `t - 1`. Raises ValueError otherwise.
    """
    _check_beta(beta)
    if len(t) == 0 or t[0] < 1 or t[-1] > len(beta) or np.any(np.diff(t) < 1):
        raise ValueError(f"t has to increase within 1..{len(beta)}, the steps of the chain.")
    log_alpha_bar = np.cumsum(np.log1p(-beta))[t - 1]
    return -np.expm1(np.diff(log_alpha_bar, prepend=0.0))


def make_schedule(beta: Float64[np.ndarray, "T"]) -> Schedule:
    """The chain of a beta table, with 1 - alpha_bar computed in its own right: 1 - float32(alpha_bar) is 1.7e-4 off.

    Raises ValueError where a beta is outside (0, 1).
    """
    _check_beta(beta)
    beta = np.concatenate([[0.0], beta])
    log_alpha_bar = np.cumsum(np.log1p(-beta))
    return Schedule(*map(jnp.asarray, (beta, 1 - beta, np.exp(log_alpha_bar), -np.expm1(log_alpha_bar))))


def discrete_process(schedule: Schedule) -> Process:
    """DDPM's chain as a process: time t - 1, rounded to a step of the chain; times outside -1..T-1 give NaN."""

    def process(time: Array) -> tuple[Array, Array]:
        t = jnp.round(time).astype(jnp.int32) + 1
        table = jnp.stack([schedule.alpha_bar, schedule.one_minus_alpha_bar])
        outside = (t < 0) | (t >= table.shape[1])
        signal, noise = jnp.where(outside, jnp.nan, jnp.sqrt(table[:, t]))
        return signal, noise

    return process


def vp_process(log_snr: Callable[[Array], Array]) -> Process:
    """The variance-preserving process of a log-SNR(u): signal^2 = sigmoid(log_snr) (Kingma et al. 2021, eq. 4)."""

    def process(time: Array) -> tuple[Array, Array]:
        log_snr_t = log_snr(time)
        return jnp.exp(0.5 * jax.nn.log_sigmoid(log_snr_t)), jnp.exp(0.5 * jax.nn.log_sigmoid(-log_snr_t))

    return process


def linear_beta_log_snr(beta_min: float = 0.1, beta_max: float = 20.0) -> Callable[[Array], Array]:
    """log-SNR(u) of the VP SDE whose beta rises linearly in u (Song et al. 2021, eq. 33); infinite at u = 0."""
    return lambda time: -jnp.log(jnp.expm1(time * (beta_min + 0.5 * time * (beta_max - beta_min))))


def cosine_log_snr(smallest: float = -15.0, largest: float = 15.0, shift: float = 0.0) -> Callable[[Array], Array]:
    """log-SNR(u) = -2 log tan of an angle linear in u, from `largest` at u = 0 to `smallest` at u = 1, then shifted.

    Hoogeboom et al. 2023, "simple diffusion", eq. 5; `shift` is 2 log(64 / d) for images of d x d pixels.
    """
    first, left = math.atan(math.exp(-0.5 * largest)), math.atan(math.exp(0.5 * smallest))
    span = 0.5 * math.pi - first - left
    # log tan as a difference of sines of the angle and its complement, so that float32 is precise at both ends.
    return lambda time: (
        2 * jnp.log(jnp.sin(left + (1 - time) * span)) - 2 * jnp.log(jnp.sin(first + time * span)) + shift
    )


def edm_process(time: Array) -> tuple[Array, Array]:
    """EDM's variance-exploding process: time is c_noise = ln(sigma) / 4 (Karras et al. 2022, table 1)."""
    return jnp.ones_like(time), jnp.exp(4 * time)


def flow_process(time: Array) -> tuple[Array, Array]:
    """Rectified flow: the straight path from data at time 0 to noise at time 1 (Liu et al. 2022, eq. 1)."""
    return 1 - time, time


def ddpm_grid(schedule: Schedule, num_steps: int, power: float = 1.0) -> Grid:
    """`num_steps` of the chain's T steps, t = T * (k / N)^power for k = N..1, then clean data.

    Even by default, in "trailing" spacing: T, T - T/N, ..., T/N. It starts at t = T, where x_T really is pure noise,
    and spends no evaluation on the step 1 -> 0, as spacing from T to 1 does (Lin et al. 2023, section 3.3): there and
    in DDIM's own spacing (1, 1 + T/N, ...) that last long step in log-SNR also throws solvers with a history off.
    `power=2` is DDIM's quadratic spacing, closer together near the data, and the better one for 20 steps or fewer.
    num_steps = T is every step of the chain.
    Raises ValueError where num_steps is not within 1..T or power < 1.
    """
    _check_num_steps(num_steps, largest=schedule.alpha_bar.shape[0] - 1)
    if power < 1:
        raise ValueError(f"power is {power}: it has to be at least 1 (1 is even, 2 quadratic).")
    k = np.arange(num_steps, -1, -1)
    even = np.floor((schedule.alpha_bar.shape[0] - 1) * (k / num_steps) ** power + 0.5).astype(int)
    t = np.maximum(even, k)  # k steps are left, so t >= k: no step is visited twice
    return Grid(
        jnp.sqrt(schedule.alpha_bar[t]),
        jnp.sqrt(schedule.one_minus_alpha_bar[t]),
        jnp.asarray(t - 1, schedule.alpha_bar.dtype),
    )


def process_grid(process: Process, num_steps: int, power: float = 1.0) -> Grid:
    """Steps of a process whose time runs from 1 (noise) to 0 (data), at time (k / N)^power for k = N..0."""
    _check_num_steps(num_steps)
    time = jnp.asarray((np.arange(num_steps, -1, -1) / num_steps) ** power)
    signal, noise = process(time[:-1])
    return Grid(jnp.append(signal, 1.0), jnp.append(noise, 0.0), time)


def flow_grid(num_steps: int, shift: float = 1.0) -> Grid:
    """Even steps of rectified flow from t = 1 to 0, moved by t' = shift t / (1 + (shift - 1) t) (Esser et al. 2024)."""
    _check_num_steps(num_steps)
    t = shift_time(np.linspace(1.0, 0.0, num_steps + 1), shift)
    return Grid(*map(jnp.asarray, (1 - t, t, t)))


def shift_time(t: Scalars, shift: Scalars) -> Any:
    """Moves times of rectified flow towards noise by shift > 1: shift t / (1 + (shift - 1) t), which keeps 0 and 1.

    Esser et al. 2024, eq. 23. It multiplies noise / signal by `shift`; its inverse is the shift by 1 / shift. NumPy's
    arrays stay NumPy's, in their float. Raises ValueError if shift <= 0.
    """
    if isinstance(shift, int | float) and shift <= 0:
        raise ValueError(f"shift is {shift}: give a number above 0 (1 leaves the times as they are)")
    return shift * t / (shift * t + (1 - t))  # which is 1 + (shift - 1) t, but keeps t = 1 to the bit


def karras_grid(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Grid:
    """EDM's noise levels, then sigma = 0; rho = inf spaces them evenly in log-SNR (Karras et al. 2022, eq. 5)."""
    _check_num_steps(num_steps)
    sigma = np.append(_karras_sigma(num_steps, sigma_min, sigma_max, rho), 0.0)
    with np.errstate(divide="ignore"):
        time = 0.25 * np.log(sigma)
    return Grid(*map(jnp.asarray, (np.ones_like(sigma), sigma, time)))


def respace(grid: Grid, num_steps: int, rho: float = math.inf) -> Grid:
    """The `num_steps` points of a fine grid nearest to even log-SNR, or to Karras' spacing in noise / signal.

    rho is Karras et al.'s exponent (their choice is 7; inf is even log-SNR). Points are picked, never interpolated, so
    the network sees only times of `grid`, and any process may be respaced: `respace(ddpm_grid(schedule, T), 10)`. The
    first point and clean data stay. Called outside jit. Raises ValueError where num_steps is not within 1..len(grid).
    """
    signal, noise = np.asarray(grid.signal, np.float64)[:-1], np.asarray(grid.noise, np.float64)[:-1]
    _check_num_steps(num_steps, largest=len(signal))
    with np.errstate(divide="ignore"):
        sigma = noise / signal
    if not np.isfinite(sigma[0]):
        sigma[0] = sigma[1:2].max(initial=1.0)
    wanted = _karras_sigma(num_steps, sigma[-1], sigma[0], rho)
    nearest = np.abs(np.log(wanted)[:, None] - np.log(sigma)).argmin(axis=1)
    # Strictly increasing, and with enough points left for the steps to come.
    order = np.arange(num_steps)
    nearest = np.maximum.accumulate(nearest - order) + order
    nearest = np.minimum(nearest, len(signal) - num_steps + order)
    picked = np.append(nearest, len(signal))
    return Grid(*(field[picked] for field in grid))


def _karras_sigma(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    if not 0 < sigma_min <= sigma_max < math.inf or rho <= 0:
        raise ValueError(f"sigma_min={sigma_min}, sigma_max={sigma_max}, rho={rho}: need 0 < min <= max and rho > 0.")
    if math.isinf(rho):
        return np.geomspace(sigma_max, sigma_min, num_steps)
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), num_steps) ** rho


def _check_num_steps(num_steps: int, largest: int | None = None) -> None:
    if num_steps < 1 or (largest is not None and num_steps > largest):
        bounds = "at least 1" if largest is None else f"within 1..{largest}, the steps there are"
        raise ValueError(f"num_steps is {num_steps}: it has to be {bounds}.")


def _check_beta(beta: np.ndarray) -> None:
    if not np.all((beta > 0) & (beta < 1)):  # written so that NaN fails
        raise ValueError(f"every beta has to lie in (0, 1): these range over [{beta.min():g}, {beta.max():g}].")
