"""DDPM's chain of T steps: tables of beta, and the `Schedule` that they make. Import the names from `schedules`.

Tables are float64 on the host, beta_1..beta_T; a Schedule is in JAX's default float.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float64, Int

from diffusion.types import Process

Table = Float64[np.ndarray, "T"]


class Schedule(NamedTuple):
    """DDPM's chain of T steps; entry t belongs to x_t, and entry 0 to clean data (beta 0, alpha_bar 1)."""

    beta: Float[Array, "T_plus_1"]
    alpha: Float[Array, "T_plus_1"]
    alpha_bar: Float[Array, "T_plus_1"]
    one_minus_alpha_bar: Float[Array, "T_plus_1"]


def make_schedule(beta: Table) -> Schedule:
    """Returns the chain of a beta table.

    1 - alpha_bar is computed in its own right: 1 - float32(alpha_bar) is off by 1.7e-4 (relative) at t = 1.

    Raises:
      ValueError: a beta outside (0, 1). The last one may be 1, where x_T is pure noise.

    Example:
      >>> print(make_schedule(np.asarray([0.1, 0.1])).alpha_bar)
      [1.   0.9  0.81]
    """
    check_beta(beta)
    beta = np.concatenate([[0.0], beta])
    with np.errstate(divide="ignore"):  # beta_T = 1
        log_alpha_bar = np.cumsum(np.log1p(-beta))
    return Schedule(*map(jnp.asarray, (beta, 1 - beta, np.exp(log_alpha_bar), -np.expm1(log_alpha_bar))))


def discrete_process(schedule: Schedule) -> Process:
    """Returns DDPM's chain as a process.

    Returns:
      time -> (signal, noise). Time is t - 1, rounded to a step of the chain; outside -1..T-1 both are NaN.

    Example:
      >>> signal, noise = discrete_process(make_schedule(linear_beta(1000)))(jnp.asarray([-1.0, 999.0]))
      >>> print(np.asarray(signal).round(3), np.asarray(noise).round(3))
      [1.    0.006] [0. 1.]
    """

    def process(time: Array) -> tuple[Array, Array]:
        t = jnp.round(time).astype(jnp.int32) + 1
        table = jnp.stack([schedule.alpha_bar, schedule.one_minus_alpha_bar])
        outside = (t < 0) | (t >= table.shape[1])
        signal, noise = jnp.where(outside, jnp.nan, jnp.sqrt(table[:, t]))
        return signal, noise

    return process


def linear_beta(num_steps: int, first: float = 1e-4, last: float = 0.02) -> Table:
    """Returns beta_1..beta_T, evenly spaced.

    Source: Ho et al. 2020, section 4. The defaults are meant for T = 1000: see `linear_beta_for`.

    Example:
      >>> print(linear_beta(3))
      [0.0001  0.01005 0.02   ]
    """
    check_num_steps(num_steps)
    return np.linspace(first, last, num_steps, dtype=np.float64)


def linear_beta_for(num_steps: int, largest: float = 0.999) -> Table:
    """Returns DDPM's linear beta with its ends scaled by 1000 / T, so that any T ends in about the same noise.

    Source: guided-diffusion (Nichol & Dhariwal 2021), get_named_beta_schedule("linear"); it has no `largest`, which
    only acts for T <= 20.

    Example:
      >>> print(linear_beta_for(100)[[0, -1]], linear_beta_for(1000)[[0, -1]])
      [0.001 0.2  ] [0.0001 0.02  ]
    """
    check_num_steps(num_steps)
    return np.minimum(linear_beta(num_steps, 0.1 / num_steps, 20 / num_steps), largest)


def sqrt_linear_beta(num_steps: int, first: float = 0.00085, last: float = 0.012) -> Table:
    """Returns beta_1..beta_T whose square roots are evenly spaced; the defaults are Stable Diffusion's.

    Source: latent-diffusion (Rombach et al. 2022), make_beta_schedule("linear"); diffusers' "scaled_linear".

    Example:
      >>> print(sqrt_linear_beta(3, 0.01, 0.09))
      [0.01 0.04 0.09]
    """
    check_num_steps(num_steps)
    return np.linspace(first**0.5, last**0.5, num_steps, dtype=np.float64) ** 2


