"""The experiments from end to end, as small as they can be, through the command line's own parser."""

import json
import os
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

from diffusion.data.samples import load_samples
from diffusion.data.sources import array_source, digits
from diffusion.evaluation import PIXELS, compare, reference_set
from diffusion.training import RunError, make_mesh, place_batch, run_key
from diffusion.training.loggers import Loggers
from experiments import command_line, image_diffusion, image_evaluation, image_modes

ROOT = Path(__file__).parent.parent
IMAGES = ("digits", "cifar10")
CONFIGS = sorted(path.stem for name in IMAGES for path in (ROOT / "experiments" / "configs").glob(f"{name}_*.py"))
SMALL = (
    "--config.network.channels=8",
    "--config.network.num_blocks=1",
    "--config.network.multipliers=(1,)",
    "--config.network.attention_resolutions=()",
    "--config.network.num_groups=4",
    "--config.data.batch_size=16",
    "--config.training.num_previews=8",
    "--config.sampling.batch_size=24",
)
SHORT = (
    "--config.training.num_steps=6",
    "--config.training.log_every=4",
    "--config.training.checkpoint_every=4",
    "--config.training.preview_every=100",
    "--config.sampling.num_steps=3",
)


def parse(folder, *arguments, experiment="digits"):
    modes = dict.fromkeys(["train", "sample", "evaluate"], lambda run: None)
    file = ROOT / "experiments" / f"{experiment}.py"
    argv = [experiment, f"--workdir={folder}", *arguments]
    values = flags.FlagValues()
    image_modes.define_flags(values)
    image_evaluation.define_flags(values)
    return command_line.parse(argv, file, "doc", f"{experiment}_ddpm.py", modes, values)[0]


def images_of_cifar_shape(num_examples=40):
    random = np.random.RandomState(0)
    image = random.randint(0, 256, (num_examples, 32, 32, 3), np.uint8)
    return array_source(image, random.randint(0, 10, num_examples), "random", "train", 10)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_trains_and_samples_in_shape(name, tmp_path):
    experiment_name = name.split("_")[0]
    source = digits("train") if experiment_name == "digits" else images_of_cifar_shape()
    path = f"--config={ROOT / 'experiments' / 'configs' / name}.py"
    run = parse(tmp_path, path, *SMALL, experiment=experiment_name)
    experiment = image_diffusion.make_experiment(run.config, source, run.mesh)  # evaluates the sampler's shapes
    batch = place_batch(run.mesh, next(experiment.batches(0)))
    params = experiment.init(run_key(0, "init"))
    losses, metrics = jax.jit(experiment.loss)(params, batch, run_key(0, "train"))
    assert losses.shape == (16,) and np.all(np.isfinite(losses)) and np.all(losses >= 0)
    assert sum(float(mean.count.sum()) for mean in metrics.values()) == 16  # every example is in one part
    # At the start the network answers 0: a loss of about one wherever the target has unit variance.
    if run.config.loss.prediction == "eps" and not run.config.loss.learned_variance:
        np.testing.assert_allclose(losses.mean(), 1.0, atol=0.2)
    image_diffusion.make_settings(run.config)


def test_one_device_and_eight_give_the_same_noise_and_loss(tmp_path):
    run = parse(tmp_path, *SMALL)
    losses = []
    for mesh in (make_mesh(1), make_mesh(8)):
        experiment = image_diffusion.make_experiment(run.config, digits("train"), mesh)
        batch = place_batch(mesh, next(experiment.batches(0)))
        losses.append(jax.jit(experiment.loss)(experiment.init(run_key(0, "init")), batch, run_key(0, "train", 7))[0])
    assert len(losses[1].sharding.device_set) == 8
    # Example by example: the same t, eps and dropout; only the order of float32 sums differs.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short digits run with dropout, its folder, and its last weights."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    run = parse(folder, *SMALL, *SHORT)
    assert run.config.network.dropout > 0
    return folder, image_modes.train(run, digits("train"))


