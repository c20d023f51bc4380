"""Losses, one number per image; the mean over the batch is taken by the train step alone.

Each averages over all axes but the first, where the papers write a sum of squares, and is computed in float32 or wider.
Weights for other predictions than eps are in `weightings`.

In the examples

>>> from diffusion.schedules import linear_beta, make_schedule
>>> schedule = make_schedule(linear_beta(10, 0.1, 0.1))
>>> x_0, v = jnp.ones((1, 2)), -jnp.ones((1, 2))
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
    """Returns L_simple, the mean squared error of the predicted noise.

    Source: DDPM, eq. 14.

    Example:
      >>> print(simple_loss(jnp.asarray([[1.0, 0.0]]), jnp.asarray([[0.0, 0.0]])))
      [0.5]
    """
    return weighted_mse(1.0, eps, eps_hat)


def weighted_mse(weight: Scalars, target: Images, output: Images) -> Float[Array, " B"]:
    """Returns weight * mean((target - output)^2), for a weight that is a scalar or [B].

    Example:
      >>> print(weighted_mse(jnp.asarray([1.0, 2.0]), jnp.ones((2, 3)), jnp.zeros((2, 3))))
      [1. 2.]
    """
    chex.assert_equal_shape([target, output])
    dtype = jnp.promote_types(jnp.result_type(target, output), jnp.float32)
    return jnp.asarray(weight) * _mean((jnp.asarray(target, dtype) - jnp.asarray(output, dtype)) ** 2)


def variational_term(schedule: Schedule, x_0: Images, x_t: Images, t: Steps, p: Normal) -> Float[Array, " B"]:
    """Returns what step t adds to the bound on -log p(x_0), in bits/dim.

    - t > 1: L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p).
    - t = 1: the decoder's L_0 = -log p(x_0 | x_1), which needs x_0 on the 256 levels of [-1, 1] and a variance of p
      above 0.

    Args:
      schedule: the chain.
      x_0: the images.
      x_t: the images at step t.
      t: the step.
      p: p(x_{t-1} | x_t).

    Source: DDPM, eqs. 5 and 13.

    Example:
      >>> perfect = q_posterior(schedule, x_0, 0.9 * x_0, 2)
      >>> print(variational_term(schedule, x_0, 0.9 * x_0, 2, perfect))
      [0.]
    """
    # At t = 1 the posterior's own variance, 0, would make the KL's gradient NaN, although the KL is not used there.
    variance = at(p_variance(schedule, "small"), t, x_t)
    kl = _mean(normal_kl(q_posterior(schedule, x_0, x_t, t)._replace(variance=variance), p))
    return jnp.where(jnp.asarray(t) == 1, -_mean(decoder_log_likelihood(x_0, p)), kl) / jnp.log(2)


def learned_variance_loss(
    schedule: Schedule, x_0: Images, x_t: Images, t: Steps, x_0_hat: Images, v: Images
) -> Float[Array, " B"]:
    """Returns `variational_term` of a network with learned variance, whose gradient reaches v but not x_0_hat.

    `v` is the output that `gaussian.learned_variance` interpolates by.

    Source: Nichol & Dhariwal 2021, section 3.1.

    Example:
      >>> print(learned_variance_loss(schedule, x_0, 0.9 * x_0, 2, x_0_hat=x_0, v=v) < 1e-6)
      [ True]
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
    """Returns L_hybrid = L_simple + weight * L_vlb.

    t is drawn evenly from 1..T, so L_vlb, the sum of the terms in bits/dim, is T times the term at t on average.

    Args:
      simple: L_simple, or another loss in its place, of the same output as `x_0_hat`.
      schedule: the chain of T steps.
      x_0: the images.
      x_t: the images at step t.
      t: the step.
      x_0_hat: from the network's output; no gradient reaches it.
      v: the network's variance output.
      weight: of L_vlb.

    Source: Nichol & Dhariwal 2021, eq. 16.

    Example:
      >>> print(hybrid_loss(jnp.asarray([0.5]), schedule, x_0, 0.9 * x_0, 2, x_0_hat=x_0, v=v))
      [0.5]
    """
    num_steps = schedule.beta.shape[0] - 1
    return simple + weight * num_steps * learned_variance_loss(schedule, x_0, x_t, t, x_0_hat, v)


def _mean(per_number: Float[Array, "B *shape"]) -> Float[Array, " B"]:
    return per_number.reshape(per_number.shape[0], -1).mean(axis=1)
