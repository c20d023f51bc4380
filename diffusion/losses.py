"""Losses, one number an example; the mean over the batch is taken by the train step alone.

Each averages over all axes but the first, where the papers write a sum of squares, and is computed in float32 or wider.
Weights for other predictions than eps are in `weightings`.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.gaussian import (
    Normal,
    at,
    decoder_log_likelihood,
    learned_variance,
    normal_kl,
    p_variance,
    q_posterior,
)
from diffusion.schedules import Schedule
from diffusion.types import Images, Scalars, Steps


def simple_loss(eps: Images, eps_hat: Images) -> Float[Array, " B"]:
    """Returns L_simple, the mean squared error of the predicted noise (eq. 14 of DDPM)."""
    return weighted_mse(1.0, eps, eps_hat)


def weighted_mse(weight: Scalars, target: Images, output: Images) -> Float[Array, " B"]:
    """Returns weight * mean((target - output)^2), for a weight that is a scalar or [B]."""
    chex.assert_equal_shape([target, output])
    dtype = jnp.promote_types(jnp.result_type(target, output), jnp.float32)
    return jnp.asarray(weight) * _mean((jnp.asarray(target, dtype) - jnp.asarray(output, dtype)) ** 2)


def variational_term(schedule: Schedule, x_0: Images, x_t: Images, t: Steps, p: Normal) -> Float[Array, " B"]:
    """Returns what step t adds to the bound on -log p(x_0), in bits/dim, where p is p(x_{t-1} | x_t).

    That is L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p) for t > 1, and the decoder's L_0 = -log p(x_0 | x_1) at t = 1,
    which needs x_0 on the 256 levels of [-1, 1] and a variance of p above 0 (eqs. 5 and 13 of DDPM).
    """
    # At t = 1 the posterior's own variance, 0, would make the KL's gradient NaN, although the KL is not used there.
    variance = at(p_variance(schedule, "small"), t, x_t)
    kl = _mean(normal_kl(q_posterior(schedule, x_0, x_t, t)._replace(variance=variance), p))
    return jnp.where(jnp.asarray(t) == 1, -_mean(decoder_log_likelihood(x_0, p)), kl) / jnp.log(2)


def learned_variance_loss(
    schedule: Schedule, x_0: Images, x_t: Images, t: Steps, x_0_hat: Images, v: Images
) -> Float[Array, " B"]:
    """Returns `variational_term` of a network with learned variance, whose gradient reaches v but not x_0_hat.

    `v` is the output that `gaussian.learned_variance` interpolates by (Nichol & Dhariwal 2021, section 3.1).
    """
    mean = q_posterior(schedule, jax.lax.stop_gradient(jnp.asarray(x_0_hat)), x_t, t).mean
    return variational_term(schedule, x_0, x_t, t, Normal(mean, learned_variance(schedule, v, t)))


def hybrid_loss(
    simple: Float[Array, " B"],
    schedule: Schedule,
    x_0: Images,
    x_t: Images,
    t: Steps,
    x_0_hat: Images,
    v: Images,
    weight: float = 1e-3,
) -> Float[Array, " B"]:
    """Returns L_hybrid = L_simple + weight * L_vlb (Nichol & Dhariwal 2021, eq. 16).

    t is drawn evenly from 1..T, so L_vlb, the sum of the terms in bits/dim, is T times the term at t on average.
    `simple` is L_simple, or the loss in its place, of the same output that means `x_0_hat`.
    """
    num_steps = schedule.beta.shape[0] - 1
    return simple + weight * num_steps * learned_variance_loss(schedule, x_0, x_t, t, x_0_hat, v)


def _mean(per_number: Float[Array, "B *shape"]) -> Float[Array, " B"]:
    return per_number.reshape(per_number.shape[0], -1).mean(axis=1)
