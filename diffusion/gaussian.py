"""DDPM's forward process q and reverse process p, one function per equation (Ho, Jain & Abbeel 2020).

t is int32, [B] or a scalar, in 1..T, and 0 is the clean image. A t outside the schedule gives NaN, not its nearest
neighbour. Images are [B, ...]; numbers per image are broadcast over the other axes.

In the examples

>>> from diffusion.schedules import linear_beta, make_schedule
>>> schedule = make_schedule(linear_beta(10, 0.1, 0.1))
>>> x_0, eps = jnp.ones((1, 2)), jnp.zeros((1, 2))
"""

from typing import NamedTuple

import chex
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import log_ndtr
from jaxtyping import Array, Float

from diffusion.predictions import diffuse
from diffusion.randomness import normal_like
from diffusion.schedules import Schedule
from diffusion.types import Images, Keys, Steps, per_example

HALF_BIN = 1 / 255  # half the distance between neighbours among the 256 levels of [-1, 1]


class Normal(NamedTuple):
    """Independent Gaussians, one per number of the images; the variance may have axes of length 1."""

    mean: Array
    variance: Array


def q_sample(schedule: Schedule, x_0: Images, t: Steps, eps: Images) -> Float[Array, "B *shape"]:
    """Returns x_t ~ q(x_t | x_0), made from x_0 and the noise eps.

    Source: DDPM, eq. 4.

    Example:
      >>> print(np.asarray(q_sample(schedule, x_0, 2, eps)).round(3))  # sqrt(0.9^2)
      [[0.9 0.9]]
    """
    alpha_bar, one_minus_alpha_bar = at(schedule.alpha_bar, t, x_0), at(schedule.one_minus_alpha_bar, t, x_0)
    return diffuse(x_0, eps, jnp.sqrt(alpha_bar), jnp.sqrt(one_minus_alpha_bar))


def q_posterior(schedule: Schedule, x_0: Images, x_t: Images, t: Steps) -> Normal:
    """Returns q(x_{t-1} | x_t, x_0). At t = 1 it is x_0 itself, with variance 0.

    Source: DDPM, eqs. 6 and 7.

    Example:
      >>> mean, variance = q_posterior(schedule, x_0, eps, 1)
      >>> print(np.asarray(mean).round(3), variance)
      [[1. 1.]] 0.0
    """
    chex.assert_equal_shape([x_0, x_t])
    t = jnp.asarray(t)
    beta, alpha = at(schedule.beta, t, x_0), at(schedule.alpha, t, x_0)
    one_minus_alpha_bar = at(schedule.one_minus_alpha_bar, t, x_0)
    alpha_bar_before, noise_before = at(schedule.alpha_bar, t - 1, x_0), at(schedule.one_minus_alpha_bar, t - 1, x_0)
    mean = jnp.sqrt(alpha_bar_before) * beta * x_0 + jnp.sqrt(alpha) * noise_before * x_t
    return Normal(mean / one_minus_alpha_bar, at(posterior_variance(schedule), t, x_0))


def p_mean(schedule: Schedule, eps_hat: Images, x_t: Images, t: Steps) -> Float[Array, "B *shape"]:
    """Returns the mean of p(x_{t-1} | x_t) from the predicted noise.

    Source: DDPM, eq. 11.

    Example:
      >>> print(np.asarray(p_mean(schedule, eps, 0.9 * x_0, 2)).round(3))  # 0.9 / sqrt(0.9)
      [[0.949 0.949]]
    """
    chex.assert_equal_shape([eps_hat, x_t])
    x_t = jnp.asarray(x_t)
    beta, one_minus_alpha_bar = at(schedule.beta, t, x_t), at(schedule.one_minus_alpha_bar, t, x_t)
    return (x_t - beta / jnp.sqrt(one_minus_alpha_bar) * eps_hat) / jnp.sqrt(at(schedule.alpha, t, x_t))


def predict_x_0(schedule: Schedule, eps_hat: Images, x_t: Images, t: Steps) -> Float[Array, "B *shape"]:
    """Returns x_0_hat from the predicted noise.

    Source: DDPM, eq. 15.

    Example:
      >>> print(np.asarray(predict_x_0(schedule, eps, q_sample(schedule, x_0, 2, eps), 2)).round(3))
      [[1. 1.]]
    """
    chex.assert_equal_shape([eps_hat, x_t])
    x_t, noise = jnp.asarray(x_t), jnp.sqrt(at(schedule.one_minus_alpha_bar, t, x_t))
    return (x_t - noise * eps_hat) / jnp.sqrt(at(schedule.alpha_bar, t, x_t))


def p_sample(
    key: Keys, schedule: Schedule, eps_hat: Images, x_t: Images, t: Steps, variance: str | Images = "large"
) -> Float[Array, "B *shape"]:
    """Returns x_{t-1} ~ p(x_{t-1} | x_t): a step of Algorithm 2, which adds no noise at t = 1.

    Args:
      key: one key or one per image.
      schedule: the chain.
      eps_hat: the predicted noise.
      x_t: the images.
      t: their step.
      variance: a name for `p_variance`, or the variance itself, as `learned_variance` returns it.

    Raises:
      ValueError: an unknown variance.

    Example:
      >>> print(np.asarray(p_sample(jax.random.key(0), schedule, eps, 0.9 * x_0, 1)).round(3))
      [[0.949 0.949]]
    """
    x_t = jnp.asarray(x_t)
    sigma_2 = at(p_variance(schedule, variance), t, x_t) if isinstance(variance, str) else variance
    z = jnp.where(per_example(jnp.asarray(t) > 1, x_t), normal_like(key, x_t), 0)
    return p_mean(schedule, eps_hat, x_t, t) + jnp.sqrt(sigma_2) * z


