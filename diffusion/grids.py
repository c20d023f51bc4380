"""Grids: where a sampler steps. Import the names from `schedules`.

The time of each point is what the network is given: t - 1 for DDPM's chain, 0..1 for flow, ln(sigma) / 4 for EDM.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float

from diffusion.chains import Schedule, check_num_steps
from diffusion.types import Process, Scalars


class Grid(NamedTuple):
    """The N + 1 points a sampler visits, from noise to data: x = signal * x_0 + noise * eps at each of them.

    The last point is clean data (signal 1, noise 0) but for `spaced_grid(final="sigma_min")`; no sampler calls the
    network there, so its time is not used. A part of a grid, `Grid(*(field[i:j] for field in grid))`, is a grid too.
    """

    signal: Float[Array, "N_plus_1"]
    noise: Float[Array, "N_plus_1"]
    time: Float[Array, "N_plus_1"]


def ddpm_grid(schedule: Schedule, num_steps: int, power: float = 1.0) -> Grid:
    """Returns `num_steps` of the chain's T steps, t = T * (k / N)^power for k = N..1, then clean data.

    - power = 1 is the "trailing" spacing: T, T - T/N, ..., T/N. It starts at t = T, where x_T really is pure noise, and
      its last step in log-SNR is shorter than with spacing from T to 1 or in DDIM's own spacing (1, 1 + T/N, ...),
      which throws solvers with a history off.
    - power = 2 is DDIM's quadratic spacing, closer together near the data, and the better one for 20 steps or fewer.
    - num_steps = T is every step of the chain.

    Source: Lin et al. 2023, section 3.3.

    Raises:
      ValueError: num_steps outside 1..T, or power < 1.

    Example:
      >>> from diffusion.schedules import linear_beta, make_schedule
      >>> print(ddpm_grid(make_schedule(linear_beta(1000)), 4).time)
      [999. 749. 499. 249.  -1.]
    """
    check_num_steps(num_steps, largest=schedule.alpha_bar.shape[0] - 1)
    if power < 1:
        raise ValueError(f"power is {power}: it has to be at least 1 (1 is even, 2 quadratic).")
    k = np.arange(num_steps, -1, -1)
    even = np.floor((schedule.alpha_bar.shape[0] - 1) * (k / num_steps) ** power + 0.5).astype(int)
    return _chain_grid(schedule, np.maximum(even, k))  # k steps are left, so t >= k: no step is visited twice


def spaced_grid(
    schedule: Schedule,
    num_steps: int,
    spacing: str,
    steps_offset: int = 0,
    final: str = "zero",
    skip_last: bool = False,
) -> Grid:
    """Returns the steps of a chain that diffusers' schedulers visit, to repeat a published pipeline step for step.

    - With `ancestral` and variance "small" this is DDPMScheduler. With "large" it is so only where the last time is 0:
      elsewhere DDPMScheduler adds noise to the final images.
    - With `ddim` this is DDIMScheduler, if T is a multiple of num_steps and the spacing is not "linspace": elsewhere
      DDIMScheduler steps to t - T // N, but is called next at another time.
    - With `dpm_solver_pp` and `unipc` set skip_last: those schedulers take one more point and leave the last one out.

    Args:
      schedule: the chain.
      num_steps: N.
      spacing: "leading" (0, r, 2r, ... with r = T // N), "trailing" (T - 1 downwards by T / N) or "linspace" (0 to
        T - 1 evenly).
      steps_offset: added to the times of "leading" (Stable Diffusion has 1).
      final: "zero" ends in clean data, "sigma_min" at the noise of t = 1, which is also what
        set_alpha_to_one=False means.
      skip_last: whether N + 1 points are spaced and the last is left out ("trailing" is the same either way).

    Source: diffusers 0.42, set_timesteps; the names of the spacings are of Lin et al. 2023, table 2.

    Raises:
      ValueError: an unknown name, num_steps outside 1..T, or times outside 0..T-1.

    Example:
      >>> from diffusion.schedules import linear_beta, make_schedule
      >>> print(spaced_grid(make_schedule(linear_beta(1000)), 4, "leading", steps_offset=1).time)
      [751. 501. 251.   1.  -1.]
    """
    total = schedule.alpha_bar.shape[0] - 1
    check_num_steps(num_steps, largest=total)
    points = num_steps + skip_last
    match spacing:
        case "leading":
            time = np.arange(points)[::-1] * (total // points) + steps_offset
        case "trailing":
            time = np.round(np.arange(total, 0, -total / num_steps)).astype(int) - 1
        case "linspace":
            time = np.round(np.linspace(0, total - 1, points)).astype(int)[::-1]
        case _:
            raise ValueError(f"unknown spacing {spacing!r}: choose from leading, trailing, linspace")
    if final not in ("zero", "sigma_min"):
        raise ValueError(f"unknown final {final!r}: choose from zero, sigma_min")
    time = time[:num_steps]
    if time[0] >= total or time[-1] < 0 or np.any(np.diff(time) >= 0):
        raise ValueError(
            f"times from {time[0]} to {time[-1]} do not fall within 0..{total - 1}: choose fewer steps or offset 0."
        )
    grid = _chain_grid(schedule, np.append(time + 1, 0 if final == "zero" else 1))
    return grid._replace(time=grid.time.at[-1].set(-1))


def _chain_grid(schedule: Schedule, t: np.ndarray) -> Grid:
    return Grid(
        jnp.sqrt(schedule.alpha_bar[t]),
        jnp.sqrt(schedule.one_minus_alpha_bar[t]),
        jnp.asarray(t - 1, schedule.alpha_bar.dtype),
    )


def process_grid(process: Process, num_steps: int, power: float = 1.0) -> Grid:
    """Returns steps of a process whose time runs from 1 (noise) to 0 (data), at time (k / N)^power for k = N..0.

    Example:
      >>> from diffusion.schedules import flow_process
      >>> print(process_grid(flow_process, 4, power=2.0).time)
      [1.     0.5625 0.25   0.0625 0.    ]
    """
    check_num_steps(num_steps)
    time = jnp.asarray((np.arange(num_steps, -1, -1) / num_steps) ** power)
    signal, noise = process(time[:-1])
    return Grid(jnp.append(signal, 1.0), jnp.append(noise, 0.0), time)


def flow_grid(num_steps: int, shift: float = 1.0) -> Grid:
    """Returns even steps of rectified flow from t = 1 to 0, moved by `shift_time`.

    Source: Esser et al. 2024, eq. 23. FLUX's pipelines step like this, with shift = exp(mu).

    Example:
      >>> print(flow_grid(4, shift=3.0).time)
      [1.   0.9  0.75 0.5  0.  ]
    """
    check_num_steps(num_steps)
    t = shift_time(np.linspace(1.0, 0.0, num_steps + 1), shift)
    return Grid(*map(jnp.asarray, (1 - t, t, t)))


def released_flow_grid(num_steps: int, shift: float = 3.0, train_steps: int = 1000) -> Grid:
    """Returns the steps of diffusers' FlowMatchEulerDiscreteScheduler with a static shift, as Stable Diffusion 3 has.

    They are even from t = 1 to the shifted 1 / train_steps, then shifted (so the last is, twice), then clean data.

    Source: diffusers 0.42, set_timesteps.

    Example:
      >>> print(np.asarray(released_flow_grid(4).time).round(3))
      [1.    0.858 0.602 0.009 0.   ]
    """
    check_num_steps(num_steps)
    t = shift_time(np.linspace(1.0, float(shift_time(1 / train_steps, shift)), num_steps), shift)
    return Grid(*(jnp.asarray(np.append(field, end)) for field, end in ((1 - t, 1), (t, 0), (t, 0))))


def flux2_grid(num_steps: int, num_tokens: int) -> Grid:
    """Returns the steps of FLUX.2's pipelines: even from t = 1 to 1 / N, shifted by exp(mu), then clean data.

    - mu is fitted to how many tokens an image has and, up to 4300 tokens, to the number of steps: it lies on the line
      through one fit for 10 steps and one for 200. Above, the fit for 200 steps is taken for any number.
    - So mu jumps after 4300 tokens (1049^2 pixels): from 2.31 to 1.18 for 4 steps.

    Args:
      num_steps: N.
      num_tokens: of the image that is drawn, (H / 16) (W / 16); references do not count.

    Source: diffusers 0.42, compute_empirical_mu of Flux2KleinPipeline, after Black Forest Labs' flux2/sampling.py.

    Raises:
      ValueError: less than one step, or less than one token.

    Example:
      >>> print(np.asarray(flux2_grid(4, (1024 // 16) ** 2).time).round(5))
      [1.      0.96738 0.90814 0.7672  0.     ]
    """
    check_num_steps(num_steps)
    if num_tokens < 1:
        raise ValueError(f"num_tokens is {num_tokens}: give the number of an image's tokens, at least 1")
    mu_10, mu_200 = 8.73809524e-05 * num_tokens + 1.89833333, _flux_mu(num_tokens)
    mu = mu_200 if num_tokens > 4300 else mu_200 + (num_steps - 200) * (mu_200 - mu_10) / 190
    t = shift_time(np.linspace(1.0, 1.0 / num_steps, num_steps), math.exp(mu))
    return Grid(*(jnp.asarray(np.append(field, end)) for field, end in ((1 - t, 1), (t, 0), (t, 0))))


def flux2_shift(num_tokens: int) -> float:
    """Returns the shift of FLUX's training times towards noise: 1.65 for 256 tokens, 3.16 for 4096.

    That of FLUX.1's schedule, whose mu is 0.5 and 1.15 there, and of `flux2_grid` for 200 steps: larger pictures need
    more noise to be hidden as well.

    Args:
      num_tokens: of an image.

    Source: Esser et al. 2024, section 5.3.2; diffusers 0.42, calculate_shift and compute_empirical_mu.

    Example:
      >>> round(flux2_shift(256), 2), round(flux2_shift(4096), 2)
      (1.65, 3.16)
    """
    return math.exp(_flux_mu(num_tokens))


def _flux_mu(num_tokens: int) -> float:
    return 0.00016927 * num_tokens + 0.45666666


def shift_time(t: Scalars, shift: Scalars) -> Any:
    """Moves times of rectified flow towards noise by shift > 1: shift t / (1 + (shift - 1) t).

    - It keeps 0 and 1, and multiplies noise / signal by `shift`.
    - Its inverse is the shift by 1 / shift.
    - The type is kept: NumPy's float64 remains NumPy's float64.

    Source: Esser et al. 2024, eq. 23.

    Raises:
      ValueError: shift <= 0.

    Example:
      >>> shift_time(0.5, 3.0)
      0.75
    """
    if isinstance(shift, int | float) and shift <= 0:
        raise ValueError(f"shift is {shift}: give a number above 0 (1 leaves the times as they are)")
    return shift * t / (shift * t + (1 - t))  # which is 1 + (shift - 1) t, but keeps t = 1 to the bit


def karras_grid(num_steps: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Grid:
    """Returns EDM's noise levels, then sigma = 0; rho = inf spaces them evenly in log-SNR.

    Source: Karras et al. 2022, eq. 5.

    Raises:
      ValueError: unless 0 < sigma_min <= sigma_max and rho > 0.

    Example:
      >>> print(np.asarray(karras_grid(4).noise).round(3))
      [8.000e+01 9.723e+00 4.700e-01 2.000e-03 0.000e+00]
    """
    check_num_steps(num_steps)
    sigma = np.append(_karras_sigma(num_steps, sigma_min, sigma_max, rho), 0.0)
    with np.errstate(divide="ignore"):
        time = 0.25 * np.log(sigma)
    return Grid(*map(jnp.asarray, (np.ones_like(sigma), sigma, time)))


def respace(grid: Grid, num_steps: int, rho: float = math.inf) -> Grid:
    """Returns the `num_steps` points of a fine grid nearest to even log-SNR, or to Karras' spacing in noise / signal.

    Points are picked, never interpolated, so the network sees only times of `grid`, and any process may be respaced:
    `respace(ddpm_grid(schedule, T), 10)`. The first point and clean data stay. Call it outside jit.

    Args:
      grid: the fine grid.
      num_steps: how many of its points are kept, besides clean data.
      rho: Karras et al.'s exponent (their choice is 7; inf is even log-SNR).

    Raises:
      ValueError: num_steps outside 1..len(grid).

    Example:
      >>> print(np.asarray(respace(karras_grid(100), 3).noise).round(3))
      [8.00e+01 4.19e-01 2.00e-03 0.00e+00]
    """
    signal, noise = np.asarray(grid.signal, np.float64)[:-1], np.asarray(grid.noise, np.float64)[:-1]
    check_num_steps(num_steps, largest=len(signal))
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
