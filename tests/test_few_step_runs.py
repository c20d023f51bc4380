"""Runs of the methods that draw in one to four steps: trained, resumed, opened, drawn and scored as any other."""

import json
import shutil

import jax
import numpy as np
import pytest
from helpers import SHORT, SMALL, SMALL_TEXT, do_call, make_call

from diffusion.model.experiment import abstract_batch, make_learner
from diffusion.model.losses import LOSSES
from diffusion.runs.run import open_run, read_description
from diffusion.training import RunError, make_mesh, run_key
from experiments import digits, scenes

SCALE = "--config.process.time_scale=1.0"  # that of the methods which differentiate the network by time
# The first steps change the network, and no pictures are drawn on the way.
FAST = (
    "--config.training.num_previews=0",
    "--config.optimizer.learning_rate=0.05",
    "--config.optimizer.warmup_steps=0",
)
EVALUATE = ("--mode=evaluate", "--num_samples=24", "--metrics=fid")
METHODS = {
    "mean_flow": ("--config.loss.share=0.5",),
    "consistency": ("--config.loss.stage_steps=2",),
    "continuous_consistency": ("--config.loss.warmup_steps=4",),
    "imitation": ("--config.loss.num_steps=(1, 2, 4)", "--config.loss.num_values=3", SCALE),
    "progressive": (SCALE,),
}
DISTILLED = ("imitation", "progressive")


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def flow(tmp_path_factory):
    """The folder of a flow of digits, of the time scale of its students."""
    folder = tmp_path_factory.mktemp("teacher") / "flow"
    do_call(digits.TASK, "digits:flow", folder, *SMALL, *SHORT, *FAST, SCALE)
    return folder


def flags_of(method, flow):
    """Returns the flags of a small run of a method; the sampler steps as its config has it."""
    short = [flag for flag in SHORT if "sampling.num_steps" not in flag]
    return (
        *SMALL,
        *short,
        *FAST,
        *METHODS[method],
        *([f"--config.loss.teacher={flow}"] if method in DISTILLED else []),
    )


def test_every_loss_is_run():
    assert {"denoising", *METHODS} == set(LOSSES)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_resumes_opens_draws_and_is_scored(flow, tmp_path, method):
    config, flags = f"digits:{method}", flags_of(method, flow)
    teacher = shutil.copytree(flow, tmp_path / "flow")
    flags = [flag.replace(str(flow), str(teacher)) for flag in flags]
    do_call(digits.TASK, config, tmp_path / "whole", *flags)
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "6")
    shutil.rmtree(teacher)  # a checkpoint is the whole experiment
    do_call(digits.TASK, config, tmp_path / "parts", *flags)
    run = open_run(tmp_path / "parts", num_devices=1)
    equal(run.params, open_run(tmp_path / "whole", num_devices=1).params)
    metrics = [json.loads(line) for line in (tmp_path / "parts" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics][-1] == 6 and all(np.isfinite(line["error"]) for line in metrics)
    drawn = [run.sample(8, seed=1, num_steps=count) for count in (1, 2, 4)]
    assert all(images.shape == (8, 8, 8, 1) for images in drawn)
    assert not np.array_equal(drawn[0], drawn[2]) and len({image.tobytes() for image in drawn[0]}) == 8
    films = run.sample(2, seed=1, num_steps=2, trajectory=True)
    np.testing.assert_array_equal(films[:, -1], drawn[1][:2])
    do_call(digits.TASK, config, tmp_path / "parts", *EVALUATE)
    report = json.loads((tmp_path / "parts" / "evaluation" / "report.json").read_text())
    assert "Fréchet distance" in json.dumps(report, ensure_ascii=False)
