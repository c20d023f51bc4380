"""A trained run in Python: opened, drawn from, denoised with, measured, changed; and trained without a command."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS
from PIL import Image

import diffusion
from diffusion.data.captions import with_captions
from diffusion.data.images import to_uint8
from diffusion.data.samples import load_samples
from diffusion.data.sources import array_source, digits
from diffusion.model.fields import change
from diffusion.model.model import draw_noise
from diffusion.model.sampling import make_sampling
from diffusion.runs.run import open_run
from diffusion.runs.train import train_run
from diffusion.training import RunError
from diffusion.types import denoised


@pytest.fixture(scope="module")
def opened(trained):
    """opened(name) -> the run of that kind on one device, opened once."""
    runs = {}
    return lambda name: runs.setdefault(name, open_run(trained(name), num_devices=1))


def test_what_an_opened_run_holds(opened, trained):
    run = opened("digits")
    assert (run.experiment, run.step, run.average, run.workdir) == ("digits", 6, 0.995, trained("digits"))
    assert run.config.network.channels == 8 and run.model.space.image_shape == (8, 8, 1)
    assert run.model.condition.kind == "nothing" and run.mesh.size == 1
    earlier = open_run(trained("digits"), step=4, changes={"sampling.num_steps": 2}, num_devices=8)
    assert (earlier.step, earlier.config.sampling.num_steps, earlier.mesh.size) == (4, 2, 8)
    longer = open_run(trained("digits"), ema_length=0.1, num_devices=1)
    assert (longer.average, longer.step) == ("power 0.1", 6)
    differ = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (longer.params, run.params)), strict=True)]
    assert np.mean(differ) > 0.9


def test_samples_are_those_of_the_command(opened, kinds, trained, tmp_path):
    out = tmp_path / "a.npz"
    kinds["digits"].do(trained("digits"), "--mode=sample", "--num_samples=6", "--seed=2", f"--out={out}")
    run = opened("digits")
    np.testing.assert_array_equal(run.sample(6, seed=2), load_samples(out))
    assert run.sample().shape == (16, 8, 8, 1) and run.sample().dtype == np.uint8
    assert np.any(run.sample(6, seed=3) != run.sample(6, seed=2))


def test_fields_of_sampling_can_be_given_for_one_call(opened):
    run = opened("digits")
    ancestral = run.sample(6, sampler="ancestral", num_steps=4)
    assert run.config.sampling.num_steps == 3 and run.config.sampling.sampler.name == "dpm_solver_pp"
    changed = run.change({"sampling.sampler": "ancestral", "sampling.num_steps": 4})
    np.testing.assert_array_equal(changed.sample(6), ancestral)
    assert np.any(run.sample(6) != ancestral)


def test_classes_are_drawn_in_turn_or_as_asked(opened):
    run = opened("digits_classes").change({"sampling.batch_size": 2})  # one program for all that follows
    all_in_turn = run.sample()
    assert len(all_in_turn) == 16
    np.testing.assert_array_equal(all_in_turn[:4], run.sample(4, labels=[0, 1, 2, 3]))
    assert len(run.sample(labels=[3, 3, 7])) == 3
    assert run.requests(5, labels=[3, 7]) == [3, 7, 3, 7, 3]
    labels = digits("test").read(np.arange(3))["label"]
    assert labels.dtype == np.int32 and run.requests(labels=labels) == labels.tolist()  # as batches hold them
    # Image 1 is the same whatever is drawn beside it, and another of another class.
    np.testing.assert_array_equal(run.sample(labels=[0, 7])[1], run.sample(labels=[3, 7, 7])[1])


def test_prompts_are_drawn_and_led_away_from_others(opened):
    run, random = opened("scenes").change({"sampling.batch_size": 2}), np.random.RandomState(0)
    # After six steps a prompt still moves no pixel.
    params = jax.tree.map(lambda x: x + 0.1 * random.standard_normal(x.shape).astype(np.float32), run.params)
    run, prompts = run._replace(params=params), ["a red three", "a blue seven"]
    two = run.sample(prompts=prompts)
    assert two.shape == (2, 16, 16, 3) and two.dtype == np.uint8
    four = run.sample(4, prompts=prompts)
    assert four.shape == (4, 16, 16, 3)
    np.testing.assert_array_equal(four[:2], two)
    # The noise of image 0 under the other prompt, and led away from another than none.
    assert np.any(run.sample(prompts=prompts[::-1])[0] != two[0])
    assert np.any(run.sample(prompts=prompts, negative_prompt="a green one")[0] != two[0])


def test_a_trajectory_ends_in_the_sample(opened):
    run = opened("digits")
    films = run.sample(6, seed=1, trajectory=True)
    assert films.shape == (6, 4, 8, 8, 1)
    # Another program may round a pixel on the edge of two levels the other way.
    assert np.abs(films[:, -1].astype(int) - run.sample(6, seed=1)).max() <= 1


def test_a_film_rests_on_its_last_frame(tmp_path):
    films = np.random.RandomState(0).randint(0, 256, (5, 4, 8, 8, 1), np.uint8)
    diffusion.save_gif(tmp_path / "film.gif", films, seconds=2.0, smallest_side=60)
    with Image.open(tmp_path / "film.gif") as opened:
        film: Any = opened
        assert film.n_frames == 4 and min(film.size) >= 60
        durations = []
        for frame in range(4):
            film.seek(frame)
            durations.append(film.info["duration"])
        assert durations == [500, 500, 500, 2000]


def test_denoise_is_what_the_sampler_calls(opened):
    run = opened("digits")
    grid = make_sampling(run.config, run.model.process).grid
    _, eps = draw_noise(run.model, 1, jnp.arange(6))
    x_T = grid.noise[0] * eps
    x_0_hat = denoised(run.denoise(x_T, jnp.full(6, grid.time[0]))).x_0_hat
    assert x_0_hat.shape == (6, 8, 8, 1) and np.abs(x_0_hat).max() <= 1  # clipped, as the config says
    first = run.sample(6, seed=1, trajectory=True)[:, 0]
    assert np.abs(np.asarray(to_uint8(x_0_hat)).astype(int) - first).max() <= 1


def test_denoise_is_of_a_class_or_prompt(opened):
    run = opened("scenes")
    x_t, time = jnp.zeros((2, 16, 16, 3)), jnp.full(2, 0.5)
    hats = [run.denoise(x_t, time, prompts=prompts) for prompts in (["a red three"], ["a red three", "a blue seven"])]
    assert hats[0].shape == (2, 16, 16, 3)
    np.testing.assert_allclose(hats[0][0], hats[1][0], atol=1e-5)
    # Of nothing that is named, it is that of no condition: guidance leads nowhere, whatever its scale.
    free = [run.change({"sampling.guidance": scale}).denoise(x_t, time) for scale in (1.0, 8.0)]
    np.testing.assert_allclose(free[0], free[1], atol=1e-5)
    with pytest.raises(ValueError, match="cannot draw from classes"):
        run.denoise(x_t, time, labels=[0, 1])


def test_likelihood_of_an_image_does_not_depend_on_those_beside_it(opened):
    images = digits("test").read(np.arange(4))["image"]
    run = opened("digits").change({"sampling.batch_size": 2})
    found = run.likelihood(images, num_steps=3, num_terms=2)
    assert found.ode.shape == (4,) and found.bound["total"].shape == (4,) and found.bound["steps"].shape == (4, 2)
    assert np.all(np.isfinite(found.ode)) and found.ode.mean() > 4  # white noise of 256 levels costs 8 bits
    some = run.likelihood(images[:2], num_steps=3, num_terms=2)
    np.testing.assert_array_equal(some.ode, found.ode[:2])
    np.testing.assert_array_equal(some.bound["total"], found.bound["total"][:2])


@pytest.mark.parametrize(
    ("name", "images", "told", "message"),
    [
        ("digits", np.zeros((2, 8, 8, 1)), {}, "uint8"),
        ("digits", np.zeros((2, 16, 16, 1), np.uint8), {}, "of shape (16, 16, 1), and the run of (8, 8, 1)"),
        ("digits", np.zeros((1, 8, 8, 1), np.uint8), {"prompts": ["three"]}, "is unconditional"),
        ("digits_classes", np.zeros((3, 8, 8, 1), np.uint8), {"labels": [1]}, "3 images and 1 prompts or labels"),
        ("digits_classes", np.zeros((1, 8, 8, 1), np.uint8), {"labels": [10]}, "class 10 does not exist"),
    ],
)
def test_images_that_are_not_the_runs_have_no_likelihood(opened, name, images, told, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        opened(name).likelihood(images, num_steps=2, num_terms=2, **told)


def test_likelihood_of_a_flow_is_the_odes_alone(opened):
    found = opened("scenes").likelihood(np.zeros((1, 16, 16, 3), np.uint8), prompts=["a red three"], num_steps=2)
    assert found.ode.shape == (1,) and found.bound == {}


@pytest.mark.parametrize(
    ("name", "asked", "message"),
    [
        ("digits", {"prompts": ["a red three"]}, "is unconditional: it cannot draw from prompts"),
        ("digits", {"labels": [3]}, "is unconditional: it cannot draw from classes"),
        ("digits_classes", {"prompts": ["three"]}, "is a model of classes: it cannot draw from prompts"),
        ("digits_classes", {"labels": [3, 11]}, "class 11 does not exist: choose from 0..9"),
        ("scenes", {"labels": [3]}, "is a model of prompts: it cannot draw from classes"),
        ("scenes", {"num_samples": 4}, "draws from prompts: give at least one"),
        ("scenes", {"prompts": []}, "of 0 requests"),
        ("scenes", {"prompts": "a red three"}, "prompts are a list"),
        ("digits", {"negative_prompt": "a red three"}, "reads no prompts"),
        ("digits_classes", {"negative_prompt": "three"}, "reads no prompts"),
        ("digits", {"num_samples": 0}, "0 samples"),
        ("digits", {"guidance": 2.0}, "condition.name=classes"),
        ("digits", {"steps": 4}, "unknown config field sampling.steps: did you mean sampling.num_steps?"),
        ("digits", {"num_steps": 2000}, "num_steps is 2000"),
        ("digits", {"seed": -1}, "seed"),
    ],
)
def test_what_a_run_cannot_draw_is_refused_in_one_line(opened, name, asked, message):
    with pytest.raises((RunError, ValueError), match=re.escape(message)) as refused:
        opened(name).sample(**asked)
    assert "\n" not in str(refused.value)


def test_fields_that_only_training_may_set_are_refused_with_the_difference(opened, kinds, trained):
    folder, message = trained("digits"), r"process\.num_steps: 1000 -> 50"
    for refused in (
        lambda: opened("digits").change({"process.num_steps": 50}),
        lambda: open_run(folder, changes={"process.num_steps": 50}),
        lambda: kinds["digits"].call(folder, "--mode=sample", "--config.process.num_steps=50"),
        lambda: kinds["digits"].call(folder, "--mode=evaluate", "--config.process.num_steps=50"),
    ):
        with pytest.raises(RunError, match=message) as error:
            refused()
        assert "\n" not in str(error.value)
    # A config file that differs is refused too, with every difference.
    with pytest.raises(RunError, match=r"loss\.prediction: eps -> velocity.*process\.name: ddpm -> flow"):
        kinds["digits"].call(folder, "--mode=sample", "--config=digits:flow")
    changed = opened("digits").change({"evaluation.num_samples": 7, "data.dir": "elsewhere"})
    assert changed.config.evaluation.num_samples == 7 and changed.config.data.dir == "elsewhere"


def test_folders_without_a_run_of_images_are_refused(tmp_path):
    with pytest.raises(RunError, match="no checkpoint in"):
        open_run(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
    with pytest.raises(AttributeError, match="has no attribute 'opn_run': it has open_run"):
        _ = diffusion.opn_run  # pyright: ignore[reportAttributeAccessIssue]


def test_a_config_is_loaded_and_changed_in_python():
    config = diffusion.load_config("digits:flow", {"process.times": "mode", "sampling.sampler": "heun"}, CONFIGS)
    assert (config.process.times, config.sampling.sampler.name, config.training.num_steps) == ("mode", "heun", 1700)
    with pytest.raises(RunError, match="unknown method 'flows'"):
        diffusion.load_config("digits:flows", folder=CONFIGS)


def test_a_run_trained_in_python_has_the_bits_of_the_commands_and_is_resumed(trained, tmp_path):
    theirs, source = open_run(trained("digits"), num_devices=1), digits("train")
    run = diffusion.train(theirs.config, source, tmp_path / "run", name="mine", num_devices=1)
    assert (run.experiment, run.step, run.average) == ("mine", 6, 0.995)
    again = diffusion.open_run(tmp_path / "run", num_devices=1)
    for other in (again, theirs):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(other.params), jax.device_get(run.params))

    longer = change(theirs.config, {"training.num_steps": 8})
    assert train_run(longer, source, tmp_path / "run", name="mine", num_devices=1).step == 8
    with pytest.raises(RunError, match=r"process\.name: ddpm -> vp"):
        train_run(change(longer, {"process": "vp"}), source, tmp_path / "run", name="mine")
    with pytest.raises(RunError, match="a run of experiment mine, not run"):
        train_run(longer, source, tmp_path / "run")
    large = array_source(np.zeros((64, 16, 16, 1), np.uint8), np.zeros(64, np.int32), "large", "train", 10)
    with pytest.raises(RunError, match=r"image_shape \[8, 8, 1\], and these have \[16, 16, 1\]"):
        train_run(longer, large, tmp_path / "run", name="mine")


def test_a_run_of_prompts_learns_the_words_of_its_captions_in_python(kinds, tmp_path):
    kind = kinds["captions"]
    config = change(kind.call(tmp_path / "run", *kind.flags).config, {"condition.size": 3})
    image = np.random.RandomState(0).randint(0, 256, (32, 16, 16, 3), np.uint8)
    source = array_source(image, np.zeros(32, np.int32), "pictures", "train", 1)
    source = with_captions(source, [["a cat" if i % 2 else "a dog by a tree"] for i in range(32)])
    run = train_run(config, source, tmp_path / "run", num_devices=1)
    assert run.model.condition.description == {"vocabulary": ["a", "by", "cat"]}
    assert run.sample(prompts=["a cat", "by a"]).shape == (2, 16, 16, 3)
    with pytest.raises(ValueError, match="needs captions, and digits has none"):
        train_run(config, digits("train"), tmp_path / "other")
    assert not (tmp_path / "other").exists()
