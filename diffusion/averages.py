"""Averages of the weights with a power-function profile, and any of them after the fact.

After t updates the average is sum_tau p_t(tau) theta_tau with p_t(tau) proportional to tau^gamma:

- It forgets the beginning, and its length is a fixed share of the training so far, `sigma_rel`, the profile's standard
  deviation over t.
- A few of these averages, stored now and then, span all others: a profile that was never tracked is their
  least-squares combination.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3, appendix C.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float64

LARGEST_SIGMA_REL = 12**-0.5  # the flat profile, gamma = 0


def power_exponent(sigma_rel: float) -> float:
    """Returns the gamma of a profile of relative length `sigma_rel`.

    sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)), the variance of a Beta(gamma + 1, 1) variable.

    Raises:
      ValueError: a length outside (0, 12^(-1/2)], the length of the mean of all weights so far.

    Example:
      >>> round(power_exponent(0.05), 2), round(power_exponent(0.1), 2)
      (16.97, 6.94)
    """
    if not 0 < sigma_rel <= LARGEST_SIGMA_REL:
        raise ValueError(
            f"the length of an average must be in (0, {LARGEST_SIGMA_REL:.4f}] of the run, not {sigma_rel}"
        )
    inverse = sigma_rel**-2
    return max(0.0, float(np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse]).real.max()))


def power_rate(step: int | jax.Array, gamma: float) -> jax.Array:
    """Returns 1 - beta of average <- beta average + (1 - beta) theta at update number `step` = 1, 2, ....

    beta = (1 - 1 / step)^(gamma + 1): the first update replaces whatever the average began with. In float32 beta itself
    would lose 1 - beta: at step 800,000 a twentieth of it.

    Example:
      >>> print(power_rate(1, 3.0), power_rate(2, 3.0))
      1.0 0.9375
    """
    return -jnp.expm1((gamma + 1.0) * jnp.log1p(-1.0 / jnp.asarray(step, jnp.float32)))


class Combination(NamedTuple):
    """A profile as a combination of stored ones: their weights, and the share of its norm that they cannot express."""

    weight: Float64[np.ndarray, "N"]
    error: float


def combine(steps: Sequence[int], gammas: Sequence[float], step: int, gamma: float) -> Combination:
    """Returns the weights [N] of stored averages (`steps[i]`, `gammas[i]`) that come closest to (`step`, `gamma`).

    Least squares over the profiles as functions of tau, in float64.

    Source: Karras et al. 2024, appendix C.

    Raises:
      ValueError: nothing is stored, or none of it reaches `step`.

    Example:
      >>> weight, error = combine([50, 100, 100], [3.0, 3.0, 10.0], step=100, gamma=3.0)
      >>> print(np.abs(weight.round(6)), round(error, 6))
      [0. 1. 0.] 0.0
    """
    if not steps or max(steps) < step:
        raise ValueError(f"an average at step {step} needs one stored there or later, not {sorted(set(steps))[-3:]}")
    t, g = np.asarray(steps, np.float64), np.asarray(gammas, np.float64)
    gram = profile_product(t[:, None], g[:, None], t, g)
    onto = profile_product(t, g, float(step), gamma)
    # Neighbouring profiles are nearly parallel: what is below rounding is left out instead of amplified.
    scale = np.sqrt(np.diag(gram))
    weight = np.linalg.lstsq(gram / np.outer(scale, scale), onto / scale, rcond=1e-14)[0] / scale
    norm = profile_product(float(step), gamma, float(step), gamma)
    square = norm - 2 * weight @ onto + weight @ gram @ weight
    return Combination(weight, float(np.sqrt(max(square, 0.0) / norm)))


def profile_product(t_1, gamma_1, t_2, gamma_2):
    """Returns the integral of p_1 p_2 over tau; p_i(tau) = (gamma_i + 1) tau^gamma_i / t_i^(gamma_i + 1) up to t_i.

    Example:
      >>> print(profile_product(10.0, 0.0, 20.0, 0.0))  # 10 * 1/10 * 1/20
      0.05
    """
    low, high = np.minimum(t_1, t_2), np.maximum(t_1, t_2)
    later = np.where(np.asarray(t_1) < t_2, gamma_2, gamma_1)
    return (gamma_1 + 1) * (gamma_2 + 1) / (gamma_1 + gamma_2 + 1) * (low / high) ** later / high
