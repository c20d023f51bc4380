"""How much each noise level counts: loss weights, and the distributions that training times are drawn from.

Weights. At a fixed x_t an error of the network's output, whatever `kind` it predicts (see `predictions`), is
proportional to the errors of eps_hat and of x_0_hat. So every weighting works with every prediction:

- A weight is a function of `kind`, and weight * mse of the output is the same loss for every kind.
- A weight of your own, for the mse of x_0 or of eps, becomes the one for kind's mse when multiplied by `x_0_mse` or
  `eps_mse` of that kind.
- Weights have the shape of `signal` and `noise`; where a prediction is singular they are infinite or NaN.

Times. Draw u in (0, 1) with `uniform` or `stratified`, and pass it to a quantile function: t = quantile(u).
"""

import math

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Int

from diffusion.gaussian import at, p_variance
from diffusion.predictions import coefficients
from diffusion.schedules import Schedule
from diffusion.types import Keys, Scalars, Steps


def eps_mse(kind: str, signal: Scalars, noise: Scalars, sigma_data: float = 0.5) -> Float[Array, "..."]:
    """Returns the squared error of eps_hat per squared error of the output: the weight of L_simple.

    Example:
      >>> print(np.asarray(eps_mse("x_0", 0.8, 0.4)).round(3))  # SNR
      4.0
    """
    signal, noise = jnp.asarray(signal), jnp.asarray(noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    return jnp.ones_like(a) if kind == "eps" else (signal / (signal * b - noise * a)) ** 2


def x_0_mse(kind: str, signal: Scalars, noise: Scalars, sigma_data: float = 0.5) -> Float[Array, "..."]:
    """Returns the squared error of x_0_hat per squared error of the output: the weight of the x_0-loss.

    Its inverse is SNR = signal^2 / noise^2 for "eps" and SNR + 1 for "v" of a variance-preserving process.

    Example:
      >>> print(np.asarray(x_0_mse("eps", 0.8, 0.4)).round(3))
      0.25
    """
    signal, noise = jnp.asarray(signal), jnp.asarray(noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    return jnp.ones_like(a) if kind == "x_0" else (noise / (signal * b - noise * a)) ** 2


def simple(kind: str, signal: Scalars, noise: Scalars, sigma_data: float = 0.5) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse L_simple: the mse of x_0 times SNR.

    Source: DDPM, eq. 14.

    Example:
      >>> print(simple("eps", 0.8, 0.4))
      1.0
    """
    return eps_mse(kind, signal, noise, sigma_data)


def min_snr(
    kind: str, signal: Scalars, noise: Scalars, gamma: float = 5.0, sigma_data: float = 0.5
) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse the mse of x_0 times min(SNR, gamma).

    Source: Hang et al. 2023, section 3.4.

    Example:
      >>> print(np.asarray(min_snr("x_0", jnp.asarray([0.4, 0.9]), jnp.asarray([0.4, 0.1]))).round(3))
      [1. 5.]
    """
    return jnp.minimum(eps_mse(kind, signal, noise, sigma_data), gamma * x_0_mse(kind, signal, noise, sigma_data))


def p2(
    kind: str, signal: Scalars, noise: Scalars, k: float = 1.0, gamma: float = 1.0, sigma_data: float = 0.5
) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse the mse of eps over (k + SNR)^gamma.

    Source: Choi et al. 2022, eq. 8.

    Example:
      >>> print(np.asarray(p2("eps", 0.8, 0.4)).round(3))
      0.2
    """
    snr = jnp.asarray(signal) ** 2 / jnp.asarray(noise) ** 2
    return eps_mse(kind, signal, noise, sigma_data) / (k + snr) ** gamma


def edm(kind: str, signal: Scalars, noise: Scalars, sigma_data: float = 0.5) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse the mse of x_0 times SNR + 1 / sigma_data^2.

    That is 1 for "F"; for "v" of a variance-preserving process it is 1 if sigma_data = 1.

    Source: Karras et al. 2022, table 1.

    Example:
      >>> print(np.asarray(edm("x_0", 1.0, 0.5)).round(3))  # 4 + 4
      8.0
    """
    return eps_mse(kind, signal, noise, sigma_data) + x_0_mse(kind, signal, noise, sigma_data) / sigma_data**2


def vlb(
    kind: str, schedule: Schedule, t: Steps, variance: str = "large", sigma_data: float = 0.5
) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse the bound's L_{t-1} in nats/dim, up to a constant.

    With variance "small" the constant is 0. At t = 1, where the bound has the decoder's L_0, it is still eq. 12.

    Source: DDPM, eq. 12.

    Raises:
      ValueError: an unknown variance.

    Example:
      >>> from diffusion.schedules import linear_beta, make_schedule
      >>> print(np.asarray(vlb("eps", make_schedule(linear_beta(2, 0.1, 0.1)), 2)).round(3))  # 0.1 / (2 * 0.9 * 0.19)
      0.292
    """
    t = jnp.asarray(t)
    beta, alpha, alpha_bar, one_minus_alpha_bar = (at(table, t, t) for table in schedule)
    levels, sigma_2 = (jnp.sqrt(alpha_bar), jnp.sqrt(one_minus_alpha_bar)), at(p_variance(schedule, variance), t, t)
    of_eps = beta**2 / (2 * sigma_2 * alpha * one_minus_alpha_bar) * eps_mse(kind, *levels, sigma_data)
    # The same from eq. 7's mean, for a last beta of 1: there alpha is 0 and x_t holds nothing of x_0.
    share_of_x_0 = jnp.sqrt(at(schedule.alpha_bar, t - 1, t)) * beta / one_minus_alpha_bar
    return jnp.where(alpha > 0, of_eps, share_of_x_0**2 / (2 * sigma_2) * x_0_mse(kind, *levels, sigma_data))


def uniform(key: Keys, batch_size: int) -> Float[Array, " B"]:
    """Draws u evenly from (0, 1), the ends never included.

    Example:
      >>> uniform(jax.random.key(0), 4).shape
      (4,)
    """
    u = jax.random.uniform(key, (batch_size,))
    return u + jnp.finfo(u.dtype).eps / 2  # half the distance between the numbers that JAX draws, from 0 on


def stratified(key: Keys, batch_size: int) -> Float[Array, " B"]:
    """Draws one u from each of B equal parts of (0, 1), in order: less variance of the batch's mean loss.

    `batch_size` is the global batch, in one call under a global jit, not one call per device.

    Example:
      >>> print(jnp.floor(4 * stratified(jax.random.key(0), 4)))
      [0. 1. 2. 3.]
    """
    u = (jnp.arange(batch_size) + uniform(key, batch_size)) / batch_size
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).eps / 2)  # where B - 1 + u rounds to B


def step_quantile(u: Scalars, num_steps: int) -> Int[Array, "..."]:
    """Returns int32 steps t, even on 1..T for u even on [0, 1).

    Raises:
      ValueError: num_steps < 1.

    Example:
      >>> print(step_quantile(jnp.asarray([0.0, 0.5, 0.999]), 1000))
      [   1  501 1000]
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: give at least 1")
    return 1 + jnp.floor(jnp.asarray(u) * num_steps).astype(jnp.int32)


def log_normal_quantile(u: Scalars, mean: float = -1.2, std: float = 1.2) -> Float[Array, "..."]:
    """Returns EDM's times ln(sigma) / 4 with ln(sigma) ~ N(mean, std^2).

    Source: Karras et al. 2022, table 1.

    Example:
      >>> print(np.asarray(log_normal_quantile(jnp.asarray(0.5))).round(3))
      -0.3
    """
    return (mean + std * ndtri(u)) / 4


def logit_normal_quantile(u: Scalars, mean: float = 0.0, std: float = 1.0) -> Float[Array, "..."]:
    """Returns flow times t with logit(t) ~ N(mean, std^2).

    Source: Esser et al. 2024, section 3.1.

    Example:
      >>> print(logit_normal_quantile(jnp.asarray(0.5)))
      0.5
    """
    return jax.nn.sigmoid(mean + std * ndtri(u))


def logit_normal_density(t: Scalars, mean: float = 0.0, std: float = 1.0) -> Float[Array, "..."]:
    """Returns the density of `logit_normal_quantile`, 0 at the ends.

    Source: Esser et al. 2024, section 3.1.

    Example:
      >>> print(np.asarray(logit_normal_density(jnp.asarray([0.0, 0.5]))).round(3))  # 4 / sqrt(2 pi)
      [0.    1.596]
    """
    t = jnp.asarray(t)
    inside = (t > 0) & (t < 1)
    t = jnp.where(inside, t, 0.5)
    z = (jnp.log(t) - jnp.log1p(-t) - mean) / std
    return jnp.where(inside, jnp.exp(-(z**2) / 2) / (std * math.sqrt(2 * math.pi) * t * (1 - t)), 0)


def mode_quantile(u: Scalars, scale: float = 1.29) -> Float[Array, "..."]:
    """Returns flow times with more of them in the middle (scale > 0) or at the ends (scale < 0).

    Source: Esser et al. 2024, section 3.1, with 1 - u for their u, so that t rises with u.

    Raises:
      ValueError: a scale outside [-1, 2 / (pi - 2)], where t would not rise everywhere.

    Example:
      >>> print(np.asarray(mode_quantile(jnp.asarray([0.0, 0.25, 0.5, 1.0]))).round(3))
      [0.    0.384 0.5   1.   ]
    """
    _check_mode_scale(scale)
    u = jnp.asarray(u)
    return u - scale * (jnp.sin(jnp.pi / 2 * u) ** 2 - u)


def mode_density(t: Scalars, scale: float = 1.29) -> Float[Array, "..."]:
    """Returns the density of `mode_quantile`, 0 outside [0, 1]; the quantile is inverted by bisection.

    Example:
      >>> print(np.asarray(mode_density(jnp.asarray([0.0, 0.5]))).round(3))  # largest in the middle
      [0.437 3.793]
    """
    t = jnp.asarray(t)
    low, high = jnp.zeros_like(t), jnp.ones_like(t)
    for _ in range(jnp.finfo(t.dtype).nmant + 2):
        middle = (low + high) / 2
        below = mode_quantile(middle, scale) < t
        low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
    slope = 1 + scale - scale * jnp.pi / 2 * jnp.sin(jnp.pi * (low + high) / 2)
    return jnp.where((t >= 0) & (t <= 1), 1 / slope, 0)


def cosmap_quantile(u: Scalars) -> Float[Array, "..."]:
    """Returns flow times whose log-SNR is distributed as the cosine schedule's.

    Source: Esser et al. 2024, section 3.1.

    Example:
      >>> print(np.asarray(cosmap_quantile(jnp.asarray([0.0, 0.5, 1.0]))).round(3))
      [0.  0.5 1. ]
    """
    angle = jnp.pi / 2 * jnp.asarray(u)
    return jnp.sin(angle) / (jnp.sin(angle) + jnp.cos(angle))  # 1 - 1 / (1 + tan), finite at u = 1 too


def cosmap_density(t: Scalars) -> Float[Array, "..."]:
    """Returns the density of `cosmap_quantile`, 0 outside [0, 1].

    Source: Esser et al. 2024, section 3.1.

    Example:
      >>> print(np.asarray(cosmap_density(jnp.asarray([0.0, 0.5]))).round(3))  # 2 / pi, 4 / pi
      [0.637 1.273]
    """
    t = jnp.asarray(t)
    return jnp.where((t >= 0) & (t <= 1), 2 / (jnp.pi * (1 - 2 * t + 2 * t**2)), 0)


def _check_mode_scale(scale: float) -> None:
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"scale is {scale}: mode sampling needs one within [-1, {2 / (math.pi - 2):.4g}]")
