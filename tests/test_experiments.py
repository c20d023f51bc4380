"""Runs of images from end to end, as small as they can be: resumed, drawn, scored and swept by the modes themselves."""

import json
import os
import re
import signal
import time

import jax
import numpy as np
import pytest
from helpers import CONFIGS, SHORT, SMALL, do_call, make_call

from diffusion.data.samples import load_samples
from diffusion.data.sources import digits
from diffusion.evaluation import PIXELS, compare, extract, reference_set
from diffusion.model.config import make_settings
from diffusion.model.experiment import make_experiment, make_learner, make_model
from diffusion.model.fields import load
from diffusion.model.sampling import make_sampling
from diffusion.runs import draw as drawing
from diffusion.runs import sample as sampling
from diffusion.runs.draw import draw
from diffusion.runs.run import open_run
from diffusion.runs.sample import draw_samples
from diffusion.training import RunError, make_mesh, place_batch, run_key
from diffusion.training.loggers import Loggers
from experiments import cifar10
from experiments import digits as experiment

METHODS = ("class_conditional", "cosine_hybrid", "edm", "flow", "v_min_snr")
SPECS = [f"{data}:{','.join(methods)}" for data in ("digits", "cifar10", "folder") for methods in [(), *zip(METHODS)]]


@pytest.mark.parametrize("spec", [*SPECS, "cifar10:small", "digits:flow,class_conditional"])
def test_every_config_of_images_can_be_trained_and_sampled(spec):
    """At its full size: nothing is allocated. Their numbers are in test_spine.py."""
    config, _ = load(spec, CONFIGS)
    model = make_model(config, (8, 8, 1) if config.data.name == "digits" else (32, 32, 3), 10)
    learner = make_learner(config, model)
    assert make_settings(config).num_steps == config.training.num_steps
    assert len(make_sampling(config, model.process).grid.time) == config.sampling.num_steps + 1
    params = jax.eval_shape(learner.init, run_key(0, "init"))
    assert sum(x.size for x in jax.tree.leaves(params)) > 1e5


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_a_network_that_begins_answers_0_so_its_loss_is_that_of_the_noise(trained, name):
    lines = (trained(name) / "metrics.jsonl").read_text().splitlines()
    # The mean of eps^2 over 4 steps of 16 images of at least 64 pixels: 1 with a standard error of at most 0.02.
    assert json.loads(lines[0])["step"] == 4 and json.loads(lines[0])["loss"] == pytest.approx(1.0, abs=0.1)


def test_one_device_and_eight_give_the_same_noise_and_loss(trained):
    run = open_run(trained("digits"), num_devices=1)
    config, model, source = run.config, run.model, digits("train")
    params = jax.device_get(run.params)
    losses = []
    for mesh in (make_mesh(1), make_mesh(8)):
        made = make_experiment(config, model, source, mesh)
        batch = place_batch(mesh, next(made.batches(0)))
        losses.append(jax.jit(made.loss)(params, batch, run_key(0, "train", 7))[0])
    assert len(losses[1].sharding.device_set) == 8
    # Example by example: the same t, eps and dropout; only the order of float32 sums differs.
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)


def test_a_run_stopped_by_ctrl_c_ends_with_the_bits_of_one_that_was_not(kinds, trained, tmp_path, monkeypatch):
    whole, steps, kind = open_run(trained("digits"), num_devices=1), [], kinds["digits"]
    assert whole.config.network.dropout > 0 and whole.step == 6

    def advance(self):
        steps.append(self)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(Loggers, "advance", advance)
        with pytest.raises(SystemExit) as stopped:
            kind.do(tmp_path, *kind.flags)
    assert stopped.value.code == 130
    assert [path.name for path in (tmp_path / "checkpoints").iterdir() if path.name.isdigit()] == ["3"]
    kind.do(tmp_path, *kind.flags)
    again = open_run(tmp_path, num_devices=1)
    assert again.step == 6
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again.params), jax.device_get(whole.params))


