"""Contrastive losses: against sums written out pair by pair, for any number of rows at a time and of devices."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from diffusion.contrastive import sigmoid_loss, softmax_loss
from diffusion.training import make_mesh


def pairs(batch, width=16, seed=0):
    random = np.random.RandomState(seed)
    x, y = random.standard_normal((2, batch, width))
    y += 0.4 * x  # pairs find each other, not always
    return (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (x, y))


def test_softmax_loss_is_the_papers():
    """Figure 3 of the paper in float64: the mean of two cross-entropies with the diagonal as labels."""
    x, y = pairs(12)
    logits = 7.0 * x @ y.T
    expected, found = [], []
    for i in range(12):
        there = -math.log(math.exp(logits[i, i]) / sum(math.exp(one) for one in logits[i]))
        back = -math.log(math.exp(logits[i, i]) / sum(math.exp(one) for one in logits[:, i]))
        expected.append((there + back) / 2)
        found.append((logits[i].argmax() == i, logits[:, i].argmax() == i))
    contrast = softmax_loss(jnp.float32(x), jnp.float32(y), 7.0)
    np.testing.assert_allclose(contrast.loss, expected, rtol=1e-5)
    assert 0 < np.mean(found) < 1
    np.testing.assert_array_equal(np.stack([contrast.x_to_y, contrast.y_to_x], 1), found)


def test_sigmoid_loss_is_the_papers():
    """Equation 1 of SigLIP: every pair is a yes-or-no question."""
    x, y = pairs(12)
    logits = 7.0 * x @ y.T - 3.0
    z = 2 * np.eye(12) - 1
    contrast = sigmoid_loss(jnp.float32(x), jnp.float32(y), 7.0, -3.0)
    np.testing.assert_allclose(contrast.loss, np.log1p(np.exp(-z * logits)).sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(contrast.x_to_y, logits.argmax(1) == np.arange(12))
    np.testing.assert_array_equal(contrast.y_to_x, logits.argmax(0) == np.arange(12))


def test_it_is_log_batch_for_equal_embeddings():
    same = jnp.tile(jnp.eye(1, 8), (64, 1))
    np.testing.assert_allclose(softmax_loss(same, same, 14.3).loss, math.log(64), rtol=1e-6)


def losses(rows):
    def mean(x, y, scale, bias):
        return softmax_loss(x, y, scale, rows).loss.mean() + sigmoid_loss(x, y, scale, bias, rows).loss.mean()

    return jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2, 3)))


@pytest.mark.parametrize(("rows", "num_devices"), [(16, 1), (8, 8)])
def test_neither_rows_at_a_time_nor_devices_change_the_loss_or_its_gradient(rows, num_devices):
    x, y = (z.astype(np.float32) for z in pairs(64))
    numbers = np.float32(14.3), np.float32(-2.0)
    expected = losses(None)(x, y, *numbers)
    sharding = NamedSharding(make_mesh(num_devices), PartitionSpec("data"))
    found = losses(rows)(jax.device_put(x, sharding), jax.device_put(y, sharding), *numbers)
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        # Sums of 64 float32 terms in another order: 64 roundings of 6e-8 at most.
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5 * np.abs(one).max())


def test_memory_grows_linearly_with_the_batch():
    def temporary_bytes(batch, rows):
        x = jax.ShapeDtypeStruct((batch, 8), jnp.float32)
        gradient = jax.jit(jax.grad(lambda x, y: softmax_loss(x, y, 10.0, rows).loss.mean()))
        analysis = gradient.lower(x, x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    # Besides the similarities it is a few arrays of [B, 8], so twice the batch is twice the memory.
    assert temporary_bytes(1024, None) > 1024 * 1024 * 4
    few, twice = temporary_bytes(512, 32), temporary_bytes(1024, 32)
    assert few > 512 * 32 * 4 and twice < 2.3 * few and twice < 1024 * 1024 * 4 / 4


def test_rows_must_divide_the_batch():
    x, y = (jnp.float32(z) for z in pairs(12))
    with pytest.raises(ValueError, match="5 rows at a time do not divide a batch of 12"):
        softmax_loss(x, y, 1.0, rows=5)