def test_a_run_stopped_by_ctrl_c_ends_with_the_bits_of_one_that_was_not(trained, tmp_path, monkeypatch):
    steps = []

    def advance(self):
        steps.append(self)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Loggers, "advance", advance)
        with pytest.raises(SystemExit) as stopped:
            image_modes.train(parse(tmp_path, *SMALL, *SHORT), digits("train"))
    assert stopped.value.code == 130
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["3"]
    again = image_modes.train(parse(tmp_path, *SMALL, *SHORT), digits("train"))
    assert again.step == 6
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.ema), jax.device_get(trained[1].ema))


def test_one_device_and_eight_draw_the_same_samples_with_the_same_score(trained):
    folder, _ = trained
    run, reference = parse(folder, "--mode=sample"), reference_set(digits("train"), PIXELS)
    images, scores = [], []
    for mesh in (make_mesh(1), make_mesh(8)):
        weights = image_modes.load(run._replace(mesh=mesh), digits("train"))
        images.append(image_modes.generate(run._replace(mesh=mesh), digits("train"), weights, 48, seed=0))
        scores.append(compare(images[-1], PIXELS, reference, ["fid"])["fid"].value)
    # Sums in another order: a pixel on the edge between two of the 256 levels may fall to either side.
    assert np.max(np.abs(images[0].astype(int) - images[1])) <= 1
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_samples_need_only_the_work_folder(trained, tmp_path):
    folder, _ = trained
    run = parse(folder, "--mode=sample", "--num_samples=30", f"--out={tmp_path / 'a.npz'}", "--seed=1")
    assert run.config.network.channels == 8 and run.config.sampling.num_steps == 3
    image_modes.sample(run, digits("train"))
    images = load_samples(tmp_path / "a.npz")
    assert images.shape == (30, 8, 8, 1) and (tmp_path / "a.png").exists()

    # Image i is the same in other batches and numbers, and another with another seed or sampler.
    run = parse(
        folder, "--mode=sample", "--num_samples=8", f"--out={tmp_path / 'b.npz'}", "--seed=1",
        "--config.sampling.batch_size=8",
    )  # fmt: skip
    image_modes.sample(run, digits("train"))
    np.testing.assert_array_equal(load_samples(tmp_path / "b.npz"), images[:8])
    for flag in ("--seed=2", "--sampler=ancestral"):
        run = parse(folder, "--mode=sample", "--num_samples=8", f"--out={tmp_path / 'c.npz'}", "--seed=1", flag)
        image_modes.sample(run, digits("train"))
        assert np.any(load_samples(tmp_path / "c.npz") != images[:8])
    assert parse(folder, "--mode=sample", "--steps=4").config.sampling.num_steps == 4


QUICK = (
    "--config.evaluation.likelihood_images=8",
    "--config.evaluation.bound_terms=4",
    "--config.evaluation.ode_steps=4",
)


def test_evaluation_reports_how_every_number_was_made(trained):
    folder, last = trained
    run = parse(folder, "--mode=evaluate", "--num_samples=100", *QUICK)
    image_evaluation.evaluate(run, digits("train"), digits("test"), last)
    report = json.loads((folder / "report.json").read_text())
    assert report["about"]["steps trained"] == 6
    by_name = {one["name"]: one for one in report["measurements"]}
    assert by_name["samples' Fréchet distance over theirs"]["value"] > 2  # six steps are not enough
    assert "fewer than 50000: 100 of the reference's own images" in by_name["Fréchet distance"]["note"]
    assert by_name["kernel distance"]["value"]["mean"] > 0.01
    assert sum(by_name["share of each class"]["value"].values()) == pytest.approx(1)
    assert by_name["bits/dim, variational bound"]["num_samples"] == 8
    for one in report["measurements"]:
        assert one["reference"]["fingerprint"].startswith("sha256:")
        real = one["sampler"].startswith("real")
        assert one["ema"] == (None if real else 0.995) and one["seeds"] == ([] if real else [0])
    for picture in ("curves.png", "nearest.png", "likelihood/terms.png"):
        assert (folder / picture).stat().st_size > 1000


