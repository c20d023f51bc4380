"""What earlier versions stored opens today: descriptions of format 1, and whole runs.

golden/config_format_1.json holds what the code of commit e41a445 stored of each config file, by today's name of it.

golden/runs_of_format_1.tar.xz holds two runs that it trained for 4 steps, digits and scenes, less previews and
TensorBoard's files, and what it made of them: after_4.npz and after_6.npz, samples of `SAMPLES` from 4 steps and after
2 more; weights_after_6.npy, the `projection` of the averaged weights after these.
"""

import copy
import json
import tarfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import CONFIGS, do_call

from diffusion.model import formats
from diffusion.model.config import plain
from diffusion.model.experiment import make_model
from diffusion.model.fields import from_plain, load
from diffusion.runs.run import open_run
from diffusion.training import RunError
from diffusion.training.description import FORMAT
from diffusion.training.workdir import differences
from experiments import digits, scenes

GOLDEN = Path(__file__).parent / "golden"
STORED = json.loads((GOLDEN / "config_format_1.json").read_text())

# What the digits' config has had other values of since.
TUNED = {
    "data.batch_size",
    "network.dropout",
    "optimizer.cooldown_steps",
    "training.num_steps",
    "training.checkpoint_every",
    "training.preview_every",
    "training.num_previews",
    "evaluation.num_samples",
    "sampling.batch_size",
    "sampling.sampler.name",
    "sampling.sampler.as_released",
    "sampling.sampler.order",
    "sampling.sampler.solver_type",
    "sampling.sampler.eta",
    "sampling.num_steps",
}


@pytest.mark.quick
@pytest.mark.parametrize("spec", sorted(STORED))
def test_a_config_of_format_1_becomes_that_of_todays_file(spec):
    stored = copy.deepcopy(STORED[spec])
    now = formats.current(stored)
    assert stored == STORED[spec] and now["format"] == 2  # what is given is left alone
    added = {"evaluation.likelihood_images", "evaluation.ode_steps"}  # of text to image, which had no likelihood
    if spec.startswith("digits"):
        added |= TUNED
    wanted = plain(load(spec, CONFIGS)[0])
    assert {line.split(":")[0] for line in differences(now["config"], wanted, ())} <= added
    assert formats.current(now) == now == json.loads(json.dumps(now))
    shape = {"digits": [8, 8, 1], "cifar10": [32, 32, 3], "scenes": [16, 16, 3], "captions": [64, 64, 3]}
    assert now["image_shape"] == shape[now["experiment"]]
    assert now["num_classes"] == (10 if now["experiment"] in ("digits", "cifar10") else None)


@pytest.mark.parametrize("spec", ["digits", "digits:flow", "scenes"])
def test_fields_that_early_versions_did_not_have_are_the_defaults_of_that_time(spec):
    stored = copy.deepcopy(STORED[spec])
    config = stored["config"]
    added = {
        "optimizer": ("name", "cooldown_steps", "muon_rate") if spec != "scenes" else (),
        "training": ("ema_profiles", "snapshot_every", "skip_bad_steps", "spike_factor"),
        "loss": ("learned_variance", "vlb_weight"),
        "data": ("flip",),
        "sampling": ("churn", "order", "shift"),
    }
    for block, names in added.items():
        for name in names:
            config[block].pop(name, None)
    now, wanted = formats.current(stored)["config"], formats.current(STORED[spec])["config"]
    changed = {line.split(":")[0] for line in differences(now, wanted, ())}
    # Averages that were not made are not claimed: the checkpoint holds none.
    assert changed <= {"training.ema_profiles", "training.snapshot_every"}
    assert now["training"]["ema_profiles"] == [] and now["training"]["snapshot_every"] == 0


def test_each_choice_takes_over_its_own_fields():
    stored = copy.deepcopy(STORED["digits:class_conditional"])
    config = stored["config"]
    config["loss"]["label_dropout"] = 0.25
    config["sampling"].update(sampler="heun", churn=3.0, eta=0.5, grid="karras")
    now = formats.current(stored)["config"]
    assert now["condition"] == {"name": "classes", "dropout": 0.25}
    assert now["sampling"]["sampler"]["name"] == "heun" and now["sampling"]["sampler"]["s_churn"] == 3.0
    assert "eta" not in now["sampling"]["sampler"] and now["sampling"]["grid"]["name"] == "karras"
    config["sampling"].update(sampler="ancestral", variance="small")
    assert formats.current(stored)["config"]["sampling"]["sampler"]["variance"] == "small"
    stored = copy.deepcopy(STORED["scenes"])
    stored["config"]["sampling"]["shift"] = 3.0
    stored["config"]["loss"]["times"] = "mode"
    now = formats.current(stored)["config"]
    assert now["sampling"]["grid"] == {"name": "uniform", "shift": 3.0}
    assert now["process"] == {"name": "flow", "times": "mode", "shift": 1.0, "time_scale": 1000.0}


