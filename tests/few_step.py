"""What the tests of few-step methods share: an exact flow map, small networks, the released code's numbers."""

import pathlib

import jax.numpy as jnp
import numpy as np
from closed_form import Gaussian

from diffusion import flow

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "few_step.npz")


def make_gaussian():
    return Gaussian(jnp.asarray([0.3, -0.5]), jnp.asarray([0.7, 0.2]))


def levels(t):
    """Signal and noise of a flow at t [B], as columns."""
    return 1 - t[:, None], t[:, None]


def gaussian_u(z, r, t):
    """The average velocity of Gaussian data, written without a division by t - r."""
    data = make_gaussian()
    mean, std = data.marginal(*levels(t))
    r, t = r[:, None], t[:, None]
    slope = (t + r) * (1 + data.std**2) - 2 * data.std**2  # (std_t^2 - std_r^2) / (t - r)
    return (z - mean) * slope / (std * (std + data.marginal(1 - r, r)[1])) - data.mean


def gaussian_velocity(z, t):
    return (z - make_gaussian().posterior_mean(z, *levels(t))) / t[:, None]


def network(params, z, r, t):
    """A small network of z, r and t."""
    inputs = jnp.concatenate([z, r[:, None], t[:, None]], axis=1)
    return jnp.tanh(inputs @ params["in"]) @ params["out"]


def make_params(seed=0):
    random = np.random.default_rng(seed)
    return {"in": jnp.asarray(random.standard_normal((4, 8))), "out": jnp.asarray(random.standard_normal((8, 2)))}


def points(batch_size=6, seed=0):
    """Noisy images z, times r < t, and the images and noise they are of."""
    random = np.random.default_rng(seed)
    x_0, eps = (jnp.asarray(x) for x in random.standard_normal((2, batch_size, 2)))
    r, t = jnp.asarray(np.sort(random.uniform(0.1, 0.9, (2, batch_size)), axis=0))
    return flow.interpolate(x_0, eps, t), r, t, x_0, eps


def toy(weights, z, *times):
    """The network of golden/record_few_step.py: images, and times [B]."""
    flat = np.prod(z.shape[1:])
    inputs = jnp.concatenate([z.reshape(len(z), -1), *(time[:, None] for time in times)], axis=1)
    return (jnp.tanh(inputs @ weights["in"]) @ weights["out"])[:, :flat].reshape(z.shape)


def golden(prefix):
    return {name.removeprefix(prefix): jnp.asarray(GOLDEN[name]) for name in GOLDEN.files if name.startswith(prefix)}


def close_to_golden(value_and_gradient, prefix):
    value, gradient = value_and_gradient
    # sums of some 10 terms of size 10 in float64
    np.testing.assert_allclose(value, GOLDEN[prefix + "loss"], rtol=1e-12)
    for name, own in gradient.items():
        np.testing.assert_allclose(own, GOLDEN[f"{prefix}grad/{name}"], atol=1e-12)