def test_several_seeds_give_mean_least_and_largest(trained):
    folder, last = trained
    run = parse(folder, "--mode=evaluate", "--num_samples=50", "--num_seeds=3", "--metrics=fid", "--seed=5")
    image_evaluation.evaluate(run, digits("train"), digits("test"), last)
    first = json.loads((folder / "report.json").read_text())["measurements"][0]
    assert first["seeds"] == [5, 6, 7] and set(first["value"]) == {"mean", "min", "max"}
    assert first["value"]["min"] < first["value"]["mean"] < first["value"]["max"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics=fid,beauty"], "no metric 'beauty': choose of fid, kid"),
        (["--metrics=inception_score"], "classifier's probabilities"),
        (["--config.evaluation.features=vgg"], "features are 'vgg': choose inception, pixels"),
        (["--config.evaluation.features=inception", "--config.evaluation.weights=none.pth"], "none.pth is not a file"),
        (["--num_seeds=2", "--out=a.npz"], "2 seeds"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_it_samples(trained, monkeypatch, arguments, message):
    folder, last = trained
    run = parse(folder, "--mode=evaluate", "--num_samples=50", *arguments)
    monkeypatch.setattr(image_modes, "generate", lambda *_: pytest.fail("sampled"))
    with pytest.raises(ValueError, match=message):
        image_evaluation.evaluate(run, digits("train"), digits("test"), last)


def test_earlier_checkpoints_can_be_used(trained, tmp_path):
    folder, last = trained
    run = parse(folder, "--mode=sample", "--checkpoint=4")
    earlier = image_modes.load(run, digits("train"))
    assert earlier.step == 4
    differ = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (earlier.ema, last.ema)), strict=True)]
    assert np.mean(differ) > 0.9
    with pytest.raises(RunError, match="no checkpoint of step 5"):
        parse(folder, "--mode=sample", "--checkpoint=5")
    with pytest.raises(RunError, match="not for --mode=train"):
        parse(tmp_path / "run", "--checkpoint=4")
    with pytest.raises(RunError, match="leave --checkpoint out"):
        image_modes.load(run, digits("train"), ema_length=0.05)


