"""How much each noise level counts: loss weights, and the distributions that training times are drawn from.

Weights. At a fixed x_t an error of the network's output, whatever `kind` it predicts (see `predictions`), means an
error of eps_hat and one of x_0_hat, each so many times larger. So every weighting works with every prediction: the
weight is asked for by `kind`, and weight * mse of the output is then the same loss for every kind. A weight of your
own, for the mse of x_0 or of eps, becomes the one for kind's mse when multiplied by `x_0_mse` or `eps_mse` of that
kind. Weights have the shape of `signal` and `noise`; where a prediction is singular they are infinite or NaN.

Times. Draw u in (0, 1) with `uniform` or `stratified`, and hand it to a quantile function: t = quantile(u).
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
    """Returns the squared error of eps_hat that an output's squared error of 1 makes: the weight of L_simple."""
    signal, noise = jnp.asarray(signal), jnp.asarray(noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    return jnp.ones_like(a) if kind == "eps" else (signal / (signal * b - noise * a)) ** 2


def x_0_mse(kind: str, signal: Scalars, noise: Scalars, sigma_data: float = 0.5) -> Float[Array, "..."]:
    """Returns the squared error of x_0_hat that an output's squared error of 1 makes: the weight of the x_0-loss.

    Its inverse is SNR = signal^2 / noise^2 for "eps" and SNR + 1 for "v" of a variance-preserving process.
    """
    signal, noise = jnp.asarray(signal), jnp.asarray(noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    return jnp.ones_like(a) if kind == "x_0" else (noise / (signal * b - noise * a)) ** 2


def simple(kind: str, signal: Scalars, noise: Scalars, sigma_data: float = 0.5) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse L_simple (DDPM, eq. 14): the mse of x_0 times SNR."""
    return eps_mse(kind, signal, noise, sigma_data)


def min_snr(
    kind: str, signal: Scalars, noise: Scalars, gamma: float = 5.0, sigma_data: float = 0.5
) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse the mse of x_0 times min(SNR, gamma) (Hang et al. 2023, section 3.4)."""
    return jnp.minimum(eps_mse(kind, signal, noise, sigma_data), gamma * x_0_mse(kind, signal, noise, sigma_data))


def p2(
    kind: str, signal: Scalars, noise: Scalars, k: float = 1.0, gamma: float = 1.0, sigma_data: float = 0.5
) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse the mse of eps over (k + SNR)^gamma (Choi et al. 2022, eq. 8)."""
    snr = jnp.asarray(signal) ** 2 / jnp.asarray(noise) ** 2
    return eps_mse(kind, signal, noise, sigma_data) / (k + snr) ** gamma


def edm(kind: str, signal: Scalars, noise: Scalars, sigma_data: float = 0.5) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse the mse of x_0 times SNR + 1 / sigma_data^2 (EDM, table 1).

    That is 1 for "F"; for "v" of a variance-preserving process it is 1 if sigma_data = 1.
    """
    return eps_mse(kind, signal, noise, sigma_data) + x_0_mse(kind, signal, noise, sigma_data) / sigma_data**2


def vlb(
    kind: str, schedule: Schedule, t: Steps, variance: str = "large", sigma_data: float = 0.5
) -> Float[Array, "..."]:
    """Returns the weight that makes kind's mse the bound's L_{t-1} in nats/dim, up to a constant (DDPM, eq. 12).

    With variance "small" the constant is 0. At t = 1, where the bound has the decoder's L_0, it is eq. 12 all the same.
    Raises ValueError for an unknown variance.
    """
    t = jnp.asarray(t)
    beta, alpha, alpha_bar, one_minus_alpha_bar = (at(table, t, t) for table in schedule)
    weight_of_eps = beta**2 / (2 * at(p_variance(schedule, variance), t, t) * alpha * one_minus_alpha_bar)
    return weight_of_eps * eps_mse(kind, jnp.sqrt(alpha_bar), jnp.sqrt(one_minus_alpha_bar), sigma_data)


def uniform(key: Keys, batch_size: int) -> Float[Array, " B"]:
    """Draws u evenly from (0, 1), the ends never included."""
    u = jax.random.uniform(key, (batch_size,))
    return u + jnp.finfo(u.dtype).eps / 2  # half the distance of the numbers that jax draws, 0 the first of them


def stratified(key: Keys, batch_size: int) -> Float[Array, " B"]:
    """Draws one u from each of B equal parts of (0, 1), in order: less variance of the batch's mean loss.

    `batch_size` is the global batch, in one call under a global jit, not one call a device.
    """
    u = (jnp.arange(batch_size) + uniform(key, batch_size)) / batch_size
    return jnp.minimum(u, 1 - jnp.finfo(u.dtype).eps / 2)  # where B - 1 + u rounds to B


def step_quantile(u: Scalars, num_steps: int) -> Int[Array, "..."]:
    """Returns int32 steps t, even on 1..T for u even on [0, 1). Raises ValueError if num_steps < 1."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}: give at least 1")
    return 1 + jnp.floor(jnp.asarray(u) * num_steps).astype(jnp.int32)


def log_normal_quantile(u: Scalars, mean: float = -1.2, std: float = 1.2) -> Float[Array, "..."]:
    """Returns EDM's times ln(sigma) / 4 with ln(sigma) ~ N(mean, std^2) (Karras et al. 2022, table 1)."""
    return (mean + std * ndtri(u)) / 4


def logit_normal_quantile(u: Scalars, mean: float = 0.0, std: float = 1.0) -> Float[Array, "..."]:
    """Returns flow times t with logit(t) ~ N(mean, std^2) (Esser et al. 2024, section 3.1)."""
    return jax.nn.sigmoid(mean + std * ndtri(u))


def logit_normal_density(t: Scalars, mean: float = 0.0, std: float = 1.0) -> Float[Array, "..."]:
    """Returns the density of `logit_normal_quantile`, 0 at the ends (Esser et al. 2024, section 3.1)."""
    t = jnp.asarray(t)
    inside = (t > 0) & (t < 1)
    t = jnp.where(inside, t, 0.5)
    z = (jnp.log(t) - jnp.log1p(-t) - mean) / std
    return jnp.where(inside, jnp.exp(-(z**2) / 2) / (std * math.sqrt(2 * math.pi) * t * (1 - t)), 0)


def mode_quantile(u: Scalars, scale: float = 1.29) -> Float[Array, "..."]:
    """Returns flow times with more of them in the middle (scale > 0) or at the ends (scale < 0).

    Esser et al. 2024, section 3.1, with 1 - u for their u, so that t rises with u. Raises ValueError if scale is not
    within [-1, 2 / (pi - 2)], where t would not rise all the way.
    """
    _check_mode_scale(scale)
    u = jnp.asarray(u)
    return u - scale * (jnp.sin(jnp.pi / 2 * u) ** 2 - u)


def mode_density(t: Scalars, scale: float = 1.29) -> Float[Array, "..."]:
    """Returns the density of `mode_quantile`, 0 outside [0, 1]; the quantile is inverted by bisection."""
    t = jnp.asarray(t)
    low, high = jnp.zeros_like(t), jnp.ones_like(t)
    for _ in range(jnp.finfo(t.dtype).nmant + 2):
        middle = (low + high) / 2
        below = mode_quantile(middle, scale) < t
        low, high = jnp.where(below, middle, low), jnp.where(below, high, middle)
    slope = 1 + scale - scale * jnp.pi / 2 * jnp.sin(jnp.pi * (low + high) / 2)
    return jnp.where((t >= 0) & (t <= 1), 1 / slope, 0)


def cosmap_quantile(u: Scalars) -> Float[Array, "..."]:
    """Returns flow times whose log-SNR is distributed as the cosine schedule's (Esser et al. 2024, section 3.1)."""
    angle = jnp.pi / 2 * jnp.asarray(u)
    return jnp.sin(angle) / (jnp.sin(angle) + jnp.cos(angle))  # 1 - 1 / (1 + tan), finite at u = 1 too


def cosmap_density(t: Scalars) -> Float[Array, "..."]:
    """Returns the density of `cosmap_quantile`, 0 outside [0, 1] (Esser et al. 2024, section 3.1)."""
    t = jnp.asarray(t)
    return jnp.where((t >= 0) & (t <= 1), 2 / (jnp.pi * (1 - 2 * t + 2 * t**2)), 0)


def _check_mode_scale(scale: float) -> None:
    if not -1 <= scale <= 2 / (math.pi - 2):
        raise ValueError(f"scale is {scale}: mode sampling needs one within [-1, {2 / (math.pi - 2):.4g}]")
