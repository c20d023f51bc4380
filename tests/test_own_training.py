"""`diffusion.train` with an optimizer and writers of the caller's."""

import ast

import jax
import numpy as np
import optax
import pytest
from helpers import CONFIGS, SHORT, SMALL, make_call

import diffusion
from diffusion.data import digits
from diffusion.model.experiment import abstract_batch, make_learner
from diffusion.model.fields import load_config
from diffusion.runs.run import open_run
from diffusion.runs.train import run_training
from diffusion.training import RunError, init_state
from diffusion.training.writers import Writer
from experiments.digits import TASK

PAIRS = [flag.removeprefix("--config.").partition("=") for flag in (*SMALL, *SHORT)]
TINY = {name: ast.literal_eval(value) for name, _, value in PAIRS}


def train(folder, num_steps, optimizer, **more):
    config = load_config("digits", {**TINY, "training.num_steps": num_steps}, CONFIGS)
    return diffusion.train(config, digits("train"), folder, name="digits", optimizer=optimizer, num_devices=1, **more)


def test_any_optimizer_of_optax_trains_resumes_and_is_opened(tmp_path):
    """Adafactor's factored moments are in no config; a resumed run has the bits of one that was not stopped."""
    train(tmp_path / "resumed", 2, optax.adafactor(1e-2))
    train(tmp_path / "resumed", 4, optax.adafactor(1e-2))
    train(tmp_path / "whole", 4, optax.adafactor(1e-2))
    runs = [open_run(tmp_path / name, num_devices=1) for name in ("resumed", "whole")]
    jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(run.params) for run in runs))
    assert runs[0].config.optimizer.to_dict() == {"name": "given"}
    images = [run.sample(4, num_steps=2) for run in runs]
    assert np.array_equal(images[0], images[1])

    refused = pytest.raises((RunError, ValueError), match=r"optimizer\.name: given -> adam")
    with refused:
        train(tmp_path / "whole", 6, None)
    flags = ("--config.training.num_steps=6", *(flag for flag in (*SMALL, *SHORT) if "training.num_steps" not in flag))
    with refused:
        make_call(TASK, "digits", tmp_path / "whole", *flags)
    call = make_call(TASK, "digits", tmp_path / "whole", "--mode=sample", num_devices=1)
    with pytest.raises(ValueError, match=r"^optimizer\.name=given is one that Python passes: diffusion\.train"):
        run_training(call)


def test_the_optimizer_that_is_given_makes_the_updates_and_the_writers_see_them(tmp_path):
    seen = []

    def mine(workdir, start_step):
        seen.append((workdir, start_step))
        return Writer(
            numbers=lambda step, values: seen.append((step, set(values))),
            picture=lambda step, name, image: seen.append((step, name, image.shape[-1])),
            config=lambda config: seen.append(config["optimizer"]),
        )

    run = train(tmp_path, 2, optax.set_to_zero(), writers=[mine])
    learner, batch = make_learner(run.config, run.model), abstract_batch(run.config, run.model)
    first = jax.jit(lambda: init_state(learner, run.config.seed, batch).params)()
    close = lambda new, old: np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-8)  # noqa: E731  # an average of equals
    jax.tree.map(close, jax.device_get(run.params), jax.device_get(first))
    assert seen[:2] == [(tmp_path, 0), {"name": "given"}]
    assert seen[2][0] == 2 and {"loss", "grad_norm", "images_per_second"} <= seen[2][1]
    assert "learning_rate" not in seen[2][1]  # which nobody knows
    assert seen[3:] == [(2, "preview/raw", 1), (2, "preview/ema", 1)]
    assert not (tmp_path / "tensorboard").exists()
