"""Runs of the methods that draw in one to four steps: trained, resumed, opened, drawn and scored as any other."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS, SHORT, SMALL, SMALL_TEXT, do_call, make_call

from diffusion.model.experiment import make_learner, make_model
from diffusion.model.fields import change, load
from diffusion.model.losses import LOSSES
from diffusion.model.model import steered
from diffusion.model.sampling import make_sampling
from diffusion.runs.begin import asked_origin, find_origin, first_weights
from diffusion.runs.run import open_run
from diffusion.runs.train import describe
from diffusion.training import RunError, batch_sharding, make_mesh, on_mesh, run_key
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
TINY = {
    "network.channels": 8,
    "network.multipliers": (1,),
    "network.num_blocks": 1,
    "network.attention_resolutions": (8,),
    "network.num_groups": 4,
    "data.batch_size": 16,
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
    report = json.loads((tmp_path / "parts" / "report.json").read_text())
    assert "Fréchet distance" in json.dumps(report, ensure_ascii=False)


def test_a_mean_flow_begins_as_the_flow_that_it_is_given(flow, tmp_path):
    flags = (*flags_of("mean_flow", flow), f"--init_from={flow}", "--config.training.num_steps=1")
    call = make_call(digits.TASK, "digits:mean_flow", tmp_path / "new", *flags, num_devices=1)
    source = call.task.read(call.config, "train")
    origin = find_origin(flow)
    model, _ = describe("digits", call.config, source, None, (), origin)
    params, about = first_weights(call.config, model, origin, call.mesh)
    teacher = open_run(flow, num_devices=1)
    assert about["begun"]["folder"] == "flow" and params.keys() == teacher.params.keys()
    assert set(params["params"]) - set(teacher.params["params"]) == {"interval_1", "interval_2"}
    x, t = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.linspace(0.2, 0.9, 4)
    expected = jax.jit(teacher.model.network.apply)(teacher.params, x, t)
    found = jax.jit(model.network.apply)(params, x, t, next_time=t / 2)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_policy_begins_as_its_teacher(flow, tmp_path):
    call = make_call(digits.TASK, "digits:imitation", tmp_path / "new", *flags_of("imitation", flow), num_devices=1)
    source = call.task.read(call.config, "train")
    origin = asked_origin(call.flags, call.config)
    assert origin is not None
    model, description = describe("digits", call.config, source, None, (), origin)
    params, about = first_weights(call.config, model, origin, call.mesh)
    assert description["frozen"] == ["teacher"] and about["teacher"]["folder"] == "flow"
    teacher = open_run(flow, num_devices=1)
    equal(params["teacher"]["network"], teacher.params)
    x, t = jax.random.normal(jax.random.key(0), (4, 8, 8, 1)), jnp.full(4, 0.5)
    student = steered(model, make_sampling(call.config, model.process), params, {}, {})
    values = jax.jit(lambda: student(x, t, 0.5 * t))()
    assert values.shape == (4, 3, 8, 8, 1)
    expected = np.asarray(teacher.denoise(x, 0.5))
    for number in range(3):
        np.testing.assert_allclose(values[:, number], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (
            "digits:flow",
            ["--sampler=mean_flow"],
            "mean_flow does not draw with what loss.name=denoising trains",
        ),
        ("digits:flow", ["--sampler=policy"], "does not draw with what loss.name=denoising trains"),
        ("digits:consistency", ["--sampler=mean_flow"], "does not draw with what loss.name=consistency trains"),
        ("digits:mean_flow", ["--config.process.name=edm", "--config.sampling.grid=karras"], "needs process.name=flow"),
        ("digits:mean_flow", ["--config.loss.omega=2.0"], "loss.omega at 1 and loss.kappa at 0"),
        ("digits:imitation", [], "loss.name=imitation learns from a trained model: name its work folder"),
        ("digits:progressive", ["--config.loss.teacher=nowhere"], "--config.loss.teacher=nowhere: nowhere holds no"),
        ("digits:imitation", ["{teacher}", "--sampler=euler"], "choose from policy"),
        (
            "digits:imitation",
            ["{teacher}", "--steps=3"],
            "the policy was trained for 4 steps of sampling.grid",
        ),
        ("digits:imitation", ["{teacher}", "--config.sampling.guidance=2.0"], "a policy has its teacher's already"),
        ("digits:imitation", ["{teacher}", "--config.sampling.sampler.shift=2.0"], "trained with loss.shift=1"),
        ("digits:imitation", ["{teacher}", "--config.loss.guidance=2.0"], "sampling.guidance=2 needs a condition"),
        ("digits:imitation,class_conditional", ["{teacher}", "--config.sampling.guidance=1.0"], "other conditions"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(flow, tmp_path, config, flags, message):
    flags = [flag.format(teacher=f"--config.loss.teacher={flow}") for flag in flags]
    with pytest.raises((RunError, ValueError), match=message) as refused:
        call = make_call(digits.TASK, config, tmp_path / "new", *SMALL, *flags, num_devices=1)
        source = call.task.read(call.config, "train")
        model, _ = describe("digits", call.config, source, None, (), asked_origin(call.flags, call.config))
        make_sampling(call.config, model.process)
    assert "\n" not in str(refused.value) and not (tmp_path / "new").exists()


def test_its_loss_is_the_same_on_one_device_and_on_eight():
    config = change(load("digits:mean_flow,class_conditional", CONFIGS)[0], {**TINY, "loss.kappa": 0.5})
    model = make_model(config, (8, 8, 1), 10)
    learner = make_learner(config, model)
    params = jax.jit(learner.init)(run_key(0, "init"))
    params = jax.tree.map(lambda x: x + 0.05, params)
    random = np.random.default_rng(0)
    batch = {"image": random.integers(0, 256, (16, 8, 8, 1), np.uint8), "label": np.arange(16, dtype=np.int32) % 10}
    found = []
    for count in (1, 8):
        mesh = make_mesh(count)
        placed = jax.device_put(batch, batch_sharding(mesh))
        loss = jax.jit(on_mesh(mesh, lambda params, batch: learner.loss(params, batch, run_key(0, "train"))))
        losses, metrics = loss(params, placed)
        found.append((np.asarray(losses), np.asarray(metrics["error"].total)))
    for one, eight in zip(*found, strict=True):
        np.testing.assert_allclose(one, eight, rtol=1e-4)


def test_scenes_are_drawn_of_words_in_few_steps(tmp_path):
    """An MM-DiT that reads words: guided MeanFlow from scratch, and a policy of a guided flow."""
    tiny = (*SMALL_TEXT, *FAST, *(flag for flag in SHORT if "sampling" not in flag), "--config.data.num_examples=64")
    do_call(scenes.TASK, "scenes", tmp_path / "flow", *tiny, "--config.sampling.num_steps=3")
    teacher = f"--config.loss.teacher={tmp_path / 'flow'}"
    do_call(scenes.TASK, "scenes:mean_flow", tmp_path / "mean_flow", *tiny)
    do_call(scenes.TASK, "scenes:imitation", tmp_path / "imitation", *tiny, teacher, "--config.loss.num_values=3")
    shutil.rmtree(tmp_path / "flow")
    for name, num_steps in (("mean_flow", 1), ("imitation", 4)):
        run = open_run(tmp_path / name, num_devices=1)
        drawn = run.sample(prompts=["a red two", "a blue four"], seed=0, num_steps=num_steps)
        assert drawn.shape == (2, 16, 16, 3) and not np.array_equal(*drawn)
    assert run.model.frozen == ("teacher",) and set(run.params["teacher"]) == {"network", "text"}
    assert run.stored["begun"]["folder"] == "flow" and run.stored["teacher"]["config"]["sampling"]["guidance"] == 3.0
