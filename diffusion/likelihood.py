"""Likelihoods in bits/dim: DDPM's variational bound, and the probability-flow ODE.

Both count 8-bit images, where a number of x_0 represents its bin of width 2/255 in [-1, 1]:

- The bound does so in its decoder.
- The ODE gives a density, whose bits/dim are those of density * bin width. Dequantised images (`dequantize`) therefore
  have at least as many bits as the discrete ones; for data that are no images `bin_width=1` gives the density itself.

In the examples

>>> from diffusion.schedules import flow_grid, linear_beta, make_schedule
>>> schedule, x_0, key = make_schedule(linear_beta(10, 0.1, 0.5)), jnp.ones((1, 2)), jax.random.key(0)
>>> denoise = lambda x_t, time: 0.5 * x_t
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from diffusion.gaussian import (
    HALF_BIN,
    Normal,
    at,
    learned_variance,
    normal_kl,
    p_variance,
    q_posterior,
    q_sample,
)
from diffusion.losses import variational_term
from diffusion.randomness import draw_like, fold_in, normal_like
from diffusion.schedules import Grid, Schedule
from diffusion.types import Denoise, Images, Keys, denoised, per_example


class Bound(NamedTuple):
    """The terms of the bound on -log2 p(x_0) / D: `steps[:, t - 1]` is L_{t-1}, or 0 at t = 1: L_0 is `decoder`."""

    prior: Float[Array, " B"]
    steps: Float[Array, "B T"]
    decoder: Float[Array, " B"]

    @property
    def total(self) -> Float[Array, " B"]:
        """The bound: the sum of all terms."""
        return self.prior + self.steps.sum(axis=1) + self.decoder


def variational_bound(
    key: Keys,
    denoise: Denoise,
    schedule: Schedule,
    x_0: Images,
    variance: str = "large",
    time: Float[Array, " T"] | None = None,
    decoder_variance: float | Float[Array, ""] | None = None,
) -> Bound:
    """Returns DDPM's bound term by term in bits/dim, each from one draw of x_t ~ q(x_t | x_0).

    Args:
      key: one key or one per image.
      denoise: (x_t, time) -> x_0_hat, or `Denoised` with v.
      schedule: the chain.
      x_0: images on the 256 levels of [-1, 1].
      variance: "large" or "small" (`gaussian.p_variance`), or "learned" if denoise returns v.
      time: `time[t - 1]` is what the network is given at t: t - 1 by default; a respaced chain needs its own.
      decoder_variance: sigma_1^2 where it is not that of `variance`: DDPM's published bits/dim, with "large", have the
        small one there, `p_variance(schedule, "small")[1]`.

    Source: DDPM, eq. 5.

    Raises:
      ValueError: an unknown variance, or "learned" though denoise returns no v.

    Example:
      >>> bound = variational_bound(key, denoise, schedule, x_0)
      >>> bound.steps.shape, bound.total.shape
      ((1, 10), (1,))
    """
    num_steps = schedule.beta.shape[0] - 1
    x_0 = jnp.asarray(x_0)
    terms_at = _make_terms(key, denoise, schedule, x_0, variance, time, decoder_variance)
    terms = jax.lax.scan(lambda _, t: (None, terms_at(t).bits), None, jnp.arange(1, num_steps + 1))[1].T
    return Bound(_prior(schedule, x_0), terms.at[:, 0].set(0), terms[:, 0])


class BoundEstimate(NamedTuple):
    """The bound from a few of its steps: `steps[:, k]` is L_{t-1} at t = `t[:, k]`, and counts `weight[:, k]` times.

    `eps_mse` is the mean squared error of the noise there, the simple loss of DDPM's eq. 14 at t.
    """

    prior: Float[Array, " B"]
    decoder: Float[Array, " B"]
    t: Int[Array, "B K"]
    weight: Float[Array, "B K"]
    steps: Float[Array, "B K"]
    eps_mse: Float[Array, "B K"]

    @property
    def total(self) -> Float[Array, " B"]:
        """An unbiased estimate of `Bound.total`."""
        return self.prior + (self.weight * self.steps).sum(axis=1) + self.decoder


def estimate_bound(
    key: Keys,
    denoise: Denoise,
    schedule: Schedule,
    x_0: Images,
    u: Float[Array, " B"],
    num_terms: int,
    variance: str = "large",
    decoder_variance: float | Float[Array, ""] | None = None,
) -> BoundEstimate:
    """Returns an unbiased estimate of `variational_bound` from `num_terms` of its steps per image, and the decoder.

    The decoder's term is always taken. The steps are drawn one in each of `num_terms` equal strata of sqrt((t - 2) /
    (T - 1)), as the terms are largest at small t.

    Args:
      key: one key or one per image.
      denoise: as in `variational_bound`, like all that is not listed here.
      schedule: the chain.
      x_0: images on the 256 levels of [-1, 1].
      u: evenly drawn from (0, 1), one per image: it places the steps.
      num_terms: how many steps.
      variance: as there.
      decoder_variance: as there.

    Raises:
      ValueError: as there, or fewer than 1 term or 2 steps of the chain.

    Example:
      >>> estimate = estimate_bound(key, denoise, schedule, x_0, u=jnp.asarray([0.5]), num_terms=3)
      >>> print(estimate.t)
      [[2 4 8]]
    """
    num_steps = schedule.beta.shape[0] - 1
    if num_steps < 2 or num_terms < 1:
        raise ValueError(f"{num_terms} terms of a chain of {num_steps} steps: give at least 1 term and 2 steps")
    x_0 = jnp.asarray(x_0)
    terms_at = _make_terms(key, denoise, schedule, x_0, variance, decoder_variance=decoder_variance)
    quantile = (jnp.arange(num_terms) + u[:, None]) / num_terms
    t = 2 + jnp.minimum((quantile**2 * (num_steps - 1)).astype(jnp.int32), num_steps - 2)
    probability = jnp.sqrt((t - 1) / (num_steps - 1)) - jnp.sqrt((t - 2) / (num_steps - 1))
    # The decoder's term is the loop's first, so that the network is compiled once.
    taken = jnp.concatenate([jnp.ones_like(t[:, :1]), t], axis=1)
    terms = jax.tree.map(jnp.transpose, jax.lax.scan(lambda _, t: (None, terms_at(t)), None, taken.T)[1])
    steps, eps_mse = (values[:, 1:] for values in terms)
    return BoundEstimate(_prior(schedule, x_0), terms.bits[:, 0], t, 1 / (num_terms * probability), steps, eps_mse)


class _Terms(NamedTuple):
    bits: Float[Array, " B"]
    eps_mse: Float[Array, " B"]


def _make_terms(key, denoise, schedule, x_0, variance, time=None, decoder_variance=None) -> Callable[[Array], _Terms]:
    """Returns t (one for all, or one per image) -> what step t adds to the bound, and its error in eps."""
    num_steps = schedule.beta.shape[0] - 1
    time = jnp.arange(num_steps, dtype=schedule.beta.dtype) if time is None else time
    chex.assert_shape(time, (num_steps,))

    def terms_at(t: Array) -> _Terms:
        eps = normal_like(fold_in(key, t), x_0)
        x_t = q_sample(schedule, x_0, t, eps)
        output = denoised(denoise(x_t, time[t - 1]))
        if variance != "learned":
            sigma_2 = at(p_variance(schedule, variance), t, x_t)
        elif output.v is not None:
            sigma_2 = learned_variance(schedule, output.v, t)
        else:
            raise ValueError("variance='learned' needs a denoise that returns (x_0_hat, v): use 'large' or 'small'")
        if decoder_variance is not None:
            sigma_2 = jnp.where(per_example(t == 1, x_t), decoder_variance, sigma_2)
        p = Normal(q_posterior(schedule, output.x_0_hat, x_t, t).mean, sigma_2)
        snr = at(schedule.alpha_bar, t, x_t) / at(schedule.one_minus_alpha_bar, t, x_t)
        eps_mse = jnp.mean(snr * (output.x_0_hat - x_0) ** 2, axis=tuple(range(1, x_0.ndim)))
        return _Terms(variational_term(schedule, x_0, x_t, t, p), eps_mse)

    return terms_at


def _prior(schedule: Schedule, x_0: Array) -> Float[Array, " B"]:
    """Returns KL(q(x_T | x_0) || N(0, I)) in bits/dim."""
    x_T = Normal(jnp.sqrt(schedule.alpha_bar[-1]) * x_0, schedule.one_minus_alpha_bar[-1])
    nats = _sum(normal_kl(x_T, Normal(jnp.zeros(()), jnp.ones(()))))
    return nats / (math.prod(x_0.shape[1:]) * jnp.log(2))


def dequantize(key: Keys, x_0: Images) -> Float[Array, "B *shape"]:
    """Spreads the 256 levels of [-1, 1] evenly over their bins of width 2/255.

    Example:
      >>> print(jnp.abs(dequantize(key, x_0) - x_0).max() <= 1 / 255)
      True
    """
    x_0 = jnp.asarray(x_0)
    return x_0 + HALF_BIN * draw_like(lambda *args: jax.random.uniform(*args, minval=-1.0), key, x_0)


def ode_likelihood(
    key: Keys,
    denoise: Denoise,
    x_0: Images,
    grid: Grid,
    num_probes: int | None = 1,
    bin_width: float = 2 * HALF_BIN,
) -> Float[Array, " B"]:
    """Returns -log2(p(x_0) * bin_width^D) / D for the density p of the probability-flow ODE.

    - Any process will do: w = x_t / sqrt(signal^2 + noise^2) turns by the angle phi = atan(noise / signal) with
      dw / dphi = v_hat, the v-prediction: finite where signal is 0, and 0 where noise is 0 if the density is smooth.
    - The grid is climbed from x_0 by the trapezoidal rule: Euler predicts, and the one evaluation at the predicted
      point both corrects and predicts the next. That is of order 2 like Heun's method at half its cost.
    - The prior is the samplers', x_T ~ N(0, noise[0]^2 I).
    - It costs N evaluations, and for each probe as many products with the network's transposed Jacobian.

    Args:
      key: one key or one per image, for the probes.
      denoise: (x_t, time) -> x_0_hat.
      x_0: the data as they are: `dequantize` 8-bit images first.
      grid: the grid of a sampler.
      num_probes: Rademacher probes per step that estimate the divergence (Hutchinson's method, without bias in log p);
        None computes it exactly, at the cost of D probes.
      bin_width: 1 for the density itself.

    Source: Song et al. 2021, eq. 39, for the divergence; Salimans & Ho 2022, appendix D, for the angle.

    Raises:
      ValueError: num_probes < 1.

    Example:
      >>> ode_likelihood(key, denoise, x_0, flow_grid(4)).shape
      (1,)
    """
    if num_probes is not None and num_probes < 1:
        raise ValueError(f"num_probes is {num_probes}: give at least 1, or None for the exact divergence")
    x_0 = jnp.asarray(x_0, jnp.promote_types(jnp.result_type(x_0, grid.signal), jnp.float32))
    size = math.prod(x_0.shape[1:])
    radius = jnp.hypot(grid.signal, grid.noise)
    cosine, sine, angle = grid.signal / radius, grid.noise / radius, jnp.arctan2(grid.noise, grid.signal)

    def probes(k):
        if num_probes is None:
            return jnp.broadcast_to(jnp.eye(size, dtype=x_0.dtype).reshape(size, 1, *x_0.shape[1:]), (size, *x_0.shape))
        draws = [draw_like(jax.random.rademacher, fold_in(fold_in(key, k), i), x_0) for i in range(num_probes)]
        return jnp.stack(draws)

    def step(carry, k):
        w, log_density, v_before, divergence_before = carry

        def v_hat(w):
            x_0_hat = denoised(denoise(radius[k] * w, grid.time[k])).x_0_hat
            return (cosine[k] * w - x_0_hat.astype(w.dtype)) / sine[k]

        turn = angle[k] - angle[k + 1]
        v, transposed_jacobian = jax.vjp(v_hat, w + turn * v_before)
        products = jax.lax.map(lambda probe: _sum(probe * transposed_jacobian(probe)[0]), probes(k))
        divergence = products.sum(axis=0) / (num_probes or 1)
        w = w + turn / 2 * (v_before + v)
        log_density = log_density + turn / 2 * (divergence_before + divergence)
        return (w, log_density, v, divergence), None

    zeros = jnp.zeros(x_0.shape[:1], x_0.dtype)
    up = jnp.arange(grid.signal.shape[0] - 2, -1, -1)  # v is 0 at the last point, the clean image
    (w, log_density, _, _), _ = jax.lax.scan(step, (x_0, zeros, jnp.zeros_like(x_0), zeros), up)
    log_density += _sum(jax.scipy.stats.norm.logpdf(w, scale=sine[0]))
    return -log_density / (size * jnp.log(2)) - math.log2(bin_width)


def _sum(per_number: Float[Array, "B *shape"]) -> Float[Array, " B"]:
    return per_number.reshape(per_number.shape[0], -1).sum(axis=1)
