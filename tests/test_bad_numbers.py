"""Losses and gradients that are not finite, or spike: reported in their step, or skipped and counted."""

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_survival import steps_in
from test_training import assert_same_bits, batches_from, do_train, logged, make_experiment, noisy_loss

from diffusion.training import Mean, RunError
from diffusion.training.checkpoints import open_existing
from diffusion.training.integrity import seal


def bad_batches(steps, value=np.nan):
    def batches(start_step):
        for step, batch in enumerate(batches_from(start_step), start_step):
            if step in steps:
                batch["x"][3, 2] = value
            yield batch

    return batches


def loss_by_parity(params, batch, key):
    """Example 3, the one of `bad_batches`, is in one part of the loss and not in the other."""
    losses, _ = noisy_loss(params, batch, key)
    odd = np.arange(len(losses)) % 2
    parts = {"odd": odd, "even": 1 - odd}
    return losses, {f"loss_of_{name}": Mean(jnp.where(p, losses, 0), p.astype(np.float32)) for name, p in parts.items()}


def test_bad_numbers_are_reported_with_step_parameters_and_part(tmp_path):
    def loss(params, batch, key):
        losses, metrics = noisy_loss(params, batch, key)
        # The gradient of sqrt at 0 is infinite, and only b goes through it.
        return losses + np.float32(0) * jnp.sqrt(params["b"] - params["b"]), metrics

    with pytest.raises(RunError, match=r"^step 1: loss .*, gradient norm nan; not finite in 1 of 2 .* groups: b;"):
        do_train(tmp_path / "gradient", make_experiment(loss))
    with pytest.raises(RunError, match=r"^step 7: loss nan.*in 1 of 2 parameter groups: w; worst in: loss_of_odd nan"):
        do_train(tmp_path / "loss", make_experiment(loss_by_parity, batches=bad_batches([6])))


def test_lengths_of_averages_are_numbers(tmp_path):
    line = r"training\.ema_profiles is \('long',\): numbers are needed"
    with pytest.raises(RunError, match=line):
        do_train(tmp_path, make_experiment(), ema_profiles=("long",))
    assert not list(tmp_path.iterdir())


def test_a_spike_stops_the_run_in_its_step(tmp_path):
    experiment = make_experiment(batches=bad_batches([6], 1e6), loss=lambda p, batch, key: (
        np.float32(1) + batch["x"][:, 2] ** 2 * p["b"] ** 2, {}))  # fmt: skip
    with pytest.raises(RunError, match=r"^step 7: loss 5.*e\+10, .*; the loss of the steps before is 2\..*of b "):
        do_train(tmp_path, experiment, spike_factor=5.0)
    assert steps_in(tmp_path) == ["4"]


def test_skipped_steps_change_nothing_are_counted_and_resume_to_the_same_bits(tmp_path):
    experiment = make_experiment(batches=bad_batches([2, 6]))
    whole: Any = do_train(tmp_path / "whole", experiment, skip_bad_steps=True)
    assert [line["skipped_steps"] for line in logged(tmp_path / "whole")] == [1, 1, 0]
    assert int(whole.step) == 12 and int(whole.opt_state[0].count) == 10
    do_train(tmp_path / "parts", experiment, num_steps=3, skip_bad_steps=True)
    before: Any = do_train(tmp_path / "before", make_experiment(), num_steps=2, skip_bad_steps=True)
    with open_existing(tmp_path / "parts") as checkpoints:
        np.testing.assert_array_equal(checkpoints.restore(whole).params["w"], before.params["w"])
    assert_same_bits(do_train(tmp_path / "parts", experiment, skip_bad_steps=True), whole)


def test_skipping_ends_after_too_many_bad_steps_in_a_row(tmp_path):
    with pytest.raises(RunError, match=r"step 11: .* 11 steps in a row"):
        do_train(tmp_path, make_experiment(batches=bad_batches(range(99))), num_steps=99, skip_bad_steps=True)


@pytest.mark.parametrize(("before", "after"), [(10, 3), (5, 10), (0, 5), (5, 0)])
def test_skipped_steps_are_counted_right_after_resuming_with_another_interval(tmp_path, before, after):
    experiment = make_experiment(batches=bad_batches([1, 6, 9]))
    do_train(tmp_path, experiment, num_steps=8, skip_bad_steps=True, log_every=before)
    begun = 0 if before in (0, 10) else 5  # after which step the metrics in that checkpoint were summed anew
    do_train(tmp_path, experiment, skip_bad_steps=True, log_every=after)
    lines = [line for line in logged(tmp_path) if line["step"] > 8]
    for line in lines:
        assert line["skipped_steps"] == sum(begun < step <= line["step"] for step in (2, 7, 10)), (line, begun)
        begun = line["step"]
    assert lines[-1]["step"] == 12


def test_checkpoints_without_the_begin_of_their_interval_count_from_the_next_one(tmp_path):
    """In those of format 1 the number is unknown: none is logged, rather than a wrong one."""
    experiment = make_experiment(batches=bad_batches([1, 6, 9]))
    do_train(tmp_path, experiment, num_steps=7, skip_bad_steps=True)
    checkpoint = tmp_path / "checkpoints" / "7"
    file = checkpoint / "_CHECKPOINT_METADATA"
    whole = json.loads(file.read_text())
    assert whole["custom_metadata"].pop("metrics_since") == 5
    file.write_text(json.dumps(whole))
    seal(checkpoint)
    do_train(tmp_path, experiment, skip_bad_steps=True)
    lines = {line["step"]: line.get("skipped_steps") for line in logged(tmp_path)}
    assert lines == {5: 1, 7: 1, 10: None, 12: 0}