def test_one_device_and_eight_draw_the_same_samples_with_the_same_score(trained):
    images, scores, reference = [], [], reference_set(digits("train"), PIXELS)
    for num_devices in (1, 8):
        run = open_run(trained("digits"), num_devices=num_devices)
        assert run.mesh.size == num_devices
        images.append(run.sample(48, seed=0))
        samples = extract(images[-1], PIXELS, reference)
        scores.append(compare(samples, PIXELS, reference, ["fid"])["fid"].value)
    # Sums in another order: a pixel on the edge between two of the 256 levels may fall to either side.
    assert np.max(np.abs(images[0].astype(int) - images[1])) <= 1
    assert scores[0] == pytest.approx(scores[1], rel=1e-3)


def test_samples_need_only_the_work_folder(kinds, trained, tmp_path, monkeypatch):
    kind, folder = kinds["digits"], trained("digits")
    kind = kind._replace(task=kind.task._replace(read=lambda *_: pytest.fail("the data was opened")))

    def sample(name, *arguments):
        out = tmp_path / f"{name}.npz"
        call = kind.do(folder, "--mode=sample", f"--out={out}", *arguments)
        return call, load_samples(out)

    call, images = sample("a", "--num_samples=30", "--seed=1")
    assert call.config.network.channels == 8 and call.config.sampling.num_steps == 3
    assert images.shape == (30, 8, 8, 1) and (tmp_path / "a.png").exists()

    # Image i is the same in other batches and numbers, and another with another seed or sampler.
    _, some = sample("b", "--num_samples=8", "--seed=1", "--config.sampling.batch_size=8")
    np.testing.assert_array_equal(some, images[:8])
    for name, *flags in (("c", "--seed=2"), ("d", "--seed=1", "--sampler=ancestral")):
        _, others = sample(name, "--num_samples=8", *flags)
        assert np.any(others != images[:8])
    assert kind.call(folder, "--mode=sample", "--steps=4").config.sampling.num_steps == 4


QUICK = (
    "--config.evaluation.likelihood_images=8",
    "--config.evaluation.bound_terms=4",
    "--config.evaluation.ode_steps=4",
)


def test_evaluation_reports_how_every_number_was_made(kinds, copied):
    folder = copied("digits")
    kinds["digits"].do(folder, "--mode=evaluate", "--num_samples=100", *QUICK)
    report = json.loads((folder / "report.json").read_text())
    assert report["about"]["steps trained"] == 6
    by_name = {one["name"]: one for one in report["measurements"]}
    assert by_name["samples' FID over theirs"]["value"] > 2  # six steps are not enough
    note = by_name["FID"]["note"]
    assert "100 samples are fewer than 50000: the distance of 100 of the reference's own images" in note
    assert by_name["KID"]["value"]["mean"] > 0.01
    assert sum(by_name["share of each class"]["value"].values()) == pytest.approx(1)
    assert by_name["bits/dim, variational bound"]["num_samples"] == 8
    for one in report["measurements"]:
        assert one["reference"]["fingerprint"].startswith("sha256:")
        real = one["sampler"].startswith("real")
        assert one["ema"] == (None if real else 0.995) and one["seeds"] == ([] if real else [0])
    for picture in ("curves.png", "nearest.png", "likelihood/terms.png"):
        assert (folder / picture).stat().st_size > 1000


