"""Optimizers: the course of the rate, what decays, what Muon takes for matrices, and any of optax from Python."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CONFIGS
from optax import apply_updates

from diffusion.model.config import from_plain, plain
from diffusion.model.experiment import make_model
from diffusion.model.fields import change, complete, load_config
from diffusion.model.model import init
from diffusion.model.optimizers import decayed, make_learning_rate, make_optimizer, matrix_axes
from diffusion.networks.unet import UNet
from diffusion.training.workdir import differences


def optimizer_of(**fields):
    """Returns the optimizer of the digits' config with these fields, trained for 20 steps, and its learning rate."""
    config = load_config("digits", {"training.num_steps": 20, "optimizer.cooldown_steps": 0}, CONFIGS)
    optimizer: Any = make_optimizer(change(config, {f"optimizer.{field}": value for field, value in fields.items()}))
    return optimizer


def test_the_rate_warms_up_stays_and_cools_down():
    _, rate = optimizer_of(learning_rate=0.5, warmup_steps=4, cooldown_steps=5)
    expected = [0.125, 0.25, 0.375] + [0.5] * 13 + [0.4, 0.3, 0.2, 0.1]
    np.testing.assert_allclose([rate(step) for step in range(20)], expected, rtol=1e-6)
    _, rate = optimizer_of(learning_rate=0.5, warmup_steps=0, cooldown_steps=0)
    np.testing.assert_allclose([rate(step) for step in (0, 19)], 0.5)


def test_the_rate_of_an_old_config_is_that_of_warm_up_stable_decay():
    """A run of before there were schedules: its fields are completed, and its rate has the same bits."""
    config = load_config("digits", {"optimizer.cooldown_steps": 7, "training.num_steps": 20}, CONFIGS)
    old = plain(config)
    del old["optimizer"]["schedule"]
    assert plain(complete(from_plain(old))) == plain(config)
    rate, settings = make_learning_rate(config), config.optimizer
    steps = jnp.arange(20)
    share = jnp.minimum((steps + 1) / settings.warmup_steps, (20 - steps) / 7)
    assert np.array_equal(rate(steps), settings.learning_rate * jnp.minimum(share, 1.0))


@pytest.mark.parametrize("end", [0.0, 0.1])
def test_the_schedules_are_optaxs(end):
    """After the warm-up, of which step 0 has its share already; the last update is not lost to a rate of zero."""
    rates = {
        name: optimizer_of(**fields, learning_rate=0.5, warmup_steps=4, cooldown_steps=0)[1]
        for name, fields in {
            "constant": {"schedule": "constant"},
            "linear": {"schedule": "linear", "schedule.end": end},
            "cosine": {"schedule": "cosine", "schedule.end": end},
        }.items()
    }
    expected = {
        "constant": optax.constant_schedule(0.5),
        "linear": optax.linear_schedule(0.5, 0.5 * end, 16),
        "cosine": optax.cosine_decay_schedule(0.5, 16, end),
    }
    for name, rate in rates.items():
        np.testing.assert_allclose([rate(step) for step in range(4)], [0.125, 0.25, 0.375, 0.5], rtol=1e-6)
        after: Any = [expected[name](step) for step in range(17)]
        np.testing.assert_allclose([rate(4 + step) for step in range(17)], after, rtol=1e-6, atol=1e-9)
        assert rate(19) > 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_a_cooldown_that_is_not_read_is_refused(schedule):
    line = f"^optimizer.cooldown_steps=3 is read by optimizer.schedule=wsd alone, not by {schedule}: set it to 0$"
    with pytest.raises(ValueError, match=line):
        optimizer_of(schedule=schedule, cooldown_steps=3)


def test_the_end_of_a_schedule_is_a_share():
    with pytest.raises(ValueError, match=r"^optimizer.schedule.end is 1.5: it is a share of the learning rate, from 0"):
        optimizer_of(**{"schedule": "cosine", "schedule.end": 1.5})


