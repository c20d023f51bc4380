"""What a network may predict, and every conversion between predictions.

Every process is x_t = signal * x_0 + noise * eps. Every prediction is a combination a * x_0 + b * eps of the same two
unknowns, so that x_t and the network's output are two linear equations for x_0 and eps:

    kind        a                 b                   determinant signal * b - noise * a
    eps         0                 1                   signal
    x_0         1                 0                   -noise
    v           -noise            signal              signal^2 + noise^2          (Salimans & Ho 2022)
    velocity    -1                1                   signal + noise              (rectified flow: eps - x_0)
    F           noise / (d q)     -d signal / q       -q / d                      (EDM, table 1)

with d = sigma_data, the data's standard deviation, and q = sqrt(noise^2 + d^2 signal^2). Where the determinant is zero
the prediction does not hold what is asked for, and the result is infinite or NaN, never clamped. That is x_0 from "eps"
at signal = 0 and eps from "x_0" at noise = 0; "v", "velocity" and "F" give both x_0 and eps everywhere.

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

    Raises ValueError if `kind` is none of `KINDS`.
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
    raise ValueError(f"unknown prediction {kind!r}: choose one of {', '.join(KINDS)}")


def diffuse(x_0: Images, eps: Images, signal: Scalars, noise: Scalars) -> Float[Array, "B *shape"]:
    """Returns x_t = signal * x_0 + noise * eps."""
    chex.assert_equal_shape([x_0, eps])
    return per_example(signal, x_0) * x_0 + per_example(noise, x_0) * eps


def to_x_0(
    kind: str, output: Images, x_t: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns x_0_hat, the clean images that the network's output means at x_t."""
    output, x_t, signal, noise = _prepare(output, x_t, signal, noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    if kind == "x_0":  # needs no division, so it holds at noise = 0 too
        return output
    return (b * x_t - noise * output) / (signal * b - noise * a)


def to_eps(
    kind: str, output: Images, x_t: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns eps_hat, the noise that the network's output means at x_t."""
    output, x_t, signal, noise = _prepare(output, x_t, signal, noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    if kind == "eps":  # needs no division, so it holds at signal = 0 too
        return output
    return (signal * output - a * x_t) / (signal * b - noise * a)


def from_x_0(
    kind: str, x_0: Images, x_t: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns the output that means x_0 at x_t: the inverse of `to_x_0`.

    At noise = 0, where x_t and x_0 do not tell eps, it is infinite or NaN for every kind but "x_0".
    """
    x_0, x_t, signal, noise = _prepare(x_0, x_t, signal, noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    if kind == "x_0":
        return x_0
    return a * x_0 + b * (x_t - signal * x_0) / noise


def target(
    kind: str, x_0: Images, eps: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns what a network of this kind is trained to answer; finite at every signal and noise."""
    x_0, eps, signal, noise = _prepare(x_0, eps, signal, noise)
    a, b = coefficients(kind, signal, noise, sigma_data)
    return a * x_0 + b * eps


def network_input(
    kind: str, x_t: Images, signal: Scalars, noise: Scalars, sigma_data: float = 0.5
) -> Float[Array, "B *shape"]:
    """Returns what a network of this kind is given: x_t, but for "F" x_t scaled to unit variance (EDM's c_in)."""
    if kind != "F":
        return jnp.asarray(x_t)
    x_t, _, signal, noise = _prepare(x_t, x_t, signal, noise)
    return x_t / jnp.sqrt(noise**2 + (sigma_data * signal) ** 2)


def denoiser(kind: str, network: Network, process: Process, sigma_data: float = 0.5) -> Denoise:
    """Returns denoise(x_t, time) -> x_0_hat, made of a network that answers `kind`.

    `network(x_t, time)` is closed over its parameters and gets time as float[B], `process(time)` gives signal and
    noise; denoise takes time as a scalar or float[B], in the network's units. A network with learned variance answers
    (output, v), and denoise then (x_0_hat, v). Raises ValueError if `kind` is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown prediction {kind!r}: choose one of {', '.join(KINDS)}")

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