def test_several_seeds_give_mean_least_and_largest(kinds, copied):
    folder = copied("digits")
    kinds["digits"].do(folder, "--mode=evaluate", "--num_samples=50", "--num_seeds=3", "--metrics=fid", "--seed=5")
    first = json.loads((folder / "report.json").read_text())["measurements"][0]
    assert first["seeds"] == [5, 6, 7] and set(first["value"]) == {"mean", "min", "max"}
    assert first["value"]["min"] < first["value"]["mean"] < first["value"]["max"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metrics=fid,beauty"], "unknown metric 'beauty': choose from fid, kid"),
        (["--metrics=inception_score"], "needs the probabilities of a classifier"),
        (["--config.evaluation.features=vgg"], "unknown features 'vgg': choose from inception, pixels, clip"),
        (["--config.evaluation.features=inception", "--config.evaluation.weights=none.pth"], "none.pth is not a file"),
        (["--num_seeds=2", "--out=a.npz"], "2 seeds"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_it_samples(kinds, copied, monkeypatch, arguments, message):
    folder = copied("digits")
    monkeypatch.setattr(sampling, "draw", lambda *_, **__: pytest.fail("sampled"))
    with pytest.raises((RunError, ValueError), match=message) as refused:
        kinds["digits"].do(folder, "--mode=evaluate", "--num_samples=50", *arguments)
    assert "\n" not in str(refused.value) and not (folder / "report.json").exists()


def test_earlier_checkpoints_can_be_used(kinds, trained, tmp_path):
    folder, kind = trained("digits"), kinds["digits"]
    last, earlier = open_run(folder, num_devices=1), kind.call(folder, "--mode=sample", "--checkpoint=4").open()
    assert earlier.step == 4 and last.step == 6
    differ = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (earlier.params, last.params)), strict=True)]
    assert np.mean(differ) > 0.9
    for call in (lambda: kind.call(folder, "--mode=sample", "--checkpoint=5"), lambda: open_run(folder, step=5)):
        with pytest.raises(RunError, match="no checkpoint of step 5"):
            call()
    with pytest.raises(RunError, match="not for --mode=train"):
        kind.call(tmp_path / "run", "--checkpoint=4")
    with pytest.raises(RunError, match="leave --checkpoint out"):
        kind.call(folder, "--mode=sample", "--checkpoint=4", "--ema_length=0.05").open()


