"""Config files by short names and methods, choices with the fields of their name, and changes of single fields."""

import numpy as np
import pytest
from helpers import CONFIGS
from ml_collections import ConfigDict

from diffusion.model.config import copy, from_plain, plain
from diffusion.model.experiment import make_model
from diffusion.model.fields import CHOICES, change, choose, complete, load
from diffusion.training import RunError

FILES = {
    "digits": ("class_conditional", "cosine_hybrid", "edm", "flow", "v_min_snr"),
    "cifar10": ("class_conditional", "cosine_hybrid", "edm", "flow", "small", "v_min_snr"),
    "folder": ("class_conditional", "cosine_hybrid", "edm", "flow", "v_min_snr"),
    "scenes": ("clip", "unet"),
    "captions": (),
}
SPECS = [f"{stem}:{method}".rstrip(":") for stem, methods in FILES.items() for method in ("", *methods)]


def block(config, place):
    for name in place.split("."):
        config = config[name]
    return config


def test_a_config_has_a_name_for_its_runs_however_it_is_spelled():
    wanted, name = load("digits:flow,class_conditional", CONFIGS)
    assert name == "digits_flow_class_conditional"
    spellings = (
        f"{CONFIGS / 'digits.py'}:flow,class_conditional",
        "digits_flow:class_conditional",
    )
    for spelling in spellings:
        assert load(spelling, CONFIGS) == (wanted, name)
    assert load("digits", CONFIGS)[1] == load(str(CONFIGS / "digits.py"), CONFIGS)[1] == "digits"
    assert load("digits_flow", CONFIGS) == load("digits:flow", CONFIGS)


def test_methods_change_what_their_papers_changed_in_their_order():
    flow, _ = load("digits:flow,class_conditional", CONFIGS)
    assert (flow.process.name, flow.loss.prediction, flow.sampling.sampler.name) == ("flow", "velocity", "euler")
    assert (flow.condition.name, flow.sampling.guidance) == ("classes", 1.5)
    # A later method has the last word: EDM's network output is F, Salimans & Ho's v.
    assert load("digits:edm,v_min_snr", CONFIGS)[0].loss.prediction == "v"
    assert load("digits:v_min_snr,edm", CONFIGS)[0].loss.prediction == "F"
    # Methods of the data that they are applied to.
    assert load("cifar10:flow", CONFIGS)[0].sampling.num_steps == 100
    assert load("cifar10:cosine_hybrid", CONFIGS)[0].sampling.sampler.variance == "learned"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere", "no config file nowhere; .* are: autoencoder, captions, cifar10, clip, digits, .*sd3$"),
        ("nowhere.py:flow", r"no config file nowhere\.py"),
        ("digits.py", r"no config file digits\.py"),
        ("_base", "no config file _base"),
        ("digits:flwo", "unknown method 'flwo': choose from cosine_hybrid, v_min_snr, edm, flow, class_conditional"),
        ("digits_flwo", "unknown method 'flwo': choose from cosine_hybrid"),
        ("scenes:flow", "unknown method 'flow': choose from unet, clip"),
        ("clip:flow", r"clip\.py takes no methods: leave out :flow"),
        (str(CONFIGS / "__init__.py"), "no function get_config"),
    ],
)
def test_configs_that_do_not_exist_are_refused_with_those_that_do(spec, message):
    with pytest.raises(RunError, match=message) as refused:
        load(spec, CONFIGS)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("spec", SPECS)
def test_every_choice_of_a_config_has_all_fields_of_its_name_and_no_others(spec):
    config, _ = load(spec, CONFIGS)
    assert config.is_locked and complete(config) == config == from_plain(plain(config))
    for place in CHOICES:
        again = from_plain(plain(config))
        choose(again, place, block(config, place).name)
        # No field but those that the choice has, each with the value of the config.
        assert plain(again) == plain(config), place


def test_the_other_name_of_a_choice_brings_its_own_fields_and_keeps_shared_ones():
    config, _ = load("digits", CONFIGS)
    changed = change(config, {"optimizer.learning_rate": 0.5, "optimizer.b2": 0.9})
    choose(changed, "optimizer", "muon")
    assert plain(changed.optimizer) == {
        **{name: changed.optimizer[name] for name in ("warmup_steps", "cooldown_steps", "clip_norm")},
        "name": "muon",
        "schedule": {"name": "wsd"},
        "learning_rate": 0.5,
        "b1": 0.9,
        "b2": 0.9,
        "muon_rate": 3.0,
    }
    choose(changed, "process", "vp")
    assert plain(changed.process) == {"name": "vp"} and changed.is_locked
    with pytest.raises(RunError, match=r"process\.name is 'dpm': choose from ddpm, vp, flow, edm"):
        choose(changed, "process", "dpm")
    clip, _ = load("clip", CONFIGS)
    with pytest.raises(RunError, match=r"this experiment's config has no sampling\.sampler"):
        choose(clip, "sampling.sampler", "ddim")


