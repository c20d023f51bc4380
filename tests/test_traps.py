"""Silent traps: data that is not what it is said to be, fields that change nothing, trainings that are over."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import CONFIGS, do, make_call
from test_workdir import CONFIG, changed, do_train, rewrite_description, stored_configs

from diffusion.data.sources import array_source, check_apart, digits, facts_of
from diffusion.model.config import plain
from diffusion.model.fields import load_config
from diffusion.model.idle import idle
from diffusion.runs import likelihood
from diffusion.runs.run import open_run, read_description
from diffusion.runs.train import describe
from diffusion.training import RunError, started
from diffusion.training.integrity import seal
from experiments import captions, scenes
from experiments import digits as digits_experiment

ITSELF = "the held-out images .* are the training images themselves"


def snapshot(folder):
    """Returns every file under a folder but the lock, with its bytes."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "run.lock"}


def on(kind, read):
    """Returns a kind of runs with other data."""
    return kind._replace(task=kind.task._replace(read=read))


# --- held-out images


def test_the_same_images_under_another_name_are_the_same_and_others_are_not():
    image = np.random.RandomState(0).randint(0, 256, (6, 4, 4, 1), np.uint8)
    train = array_source(image, None, "mine", "train", None)
    with pytest.raises(ValueError, match=r"^the held-out images \(yours test, 6\) are the training images themselves"):
        check_apart(array_source(image.copy(), None, "yours", "test", None), train.fingerprint)
    check_apart(array_source(image[:5], None, "mine", "train", None), train.fingerprint)
    check_apart(digits("test"), digits("train").fingerprint)


@pytest.mark.parametrize("mode", ["train", "evaluate", "likelihood"])
def test_a_held_out_set_that_is_the_training_set_stops_the_run(kinds, copied, tmp_path, mode, monkeypatch):
    kind = on(kinds["digits"], lambda config, split: digits("train"))
    monkeypatch.setattr(likelihood, "measure", None)
    folder = tmp_path / "new" if mode == "train" else copied("digits")
    before = snapshot(tmp_path)
    flags = (*kind.flags, "--config.evaluation.after_training=True") if mode == "train" else ()
    with pytest.raises(ValueError, match=ITSELF):
        do(kind.call(folder, f"--mode={mode}", *flags))
    assert snapshot(tmp_path) == before


def test_so_does_a_folder_of_captions_that_is_named_twice(kinds, trained, shared, tmp_path):
    kind = kinds["captions"]
    twice = f"--config.evaluation.dir={shared / 'pairs' / 'train'}"
    with pytest.raises(ValueError, match=ITSELF):
        do(kind.call(tmp_path / "new", *kind.flags, twice, "--config.evaluation.after_training=True"))
    with pytest.raises(ValueError, match=ITSELF):
        do(kind.call(trained("captions"), "--mode=evaluate", twice))
    assert not (tmp_path / "new").exists()


# --- the data of a run


def test_a_run_stores_which_data_it_was_trained_on(trained):
    data = read_description(trained("digits"))["data"]
    assert (
        data
        == facts_of(digits("train"))
        == {
            "name": "digits",
            "split": "train",
            "num_examples": 1297,
            "fingerprint": digits("train").fingerprint,
        }
    )


def test_other_data_in_the_same_folder_is_refused(kinds, copied):
    folder, kind = copied("digits"), kinds["digits"]
    before, longer = snapshot(folder), "--config.training.num_steps=9"
    other = on(kind, lambda config, split: digits("test"))
    line = (
        r"^the run was trained on other data: digits train, 1297 examples, sha256:\w+\.\.\.; these are digits test, 500"
    )
    with pytest.raises(RunError, match=line):
        do(other.call(folder, *kind.flags, longer))
    assert snapshot(folder) == before
    do(kind.call(folder, *kind.flags, longer))  # the run's own
    assert read_description(folder)["data"]["num_examples"] == 1297