def sigmoid_beta(num_steps: int, first: float = 1e-4, last: float = 0.02) -> Table:
    """Returns beta_1..beta_T along a sigmoid over [-6, 6], from just above `first` to just below `last`.

    Source: GeoDiff (Xu et al. 2022); diffusers' "sigmoid".

    Example:
      >>> print(sigmoid_beta(3, 0.0, 1.0).round(4))
      [0.0025 0.5    0.9975]
    """
    check_num_steps(num_steps)
    return first + (last - first) / (1 + np.exp(-np.linspace(-6.0, 6.0, num_steps)))


def cosine_beta(num_steps: int, offset: float = 0.008, largest: float = 0.999) -> Table:
    """Returns beta of alpha_bar = cos^2(pi / 2 * (t / T + offset) / (1 + offset)), at most `largest`.

    Source: Nichol & Dhariwal 2021, eq. 17; diffusers' "squaredcos_cap_v2".

    Example:
      >>> print(cosine_beta(4).round(3))
      [0.153 0.417 0.708 0.999]
    """
    check_num_steps(num_steps)
    angle = (np.arange(num_steps + 1) / num_steps + offset) / (1 + offset) * np.pi / 2
    # 1 - cos^2(b) / cos^2(a) = sin(b + a) sin(b - a) / cos^2(a): no cancellation where the steps are small.
    beta = np.sin(angle[1:] + angle[:-1]) * np.sin(angle[1:] - angle[:-1]) / np.cos(angle[:-1]) ** 2
    return np.minimum(beta, largest)


def respaced_beta(beta: Table, t: Int[np.ndarray, "N"]) -> Float64[np.ndarray, "N"]:
    """Returns beta of the chain that visits only the steps `t` of the chain of `beta`.

    Source: Nichol & Dhariwal 2021, section 4. The network of the long chain is given `t - 1`.

    Raises:
      ValueError: a t that does not increase within 1..T.

    Example:
      >>> print(respaced_beta(np.asarray([0.1, 0.1, 0.1]), np.asarray([2, 3])).round(4))
      [0.19 0.1 ]
    """
    check_beta(beta)
    if len(t) == 0 or t[0] < 1 or t[-1] > len(beta) or np.any(np.diff(t) < 1):
        raise ValueError(f"t has to increase within 1..{len(beta)}, the steps of the chain.")
    with np.errstate(divide="ignore"):  # beta_T = 1
        log_alpha_bar = np.cumsum(np.log1p(-beta))[t - 1]
    return -np.expm1(np.diff(log_alpha_bar, prepend=0.0))


def rescale_zero_terminal_snr(beta: Table) -> Table:
    """Returns beta of the chain whose sqrt(alpha_bar) is shifted and scaled to end in 0: there x_T is pure noise.

    - beta_T is then 1, and alpha_bar_1 is kept.
    - The network has to predict "v" or "x_0": at t = T "eps" does not determine x_0.

    Source: Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Algorithm 1.

    Raises:
      ValueError: fewer than 2 steps, or a beta outside (0, 1).

    Example:
      >>> print(rescale_zero_terminal_snr(np.asarray([0.36, 0.75])))
      [0.36 1.  ]
    """
    check_beta(beta)
    check_num_steps(len(beta), smallest=2)
    root = np.sqrt(np.cumprod(1 - beta))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return np.append(beta[0], 1 - (root[1:] / root[:-1]) ** 2)


def check_num_steps(num_steps: int, largest: int | None = None, smallest: int = 1) -> None:
    """Raises ValueError if num_steps is outside smallest..largest."""
    if num_steps < smallest or (largest is not None and num_steps > largest):
        bounds = f"at least {smallest}" if largest is None else f"within {smallest}..{largest}, the steps there are"
        raise ValueError(f"num_steps is {num_steps}: it has to be {bounds}.")


def check_beta(beta: np.ndarray) -> None:
    """Raises ValueError if a beta is outside (0, 1), but for a last one of 1."""
    if not (np.all((beta > 0) & (beta <= 1)) and np.all(beta[:-1] < 1)):  # written so that NaN fails
        low, high = beta.min(), beta.max()
        raise ValueError(f"every beta has to lie in (0, 1), or be 1 at T: these range over [{low:g}, {high:g}].")
