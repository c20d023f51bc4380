"""Group normalisation in one pass: its numbers in float64's terms, its derivatives as XLA's, and dropout's draws."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks import layers
from diffusion.networks.layers import Dropout, GroupNorm, ResidualBlock, moments

ROUNDING = 2.0**-24


@pytest.fixture(params=["cpu", "accelerator"])
def device(request, monkeypatch):
    """What the networks are traced for."""
    monkeypatch.setattr(layers, "is_for_cpu", lambda: request.param == "cpu")
    return request.param


def numbers(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def exact(x, scale, bias, groups, before, after):
    """Returns, in float64 and by the definition, SiLU(GroupNorm(x + before) (1 + scale) + shift)."""
    x = x + before[:, None, None]
    cut = x.reshape(*x.shape[:3], groups, -1)
    axes = (1, 2, 4)
    y = (cut - cut.mean(axes, keepdims=True)) / np.sqrt(cut.var(axes, keepdims=True) + 1e-6)
    y = (y.reshape(x.shape) * scale + bias) * (1 + after[0][:, None, None]) + after[1][:, None, None]
    return y / (1 + np.exp(-y))


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_all_of_it_equals_the_definition_in_float64(device, mean):
    # 12 channels of 3 groups in parts of 5 and 7: the second group is cut by the parts.
    x, scale, bias, before = mean + numbers(2, 8, 8, 12), numbers(12, seed=1), numbers(12, seed=2), numbers(2, 12)
    after = numbers(2, 12, seed=3), numbers(2, 12, seed=4)
    arrays = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (x, scale, bias, before, after))
    rounded = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
    x, scale, bias, before, after = arrays
    layer = GroupNorm(3, activation=nn.silu)
    apply: Any = jax.jit(lambda *parts: layer.apply({"params": {"scale": scale, "bias": bias}}, *parts, **told))
    told = {"before": before, "after": after}
    expected = exact(rounded[0], rounded[1], rounded[2], 3, rounded[3], rounded[4])
    # A sum of 256 is off by sqrt(256) roundings of what is summed, of size mean + 4, twice, times gains of up to 10.
    bound = 2 * 16 * (4 + mean) * ROUNDING * 10
    np.testing.assert_allclose(apply(x[..., :5], x[..., 5:]), expected, atol=bound)
    np.testing.assert_array_equal(apply(x), apply(x))
    np.testing.assert_allclose(apply(x), apply(x[..., :5], x[..., 5:]), atol=bound)


def test_one_pass_keeps_the_variance_of_a_pixel_far_from_all_others():
    # The worst case: the pixel that differences are taken from is the only one that differs.
    x = np.zeros((1, 32, 32, 2), np.float32)
    x[0, 0, 0] = 1000.0, -3.0
    x += np.array([5.0, 10_000.0], np.float32)
    mean, variance = jax.jit(moments)(jnp.asarray(x))
    wide = x.astype(np.float64)
    np.testing.assert_allclose(mean, wide.mean((1, 2)), rtol=4 * ROUNDING)
    # 1 / n of E[d^2] is left, n = 1024, which is off by the roundings of its sum: 32 of them at worst.
    np.testing.assert_allclose(variance, wide.var((1, 2)), rtol=1024 * 32 * ROUNDING)


def test_derivatives_are_the_same_whatever_the_device(monkeypatch):
    block = ResidualBlock(6, dropout=0.5, num_groups=2)
    x, skip, embedding = (jnp.asarray(numbers(*shape), jnp.float32) for shape in ((2, 4, 4, 6), (2, 4, 4, 4), (2, 5)))
    params = jax.jit(lambda key: block.init(key, (x, skip), embedding))(jax.random.key(0))
    leaves, structure = jax.tree.flatten(params)
    params = structure.unflatten([leaf + 0.1 * numbers(*leaf.shape, seed=i) for i, leaf in enumerate(leaves)])
    found = {}
    for device in ("cpu", "accelerator"):
        monkeypatch.setattr(layers, "is_for_cpu", lambda device=device: device == "cpu")

        def loss(params, x, skip, embedding):
            rngs = {"dropout": jax.random.key(1)}
            y: Any = block.apply(params, (x, skip), embedding, True, rngs=rngs)
            return jnp.sum(jnp.sin(y))

        def slope(*primals, loss=loss):
            return jax.jvp(loss, primals, jax.tree.map(jnp.ones_like, primals))[1]

        arguments = params, x, skip, embedding
        # The gradient; the derivative in forward mode; and the gradient of that, as flow maps take it.
        functions = [jax.grad(loss, (0, 1, 2, 3)), slope, jax.grad(slope, (0, 1, 2, 3))]
        found[device] = [jax.jit(function)(*arguments) for function in functions]
        assert ("remat" in str(jax.make_jaxpr(loss)(*arguments))) == (device == "accelerator")
    expected, got = (jax.tree.leaves(x) for x in found.values())
    for a, b in zip(expected, got, strict=True):
        # Sums of at most 2 * 16 * 10 terms, in another order.
        np.testing.assert_allclose(b, a, atol=320 * ROUNDING * max(1.0, float(np.abs(a).max())))


def test_parts_are_the_channels_of_one_array():
    block = ResidualBlock(6, dropout=0.0, num_groups=2)
    x, skip = (jnp.asarray(numbers(2, 4, 4, channels), jnp.float32) for channels in (6, 4))
    joined = jnp.concatenate([x, skip], axis=-1)
    params = jax.jit(block.init)(jax.random.key(0), joined)
    assert jax.tree.all(jax.tree.map(np.array_equal, params, jax.jit(block.init)(jax.random.key(0), (x, skip))))
    params = jax.tree.map(lambda x: x + 0.1, params)
    apply: Any = jax.jit(block.apply)
    expected = apply(params, joined)
    # Products of 10 channels and, in two convolutions, of 90 and 54.
    bound = (10 + 90 + 54) * ROUNDING * np.abs(expected).max() * 4
    np.testing.assert_allclose(apply(params, (x, skip)), expected, atol=bound)


def test_dropout_draws_what_flaxs_draws():
    class Ours(nn.Module):
        @nn.compact
        def __call__(self, x):
            keep, share = Dropout(0.3)(x.shape)
            return jnp.where(keep, x / share, 0)

    class Flaxs(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dropout(0.3, deterministic=False)(x)

    x = jnp.asarray(numbers(8, 4, 4, 6), jnp.float32)
    ours, flaxs = (module.apply({}, x, rngs={"dropout": jax.random.key(3)}) for module in (Ours(), Flaxs()))
    np.testing.assert_array_equal(ours, flaxs)
    assert 0.2 < np.mean(np.asarray(ours) == 0) < 0.4