def test_every_training_refuses_it_and_an_old_run_without_a_fingerprint_goes_on(tmp_path):
    """As of an autoencoder or a CLIP, which only pass their data on."""
    data = {name: {"name": "a", "split": "train", "num_examples": 2, "fingerprint": name} for name in ("one", "two")}
    do_train(tmp_path, CONFIG)  # old: stores none
    do_train(tmp_path, changed(training__num_steps=9), extra={"data": data["one"]})
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="was trained on other data"):
        do_train(tmp_path, changed(training__num_steps=10), extra={"data": data["two"]})
    assert snapshot(tmp_path) == before
    do_train(tmp_path, changed(training__num_steps=10), extra={"data": data["one"]})


def test_an_old_run_opens_and_its_data_is_stored_when_it_is_resumed(kinds, copied):
    folder = copied("digits")
    for checkpoint in (folder / "checkpoints").iterdir():
        rewrite_description(checkpoint / "_CHECKPOINT_METADATA", data=None)
        seal(checkpoint)
    assert "data" not in read_description(folder) and open_run(folder, num_devices=1).step == 6
    call = kinds["digits"].call(folder, *kinds["digits"].flags)
    _, description = describe("digits", call.config, digits("train"), call.stored, ())
    assert description["data"] == facts_of(digits("train"))


# --- fields that change nothing


@pytest.mark.parametrize(
    ("task", "spec", "flags", "line"),
    [
        ("digits", "digits", "loss.vlb_weight=0.1", "loss.vlb_weight changes nothing: .* loss.learned_variance=True"),
        ("digits", "digits", "lora.alpha=8.0", "lora.alpha changes nothing: lora.rank=0 trains no adapters"),
        ("scenes", "scenes", "condition.phrases=3", "data.name=scenes has words of its own"),
        ("digits", "digits", "sampling.guidance_interval=(0.3,5.0)", "sampling.guidance=1 is no guidance"),
        ("digits", "digits", "evaluation.weights=x.pth", "evaluation.features=pixels have no network"),
        ("digits", "digits:flow", "evaluation.bound_terms=8", "process.name=flow has no chain"),
        ("digits", "digits:cosine_hybrid", "process.last=0.01", "process.beta=cosine has ends of its own"),
        ("digits", "digits", "process.table=(0.1,0.2)", "it is read with process.beta=table"),
        ("digits", "digits", "training.ema_profiles=() training.snapshot_every=5", "training.snapshot_every changes"),
        ("captions", "captions", "evaluation.split=train", "evaluation.split changes nothing: data.name=folder"),
        ("captions", "captions", "data.name=tfds:x data.buckets=16", "data.buckets changes nothing: data.name=tfds:x"),
        # These a choice or an experiment refuses by itself.
        ("digits", "digits", "sampling.sampler.eta=0.5", r"eta is not a field of sampling.sampler.name=dpm_solver_pp"),
        ("digits", "digits", "sampling.order=3", "unknown config field sampling.order"),
    ],
)
def test_a_field_that_changes_nothing_is_refused_where_it_is_asked_for(tmp_path, task, spec, flags, line):
    experiment = {"digits": digits_experiment, "captions": captions, "scenes": scenes}[task]
    with pytest.raises(RunError, match=line) as error:
        make_call(experiment.TASK, spec, tmp_path / "run", *(f"--config.{flag}" for flag in flags.split()))
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_it_is_not_refused_where_it_is_off_or_read_or_only_the_configs(tmp_path):
    for spec, flags in (
        ("digits", ("loss.vlb_weight=0.0", "lora.targets=()", "sampling.guidance_interval=()")),
        ("digits:cosine_hybrid", ("loss.vlb_weight=0.1",)),
        ("digits:class_conditional", ("sampling.guidance_interval=(0.3,5.0)",)),
        ("digits:flow", ()),  # bound_terms are in the file
    ):
        call = make_call(digits_experiment.TASK, spec, tmp_path / "run", *(f"--config.{flag}" for flag in flags))
        assert call.asked == tuple(flag.partition("=")[0] for flag in flags)


