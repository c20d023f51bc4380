"""Numbers that are not finite: refused in configs, samples and weights, before they are used or written."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Begun, do, make_call
from published_folders import write_folder
from safetensors.numpy import load_file, save_file

from diffusion import training
from diffusion.model.config import make_settings
from diffusion.model.experiment import abstract_batch, make_learner
from diffusion.runs import sample
from diffusion.runs.draw import draw
from diffusion.runs.run import open_run
from diffusion.training import Checkpoints
from experiments import cifar10


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("digits", ("--config=digits:flow", "--config.loss.prediction=eps", "--config.sampling.threshold=none")),
        ("digits", ("--config.process.zero_terminal_snr=True",)),
        ("scenes", ("--config.loss.prediction=eps",)),
        ("captions", ("--config.loss.prediction=eps", "--config.sampling.grid=log_snr")),
    ],
)
def test_eps_is_refused_where_sampling_begins_with_noise_alone(kinds, kind, changes, tmp_path, untrained, refused):
    call = kinds[kind].call(tmp_path / "run", *kinds[kind].flags, *changes)
    refused("loss.prediction=eps holds no image where sampling begins, .* predict v, velocity or x_0", lambda: do(call))
    with pytest.raises(Begun):  # what holds one there
        do(kinds[kind].call(tmp_path / "run", *kinds[kind].flags, *changes, "--config.loss.prediction=v"))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_guidance_is_finite(kinds, trained, tmp_path, value, refused):
    flag, line = f"--config.sampling.guidance={value}", f"sampling.guidance is {value}: give a finite number"
    kind = kinds["digits"]
    refused(line, lambda: do(kind.call(trained("digits"), "--mode=sample", flag, f"--out={tmp_path / 'a.npz'}")))
    refused(line, lambda: do(kind.call(tmp_path / "run", *kind.flags, flag)))


def broken(sampler: Any, denoise: Any, grid: Any, keys: Any, eps: Any) -> Any:
    """Returns samples of which the second and the third hold one number each that is not finite."""
    return eps.at[1, 0, 0, 0].set(jnp.nan).at[2, 7, 7, 0].set(-jnp.inf)


def test_samples_that_are_not_finite_are_counted(trained, tmp_path, refused):
    run = open_run(trained("digits"), num_devices=1)
    asked: Any = ([None] * 4, np.arange(4), 0)
    refused(r"2 of 4 samples are not finite \(NaN or infinity\)", lambda: draw(run.painter, *asked, use=broken))
    # As pictures these would be black: NaN becomes 0.
    nothing = run._replace(params=jax.tree.map(lambda x: x * jnp.nan, run.params))
    refused("4 of 4 samples are not finite", lambda: nothing.sample(4))
    refused("4 of 4 samples", lambda: sample.draw_samples(nothing, *asked, out=tmp_path / "a.npz"))


def test_weights_that_are_not_finite_are_not_opened(copied, refused):
    folder = copied("digits")
    run = open_run(folder, num_devices=1)
    learner, batch = make_learner(run.config, run.model), abstract_batch(run.config, run.model)
    abstract = training.abstract_train_state(learner, make_settings(run.config), run.mesh, batch)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state: Any = checkpoints.restore(abstract)
        state.ema["params"]["conv_in"]["bias"] *= jnp.nan
        checkpoints.save(7, state, checkpoints.description())
    line = f"the averaged weights in {folder} cannot be used: 8 of its weights are not finite, .*params/conv_in/bias"
    refused(line, lambda: open_run(folder, num_devices=1))
    assert open_run(folder, step=6, num_devices=1).step == 6


def test_weights_that_are_not_finite_are_not_imported(tmp_path, refused):
    folder = write_folder(tmp_path / "theirs")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][2] = np.nan
    save_file(weights, path)
    call = make_call(cifar10.TASK, "cifar10", tmp_path / "run", "--mode=import", f"--weights={folder}")
    refused(r"conv_in\.bias holds 1 numbers of 4 that are not finite", lambda: do(call))
