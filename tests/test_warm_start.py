"""Warm start: a run begins with another's weights, a new optimizer, and a record of where they are from."""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_call, random_images
from published_sd3 import write_pipeline
from safetensors.numpy import load_file
from test_sd3 import import_into

import diffusion
from diffusion import training
from diffusion.model.config import make_settings, plain
from diffusion.model.experiment import abstract_batch, make_learner, make_model
from diffusion.model.fields import load_config
from diffusion.model.model import init
from diffusion.runs import export
from diffusion.runs.begin import Origin, adopt, check_fit, find_origin, first_weights
from diffusion.runs.run import load, open_run, read_description
from diffusion.runs.train import describe
from diffusion.training import RunError, digest, make_mesh
from diffusion.training.loop import first_state
from experiments import digits, sd3


def equal(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def begin(kind, origin, vocabulary=(), *arguments):
    """Returns the state before the first step of a run of a kind, its model, and what is stored of its weights."""
    call = kind.call(origin.folder.parent / "new", *kind.flags, *arguments)
    source = call.task.read(call.config, "train")
    model, _ = describe("new", call.config, source, None, vocabulary, origin)
    begun, about = first_weights(call.config, model, origin, call.mesh)
    learner, settings = make_learner(call.config, model)._replace(begun=begun), make_settings(call.config)
    batch = abstract_batch(call.config, model)
    abstract = training.abstract_train_state(learner, settings, call.mesh, batch)
    return first_state(learner, settings, abstract, batch)(), model, about


@pytest.mark.parametrize("widths, traces", [((5,), 1), ([5], 2)])
def test_equal_networks_are_traced_once_for_their_weights(widths, traces):
    """Unless a field cannot be hashed, as a list; weights are those that Linen draws."""
    traced = []

    class Counted(nn.Module):
        widths: Any

        @nn.compact
        def __call__(self, x, time):
            traced.append(x.shape)
            return nn.Dense(self.widths[0])(x)

    model = make_model(load_config("digits"), (8, 8, 1))
    one, other = (partial(init, model._replace(network=Counted(widths))) for _ in range(2))
    shapes = jax.eval_shape(one, jax.random.key(0))
    assert jax.eval_shape(other, jax.random.key(0)) == shapes and traced == [(1, 8, 8, 1)] * traces
    equal(jax.jit(one)(jax.random.key(3)), jax.jit(Counted(widths).init)(jax.random.key(3), jnp.zeros((1, 8, 8, 1)), 0))


@pytest.mark.parametrize("raw", [False, True])
def test_a_run_begins_with_the_weights_of_another(trained, kinds, raw):
    folder = trained("digits")
    state, _, about = begin(kinds["digits"], find_origin(f"{folder}:4", raw=raw))
    stored = read_description(folder, 4)
    config = open_run(folder).config
    other = load(folder, stored, config, make_mesh(1), 4, raw=raw)
    equal(state.params, other.params)
    equal(state.ema, other.params)
    for profile in state.profiles.values():
        equal(profile, other.params)
    assert state.step == 0 and not any(np.any(moment) for moment in jax.tree.leaves(state.opt_state))
    assert about["begun"] == {
        "folder": "digits",
        "step": 4,
        "digest": digest(other.params),
        "weights": "raw" if raw else "averaged",
        "parts": ["network"],
    }


def test_a_run_that_has_begun_so_resumes_and_says_where_it_is_from(trained, kinds, tmp_path):
    kind, folder = kinds["digits"], trained("digits")
    kind.do(tmp_path / "new", *kind.flags, f"--init_from={folder}")
    begun = read_description(tmp_path / "new")["begun"]
    assert (begun["folder"], begun["step"]) == ("digits", 6)
    for also in ((), (f"--init_from={folder}",)):  # resumed with or without
        assert kind.call(tmp_path / "new", *kind.flags, *also).stored["begun"] == begun
    with pytest.raises(RunError, match="new began with digits: leave --init_from=other:2 out to resume it"):
        kind.call(tmp_path / "new", *kind.flags, "--init_from=other:2")
    with pytest.raises(RunError, match="digits began without --init_from: leave"):
        kind.call(folder, *kind.flags, "--init_from=other")


def test_python_begins_a_run_so_too(trained, kinds, tmp_path):
    config = open_run(trained("digits")).config
    source = digits.TASK.read(config, "train")
    run = diffusion.train(config, source, tmp_path / "new", num_devices=1, init_from=trained("digits"))
    assert read_description(tmp_path / "new")["begun"]["digest"] == open_run(trained("digits")).digest
    assert run.step == 6


def test_weights_that_do_not_fit_are_refused_by_name(trained, kinds):
    kind, origin = kinds["digits"], find_origin(trained("digits"))
    with pytest.raises(RunError) as error:
        begin(kind, origin, (), "--config.network.channels=16")
    assert re.search(
        r"the weights of \S+digits do not fit this config: network/params/\S+ is \([\d, ]+\) there and \([\d, ]+\) "
        r"here; .*, and \d+ more. Give the run's own settings",
        str(error.value),
    )
    assert "\n" not in str(error.value)
    with pytest.raises(RunError, match=r"network/params/\S+ is not there and \(\d+, \d+\) here"):
        begin(kinds["digits_classes"], origin)


def test_only_some_parts_are_taken(trained, kinds):
    folder, kind = trained("scenes"), kinds["scenes"]
    theirs = open_run(folder, num_devices=1)
    words = ["an", "extra", "vocabulary"]
    state, model, about = begin(kind, find_origin(folder, ["network"]), words)
    equal(state.params["network"], theirs.params["network"])
    assert (model.condition.description or {})["vocabulary"] == words and about["begun"]["parts"] == ["network"]
    shapes = [jax.tree.map(np.shape, one["text"]) for one in (state.params, theirs.params)]
    assert shapes[0] != shapes[1]
    state, model, _ = begin(kind, find_origin(folder), words)
    equal(state.params, theirs.params)
    assert model.condition.description == theirs.model.condition.description


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--init_from=nowhere"], "--init_from=nowhere: nowhere holds no checkpoint: name the work folder"),
        (["--init_from={}:3"], "no checkpoint of step 3 in .*: choose from 4, 6"),
        (["--init_from={}", "--init_only=text"], "--init_only=text: .* has no text: choose from network"),
        (["--init_only=network"], "--init_only is of --init_from=RUN: give that too"),
        (["--init_raw"], "--init_raw is of --init_from=RUN: give that too"),
        (["--init_from={}", "--mode=sample"], "--init_from is not read by --mode=sample, but by train, check"),
        (["--init_from="], "--init_from= is empty"),
    ],
)
def test_what_cannot_be_begun_with_is_refused(trained, kinds, tmp_path, flags, message):
    flags = [flag.format(trained("digits")) for flag in flags]
    with pytest.raises(RunError, match=message) as error:
        kinds["digits"].call(tmp_path / "new", *kinds["digits"].flags, *flags)
    assert "\n" not in str(error.value) and not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a tiny pipeline, and that of a run with its files."""
    folder = write_pipeline(tmp_path_factory.mktemp("published"))
    return folder, import_into(tmp_path_factory.mktemp("run") / "sd3", folder)


def test_what_a_config_leaves_open_is_the_pipelines(published, tmp_path):
    _, folder = published
    flags = (f"--init_from={folder}", "--config.network.dtype=bfloat16", "--config.condition.dropout=0.2")
    call = make_call(sd3.TASK, "sd3", tmp_path / "mine", *flags, num_devices=1)
    theirs = open_run(folder).config
    assert (call.config.network.width, call.config.network.dtype) == (theirs.network.width, "bfloat16")
    assert (call.config.condition.length, call.config.condition.dropout) == (theirs.condition.length, 0.2)
    assert call.config.sampling.grid.shift == 3.0
    source = random_images(8)
    source = source._replace(image_shape=(16, 16, 3), captions=["a fox"] * 10)
    origin = find_origin(folder)
    model, description = describe("sd3", call.config, source, None, (), origin)
    begun, _ = first_weights(call.config, model, origin, call.mesh)
    equal(begun, open_run(folder, num_devices=1).params)  # the network's in float32, though it computes in bfloat16
    assert description["frozen"] == ["text", "space"] and description["condition"] == dict(origin.stored["condition"])
    with pytest.raises(RunError, match=r"--config.network.width=32: .*sd3 has 16: leave it out"):
        make_call(sd3.TASK, "sd3", tmp_path / "mine", *flags, "--config.network.width=32")


def test_a_pipeline_is_exported_as_it_was(published, tmp_path):
    folder, run = published
    call = make_call(sd3.TASK, "sd3", run, "--mode=export", f"--weights={tmp_path / 'out'}", num_devices=1)
    export.export_weights(call)
    for file in folder.rglob("*.safetensors"):
        old, new = (load_file(path) for path in (file, tmp_path / "out" / file.relative_to(folder)))
        assert old.keys() == new.keys()
        equal(old, new)
    config = "scheduler/scheduler_config.json"
    shifts = [json.loads((path / config).read_text())["shift"] for path in (folder, tmp_path / "out")]
    assert shifts == [3.0, 3.0]


@pytest.mark.parametrize("asked, expected", [((), 1.0), (("process.time_scale",), 1000.0)])
def test_a_student_embeds_times_as_its_teacher(asked, expected):
    student = load_config("digits:imitation", {"loss.teacher": "runs/flow"})
    theirs = load_config("digits:flow", {"process.time_scale": 1.0})
    origin = Origin(Path("runs/flow"), None, False, ("network",), {"config": plain(theirs)})
    assert student.process.time_scale == 1000.0
    assert adopt(student, origin, asked).process.time_scale == expected


@pytest.mark.parametrize("asked, expected", [((), "v"), (("loss.prediction",), "velocity")])
@pytest.mark.parametrize("method", ["imitation", "progressive"])
def test_a_student_returns_what_its_teacher_does_or_it_is_reported(method, asked, expected, caplog):
    student = load_config(f"digits:{method}", {"loss.teacher": "runs/flow"})
    theirs = load_config("digits:flow", {"loss.prediction": "v"})
    stored = {"config": plain(theirs), "image_shape": [8, 8, 1], "num_classes": 10}
    origin = Origin(Path("runs/flow"), None, False, ("network",), stored)
    adopted = adopt(student, origin, asked)
    assert adopted.loss.prediction == expected
    check_fit(origin, make_model(adopted, (8, 8, 1), 10))
    told = "the network of runs/flow returns v, and this run reads it as velocity"
    assert (told in caplog.text) == (expected == "velocity")
