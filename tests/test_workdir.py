"""Which config a folder belongs to, what of it may change, what is recorded, and the format of what is stored."""

import json

import pytest
from helpers import with_fields
from test_training import BATCH_SIZE, batches_from, make_experiment, settings

from diffusion.training import RunError, make_mesh, train
from diffusion.training.checkpoints import open_existing, read_description
from diffusion.training.description import FORMAT
from diffusion.training.integrity import seal
from diffusion.training.workdir import FREE_AFTERWARDS, FREE_IN_TRAINING, check, claim, differences

CONFIG = {
    "seed": 0,
    "data": {"name": "digits", "dir": "here", "directory": "here"},
    "optimizer": {"learning_rate": 0.1, "cooldown_steps": 0},
    "training": {"num_steps": 8, "log_every": 5, "ema_decay": 0.9},
    "sampling": {"num_steps": 50, "sampler": {"name": "ddim", "eta": 0.0}},
    "evaluation": {"num_samples": 100},
}


def changed(**fields):
    """Returns CONFIG with fields changed: training__num_steps=12."""
    return with_fields(CONFIG, **fields)


def do_train(workdir, config, experiment=None, migrate=lambda stored: stored, extra=None):
    workdir.mkdir(exist_ok=True)
    number = settings(num_steps=config["training"]["num_steps"], log_every=config["training"]["log_every"])
    description = {"experiment": "test", "config": config, **(extra or {})}
    return train(
        experiment or make_experiment(),
        number,
        workdir=workdir,
        mesh=make_mesh(2),
        description=description,
        migrate=migrate,
    )


def stored_configs(workdir):
    """Returns the config in config.json, and that in the newest checkpoint."""
    with open_existing(workdir) as checkpoints:
        return json.loads((workdir / "config.json").read_text())["config"], checkpoints.description()["config"]


@pytest.mark.parametrize(
    ("fields", "in_training", "afterwards"),
    [
        ({"sampling__num_steps": 10, "evaluation__num_samples": 1, "data__dir": "there"}, [], []),
        ({"sampling__sampler": {"name": "heun"}}, [], []),
        ({"training__log_every": 1}, [], ["training.log_every: 5 -> 1"]),
        ({"training__num_steps": 9}, [], ["training.num_steps: 8 -> 9"]),
        ({"seed": 1, "training__ema_decay": 0.5}, *[["seed: 0 -> 1", "training.ema_decay: 0.9 -> 0.5"]] * 2),
        # Not data.dir, although it begins as it does.
        ({"data__directory": "there"}, *[["data.directory: here -> there"]] * 2),
        ({"model": {"width": 3}}, *[["model.width: (none) -> 3"]] * 2),
    ],
)
def test_what_may_change_in_training_and_afterwards(fields, in_training, afterwards):
    assert differences(CONFIG, changed(**fields), FREE_IN_TRAINING) == in_training
    assert differences(CONFIG, changed(**fields), FREE_AFTERWARDS) == afterwards


def test_with_a_cooldown_the_number_of_steps_is_fixed():
    cooled = changed(optimizer__cooldown_steps=3)
    longer = changed(optimizer__cooldown_steps=3, training__num_steps=9)
    assert differences(cooled, longer) == ["training.num_steps: 8 -> 9 (fixed by optimizer.cooldown_steps)"]
    assert differences(cooled, cooled) == []
    without = changed(training__num_steps=9)
    del without["optimizer"]["cooldown_steps"]
    assert differences(CONFIG, without) == ["optimizer.cooldown_steps: 0 -> (none)"]


def test_a_resumed_run_records_what_it_trains_with_and_keeps_how_it_is_sampled(tmp_path):
    do_train(tmp_path, CONFIG)
    asked = changed(
        training__num_steps=12,
        data__dir="there",
        sampling={"num_steps": 3, "sampler": {"name": "heun"}},
        evaluation__num_samples=1,
    )
    do_train(tmp_path, asked)
    expected = changed(training__num_steps=12, data__dir="there")
    assert stored_configs(tmp_path) == (expected, expected)