def test_the_text_encoder_of_a_run_is_kept():
    vocabulary = ["a", "red", "two"]
    stored = copy.deepcopy(STORED["scenes"]) | {"text": {"vocabulary": vocabulary}}
    now = formats.current(stored)
    assert "text" not in now and now["condition"] == {"vocabulary": vocabulary}
    model = make_model(from_plain(now["config"]), tuple(now["image_shape"]), None, now)
    np.testing.assert_array_equal(model.condition.read(["a blue two"])[0, :4], [2, 1, 4, 0])


def test_images_of_unknown_shape_are_refused():
    stored = copy.deepcopy(STORED["cifar10"])
    stored["config"]["data"]["name"] = "celeb_a"
    with pytest.raises(RunError, match=r"data set celeb_a .* without its image shape") as refused:
        formats.current(stored)
    assert "\n" not in str(refused.value)
    stored["config"]["data"]["name"] = "svhn_cropped:3.*.*"
    assert formats.current(stored)["image_shape"] == [32, 32, 3]


def test_a_clip_is_left_as_it_is():
    stored = {"experiment": "clip", "config": plain(load("clip", CONFIGS)[0]), "vocabulary": "..."}
    assert formats.current(stored) == stored


# What was drawn of each run, and the flags that resume it: its own, in today's names.
SAMPLES = {
    "digits": {"num_samples": 8},
    "scenes": {"prompts": ["a red three"], "num_samples": 4},
}
SHARED = (
    "--config.training.num_steps=6",
    "--config.training.checkpoint_every=4",
    "--config.training.preview_every=100",
    "--config.training.num_previews=1",
    "--config.training.ema_profiles=()",
    "--config.evaluation.after_training=False",
)
RESUME = {
    "digits": (
        "--config.network.channels=4",
        "--config.network.num_groups=2",
        "--config.network.multipliers=(1,)",
        "--config.network.num_blocks=1",
        "--config.network.attention_resolutions=()",
        "--config.network.dropout=0.1",
        "--config.optimizer.cooldown_steps=0",
        "--config.data.batch_size=16",
        *SHARED,
    ),
    "scenes": (
        "--config.network.width=8",
        "--config.network.depth=1",
        "--config.network.num_heads=2",
        "--config.condition.width=8",
        "--config.data.batch_size=8",
        "--config.data.num_examples=32",
        "--config.training.keep_every=0",
        "--config.optimizer.cooldown_steps=0",
        *SHARED,
    ),
}
TASKS = {"digits": digits.TASK, "scenes": scenes.TASK}


def projection(params):
    """Returns a number of each array, which depends on all its values, float64[P]."""
    random = np.random.RandomState(0)
    return np.array([np.vdot(random.standard_normal(x.shape), x) for x in map(np.asarray, jax.tree.leaves(params))])


@pytest.mark.parametrize("name", [pytest.param("digits", marks=pytest.mark.quick), "scenes"])
def test_a_run_of_format_1_opens_and_draws_and_is_resumed_as_by_the_code_that_made_it(tmp_path, name):
    with tarfile.open(GOLDEN / "runs_of_format_1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / name
    run = open_run(folder, num_devices=1)
    assert (run.experiment, run.step) == (name, 4)

    def check_samples(run, file):
        # On another CPU sums are rounded in another order: a value may fall to the other side of a level's edge.
        drawn = run.sample(**SAMPLES[name], seed=3, num_steps=5).astype(int)
        off = np.abs(drawn - np.load(folder / file)["arr_0"])
        assert off.max() <= 1 and np.mean(off > 0) <= 0.01

    check_samples(run, "after_4.npz")
    do_call(TASKS[name], name, folder, *RESUME[name])
    resumed = open_run(folder, num_devices=1)
    assert resumed.step == 6
    before, after, theirs = projection(run.params), projection(resumed.params), np.load(folder / "weights_after_6.npy")
    # The same two steps: the same data, noise and moments of the optimizer.
    assert np.linalg.norm(after - theirs) < 0.05 * np.linalg.norm(theirs - before)
    check_samples(resumed, "after_6.npz")
    # Its folder is of today's format now.
    config = json.loads((folder / "config.json").read_text())
    assert config["format"] == FORMAT and config["config"]["condition"]["name"] == run.config.condition.name
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 6]


def test_what_format_2_did_not_store_is_as_it_was():
    """Its frozen text encoders were averaged and had no moments of their own by the optimizer's doing."""
    stored = formats.current(copy.deepcopy(STORED["scenes"])) | {"format": 2}
    stored.pop("frozen")
    assert formats.current(stored)["frozen"] == []
    assert formats.current(stored | {"frozen": ["text"]})["frozen"] == ["text"]
    assert "frozen" not in formats.current(stored | {"format": 3})


@pytest.mark.quick
def test_what_format_3_trained_is_the_denoising_loss():
    stored: dict[str, Any] = formats.current(copy.deepcopy(STORED["digits:flow"])) | {"format": 3}
    stored["config"]["loss"].pop("name")
    now = formats.current(stored)
    assert now["config"]["loss"]["name"] == "denoising" and now["config"]["loss"]["prediction"] == "velocity"
    assert formats.current(now) == now
