"""Exact answers for data whose distribution is known: a Gaussian, and a mixture of Gaussians, independent by dimension.

x = signal * x_0 + noise * eps throughout. Works in whatever float JAX has on; the exact comparisons use float64.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp


class Gaussian(NamedTuple):
    """x_0 ~ N(mean, std^2): mean and std broadcast to one image's shape."""

    mean: jax.Array
    std: jax.Array

    def marginal(self, signal, noise):
        """Mean and std of x at this signal and noise (scalars)."""
        return signal * self.mean, jnp.sqrt(signal**2 * self.std**2 + noise**2)

    def posterior_mean(self, x, signal, noise):
        """E[x_0 | x]."""
        signal, noise = _per_image(signal, x), _per_image(noise, x)
        gain = signal * self.std**2 / (signal**2 * self.std**2 + noise**2)
        return self.mean + gain * (x - signal * self.mean)

    def flow(self, x, start, end):
        """Where the probability-flow ODE takes x from start = (signal, noise) to end = (signal, noise)."""
        mean_a, std_a = self.marginal(*start)
        mean_b, std_b = self.marginal(*end)
        return mean_b + std_b / std_a * (x - mean_a)

    def log_likelihood(self, x, signal=1.0, noise=0.0):
        """Nats [B] of x under the marginal; with the defaults, of clean data."""
        mean, std = self.marginal(signal, noise)
        nats = -0.5 * jnp.square((x - mean) / std) - jnp.log(std) - 0.5 * np.log(2 * np.pi)
        return nats.reshape(x.shape[0], -1).sum(axis=1)

    def sample(self, key, batch_size, shape):
        return self.mean + self.std * jax.random.normal(key, (batch_size, *shape), jnp.result_type(float))


class Mixture(NamedTuple):
    """x_0 ~ sum_k weight[k] N(mean[k], std[k]^2 I): weight [K], mean [K, *shape], std [K]."""

    weight: jax.Array
    mean: jax.Array
    std: jax.Array

    def _log_joint(self, x, signal, noise):
        """log weight_k + log N(x; component k) [B, K]; signal and noise are scalars or [B]."""
        signal, noise = (jnp.broadcast_to(jnp.asarray(a), x.shape[:1])[:, None] for a in (signal, noise))
        flat, mean = x.reshape(x.shape[0], -1), self.mean.reshape(len(self.weight), -1)
        variance = signal**2 * self.std**2 + noise**2
        distance = jnp.sum(jnp.square(flat[:, None] - signal[:, :, None] * mean), axis=-1)
        size = flat.shape[1]
        return jnp.log(self.weight) - 0.5 * (distance / variance + size * jnp.log(2 * np.pi * variance))

    def posterior_mean(self, x, signal, noise):
        """E[x_0 | x]: the components' posterior means, weighted by their responsibilities."""
        share = jax.nn.softmax(self._log_joint(x, signal, noise), axis=1)
        signal, noise = (jnp.broadcast_to(jnp.asarray(a), x.shape[:1])[:, None] for a in (signal, noise))
        gain = signal * self.std**2 / (signal**2 * self.std**2 + noise**2)
        mean = self.mean.reshape(len(self.weight), -1)
        flat = x.reshape(x.shape[0], -1)
        means = mean + gain[:, :, None] * (flat[:, None] - signal[:, :, None] * mean)
        return jnp.sum(share[:, :, None] * means, axis=1).reshape(x.shape)

    def log_likelihood(self, x, signal=1.0, noise=0.0):
        """Nats [B] of x under the marginal; with the defaults, of clean data."""
        return jax.nn.logsumexp(self._log_joint(x, signal, noise), axis=1)

    def moments(self):
        """Mean and std of x_0, dimension by dimension."""
        weight = self.weight.reshape(-1, *[1] * (self.mean.ndim - 1))
        std = self.std.reshape(weight.shape)
        mean = jnp.sum(weight * self.mean, axis=0)
        return mean, jnp.sqrt(jnp.sum(weight * (std**2 + jnp.square(self.mean - mean)), axis=0))

    def flow(self, x, start, end):
        """Where the probability-flow ODE takes x between two points with signal and noise above 0.

        Integrated in y = x / signal over log sigma, dy / d log sigma = y - E[x_0 | y], to a tolerance of 1e-11.
        """
        log_sigma = [float(np.log(noise / signal)) for signal, noise in (start, end)]
        posterior_mean = jax.jit(self.posterior_mean)

        def derivative(log_sigma, y):
            y = y.reshape(x.shape)
            return (y - np.asarray(posterior_mean(y, 1.0, np.exp(log_sigma)))).ravel()

        y = np.asarray(x, np.float64).ravel() / float(start[0])
        solution = solve_ivp(derivative, log_sigma, y, method="DOP853", rtol=1e-11, atol=1e-11)
        return float(end[0]) * solution.y[:, -1].reshape(x.shape)

    def sample(self, key, batch_size):
        keys = jax.random.split(key)
        component = jax.random.choice(keys[0], len(self.weight), (batch_size,), p=self.weight)
        noise = jax.random.normal(keys[1], (batch_size, *self.mean.shape[1:]), self.mean.dtype)
        return self.mean[component] + _per_image(self.std[component], noise) * noise


def exact_denoise(data: Gaussian | Mixture, process: Callable) -> Callable:
    """The perfect network: (x_t, time) -> E[x_0 | x_t] under a process time -> (signal, noise)."""
    return lambda x_t, time: data.posterior_mean(x_t, *process(time))


def _per_image(a, x):
    """A scalar, or [B] made to broadcast against x [B, ...]."""
    a = jnp.asarray(a)
    return a.reshape(-1, *[1] * (x.ndim - 1)) if a.ndim else a