def test_config_json_changes_only_once_steps_are_made_with_its_values(tmp_path):
    do_train(tmp_path, CONFIG)
    before = (tmp_path / "config.json").read_bytes()

    def no_batches(start_step):
        yield from batches_from(start_step) if start_step < 0 else ()

    with pytest.raises(StopIteration):
        do_train(tmp_path, changed(training__num_steps=12), make_experiment(batches=no_batches))
    assert (tmp_path / "config.json").read_bytes() == before
    do_train(tmp_path, changed(training__log_every=1))  # finished already
    assert (tmp_path / "config.json").read_bytes() == before
    with pytest.raises(RunError):
        do_train(tmp_path, changed(training__num_steps=7))
    assert (tmp_path / "config.json").read_bytes() == before
    do_train(tmp_path, changed(training__num_steps=9))
    assert stored_configs(tmp_path)[0]["training"]["num_steps"] == 9


def test_a_run_without_checkpoints_yet_is_recorded_as_it_begins(tmp_path):
    claim(tmp_path, "test", CONFIG)
    asked = changed(sampling__num_steps=3)
    do_train(tmp_path, asked)
    assert stored_configs(tmp_path) == (asked, asked)


def test_checkpoints_without_config_json_still_belong_to_their_config(tmp_path):
    do_train(tmp_path, CONFIG)
    (tmp_path / "config.json").unlink()
    with pytest.raises(RunError, match=r"another config \(there -> asked\): seed: 0 -> 1\. Resume with the old"):
        do_train(tmp_path, changed(seed=1))
    do_train(tmp_path, changed(training__num_steps=9))
    assert stored_configs(tmp_path)[0] == changed(training__num_steps=9)


def test_what_a_checkpoint_holds_besides_goes_into_those_of_the_resumed_run(tmp_path):
    do_train(tmp_path, CONFIG, extra={"weights": {"file": "public.safetensors"}, "words": ["a"]})
    do_train(tmp_path, changed(training__num_steps=12), extra={"words": ["a", "b"]})
    stored = read_description(tmp_path / "checkpoints" / "12")
    assert stored["weights"] == {"file": "public.safetensors"} and stored["words"] == ["a", "b"]


def rewrite_description(path, **changes):
    """Changes the description stored with a checkpoint, or a config.json; None removes an entry."""
    whole = json.loads(path.read_text())
    description = whole.get("custom_metadata", whole)
    description |= changes
    for name in [name for name, value in changes.items() if value is None]:
        del description[name]
    path.write_text(json.dumps(whole))


def test_every_checkpoint_has_the_format_and_a_newer_one_is_refused_in_a_line(tmp_path):
    do_train(tmp_path, CONFIG)
    checkpoint = tmp_path / "checkpoints" / "8"
    assert read_description(checkpoint)["format"] == FORMAT
    assert json.loads((tmp_path / "config.json").read_text())["format"] == FORMAT
    newer = "was written by a newer version of this project: update it$"
    rewrite_description(checkpoint / "_CHECKPOINT_METADATA", format=FORMAT + 1)
    with pytest.raises(RunError, match=newer):
        read_description(checkpoint)
    rewrite_description(tmp_path / "config.json", format=FORMAT + 1)
    with pytest.raises(RunError, match=newer):
        check(tmp_path, "test", CONFIG)
    rewrite_description(checkpoint / "_CHECKPOINT_METADATA", format="2")
    with pytest.raises(RunError, match="not written by this project"):
        read_description(checkpoint)
    rewrite_description(checkpoint / "_CHECKPOINT_METADATA", format=None)  # format 1: returned as it is
    assert "format" not in read_description(checkpoint) and read_description(checkpoint)["config"] == CONFIG


def test_an_older_run_is_compared_after_its_migration_and_recorded_in_the_new_form(tmp_path):
    def migrate(stored):
        if stored.get("format", 1) == 2:
            return stored
        config = dict(stored["config"])
        config["optimizer"] = config.pop("adam")
        return {**stored, "format": 2, "config": config}

    old = changed()
    old["adam"] = old.pop("optimizer")
    do_train(tmp_path, old)
    for checkpoint in (tmp_path / "checkpoints").iterdir():
        rewrite_description(checkpoint / "_CHECKPOINT_METADATA", format=None)
        seal(checkpoint)
    rewrite_description(tmp_path / "config.json", format=None)

    longer = changed(training__num_steps=12)
    with pytest.raises(RunError, match="another config"):
        do_train(tmp_path, longer)
    state = do_train(tmp_path, longer, migrate=migrate)
    assert int(state.step) == 12 and state.metrics["loss"].count == 2 * BATCH_SIZE
    assert stored_configs(tmp_path) == (longer, longer)
