"""Guidance: from one Denoise, or two, to another. All act on x_0_hat, where they are the same as acting on eps_hat.

A Denoise of a learned variance returns (x_0_hat, v); the v of the first one given passes through unchanged.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Int

from diffusion.types import Denoise, Denoised, denoised, per_example


def classifier_free(conditional: Denoise, unconditional: Denoise, scale: ArrayLike) -> Denoise:
    """x_0_hat = unconditional + scale * (conditional - unconditional) (Ho & Salimans 2022, eq. 6 with w = scale - 1).

    scale is a number or [B], one an image. At 1 the result is `conditional`, bit for bit, and a Python 1 does not even
    call `unconditional`.
    """
    if isinstance(scale, (int, float)) and scale == 1:
        return conditional

    def denoise(x_t: Array, time: Array | float) -> Array | Denoised:
        output, other = denoised(conditional(x_t, time)), denoised(unconditional(x_t, time)).x_0_hat
        x_0_hat = output.x_0_hat
        scales = per_example(jnp.asarray(scale, x_0_hat.dtype), x_0_hat)
        guided = jnp.where(scales == 1, x_0_hat, other + scales * (x_0_hat - other))
        return output._replace(x_0_hat=guided).plain()

    return denoise


def autoguidance(network: Denoise, weaker: Denoise, scale: ArrayLike) -> Denoise:
    """x_0_hat = weaker + scale * (network - weaker), where `weaker` is a smaller or less trained network.

    Karras et al. 2024, "Guiding a diffusion model with a bad version of itself", eq. 3; both have the same condition.
    """
    return classifier_free(network, weaker, scale)


def limited_interval(inside: Denoise, outside: Denoise, first: float, last: float) -> Denoise:
    """`inside` where first <= time <= last, in the network's units of time, and `outside` elsewhere.

    With inside = classifier_free(conditional, ...) and outside = conditional this is guidance in a limited interval
    (Kynkäänniemi et al. 2024, eq. 5). Where all images are at one time only the one that is needed is called. Raises
    ValueError where first is after last.
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


def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
    """x_0_hat clipped to the range of images, as DDPM's released code does at every step."""
    return _then(denoise, lambda x_0_hat: jnp.clip(x_0_hat, low, high))


def dynamic_threshold(denoise: Denoise, quantile: float = 0.995) -> Denoise:
    """x_0_hat clipped to [-s, s] and divided by s, the quantile of an image's |x_0_hat|, where s > 1.

    Imagen (Saharia et al. 2022, section 2.3). Raises ValueError where the quantile is outside (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}: it has to lie in (0, 1].")

    def threshold(x_0_hat: Array) -> Array:
        magnitude = jnp.abs(x_0_hat.reshape(x_0_hat.shape[0], -1)).astype(jnp.promote_types(x_0_hat.dtype, jnp.float32))
        s = jnp.maximum(jnp.quantile(magnitude, quantile, axis=1), 1).astype(x_0_hat.dtype)
        s = per_example(s, x_0_hat)
        return jnp.clip(x_0_hat, -s, s) / s

    return _then(denoise, threshold)


def drop_labels(key: Array, labels: Int[Array, "B"], null: int, rate: float) -> Int[Array, "B"]:
    """Labels with each replaced by the null class at probability `rate`: how one network learns both for guidance.

    Ho & Salimans 2022, Algorithm 1. Raises ValueError where the rate is outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}: it has to lie in [0, 1].")
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null, labels)


def _then(denoise: Denoise, function: Callable[[Array], Array]) -> Denoise:
    """Returns `denoise` with `function` applied to its x_0_hat alone."""

    def applied(x_t: Array, time: Array | float) -> Array | Denoised:
        output = denoised(denoise(x_t, time))
        return output._replace(x_0_hat=function(output.x_0_hat)).plain()

    return applied