def test_num_steps_cannot_change_under_a_schedule_that_ends_there():
    config = plain(load_config("digits", {"optimizer.cooldown_steps": 0}, CONFIGS))
    longer = {**config, "training": {**config["training"], "num_steps": 99}}
    assert differences(config, longer) == []
    for name in ("linear", "cosine"):
        old, new = ({**c, "optimizer": {**c["optimizer"], "schedule": {"name": name}}} for c in (config, longer))
        (line,) = differences(old, new)
        assert line == "training.num_steps: 1700 -> 99 (fixed by optimizer.schedule.name)"


def test_kernels_and_adapters_decay_and_nothing_else_does():
    """Biases of several heads have three axes, tables of positions and words two: names tell."""
    config = load_config("scenes", {}, CONFIGS)
    model = make_model(config, (16, 16, 3), vocabulary=["a", "red", "three"])
    params: Any = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))
    found: dict[str, set[bool]] = {}
    for path, decays in jax.tree_util.tree_leaves_with_path(decayed(params)):
        found.setdefault(path[-1].key, set()).add(decays)
    assert found == {"kernel": {True}, "bias": {False}, "scale": {False}, "embedding": {False}, "place": {False}}
    assert params["network"]["params"]["block_0"]["image_qkv"]["bias"].ndim == 3
    assert decayed({"lora": {"block_0": {"image_qkv": {"A": 0, "B": 0}}}})["lora"]["block_0"]["image_qkv"]["A"]


PARAMS = {"block_0": {"mlp": {"kernel": jnp.full((2, 3), 2.0), "bias": jnp.full(3, 2.0)}}}


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_decay_is_decoupled_from_the_gradient(name):
    """Without a gradient a kernel shrinks by rate x decay, whatever the gradients before; a bias does not move."""
    optimizer, _ = optimizer_of(name=name, learning_rate=0.5, weight_decay=0.1, warmup_steps=0, clip_norm=1e9)
    still = jax.tree.map(jnp.zeros_like, PARAMS)
    update: Any = optimizer.update(still, optimizer.init(PARAMS), PARAMS)[0]
    np.testing.assert_allclose(update["block_0"]["mlp"]["kernel"], -0.5 * 0.1 * 2.0, rtol=1e-6)
    assert not np.any(update["block_0"]["mlp"]["bias"])


def test_sgd_with_momentum():
    optimizer, _ = optimizer_of(name="sgd", learning_rate=0.5, momentum=0.9, warmup_steps=0, clip_norm=1e9)
    ones, state = jax.tree.map(jnp.ones_like, PARAMS), optimizer.init(PARAMS)
    for expected in (-0.5, -0.5 * 1.9):  # the sum of gradients, each before the last times 0.9
        update, state = optimizer.update(ones, state, PARAMS)
        np.testing.assert_allclose(update["block_0"]["mlp"]["bias"], expected, rtol=1e-6)


def test_radam_divides_by_the_root_of_squares_once_it_knows_enough_of_them():
    """Of b2 = 0.999 that is from the sixth gradient on; before, and of equal gradients, the step is a gradient's."""
    optimizer, _ = optimizer_of(name="radam", learning_rate=0.5, warmup_steps=0, clip_norm=1e9)
    threes, state = jax.tree.map(lambda x: jnp.full_like(x, 3.0), PARAMS), optimizer.init(PARAMS)
    found = []
    for _ in range(6):
        update, state = optimizer.update(threes, state, PARAMS)
        found.append(float(update["block_0"]["mlp"]["bias"][0]))
    np.testing.assert_allclose(found[:5], -0.5 * 3.0, rtol=1e-5)  # float32's, of 1 - 0.999^t
    rho, last = 5.99416, 1999.0  # of Algorithm 2 at t = 6, and its limit
    rectified = ((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho)) ** 0.5
    # In float32 1 - 0.999^6 is off by 2e-5 of itself, and rho by 0.04, of rho - 4 = 2.
    np.testing.assert_allclose(found[5], -0.5 * rectified, rtol=2e-2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "adagrad"}, "optimizer.name is 'adagrad': choose from adam, adamw, radam, muon, sgd, lion"),
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
