"""DDPM's forward process q and reverse process p, one function an equation (Ho, Jain & Abbeel 2020).

t is int32, [B] or a scalar, in 1..T, and 0 is the clean image. An entry outside the schedule gives NaN, not its nearest
neighbour. Images are [B, ...]; numbers of one an example are broadcast over the rest.
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

HALF_BIN = 1 / 255  # half the distance of two neighbours among the 256 levels of [-1, 1]


class Normal(NamedTuple):
    """Independent Gaussians, an image of them an example; the variance may have axes of length 1."""

    mean: Array
    variance: Array


def q_sample(schedule: Schedule, x_0: Images, t: Steps, eps: Images) -> Float[Array, "B *shape"]:
    """Returns x_t ~ q(x_t | x_0), made from x_0 and the noise eps (eq. 4)."""
    alpha_bar, one_minus_alpha_bar = at(schedule.alpha_bar, t, x_0), at(schedule.one_minus_alpha_bar, t, x_0)
    return diffuse(x_0, eps, jnp.sqrt(alpha_bar), jnp.sqrt(one_minus_alpha_bar))


def q_posterior(schedule: Schedule, x_0: Images, x_t: Images, t: Steps) -> Normal:
    """Returns q(x_{t-1} | x_t, x_0) (eqs. 6 and 7). At t = 1 it is x_0 itself, with variance 0."""
    chex.assert_equal_shape([x_0, x_t])
    t = jnp.asarray(t)
    beta, alpha = at(schedule.beta, t, x_0), at(schedule.alpha, t, x_0)
    one_minus_alpha_bar = at(schedule.one_minus_alpha_bar, t, x_0)
    alpha_bar_before, noise_before = at(schedule.alpha_bar, t - 1, x_0), at(schedule.one_minus_alpha_bar, t - 1, x_0)
    mean = jnp.sqrt(alpha_bar_before) * beta * x_0 + jnp.sqrt(alpha) * noise_before * x_t
    return Normal(mean / one_minus_alpha_bar, at(posterior_variance(schedule), t, x_0))


def p_mean(schedule: Schedule, eps_hat: Images, x_t: Images, t: Steps) -> Float[Array, "B *shape"]:
    """Returns the mean of p(x_{t-1} | x_t) that the predicted noise means (eq. 11)."""
    chex.assert_equal_shape([eps_hat, x_t])
    x_t = jnp.asarray(x_t)
    beta, one_minus_alpha_bar = at(schedule.beta, t, x_t), at(schedule.one_minus_alpha_bar, t, x_t)
    return (x_t - beta / jnp.sqrt(one_minus_alpha_bar) * eps_hat) / jnp.sqrt(at(schedule.alpha, t, x_t))


def predict_x_0(schedule: Schedule, eps_hat: Images, x_t: Images, t: Steps) -> Float[Array, "B *shape"]:
    """Returns the clean images that the predicted noise means (eq. 15)."""
    chex.assert_equal_shape([eps_hat, x_t])
    x_t, noise = jnp.asarray(x_t), jnp.sqrt(at(schedule.one_minus_alpha_bar, t, x_t))
    return (x_t - noise * eps_hat) / jnp.sqrt(at(schedule.alpha_bar, t, x_t))


def p_sample(
    key: Keys, schedule: Schedule, eps_hat: Images, x_t: Images, t: Steps, variance: str | Images = "large"
) -> Float[Array, "B *shape"]:
    """Returns x_{t-1} ~ p(x_{t-1} | x_t): a step of Algorithm 2, which adds no noise at t = 1.

    `key` is one key or one an image. `variance` is a name for `p_variance`, which raises ValueError for others, or the
    variance itself, as `learned_variance` returns it.
    """
    x_t = jnp.asarray(x_t)
    sigma_2 = at(p_variance(schedule, variance), t, x_t) if isinstance(variance, str) else variance
    z = jnp.where(per_example(jnp.asarray(t) > 1, x_t), normal_like(key, x_t), 0)
    return p_mean(schedule, eps_hat, x_t, t) + jnp.sqrt(sigma_2) * z


def posterior_variance(schedule: Schedule) -> Float[Array, "T_plus_1"]:
    """Returns the variance of q(x_{t-1} | x_t, x_0) for every t (eq. 7): 0 at t = 1, and at t = 0, which has none."""
    ratio = schedule.one_minus_alpha_bar[:-1] / schedule.one_minus_alpha_bar[1:]
    return jnp.append(0, ratio * schedule.beta[1:])


def p_variance(schedule: Schedule, variance: str = "large") -> Float[Array, "T_plus_1"]:
    """Returns sigma_t^2 of p(x_{t-1} | x_t) for every t: beta_t for "large", the posterior's for "small" (section 3.2).

    The posterior's is 0 at t = 1, which does for sampling but not for the decoder: there "small" has t = 2's (beta_1 if
    T = 1). Raises ValueError for another name.
    """
    if variance == "large":
        return schedule.beta
    if variance == "small":
        small = posterior_variance(schedule)
        return small.at[1].set(small[2] if small.shape[0] > 2 else schedule.beta[1])
    raise ValueError(f"unknown variance {variance!r}: choose 'large' (beta_t) or 'small' (the posterior's)")


def learned_variance(schedule: Schedule, v: Images, t: Steps) -> Float[Array, "B *shape"]:
    """Returns the variance between posterior's (v = -1) and beta_t (v = 1), interpolated in the logarithm.

    `v` is the network's own output, in [-1, 1] when trained, but any number is taken. Nichol & Dhariwal 2021, eq. 15,
    with v there = (v + 1) / 2. At t = 1, where the posterior's variance is 0, t = 2's is taken.
    """
    v = jnp.asarray(v, jnp.promote_types(v.dtype, jnp.float32))
    large, small = at(schedule.beta, t, v), at(p_variance(schedule, "small"), t, v)
    fraction = (v + 1) / 2
    return jnp.exp(fraction * jnp.log(large) + (1 - fraction) * jnp.log(small))


def normal_kl(p: Normal, q: Normal) -> Float[Array, "..."]:
    """Returns KL(p || q) in nats, number by number; infinite where a variance is 0."""
    excess = (p.variance - q.variance) / q.variance
    # Near -1 excess has lost the ratio's digits, which the logarithms have; near 0 it is the other way round.
    far = excess < -0.5
    log_ratio = jnp.where(far, jnp.log(p.variance) - jnp.log(q.variance), jnp.log1p(jnp.where(far, 0, excess)))
    return 0.5 * (excess - log_ratio + (p.mean - q.mean) ** 2 / q.variance)


def decoder_log_likelihood(x_0: Float[Array | np.ndarray, "..."], p: Normal) -> Float[Array, "..."]:
    """Returns the nats that p gives to the 8-bit level at x_0, number by number (eq. 13).

    x_0 is one of the 256 levels of [-1, 1]. It gets p's mass in the bin of 2/255 around it; the first and the last bin
    reach to infinity, so that the 256 add up to 1. Finite also in p's far tails; needs a variance above 0.
    """
    first, last, std = x_0 < -1 + HALF_BIN, x_0 > 1 - HALF_BIN, jnp.sqrt(p.variance)
    # By symmetry the bin may be mirrored to the left of the mean, where both log-CDFs keep their digits.
    mirrored = x_0 > p.mean
    distance = jnp.where(mirrored, p.mean - x_0, x_0 - p.mean)
    log_right = jnp.where(jnp.where(mirrored, first, last), 0, log_ndtr((distance + HALF_BIN) / std))
    log_left = jnp.where(jnp.where(mirrored, last, first), -jnp.inf, log_ndtr((distance - HALF_BIN) / std))
    return log_right + jnp.log(-jnp.expm1(log_left - log_right))


def at(table: Float[Array, "T_plus_1"], t: Steps, images: Array | np.ndarray) -> Array:
    """Returns the table's entries at t with the axes of `images`; NaN where t is outside the table."""
    t = jnp.asarray(t)
    # jax clamps an index beyond the end, and would take T's entry in silence
    return per_example(table.at[t].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False), images)