def test_sampling_that_was_killed_goes_on(trained, tmp_path, monkeypatch):
    folder, last = trained
    run = parse(folder, "--mode=sample", "--config.sampling.batch_size=8")
    out = tmp_path / "a.npz"
    whole = image_modes.draw_samples(run, digits("train"), last, 30, 0, tmp_path / "whole.npz")
    save, saved = image_modes.save_samples, []

    def dies_at_the_third(path, images):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, images)

    monkeypatch.setattr(image_modes, "save_samples", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        image_modes.draw_samples(run, digits("train"), last, 30, 0, out)
    monkeypatch.setattr(image_modes, "save_samples", save)
    written = saved[0].read_bytes()
    saved[0].write_bytes(saved[1].read_bytes())  # seen: what is there is read, not made again
    marked = image_modes.draw_samples(run, digits("train"), last, 30, 0, out)
    np.testing.assert_array_equal(marked[:8], whole[8:16])
    np.testing.assert_array_equal(marked[8:], whole[8:])
    assert written and sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    # Samples that are there are read again; those of another way are not taken for them.
    monkeypatch.setattr(image_modes, "generate", lambda *_: pytest.fail("made again"))
    np.testing.assert_array_equal(image_modes.draw_samples(run, digits("train"), last, 30, 0, out), marked)
    other = last._replace(ema=jax.tree.map(lambda x: x + 1, last.ema))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        image_modes.draw_samples(run, digits("train"), other, 30, 0, out)


def test_sweeps_over_steps_and_averages(trained):
    folder, _ = trained
    run = parse(folder, "--mode=evaluate", "--num_samples=50", "--sweep_steps=2,4", "--sweep_ema=0.05,0.1")
    image_evaluation.sweep(run, digits("train"))
    for name, labels in (("steps", ("2", "4")), ("ema", ("0.05", "0.1"))):
        rows = json.loads((folder / "sweeps" / name / "report.json").read_text())["measurements"]
        assert [one["name"].split()[-1] for one in rows] == list(labels)
        assert rows[0]["value"] != rows[1]["value"] and (folder / "sweeps" / name / "fid.png").stat().st_size > 1000
    assert [one["ema"] for one in rows] == ["power 0.05", "power 0.1"]
    for wrong, message in ((["--sweep_ema=0.01"], "off by"), (["--sweep_steps=few"], "numbers"), ([], "what to vary")):
        with pytest.raises((RunError, ValueError), match=message):
            image_evaluation.sweep(parse(folder, "--mode=evaluate", *wrong), digits("train"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.process.num_steps=0"], "num_steps is 0"),
        (["--config.process.last=1.5"], r"beta has to lie in \(0, 1\)"),
        (["--config.process.beta=sigmoid"], "choose linear or cosine"),
        (["--config.network.multipliers=1,2,2,2,2"], "image size 8x8"),
        (["--config.data.batch_size=20"], "multiple of 8"),
        (["--config.data.batch_size=4000"], "batch_size 4000"),
        (["--config.sampling.num_steps=2000"], "num_steps is 2000"),
        (["--config.sampling.sampler=magic"], "choose ancestral"),
        (["--config.sampling.sampler=ancestral", "--config.sampling.variance=learned"], "learned_variance=True"),
        (["--config.sampling.guidance=2.0"], "class_conditional"),
        (["--config.loss.prediction=noise"], "unknown prediction 'noise'"),
        (["--config.loss.weighting=heavy"], "choose none, simple"),
        (["--config.training.sharding=some"], "choose replicated or full"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(tmp_path, arguments, message):
    folder = tmp_path / "run"
    run = parse(folder, *arguments)
    with pytest.raises((RunError, ValueError), match=message) as refused:
        image_modes.train(run, digits("train"))
    assert "\n" not in str(refused.value)
    assert not folder.exists()


def test_a_flow_refuses_the_variance_of_a_chain(tmp_path):
    config = f"--config={ROOT / 'experiments' / 'configs' / 'digits_flow'}.py"
    run = parse(tmp_path / "run", config, *SMALL, "--sampler=ancestral")
    with pytest.raises(ValueError, match="use variance='small'"):
        image_modes.train(run, digits("train"))


def test_a_set_that_is_not_prepared_is_told_in_seconds(tmp_path):
    import time

    from experiments.cifar10 import make_source

    run = parse(tmp_path / "run", f"--config.data.dir={tmp_path}", experiment="cifar10")
    begun = time.monotonic()
    with pytest.raises(ValueError, match="cifar10") as refused:
        make_source(run.config, "train")
    assert time.monotonic() - begun < 5
    assert "prepare" in str(refused.value) and "\n" not in str(refused.value)


def test_likelihood_by_both_routes_stands_in_one_report(trained):
    from experiments.image_likelihood import bits_per_dim

    folder, _ = trained
    run = parse(folder, "--mode=sample", "--num_samples=8", "--steps=5")
    bits_per_dim(run, digits("test"))
    report = json.loads((folder / "likelihood" / "report.json").read_text())
    ode, bound = (one["value"] for one in report["measurements"])
    assert bound["mean"] == pytest.approx(bound["prior"] + bound["steps"] + bound["decoder"], rel=1e-5)
    # Nothing is known after six steps, and the white noise of 256 levels costs 8 bits.
    assert ode["mean"] > 4 and bound["mean"] > 4
    assert (folder / "likelihood" / "terms.png").stat().st_size > 1000
