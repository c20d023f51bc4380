"""Optimizers: the course of the rate, and what Muon takes for matrices."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax import apply_updates

from diffusion.networks.unet import UNet
from experiments import scenes
from experiments.configs import digits_ddpm, scenes_mmdit
from experiments.optimizers import make_optimizer, matrix_axes
from experiments.text_to_image import make_parts


def test_the_rate_warms_up_stays_and_cools_down():
    config: Any = digits_ddpm.get_config()
    config.optimizer.update(dict(learning_rate=0.5, warmup_steps=4, cooldown_steps=5))
    config.training.num_steps = 20
    rate: Any = make_optimizer(config)[1]
    expected = [0.125, 0.25, 0.375] + [0.5] * 13 + [0.4, 0.3, 0.2, 0.1]
    np.testing.assert_allclose([rate(step) for step in range(20)], expected, rtol=1e-6)
    config.optimizer.update(dict(warmup_steps=0, cooldown_steps=0))
    rate = make_optimizer(config)[1]
    np.testing.assert_allclose([rate(step) for step in (0, 19)], 0.5)
    config.optimizer.name = "sgd"
    with pytest.raises(ValueError, match="choose adam or muon"):
        make_optimizer(config)


def test_every_matrix_of_the_inner_layers_is_one():
    parts = make_parts(scenes_mmdit.get_config(), (16, 16, 3), scenes.VOCABULARY)
    mmdit: Any = jax.eval_shape(
        parts.network.init,
        jax.random.key(0),
        jnp.zeros((1, 16, 16, 3)),
        jnp.zeros(1),
        context=jnp.zeros((1, 12, 96)),
        pooled=jnp.zeros((1, 96)),
    )
    unet: Any = jax.eval_shape(UNet().init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)), jnp.zeros(1))
    found = {}
    for params in (mmdit, unet):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            axes: Any = matrix_axes(path, leaf)
            if axes:
                shape = [[leaf.shape[i] for i in axis] for axis in (axes.reduction_axis, axes.output_axis)]
                found["/".join(key.key for key in path[1:-1])] = shape
    assert found["block_0/image_qkv"] == [[96], [3, 3, 32]]
    assert found["block_0/text_out"] == [[3, 32], [96]]
    assert found["block_3/image_mlp_2"] == [[384], [96]]
    assert found["down_1_block_0/conv_1"] == [[3, 3, 128], [256]]
    assert found["middle_attention/query"] == [[256], [256]]
    outer = {"patch_in", "patch_out", "context_in", "time_1", "pooled_1", "modulation_out", "conv_in", "conv_out"}
    assert not outer & set(found)


def test_muon_moves_a_matrix_in_every_direction_alike_and_by_the_size_of_adams_steps():
    config: Any = digits_ddpm.get_config()
    config.optimizer.update(dict(name="muon", learning_rate=1e-3, muon_rate=3.0, warmup_steps=0, clip_norm=1e9))
    optimizer, _ = make_optimizer(config)
    random = np.random.RandomState(0)
    # A gradient with one direction some 100 times stronger than the others.
    gradient = random.randn(64, 96) + 100 * np.outer(random.randn(64), random.randn(96)) / 64**0.5
    params = {"block_0": {"mlp_1": {"kernel": jnp.zeros((64, 96)), "bias": jnp.zeros(96)}}}
    gradients = jax.tree.map(lambda x: jnp.asarray(gradient if x.ndim == 2 else gradient[0], x.dtype), params)
    update: Any = optimizer.update(gradients, optimizer.init(params), params)[0]
    whole: Any = apply_updates(params, update)
    new = whole["block_0"]["mlp_1"]
    moved = np.linalg.svd(np.asarray(new["kernel"]), compute_uv=False)
    # Five of Muon's steps leave singular values between 0.7 and 1.2 (Jordan et al. 2024), but for the smallest ones.
    assert moved[0] / np.median(moved) < 1.8
    assert np.sqrt(np.mean(np.square(new["kernel"]))) == pytest.approx(3.0 * 0.2 * 1e-3, rel=0.3)
    # Adam's first step with Nesterov's momentum: (0.9 / (1 + 0.9) + 1) learning rates.
    np.testing.assert_allclose(np.abs(new["bias"]), 1e-3 * (0.9 / 1.9 + 1), rtol=1e-3)
