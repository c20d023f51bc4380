"""Guidance: from one Denoise, or two, to another. All act on x_0_hat, where they are the same as acting on eps_hat.

A Denoise may return x_0_hat or `Denoised`; a learned variance v of the first one given passes through unchanged.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Int

from diffusion.types import Denoise, Denoised, denoised, per_example


def classifier_free(conditional: Denoise, unconditional: Denoise, scale: ArrayLike) -> Denoise:
    """Returns a Denoise with x_0_hat = unconditional + scale * (conditional - unconditional).

    Args:
      conditional: the network with its condition.
      unconditional: the network without, or with a negative prompt.
      scale: a number, or [B] with one per image. At 1 the result is `conditional`, bit for bit, and a Python 1 does not
        even call `unconditional`.

    Source: Ho & Salimans 2022, eq. 6 with w = scale - 1.

    Example:
      >>> guided = classifier_free(lambda x_t, time: 0.5 * x_t, lambda x_t, time: 0.25 * x_t, 3.0)
      >>> print(guided(jnp.ones((1, 2)), 0.0))
      [[1. 1.]]
    """
    if isinstance(scale, (int, float)) and scale == 1:
        return conditional
    return classifier_free_pair(lambda x_t, time: (conditional(x_t, time), unconditional(x_t, time)), scale)


def classifier_free_pair(pair: Callable[[Array, Array | float], tuple[Any, Any]], scale: ArrayLike) -> Denoise:
    """Returns `classifier_free` of a function that makes both evaluations, in one call of the network for instance.

    Args:
      pair: (x_t, time) -> what `conditional` returns, and what `unconditional` returns.
      scale: as in `classifier_free`.

    Example:
      >>> guided = classifier_free_pair(lambda x_t, time: (0.5 * x_t, 0.25 * x_t), 3.0)
      >>> print(guided(jnp.ones((1, 2)), 0.0))
      [[1. 1.]]
    """

    def denoise(x_t: Array, time: Array | float) -> Array | Denoised:
        output, other = map(denoised, pair(x_t, time))
        x_0_hat, other = output.x_0_hat, other.x_0_hat
        scales = per_example(jnp.asarray(scale, x_0_hat.dtype), x_0_hat)
        guided = jnp.where(scales == 1, x_0_hat, other + scales * (x_0_hat - other))
        return Denoised(guided, output.v).plain()

    return denoise


def skip_layer(
    pair: Callable[[Array, Array | float], tuple[Any, Any]], without: Denoise, scale: ArrayLike, skip_scale: float
) -> Denoise:
    """Returns `classifier_free_pair` that is led away, too, from the conditional network without some of its layers.

    x_0_hat = unconditional + scale (conditional - unconditional) + skip_scale (conditional - without)

    Args:
      pair: as in `classifier_free_pair`.
      without: the conditional network without these layers.
      scale: as in `classifier_free`.
      skip_scale: 2.8 with Stable Diffusion 3.5 medium's layers 7 to 9.

    Source: the released code of Stable Diffusion 3.5 (Stability AI 2024).

    Example:
      >>> guided = skip_layer(lambda x_t, time: (0.5 * x_t, 0.25 * x_t), lambda x_t, time: 0.25 * x_t, 3.0, 2.0)
      >>> print(guided(jnp.ones((1, 2)), 0.0))
      [[1.5 1.5]]
    """

    def denoise(x_t: Array, time: Array | float) -> Array | Denoised:
        outputs = pair(x_t, time)
        led = denoised(classifier_free_pair(lambda x_t, time: outputs, scale)(x_t, time))
        away = denoised(outputs[0]).x_0_hat - denoised(without(x_t, time)).x_0_hat
        return Denoised(led.x_0_hat + skip_scale * away, led.v).plain()

    return denoise


def autoguidance(network: Denoise, weaker: Denoise, scale: ArrayLike) -> Denoise:
    """Returns a Denoise with x_0_hat = weaker + scale * (network - weaker).

    Args:
      network: the network.
      weaker: a smaller or less trained one with the same condition.
      scale: as in `classifier_free`.

    Source: Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", eq. 3.

    Example:
      >>> guided = autoguidance(lambda x_t, time: 0.5 * x_t, lambda x_t, time: 0.25 * x_t, 2.0)
      >>> print(guided(jnp.ones((1, 2)), 0.0))
      [[0.75 0.75]]
    """
    return classifier_free(network, weaker, scale)


def limited_interval(inside: Denoise, outside: Denoise, first: float, last: float) -> Denoise:
    """Returns a Denoise that is `inside` where first <= time <= last, and `outside` elsewhere.

    With inside = classifier_free(conditional, ...) and outside = conditional this is guidance in a limited interval.
    Where all images are at one time only the one that is needed is called.

    Args:
      inside: used in the interval.
      outside: used elsewhere.
      first: the interval's smaller end, in the network's units of time.
      last: its larger end.

    Source: Kynkäänniemi et al. 2024, eq. 5.

    Raises:
      ValueError: first is after last.

    Example:
      >>> guided = limited_interval(lambda x_t, time: 2 * x_t, lambda x_t, time: x_t, 0.2, 0.8)
      >>> print(guided(jnp.ones((1, 2)), 0.5), guided(jnp.ones((1, 2)), 0.9))
      [[2. 2.]] [[1. 1.]]
    """
    if first > last:
        raise ValueError(f"the interval [{first}, {last}] is empty: give the smaller time first.")

    def denoise(x_t: Array, time: Array | float) -> Array | Denoised:
        time = jnp.asarray(time)
        within = (first <= time) & (time <= last)
        calls = [lambda x_t, time, call=call: denoised(call(x_t, time)) for call in (inside, outside)]
        if time.ndim == 0:
            return lax.cond(within, *calls, x_t, time).plain()
        outputs = [call(x_t, time) for call in calls]
        return jax.tree.map(lambda a, b: jnp.where(per_example(within, a), a, b), *outputs).plain()

    return denoise


def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0, *, keep_eps: bool = False) -> Denoise:
    """Returns `denoise` with x_0_hat clipped to the range of images.

    Args:
      denoise: what is clipped, already guided.
      low: the smallest number of an image.
      high: the largest.
      keep_eps: whether `samplers.ddim` takes eps_hat from x_0_hat as it was, as diffusers' DDIMScheduler does, and not
        from the clipped one, as DDPM's and guided-diffusion's released code.

    Example:
      >>> print(clip(lambda x_t, time: x_t)(jnp.asarray([[-3.0, 0.5]]), 0.0))
      [[-1.   0.5]]
    """
    if not low < high:
        raise ValueError(f"images cannot be clipped to [{low}, {high}]: give low < high")
    return _bounded(denoise, lambda x_0_hat: jnp.clip(x_0_hat, low, high), keep_eps)


def dynamic_threshold(denoise: Denoise, quantile: float = 0.995, *, keep_eps: bool = False) -> Denoise:
    """Returns `denoise` with x_0_hat clipped to [-s, s] and divided by s, a quantile of the image's |x_0_hat|.

    Images whose s is at most 1 are clipped to [-1, 1].

    Args:
      denoise: what is bounded, already guided.
      quantile: in (0, 1].
      keep_eps: as in `clip`.

    Source: Saharia et al. 2022 (Imagen), section 2.3.

    Raises:
      ValueError: a quantile outside (0, 1].

    Example:
      >>> print(dynamic_threshold(lambda x_t, time: x_t, 1.0)(jnp.asarray([[-4.0, 2.0]]), 0.0))
      [[-1.   0.5]]
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}: it has to lie in (0, 1].")

    def threshold(x_0_hat: Array) -> Array:
        magnitude = jnp.abs(x_0_hat.reshape(x_0_hat.shape[0], -1)).astype(jnp.promote_types(x_0_hat.dtype, jnp.float32))
        s = jnp.maximum(jnp.quantile(magnitude, quantile, axis=1), 1).astype(x_0_hat.dtype)
        s = per_example(s, x_0_hat)
        return jnp.clip(x_0_hat, -s, s) / s

    return _bounded(denoise, threshold, keep_eps)


def drop_labels(key: Array, labels: Int[Array, "B"], null: int, rate: float) -> Int[Array, "B"]:
    """Returns labels with each replaced by the null class at probability `rate`: one network learns both for guidance.

    Source: Ho & Salimans 2022, Algorithm 1.

    Raises:
      ValueError: a rate outside [0, 1].

    Example:
      >>> print(drop_labels(jax.random.key(0), jnp.arange(4), null=10, rate=1.0))
      [10 10 10 10]
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}: it has to lie in [0, 1].")
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null, labels)


def _bounded(denoise: Denoise, function: Callable[[Array], Array], keep_eps: bool) -> Denoise:
    """Returns `denoise` with `function` applied to x_0_hat, which is kept as `unclipped` if `keep_eps`."""

    def applied(x_t: Array, time: Array | float) -> Array | Denoised:
        output = denoised(denoise(x_t, time))
        return Denoised(function(output.x_0_hat), output.v, output.x_0_hat if keep_eps else None).plain()

    return applied