def test_a_learned_variance_is_sampled_with_unless_another_is_named():
    config, _ = load("digits:cosine_hybrid", CONFIGS)
    assert change(config, {"sampling.sampler.name": "ancestral"}).sampling.sampler.variance == "learned"
    large = change(config, {"sampling.sampler.name": "ancestral", "sampling.sampler.variance": "large"})
    assert large.sampling.sampler.variance == "large"
    plain_one, _ = load("digits", CONFIGS)
    assert change(plain_one, {"sampling.sampler.name": "ancestral"}).sampling.sampler.variance == "large"


def test_change_applies_names_before_the_fields_of_that_name_and_leaves_the_config_alone():
    config, _ = load("digits", CONFIGS)
    before = plain(config)
    changes = {
        "process.times": "cosmap",
        "process.name": "flow",
        "training.num_steps": 7,
        "network.multipliers": [1, 3],
    }
    changed = change(config, changes)
    assert plain(changed.process) == {"name": "flow", "times": "cosmap", "shift": 1.0, "time_scale": 1000.0}
    assert changed.training.num_steps == 7 and changed.network.multipliers == (1, 3)
    assert plain(config) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network.channel": 5}, "channel is not a field of network.name=unet: "),
        ({"netwrok.channels": 5}, "did you mean network.channels?"),
        ({"sampling.gudance": 2.0}, "unknown config field sampling.gudance: did you mean sampling.guidance?"),
        ({"zzzz": 1}, "unknown config field zzzz (--help lists all)"),
        ({"process.times": "mode"}, "times is not a field of process.name=ddpm: it has beta, first, last, num_steps"),
        ({"process.name": "vp", "process.beta": "cosine"}, "beta is not a field of process.name=vp: it has no fields"),
        ({"sampling.sampler.variance": "small"}, "variance is not a field of sampling.sampler.name=dpm_solver_pp: "),
        ({"network.name": "transformer"}, "network.name is 'transformer': choose from unet, mmdit"),
        ({"network.channels": "many"}, "network.channels is 'many': it must be like 32"),
        ({"network.multipliers": 3.5}, "network.multipliers is 3.5: it must be like [1, 2]"),
    ],
)
def test_changes_that_cannot_be_name_what_there_is(changes, message):
    config, _ = load("digits", CONFIGS)
    with pytest.raises(RunError) as refused:
        change(config, changes)
    assert message in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("place", "fields", "message"),
    [
        ("process", {"name": "chain"}, "process.name is 'chain': choose from ddpm, vp, flow, edm"),
        ("process", {"name": "flow", "beta": "linear"}, "process.beta is not a field of flow: it has times"),
        ("process", {"name": "vp", "times": "mode"}, "process.times is not a field of vp: it has no fields"),
        ("condition", {"name": "labels"}, "condition.name is 'labels': choose from nothing, classes, words, clip"),
        ("network", {"name": "unet", "width": 3, "dtype": "float32"}, "network.width is not a field of unet: it has"),
    ],
)
def test_a_model_of_fields_that_do_not_exist_is_refused(place, fields, message):
    """As a config file of one's own may ask for, or a call from Python."""
    config, _ = load("digits", CONFIGS)
    config = config.copy_and_resolve_references().unlock()
    config[place] = ConfigDict(fields)
    with pytest.raises(ValueError) as refused:
        make_model(config, (8, 8, 1), 10)
    assert message in str(refused.value)


def test_plain_configs_are_json_and_copies_are_copies():
    config, _ = load("scenes", CONFIGS)
    assert change(config, {"process": "flow"}) == change(config, {"process.name": "flow"})  # a choice is its name
    copied = copy(config, sampling={"guidance": 7.0}, data={"image_size": 32})
    assert (copied.sampling.guidance, copied.data.image_size, copied.data.name) == (7.0, 32, "scenes")
    assert (config.sampling.guidance, config.data.image_size) == (3.0, 16)
    assert plain(config)["evaluation"]["guidance"] == [1.0, 2.0, 4.0, 8.0]
    np.testing.assert_equal(from_plain(plain(config)).evaluation.guidance, (1.0, 2.0, 4.0, 8.0))
