"""Group normalisation, and with it what `fused_norm` joins, in the steps of their formulas."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Channels = Float[Array | np.ndarray, "C"]
Params = Float[Array, "C"]
PerImage = Float[Array, "B *one C"]  # as many axes of length 1 as x has of pixels


class Plan(NamedTuple):
    """What is computed of x + shift, known before the arrays are.

    Attributes:
      num_groups: of the channels.
      epsilon: added to the variance.
      silu: whether SiLU follows.
      rate: of dropout after that; 0: none.
      dtype: of the output.
    """

    num_groups: int
    epsilon: float
    silu: bool
    rate: float
    dtype: Any

    @property
    def gain(self) -> float:
        """What dropout multiplies by what it lets pass; of a rate of 1 that is nothing."""
        return 1 / (1 - self.rate) if self.rate < 1 else 0.0


def group_norm(
    x: Float[Array, "B *space C"], scale: Channels, bias: Channels, num_groups: int, epsilon: float
) -> Float[Array, "B *space C"]:
    """Returns x with mean 0 and variance 1 in each group of channels of an image, times scale, plus bias.

    Source: Wu & He 2018.
    """
    space = tuple(range(1, x.ndim - 1))
    # Per channel first, then per group, which reads x in the order of memory, and once. Moments are those of the
    # differences from one of the pixels: E[x^2] - E[x]^2 would lose the variance of channels whose mean is large.
    pixel = jax.lax.stop_gradient(x[(slice(None), *(slice(1) for _ in space))])
    difference = jnp.mean(x - pixel, axis=space, keepdims=True)
    variance_c = jnp.mean(jnp.square(x - pixel), axis=space, keepdims=True) - jnp.square(difference)
    mean_c = pixel + difference
    gain, shift = gain_and_shift(num_groups, epsilon, mean_c, variance_c, scale, bias)
    return x * gain + shift


def by_axis(
    num_groups: int, epsilon: float, mean_c: PerImage, variance_c: PerImage, scale: Params, bias: Params
) -> tuple[PerImage, PerImage]:
    """Returns what x is multiplied by, and what is added then, from the moments of an image's channels."""
    groups = (*mean_c.shape[:-1], num_groups, mean_c.shape[-1] // num_groups)
    mean = jnp.mean(mean_c.reshape(groups), axis=-1, keepdims=True)
    variance = jnp.mean(variance_c.reshape(groups) + jnp.square(mean_c.reshape(groups) - mean), -1, keepdims=True)
    gain = jax.lax.rsqrt(variance + epsilon) * scale.reshape(groups[-2:])
    shift = bias.reshape(groups[-2:]) - mean * gain
    return gain.reshape(mean_c.shape), shift.reshape(mean_c.shape)


def by_product(
    num_groups: int, epsilon: float, mean_c: PerImage, variance_c: PerImage, scale: Params, bias: Params
) -> tuple[PerImage, PerImage]:
    """Returns what `by_axis` does, by means over groups that are products of matrices, which XLA leaves whole.

    Those over an axis it repeats on CPUs for each pixel that is normalised, forward and backward, in loops as short as
    a group: the digits train 1.4 times as fast without. A channel that is not finite makes its whole image so.
    """
    group = jnp.arange(mean_c.shape[-1]) // (mean_c.shape[-1] // num_groups)
    share = (group[:, None] == group).astype(mean_c.dtype) * (num_groups / mean_c.shape[-1])
    mean = jnp.matmul(mean_c, share, precision="highest")
    variance = jnp.matmul(variance_c + jnp.square(mean_c - mean), share, precision="highest")
    gain = jax.lax.rsqrt(variance + epsilon) * scale
    return gain, bias - mean * gain


@partial(jax.jit, static_argnums=(0, 1))  # layers of one shape share a trace
def gain_and_shift(num_groups: int, epsilon: float, *arrays: Any) -> tuple[PerImage, PerImage]:
    """Returns what both functions above do, by the faster one where the program is compiled for."""
    cpu, default = (partial(function, num_groups, epsilon) for function in (by_product, by_axis))
    return jax.lax.platform_dependent(*arrays, cpu=cpu, default=default)


def in_steps(plan: Plan, x: Array, shift: Array, scale: Array, bias: Array, *keep: Array) -> Float[Array, "B P C"]:
    """Returns x + shift normalised, times scale, plus bias; then SiLU and dropout, as the plan says."""
    y = group_norm(x.astype(jnp.float32) + shift[:, None], scale, bias, plan.num_groups, plan.epsilon)
    y = jax.nn.silu(y) if plan.silu else y
    for mask in keep:
        y = jnp.where(mask > 0, y * plan.gain, 0.0)
    return y.astype(plan.dtype)