@pytest.mark.parametrize("spec", sorted(path.stem for path in CONFIGS.glob("[!_]*.py")))
def test_an_idle_field_exists_and_changing_it_is_what_is_idle(spec):
    """The table names fields that a config has, with values that are not off."""
    config = load_config(spec, folder=CONFIGS)
    for field, reason in idle(config):
        block, _, name = field.rpartition(".")
        assert plain(config)[block][name] and reason


@pytest.mark.parametrize(
    ("experiment", "field"),
    [
        (digits_experiment, "data.name=mnist"),
        (digits_experiment, "data.dir=pictures"),
        (scenes, "data.name=coco"),
    ],
)
def test_data_that_an_experiment_does_not_read_is_refused(tmp_path, experiment, field):
    name = experiment.TASK.name
    call = make_call(experiment.TASK, name, tmp_path / "run", f"--config.{field}")
    with pytest.raises(ValueError, match=rf"^{field}: this experiment is on the {name}; see "):
        do(call)
    assert not (tmp_path / "run").exists()


# --- trainings that are over, or shorter


def test_a_finished_run_started_again_says_so_and_changes_nothing(kinds, copied, capsys):
    folder, kind = copied("digits"), kinds["digits"]
    before = snapshot(folder)
    do(kind.call(folder, *kind.flags, "--config.training.log_every=2", "--config.sampling.num_steps=9"))
    lines = [line for line in capsys.readouterr().err.splitlines() if "Warning" not in line]
    assert lines == [f"the run in {folder} is finished: 6 of 6 steps"]
    assert snapshot(folder) == before


def test_fewer_steps_than_were_made_are_refused_before_data_is_read(kinds, copied):
    folder = copied("digits")
    kind = on(kinds["digits"], lambda config, split: pytest.fail("the data was read"))
    before = snapshot(folder)
    with pytest.raises(RunError, match=rf"num_steps is 5, but the run in {folder} has made 6 steps: raise it"):
        do(kind.call(folder, *kind.flags, "--config.training.num_steps=5"))
    assert snapshot(folder) == before


@pytest.mark.parametrize("steps", [5, 9])
def test_with_a_cooldown_other_steps_are_refused(kinds, trained, steps):
    kind = kinds["scenes"]
    line = rf"training.num_steps: 6 -> {steps} \(fixed by optimizer.cooldown_steps\)"
    with pytest.raises(RunError, match=line):
        kind.call(trained("scenes"), *kind.flags, f"--config.training.num_steps={steps}")


def test_config_json_is_that_of_the_run_whatever_was_asked_and_refused(tmp_path):
    do_train(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()
    for asked in (changed(seed=1), changed(training__num_steps=7), changed(training__ema_decay=0.5)):
        with pytest.raises(RunError):
            do_train(tmp_path, asked)
        assert (tmp_path / "config.json").read_bytes() == before
    assert json.loads(before)["config"] == stored_configs(tmp_path)[1] == CONFIG


# --- seconds


def test_seconds_are_counted_from_the_start_of_the_process():
    file = Path(started.__file__)
    program = "import runpy, sys, time; time.sleep(0.4); found = runpy.run_path(sys.argv[1])\n"
    program += "print(time.perf_counter() - found['process_start'](), time.perf_counter() - found['IMPORTED'])"
    done = subprocess.run([sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True)
    since_start, since_import = map(float, done.stdout.split())
    assert since_start > since_import + 0.4 - 0.02  # the kernel counts in ticks of 10 ms


def test_where_the_kernel_does_not_say_they_are_counted_from_the_import(monkeypatch):
    for text in ("", "1 (a) b) S 1", f"1 (python) S {' 0' * 30}"):  # the last started with the machine
        monkeypatch.setattr(Path, "read_text", lambda self, text=text: text)
        monkeypatch.setattr(started.time, "clock_gettime", lambda clock: 1e6)
        assert started.process_start() == started.IMPORTED
