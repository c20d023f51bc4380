"""Optimizers: the course of the rate, and what Muon takes for matrices."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS
from optax import apply_updates

from diffusion.model.experiment import make_model
from diffusion.model.fields import change, load_config
from diffusion.model.model import init
from diffusion.model.optimizers import make_optimizer, matrix_axes
from diffusion.networks.unet import UNet


def optimizer_of(**fields):
    """Returns the optimizer of the digits' config with these fields, trained for 20 steps, and its learning rate."""
    config = load_config("digits", {"training.num_steps": 20}, CONFIGS)
    optimizer: Any = make_optimizer(change(config, {f"optimizer.{field}": value for field, value in fields.items()}))
    return optimizer


def test_the_rate_warms_up_stays_and_cools_down():
    _, rate = optimizer_of(learning_rate=0.5, warmup_steps=4, cooldown_steps=5)
    expected = [0.125, 0.25, 0.375] + [0.5] * 13 + [0.4, 0.3, 0.2, 0.1]
    np.testing.assert_allclose([rate(step) for step in range(20)], expected, rtol=1e-6)
    _, rate = optimizer_of(learning_rate=0.5, warmup_steps=0, cooldown_steps=0)
    np.testing.assert_allclose([rate(step) for step in (0, 19)], 0.5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "sgd"}, "optimizer.name is 'sgd': choose from adam, muon"),
        ({"muon_rate": 1.0}, "optimizer.muon_rate is not a field of adam: it has b1, b2, eps"),
    ],
)
def test_an_unknown_name_or_field_is_refused(fields, message):
    config = load_config("digits", {}, CONFIGS)
    with config.unlocked():
        config.optimizer.update(fields)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make_optimizer(config)


def test_every_matrix_of_the_inner_layers_is_one():
    config = load_config("scenes", {}, CONFIGS)
    model = make_model(config, (16, 16, 3), vocabulary=["a", "red", "three"])
    mmdit: Any = jax.eval_shape(lambda key: init(model, key)["network"], jax.random.key(0))
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
    optimizer, _ = optimizer_of(name="muon", learning_rate=1e-3, muon_rate=3.0, warmup_steps=0, clip_norm=1e9)
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