def test_sampling_that_was_killed_resumes(trained, tmp_path, monkeypatch):
    run = open_run(trained("digits"), num_devices=8, changes={"sampling.batch_size": 8})
    out, index = tmp_path / "a.npz", np.arange(30)

    def made(run, out):
        return draw_samples(run, [None] * 30, index, 0, out=out)

    whole = made(run, tmp_path / "whole.npz")
    save, saved = drawing.save_samples, []

    def dies_at_the_third(path, images, label=None):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(path)
        save(path, images)

    monkeypatch.setattr(drawing, "save_samples", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        made(run, out)
    monkeypatch.setattr(drawing, "save_samples", save)
    saved[0].write_bytes(saved[1].read_bytes())  # what is there is read, not made again: these are seen
    marked = made(run, out)
    np.testing.assert_array_equal(marked[:8], whole[8:16])
    np.testing.assert_array_equal(marked[8:], whole[8:])
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []

    # Samples that are there are read again; those of other weights, or drawn in another way, are not taken for them.
    monkeypatch.setattr(sampling, "draw", lambda *_, **__: pytest.fail("made again"))
    np.testing.assert_array_equal(made(run, out), marked)
    others = (
        run._replace(params=jax.tree.map(lambda x: x + 1, run.params)),
        run.change({"sampling.num_steps": 2}),
    )
    for other in others:
        with pytest.raises(ValueError, match="holds other pictures"):
            made(other, out)
        with pytest.raises(pytest.fail.Exception, match="made again"):
            made(other, None)


def test_sweeps_over_steps_and_averages(kinds, copied):
    folder, kind = copied("digits"), kinds["digits"]
    kind.do(folder, "--mode=sweep", "--num_samples=50", "--sweep_steps=2,4", "--sweep_ema=0.05,0.1")
    for name, labels in (("steps", ("2", "4")), ("ema", ("0.05", "0.1"))):
        rows = json.loads((folder / "sweeps" / name / "report.json").read_text())["measurements"]
        assert [one["name"].split()[-1] for one in rows] == list(labels)
        assert rows[0]["value"] != rows[1]["value"] and (folder / "sweeps" / name / "score.png").stat().st_size > 1000
    assert [one["ema"] for one in rows] == ["power 0.05", "power 0.1"]
    for wrong, message in (
        (["--sweep_ema=0.01"], "off by"),
        (["--sweep_steps=few"], "numbers"),
        (["--sweep_steps=2.5"], "whole numbers"),
        (["--sweep_steps=0"], "above 0"),
        ([], "what to vary"),
    ):
        with pytest.raises((RunError, ValueError), match=message) as refused:
            kind.do(folder, "--mode=sweep", *wrong)
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.process.num_steps=0"], "num_steps is 0"),
        (["--config.process.last=1.5"], "beta has to lie in (0, 1)"),
        (["--config.process.beta=square"], "process.beta is 'square': choose from linear"),
        (["--config.network.multipliers=1,2,2,2,2"], "image size 8x8"),
        (["--config.data.batch_size=20"], "multiple of 8"),
        (["--config.data.batch_size=4000"], "data.batch_size is 4000"),
        (["--config.sampling.num_steps=2000"], "num_steps is 2000"),
        (["--config.sampling.sampler.name=magic"], "choose from ancestral"),
        (["--sampler=magic"], "choose from ancestral"),
        (["--sampler=ancestral", "--config.sampling.sampler.variance=learned"], "learned_variance=True"),
        (["--sampler=ancestral", "--config.sampling.sampler.eta=1.0"], "eta is not a field of"),
        (["--config.sampling.guidance=2.0"], "condition.name=classes"),
        (["--config.loss.prediction=noise"], "unknown prediction 'noise'"),
        (["--config.loss.weighting=heavy"], "choose from none, simple"),
        (["--config.training.sharding=some"], "choose from replicated, full"),
        (["--config.network.name=mmdit"], "channels is not a field of network.name=mmdit: it has"),
        (["--config.condition.name=words"], "needs captions"),
        (["--config=digits:flow", "--config.loss.learned_variance=True"], "process.name=ddpm"),
        (["--config=digits:flow", "--config.loss.weighting=vlb"], "process.name=ddpm"),
        (
            ["--config=digits:flow", "--sampler=ancestral", "--config.sampling.sampler.variance=large"],
            "use variance='small'",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(tmp_path, arguments, message):
    folder = tmp_path / "run"
    given = {argument.partition("=")[0] for argument in arguments}
    small = [flag for flag in (*SMALL, *SHORT) if flag.partition("=")[0] not in given]
    with pytest.raises((RunError, ValueError), match=re.escape(message)) as refused:
        do_call(experiment.TASK, "digits", folder, *small, *arguments, num_devices=8)
    assert "\n" not in str(refused.value)
    assert not folder.exists()


def test_a_set_that_is_not_prepared_is_reported_in_seconds(tmp_path):
    call = make_call(cifar10.TASK, "cifar10", tmp_path / "run", f"--config.data.dir={tmp_path}")
    begun = time.monotonic()
    with pytest.raises(ValueError, match="cifar10") as refused:
        call.task.read(call.config, "train")
    assert time.monotonic() - begun < 5
    assert "prepare" in str(refused.value) and "\n" not in str(refused.value)


def test_likelihood_by_both_routes_is_in_one_report(kinds, copied):
    folder = copied("digits")
    kinds["digits"].do(folder, "--mode=likelihood", "--num_samples=8", "--steps=5")
    report = json.loads((folder / "likelihood" / "report.json").read_text())
    ode, bound = (one["value"] for one in report["measurements"])
    assert bound["mean"] == pytest.approx(bound["prior"] + bound["steps"] + bound["decoder"], rel=1e-5)
    # Nothing is known after six steps, and the white noise of 256 levels costs 8 bits.
    assert ode["mean"] > 4 and bound["mean"] > 4
    assert (folder / "likelihood" / "terms.png").stat().st_size > 1000


def test_a_program_is_compiled_once_for_all_calls_of_a_run(trained):
    run = open_run(trained("digits"), num_devices=1)
    index = np.arange(8)
    first = draw(run.painter, [None] * 8, index, 0)
    (program,) = run.programs.values()
    np.testing.assert_array_equal(draw(run.painter, [None] * 8, index, 0), first)
    assert list(run.programs.values()) == [program] and program._cache_size() == 1
    run.sample(8, num_steps=2)
    assert len(run.programs) == 2  # another grid is another program
