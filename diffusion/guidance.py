"""Guidance: from one Denoise, or two, to another. All act on x_0_hat, where they are the same as acting on eps_hat.

A Denoise of a learned variance returns (x_0_hat, v); the v of the first one given passes through unchanged.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Int

Denoise = Callable[[Array, Any], Any]


def classifier_free(conditional: Denoise, unconditional: Denoise, scale: ArrayLike) -> Denoise:
    """x_0_hat = unconditional + scale * (conditional - unconditional) (Ho & Salimans 2022, eq. 6 with w = scale - 1).

    scale is a number or [B], one an image. At 1 the result is `conditional`, bit for bit, and a Python 1 does not even
    call `unconditional`.
    """
    if isinstance(scale, (int, float)) and scale == 1:
        return conditional

    def denoise(x_t: Array, time: Array | float) -> Any:
        output, other = conditional(x_t, time), _x_0_hat(unconditional(x_t, time))

        def guide(x_0_hat: Array) -> Array:
            scales = _per_image(jnp.asarray(scale, x_0_hat.dtype), x_0_hat)
            return jnp.where(scales == 1, x_0_hat, other + scales * (x_0_hat - other))

        return _on_x_0_hat(guide, output)

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

    def denoise(x_t: Array, time: Array | float) -> Any:
        time = jnp.asarray(time)
        within = (first <= time) & (time <= last)
        if time.ndim == 0:
            return lax.cond(within, inside, outside, x_t, time)
        outputs = inside(x_t, time), outside(x_t, time)
        return jax.tree.map(lambda a, b: jnp.where(_per_image(within, a), a, b), *outputs)

    return denoise


def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
    """x_0_hat clipped to the range of images, as DDPM's released code does at every step."""
    return lambda x_t, time: _on_x_0_hat(lambda x_0_hat: jnp.clip(x_0_hat, low, high), denoise(x_t, time))


def dynamic_threshold(denoise: Denoise, quantile: float = 0.995) -> Denoise:
    """x_0_hat clipped to [-s, s] and divided by s, the quantile of an image's |x_0_hat|, where s > 1.

    Imagen (Saharia et al. 2022, section 2.3). Raises ValueError where the quantile is outside (0, 1].
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile is {quantile}: it has to lie in (0, 1].")

    def threshold(x_0_hat: Array) -> Array:
        magnitude = jnp.abs(x_0_hat.reshape(x_0_hat.shape[0], -1)).astype(jnp.promote_types(x_0_hat.dtype, jnp.float32))
        s = jnp.maximum(jnp.quantile(magnitude, quantile, axis=1), 1).astype(x_0_hat.dtype)
        s = _per_image(s, x_0_hat)
        return jnp.clip(x_0_hat, -s, s) / s

    return lambda x_t, time: _on_x_0_hat(threshold, denoise(x_t, time))


def drop_labels(key: Array, labels: Int[Array, "B"], null: int, rate: float) -> Int[Array, "B"]:
    """Labels with each replaced by the null class at probability `rate`: how one network learns both for guidance.

    Ho & Salimans 2022, Algorithm 1. Raises ValueError where the rate is outside [0, 1].
    """
    if not 0 <= rate <= 1:
        raise ValueError(f"rate is {rate}: it has to lie in [0, 1].")
    return jnp.where(jax.random.bernoulli(key, rate, labels.shape), null, labels)


def _x_0_hat(output: Any) -> Array:
    return output[0] if isinstance(output, tuple) else output


def _on_x_0_hat(function: Callable[[Array], Array], output: Any) -> Any:
    return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)


def _per_image(a: Array, x: Array) -> Array:
    return a.reshape(-1, *[1] * (x.ndim - 1)) if a.ndim else a
