"""What --mode=check reports of a run before it begins."""

import jax
import jax.numpy as jnp
from test_training import BATCH_SIZE, make_experiment, settings

from diffusion.training import make_mesh
from diffusion.training.dry_run import dry_run


def test_a_dry_run_reports_what_a_run_needs_and_leaves_nothing(tmp_path):
    found = dry_run(make_experiment(), settings(), mesh=make_mesh(2), num_examples=100, folder=tmp_path / "check")
    text = "\n".join(found.lines)
    assert "parameters   513 in 2 groups" in text and "the same bits" in text and found.warnings == []
    # w, its average and Adam's two moments: 4 x 513 float32, whole on each device.
    table = [line.split() for line in found.lines if " arrays whole " in line]
    assert {row[0]: row[1] for row in table}["opt_state"] == "5"
    assert int(found.state.step) == 1 and list(tmp_path.iterdir()) == []


def test_a_dry_run_warns_of_equal_noise_little_data_and_a_long_average(tmp_path):
    def loss(params, batch, key):
        eps = jax.random.normal(key, (BATCH_SIZE // 2,))  # the trap: one draw for every device
        return jnp.tile(eps, 2) * params["b"] + jnp.sum(batch["x"] @ params["w"], axis=1), {}

    found = dry_run(
        make_experiment(loss), settings(ema_decay=0.99), mesh=make_mesh(2), num_examples=9, folder=tmp_path / "check"
    )
    expected = [
        "fewer than a batch of 16",
        "average is 100 steps long, the run 12",
        "devices 0 and 1 draw the same noise",
    ]
    assert len(found.warnings) == 3
    for warning, words in zip(found.warnings, expected, strict=True):
        assert words in warning
