"""What a network may predict, and every conversion between predictions.

Every process is x_t = signal * x_0 + noise * eps, and every prediction is a * x_0 + b * eps of the same two unknowns,
so that x_t and the network's output are two linear equations for x_0 and eps:

    kind        a                 b                   determinant signal * b - noise * a
    eps         0                 1                   signal
    x_0         1                 0                   -noise
    v           -noise            signal              signal^2 + noise^2          (Salimans & Ho 2022)
    velocity    -1                1                   signal + noise              (rectified flow: eps - x_0)
    F           noise / (d q)     -d signal / q       -q / d                      (EDM, table 1)

with d = sigma_data, the data's standard deviation, and q = sqrt(noise^2 + d^2 signal^2).

Where the determinant is zero the prediction does not determine the other unknown, and the result is infinite or NaN,
never clamped. That is x_0 from "eps" at signal = 0 and eps from "x_0" at noise = 0; "v", "velocity" and "F" determine
both everywhere.

`signal` and `noise` are scalars, [B], or broadcast against the images. Everything is computed in float32 or wider.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.types import Denoise, Denoised, Images, Network, Process, Scalars, denoised, per_example

KINDS = ("eps", "x_0", "v", "velocity", "F")


def coefficients(kind: str, signal: Scalars, noise: Scalars, sigma_data: float = 0.5) -> tuple[Array, Array]:
    """Returns a and b of the prediction a * x_0 + b * eps, in the shape of `signal` and `noise`.

    Raises:
      ValueError: a kind that is not in `KINDS`.

    Example:
      >>> a, b = coefficients("v", 0.6, 0.8)
      >>> print(np.asarray([a, b]).round(3))
      [-0.8  0.6]
    """
    signal, noise = jnp.broadcast_arrays(signal, noise)
    if kind == "eps":
        return jnp.zeros_like(signal), jnp.ones_like(signal)
    if kind == "x_0":
        return jnp.ones_like(signal), jnp.zeros_like(signal)
    if kind == "v":
        return -noise, signal
    if kind == "velocity":
        return -jnp.ones_like(signal), jnp.ones_like(signal)
    if kind == "F":
        q = jnp.sqrt(noise**2 + (sigma_data * signal) ** 2)
        return noise / (sigma_data * q), -sigma_data * signal / q
    raise ValueError(f"unknown prediction {kind!r}: choose from {', '.join(KINDS)}")


def diffuse(x_0: Images, eps: Images, signal: Scalars, noise: Scalars) -> Float[Array, "B *shape"]:
    """Returns x_t = signal * x_0 + noise * eps.

    Example:
      >>> print(diffuse(jnp.ones((1, 2)), jnp.zeros((1, 2)), 0.5, 0.5))
      [[0.5 0.5]]
    """
    chex.assert_equal_shape([x_0, eps])
    return per_example(signal, x_0) * x_0 + per_example(noise, x_0) * eps


def to_x_0(
    kind: str, output: Images, x_t: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns x_0_hat from the network's output at x_t.

    Example:
      >>> print(to_x_0("velocity", jnp.ones((1, 2)), jnp.ones((1, 2)), 0.5, 0.5))  # x_t - t * velocity
      [[0.5 0.5]]
    """
    output, x_t, signal, noise = _prepare(output, x_t, signal, noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    if kind == "x_0":  # needs no division, so it holds at noise = 0 too
        return output
    return (b * x_t - noise * output) / (signal * b - noise * a)


def to_eps(
    kind: str, output: Images, x_t: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns eps_hat from the network's output at x_t.

    Example:
      >>> print(to_eps("x_0", jnp.ones((1, 2)), jnp.ones((1, 2)), 0.5, 0.5))  # (x_t - signal * x_0) / noise
      [[1. 1.]]
    """
    output, x_t, signal, noise = _prepare(output, x_t, signal, noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    if kind == "eps":  # needs no division, so it holds at signal = 0 too
        return output
    return (signal * output - a * x_t) / (signal * b - noise * a)


def from_x_0(
    kind: str, x_0: Images, x_t: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns the output that belongs to x_0 at x_t: the inverse of `to_x_0`.

    At noise = 0, where x_t and x_0 do not determine eps, it is infinite or NaN for every kind but "x_0".

    Example:
      >>> print(from_x_0("velocity", 0.5 * jnp.ones((1, 2)), jnp.ones((1, 2)), 0.5, 0.5))
      [[1. 1.]]
    """
    x_0, x_t, signal, noise = _prepare(x_0, x_t, signal, noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    if kind == "x_0":
        return x_0
    return a * x_0 + b * (x_t - signal * x_0) / noise


def target(
    kind: str, x_0: Images, eps: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns what a network of this kind is trained to return; finite at every signal and noise.

    Example:
      >>> print(target("velocity", jnp.ones((1, 2)), 3 * jnp.ones((1, 2)), 0.5, 0.5))  # eps - x_0
      [[2. 2.]]
    """
    x_0, eps, signal, noise = _prepare(x_0, eps, signal, noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    return a * x_0 + b * eps


def network_input(
    kind: str, x_t: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns what a network of this kind is given: x_t, but for "F" x_t scaled to unit variance (EDM's c_in).

    Example:
      >>> print(network_input("F", 5 * jnp.ones((1, 2)), 1.0, 3.0, sigma_data=4.0))  # 5 / sqrt(3^2 + 4^2)
      [[1. 1.]]
    """
    if kind != "F":
        return jnp.asarray(x_t)
    x_t, _, signal, noise = _prepare(x_t, x_t, signal, noise)
    return x_t / jnp.sqrt(noise**2 + (sigma_data * signal) ** 2)


def denoiser(kind: str, network: Network, process: Process, sigma_data: float = 0.5) -> Denoise:
    """Returns denoise(x_t, time) -> x_0_hat of a network that predicts `kind`.

    Args:
      kind: one of `KINDS`.
      network: (x_t, time) -> output, closed over its parameters; it gets time as float[B]. With a learned variance it
        returns (output, v).
      process: time -> (signal, noise).
      sigma_data: the data's standard deviation, which only "F" reads.

    Returns:
      denoise, which takes time as a scalar or float[B] in the network's units, and returns x_0_hat, or
      Denoised(x_0_hat, v) with a learned variance.

    Raises:
      ValueError: an unknown kind.

    Example:
      >>> denoise = denoiser("velocity", lambda x_t, time: x_t, lambda time: (1 - time, time))
      >>> print(denoise(jnp.ones((1, 2)), 0.5))
      [[0.5 0.5]]
    """
    if kind not in KINDS:
        raise ValueError(f"unknown prediction {kind!r}: choose from {', '.join(KINDS)}")

    def denoise(x_t: Images, time: Scalars) -> Array | Denoised:
        time = jnp.asarray(time, jnp.promote_types(jnp.result_type(time), jnp.float32))
        time = jnp.broadcast_to(time, x_t.shape[:1])
        signal, noise = process(time)
        output = denoised(network(network_input(kind, x_t, signal, noise, sigma_data), time))  # not yet of x_0
        chex.assert_equal_shape([x_t, *jax.tree.leaves(output)])
        return output._replace(x_0_hat=to_x_0(kind, output.x_0_hat, x_t, signal, noise, sigma_data)).plain()

    return denoise


def _prepare(first: Images, second: Images, signal: Scalars, noise: Scalars) -> tuple[Array, Array, Array, Array]:
    chex.assert_equal_shape([first, second])
    dtype = jnp.promote_types(jnp.result_type(first, second, signal, noise), jnp.float32)
    first, second = jnp.asarray(first, dtype), jnp.asarray(second, dtype)
    return first, second, per_example(jnp.asarray(signal, dtype), first), per_example(jnp.asarray(noise, dtype), first)
