"""Text to image on scenes from the command line, and the questions that its evaluation asks."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffusion.data import scenes
from diffusion.data.samples import load_samples
from diffusion.data.words import split_words
from diffusion.evaluation import composition
from diffusion.runs.run import open_run, read_description
from diffusion.training import RunError
from experiments import scenes as experiment

# --- what the copies of the machinery once got wrong


def test_flows_are_sampled_by_ancestral_steps(kinds, copied, tmp_path):
    folder, out = copied("scenes"), tmp_path / "a.npz"
    ask = ("--mode=sample", "--sampler=ancestral", "--prompt=a red two", "--num_samples=2", f"--out={out}")
    kinds["scenes"].do(folder, *ask)
    images = load_samples(out)
    made = json.loads(out.with_suffix(".json").read_text())["sampling"]
    assert images.shape == (2, 16, 16, 3) and made["sampler"] == {"name": "ancestral", "variance": "small"}
    other = open_run(folder, num_devices=1).sample(2, prompts=["a red two"])
    assert np.abs(images.astype(int) - other).max() > 1  # Euler's steps
    with pytest.raises(ValueError, match=r"this grid is of no DDPM process .*: use variance='small'"):
        kinds["scenes"].do(folder, *ask[:-1], "--config.sampling.sampler.variance=large")


def test_text_to_image_on_ddpm_s_chain_trains_and_draws(kinds, tmp_path):
    kind, folder = kinds["scenes"], tmp_path / "run"
    short = ("--config.training.num_steps=2", "--config.training.num_previews=0", "--config.optimizer.name=adam")
    chain = ("--config.process.name=ddpm", "--config.process.num_steps=20", "--config.process.beta=cosine")
    kind.do(folder, *kind.flags, *short, *chain)
    run = open_run(folder, num_devices=1)
    assert run.model.process.schedule is not None and len(run.model.process.schedule.beta) == 21
    drawn = run.sample(prompts=["a red two", "a blue four"])
    assert drawn.shape == (2, 16, 16, 3) and np.abs(drawn[0].astype(int) - drawn[1]).max() > 1


def test_processes_that_the_grid_does_not_fit_are_refused_before_training(kinds, tmp_path):
    kind = kinds["scenes"]
    with pytest.raises(ValueError, match="an edm process has no steps even in time: choose"):
        kind.do(tmp_path / "run", *kind.flags, "--config.process.name=edm")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_num_steps_is_fixed_by_a_cooldown(kinds, trained):
    more = "--config.training.num_steps=8"
    kind, folder = kinds["scenes"], trained("scenes")
    with pytest.raises(RunError, match=r"training\.num_steps: 6 -> 8 \(fixed by optimizer\.cooldown_steps\)"):
        kind.call(folder, *kind.flags, more)
    with pytest.raises(RunError, match=r"optimizer\.cooldown_steps: 4000 -> 0"):
        kind.call(folder, *kind.flags, more, "--config.optimizer.cooldown_steps=0")
    kind = kinds["digits"]  # which has none
    assert kind.call(trained("digits"), *kind.flags, more).config.training.num_steps == 8


# --- prompts


def test_the_run_reads_every_word_of_a_scene(trained):
    assert read_description(trained("scenes"))["condition"]["vocabulary"] == experiment.VOCABULARY


def test_the_examples_are_combinations_that_training_never_shows():
    call: Any = SimpleNamespace()
    shown = experiment.examples(call)
    assert len(set(shown)) > 20 and {word for one in shown for word in split_words(one)} <= set(experiment.VOCABULARY)
    train = set(scenes.scenes("train", 16, 500).captions)
    assert not train & set(shown)


def test_a_run_in_python_draws_what_the_command_draws(kinds, copied, tmp_path):
    folder, out = copied("scenes"), tmp_path / "a.npz"
    kinds["scenes"].do(folder, "--mode=sample", "--prompt=a red two", "--num_samples=3", "--seed=4", f"--out={out}")
    drawn = open_run(folder, num_devices=1).sample(3, prompts=["a red two"], seed=4)
    np.testing.assert_array_equal(drawn, load_samples(out))


# --- evaluation

SPLIT = "held_out"


def shows(wanted, images):
    """A judge that knows every pixel: whether each picture is that of its scene."""
    return np.array([np.array_equal(image, scenes.draw(one, SPLIT)) for one, image in zip(wanted, images, strict=True)])


@pytest.fixture
def perfect(trained, kinds, monkeypatch):
    """(call, run) of a model that draws every prompt as it is, and the guidance of each batch that it drew."""
    folder = trained("scenes")
    call = kinds["scenes"].call(folder, "--mode=evaluate", "--config.evaluation.num_swept=12")
    scales = []

    def draw_scenes(call, run, wanted):
        scales.append(run.config.sampling.guidance)
        return np.stack([scenes.draw(one, SPLIT) for one in wanted])

    monkeypatch.setattr(experiment, "draw_scenes", draw_scenes)
    return call, call.open(), scales


def test_shares_of_a_split_are_of_drawn_real_and_mismatched_pictures(perfect, monkeypatch, tmp_path):
    call, run, _ = perfect
    run = run._replace(workdir=tmp_path)
    drawn, real, other = experiment.of_split(call, run, SPLIT, 30, shows)
    assert set(drawn.value) == {"all", *scenes.KINDS, "two objects"} and set(drawn.value.values()) == {1.0}
    assert real.value == drawn.value and real.made["sampler"] == "real images" and drawn.made["seeds"] == [0]
    assert other.value == {"all": 0.0}
    assert (tmp_path / "composition_held_out.png").stat().st_size > 1000
    monkeypatch.setattr(
        experiment, "draw_scenes", lambda call, run, wanted: np.zeros((len(wanted), 16, 16, 3), np.uint8)
    )
    drawn, real, other = experiment.of_split(call, run, SPLIT, 30, shows)
    assert set(drawn.value.values()) == {0.0} and set(real.value.values()) == {1.0}


def test_guidance_is_swept_at_the_scales_of_the_config(perfect):
    call, run, scales = perfect
    share = experiment.by_guidance(call, run, shows)
    assert scales == [1.0, 2.0, 4.0, 8.0] and share.count == 12
    assert share.value == {"guidance 1": 1.0, "guidance 2": 1.0, "guidance 4": 1.0, "guidance 8": 1.0}
    assert share.made["sampler"] == "euler"  # without the scale of the config, which is not that of these


def test_a_replaced_prompt_is_what_its_pictures_show(perfect):
    call, run, _ = perfect
    share = experiment.prompt_replaced(call, run, shows)
    assert share.value == {"with the new prompt": 1.0, "with the old one": 0.0}


def test_sweeps_draw_the_share_of_never_seen_prompts(perfect, monkeypatch):
    call, run, _ = perfect
    monkeypatch.setattr(experiment, "make_judge", lambda run: shows)
    measured: Any = experiment.score(call._replace(config=run.config), run)
    assert measured.value["all"] == 1.0 and measured.name.endswith("never-seen combinations")
    assert measured.num_samples == 600 and measured.num_steps == 3


def test_the_report_answers_every_question(kinds, copied, monkeypatch):
    fit_reader = composition.fit_reader
    monkeypatch.setattr(composition, "fit_reader", lambda size: fit_reader(size, num_scenes=200))
    folder = copied("scenes")
    few = ("--num_samples=8", "--config.evaluation.num_swept=4", "--config.evaluation.guidance=(1.0, 2.0)")
    kinds["scenes"].do(folder, "--mode=evaluate", *few)
    measurements = json.loads((folder / "report.json").read_text())["measurements"]
    wholly = [one["name"] for one in measurements if one["name"].startswith("prompts wholly satisfied")]
    assert wholly == [
        "prompts wholly satisfied, never-seen combinations",
        "prompts wholly satisfied, seen combinations",
        "prompts wholly satisfied, never-seen combinations",
    ]
    assert len(measurements) == 8 and {one["num_samples"] for one in measurements} == {8, 4}
    for split in experiment.SAID:
        assert (folder / f"composition_{split}.png").stat().st_size > 1000