def posterior_variance(schedule: Schedule) -> Float[Array, "T_plus_1"]:
    """Returns the variance of q(x_{t-1} | x_t, x_0) for every t: 0 at t = 1, and at t = 0, which has none.

    Source: DDPM, eq. 7.

    Example:
      >>> print(np.asarray(posterior_variance(schedule)[:3]).round(4))  # 0.1 * 0.1 / 0.19
      [0.     0.     0.0526]
    """
    ratio = schedule.one_minus_alpha_bar[:-1] / schedule.one_minus_alpha_bar[1:]
    return jnp.append(0, ratio * schedule.beta[1:])


def p_variance(schedule: Schedule, variance: str = "large") -> Float[Array, "T_plus_1"]:
    """Returns sigma_t^2 of p(x_{t-1} | x_t) for every t: beta_t for "large", the posterior's for "small".

    The posterior's is 0 at t = 1, which suffices for sampling but not for the decoder: there "small" has t = 2's
    (beta_1 if T = 1).

    Source: DDPM, section 3.2.

    Raises:
      ValueError: another name.

    Example:
      >>> print(np.asarray(p_variance(schedule, "small")[1:3]).round(4))
      [0.0526 0.0526]
    """
    if variance == "large":
        return schedule.beta
    if variance == "small":
        small = posterior_variance(schedule)
        return small.at[1].set(small[2] if small.shape[0] > 2 else schedule.beta[1])
    raise ValueError(f"unknown variance {variance!r}: choose 'large' (beta_t) or 'small' (the posterior's)")


def learned_variance(schedule: Schedule, v: Images, t: Steps) -> Float[Array, "B *shape"]:
    """Returns the variance between the posterior's (v = -1) and beta_t (v = 1), interpolated in the logarithm.

    At t = 1, where the posterior's variance is 0, t = 2's is taken.

    Args:
      schedule: the chain.
      v: the network's own output, in [-1, 1] when trained, but any number is accepted.
      t: the step.

    Source: Nichol & Dhariwal 2021, eq. 15, with (v + 1) / 2 for their v.

    Example:
      >>> print(np.asarray(learned_variance(schedule, jnp.asarray([[-1.0, 1.0]]), 2)).round(4))
      [[0.0526 0.1   ]]
    """
    v = jnp.asarray(v, jnp.promote_types(v.dtype, jnp.float32))
    large, small = at(schedule.beta, t, v), at(p_variance(schedule, "small"), t, v)
    fraction = (v + 1) / 2
    return jnp.exp(fraction * jnp.log(large) + (1 - fraction) * jnp.log(small))


def normal_kl(p: Normal, q: Normal) -> Float[Array, "..."]:
    """Returns KL(p || q) in nats per number; infinite where p's variance is 0.

    Example:
      >>> print(normal_kl(Normal(jnp.asarray(1.0), jnp.asarray(1.0)), Normal(jnp.asarray(0.0), jnp.asarray(1.0))))
      0.5
    """
    excess = (p.variance - q.variance) / q.variance
    # Near -1 excess has lost the ratio's digits, which the logarithms have; near 0 it is the other way round.
    far = excess < -0.5
    log_ratio = jnp.where(far, jnp.log(p.variance) - jnp.log(q.variance), jnp.log1p(jnp.where(far, 0, excess)))
    return 0.5 * (excess - log_ratio + (p.mean - q.mean) ** 2 / q.variance)


def decoder_log_likelihood(x_0: Float[Array | np.ndarray, "..."], p: Normal) -> Float[Array, "..."]:
    """Returns the log-probability under p of the 8-bit levels x_0, in nats per number.

    x_0 is one of the 256 levels of [-1, 1]. It gets p's mass in the bin of 2/255 around it; the first and the last bin
    reach to infinity, so that the 256 add up to 1. Finite also in p's far tails; needs a variance above 0.

    Source: DDPM, eq. 13.

    Example:
      >>> print(np.asarray(decoder_log_likelihood(x_0, Normal(x_0, jnp.asarray(1e-8)))).round(3))
      [[0. 0.]]
    """
    first, last, std = x_0 < -1 + HALF_BIN, x_0 > 1 - HALF_BIN, jnp.sqrt(p.variance)
    # By symmetry the bin may be mirrored to the left of the mean, where both log-CDFs keep their digits.
    mirrored = x_0 > p.mean
    distance = jnp.where(mirrored, p.mean - x_0, x_0 - p.mean)
    log_right = jnp.where(jnp.where(mirrored, first, last), 0, log_ndtr((distance + HALF_BIN) / std))
    log_left = jnp.where(jnp.where(mirrored, last, first), -jnp.inf, log_ndtr((distance - HALF_BIN) / std))
    return log_right + jnp.log(-jnp.expm1(log_left - log_right))


def at(table: Float[Array, "T_plus_1"], t: Steps, images: Array | np.ndarray) -> Array:
    """Returns the table's entries at t with the axes of `images`; NaN where t is outside the table.

    Example:
      >>> print(at(schedule.beta, jnp.asarray([0, 1, 11]), jnp.ones((3, 1))).T)
      [[0.  0.1 nan]]
    """
    t = jnp.asarray(t)
    # JAX clamps an index beyond the end: it would silently return the entry of T.
    return per_example(table.at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False), images)
