"""Runs of the methods that draw in one to four steps: trained, resumed, opened, drawn and scored as any other."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS, SHORT, SMALL, SMALL_TEXT, do_call, make_call

from diffusion.demo.controls import properties_of
from diffusion.demo.engine import Engine
from diffusion.demo.requests import Limits, Request
from diffusion.model.experiment import abstract_batch, make_learner, make_model, with_steps
from diffusion.model.fields import change, load
from diffusion.model.losses import LOSSES
from diffusion.model.model import make_generate, steered
from diffusion.model.sampling import make_sampling
from diffusion.model.warnings import warnings_of
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


def flags_of(method, teacher):
    """Returns the flags of a small run of a method; the sampler steps as its config has it."""
    short = [flag for flag in SHORT if "sampling.num_steps" not in flag]
    return (
        *SMALL,
        *short,
        *FAST,
        *METHODS[method],
        *([f"--config.loss.teacher={teacher}"] if method in DISTILLED else []),
    )


def test_every_loss_is_run():
    assert {"denoising", *METHODS} == set(LOSSES)


@pytest.fixture(scope="module")
def student(flow, tmp_path_factory):
    """student(method) -> the folder of a run of a method, made once, whose teacher is no longer there."""
    made = {}

    def folder(method):
        if method not in made:
            teacher = shutil.copytree(flow, tmp_path_factory.mktemp("teacher") / "flow")
            made[method] = tmp_path_factory.mktemp(method) / "run"
            do_call(digits.TASK, f"digits:{method}", made[method], *flags_of(method, teacher))
            shutil.rmtree(teacher)  # a checkpoint is the whole experiment
        return made[method]

    return folder


@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_opens_and_draws(student, method):
    metrics = [json.loads(line) for line in (student(method) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics][-1] == 6 and all(np.isfinite(line["error"]) for line in metrics)
    images = open_run(student(method), num_devices=1).sample(8, seed=1, num_steps=1)
    assert images.shape == (8, 8, 8, 1) and len({image.tobytes() for image in images}) == 8


def test_a_student_resumes_to_the_bit_without_its_teacher(student, tmp_path):
    folder = shutil.copytree(student("imitation"), tmp_path / "run")
    shutil.rmtree(folder / "checkpoints" / "6")
    teacher = json.loads((folder / "config.json").read_text())["config"]["loss"]["teacher"]
    do_call(digits.TASK, "digits:imitation", folder, *flags_of("imitation", teacher))
    equal(open_run(folder, num_devices=1).params, open_run(student("imitation"), num_devices=1).params)


@pytest.mark.parametrize("method", DISTILLED)
def test_a_student_is_handed_on_without_its_teacher(student, method, tmp_path):
    """Nor a trace of where that was; it draws the same pictures."""
    artefact, run = tmp_path / "artefact", open_run(student(method), num_devices=1)
    do_call(digits.TASK, f"digits:{method}", student(method), "--mode=export", f"--weights={artefact}")
    stored = (artefact / "published.json").read_text()
    assert json.loads(stored)["frozen"] == [] and "/" not in json.loads(stored)["config"]["loss"]["teacher"]
    again = open_run(artefact, num_devices=1)
    equal(again.params, run.params["network"])
    np.testing.assert_array_equal(again.sample(4, seed=1), run.sample(4, seed=1))


def test_what_depends_on_the_step_is_told_it_where_a_run_resumes():
    def batches():
        while True:
            yield {"label": np.zeros(3, np.int32)}

    steps = with_steps(batches(), 4)
    np.testing.assert_array_equal([next(steps)["step"] for _ in range(2)], [[4] * 3, [5] * 3])


def test_a_policy_is_scored_as_any_other(student, tmp_path):
    folder = shutil.copytree(student("imitation"), tmp_path / "run")
    do_call(digits.TASK, "digits", folder, "--mode=evaluate", "--num_samples=24", "--metrics=fid")
    assert "FID" in json.loads((folder / "report.json").read_text())["measurements"][0]["name"]


@pytest.mark.parametrize("method", ["continuous_consistency", "imitation"])
def test_bits_per_dim_of_what_follows_no_ode_are_refused(student, method):
    with pytest.raises(ValueError, match=r"^bits/dim are of the ODE that .* leave bits_per_dim out$"):
        do_call(digits.TASK, "digits", student(method), "--mode=likelihood", "--num_samples=2")
    assert not (student(method) / "likelihood").exists()


@pytest.mark.parametrize("method", ["mean_flow", "consistency", "imitation"])
def test_the_modes_that_use_a_run_draw_in_few_steps(student, tmp_path, method):
    """A flow map, a consistency function, a policy: none of them is a denoiser of one time."""

    def do(mode, *flags):
        out = tmp_path / f"{mode}.npz"
        do_call(digits.TASK, "digits", student(method), f"--mode={mode}", f"--out={out}", "--num_samples=2", *flags)
        return dict(np.load(out))

    arrays = do("img2img", "--strength=0.5")
    assert arrays["arr_0"].shape == (12, 8, 8, 1) and len({image.tobytes() for image in arrays["arr_0"]}) == 12
    arrays = do("inpaint", "--resample=2")
    rows, known = arrays["arr_0"].reshape(2, 6, 8, 8, 1), arrays["known"]
    assert np.array_equal((rows == arrays["image"][:, None])[:, :, known], np.ones((2, 6, 32), bool))
    assert not np.array_equal(rows[0, 0], rows[0, 1])
    rows = do("interpolate", "--strength=0.5")["arr_0"].reshape(2, 9, 8, 8, 1)
    assert not np.array_equal(rows[:, 0], rows[:, 8])
    rows = do("progressive")["arr_0"]
    num_steps = 4 if method == "imitation" else 2
    assert len(rows) == 2 * num_steps  # x_0_hat at every step but the last, and the sample


@pytest.mark.parametrize("method", ["mean_flow", "imitation"])
def test_the_prompt_page_draws_and_shows_them(student, method):
    run = open_run(student(method), num_devices=1)
    engine = Engine({"student": run})
    try:
        *shown, last = engine.submit(Request(seed=3, num_pictures=2)).updates(300)
        with pytest.raises(ValueError, match="guidance"):
            engine.submit(Request(guidance=2.0))
        if method == "imitation":
            image, mask = np.full((8, 8, 1), 200, np.uint8), np.arange(8)[None].repeat(8, 0) > 3
            *_, filled = engine.submit(Request(image=image, mask=mask)).updates(300)
            assert filled.pictures is not None
            assert np.all(filled.pictures[0][~mask] == 200) and np.any(filled.pictures[0][mask] != 200)
            with pytest.raises(ValueError, match="the policy was trained for 1 or 2 or 4 steps"):
                engine.submit(Request(num_steps=3))
    finally:
        engine.close()
    np.testing.assert_array_equal(last.pictures, run.sample(2, seed=3))
    assert all(update.previews.shape == (2, 8, 8, 1) for update in shown if update.previews is not None)
    controls = properties_of(run, Limits(), ())
    assert not controls["guidance"]["visible"] and controls["sampler"]["value"] in controls["sampler"]["choices"]
    assert method != "imitation" or controls["sampler"]["choices"] == ["policy"]


@pytest.mark.parametrize("method", ["mean_flow", "continuous_consistency", "consistency"])
def test_few_digits_are_reported_where_the_network_is_differentiated(method):
    """As is a factor on time; consistency in pairs differentiates nothing."""
    own = load(f"digits:{method}", CONFIGS)[0]
    asked = {"network.dtype": "bf16"} | ({"process.time_scale": 1000.0} if method != "consistency" else {})
    found = [warnings_of(config, make_model(config, (8, 8, 1), 10)) for config in (own, change(own, asked))]
    assert found[0] == [] and len(found[1]) == (0 if method == "consistency" else 2)
    for line, start in zip(found[1], ("network.dtype=bfloat16: ", "process.time_scale=1000 is a factor"), strict=False):
        assert line.startswith(start) and f"loss.name={method}" in line


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


def test_scenes_are_drawn_of_words_by_a_policy(copied, tmp_path):
    """An MM-DiT that reads words, as its guided teacher does."""
    flow = copied("scenes")
    tiny = (*SMALL_TEXT, *FAST, *(flag for flag in SHORT if "sampling" not in flag), "--config.data.num_examples=64")
    tiny = (*tiny, "--config.optimizer.name=adam", "--config.loss.num_values=3")
    do_call(scenes.TASK, "scenes:imitation", tmp_path / "imitation", *tiny, f"--config.loss.teacher={flow}")
    shutil.rmtree(flow)
    run = open_run(tmp_path / "imitation", num_devices=1)
    drawn = run.sample(prompts=["a red two", "a blue four"], seed=0, num_steps=4)
    assert drawn.shape == (2, 16, 16, 3) and not np.array_equal(*drawn)
    assert run.model.frozen == ("teacher",) and set(run.params["teacher"]) == {"network", "text"}
    assert run.stored["begun"]["folder"] == "scenes" and run.stored["teacher"]["config"]["sampling"]["guidance"] == 3.0


def test_mean_flow_of_scenes_is_guided_to_the_words():
    """Its loss and its jumps are traced, not compiled."""
    config = change(load("scenes:mean_flow", CONFIGS)[0], {"network.width": 16, "network.num_heads": 2})
    model = make_model(config, (16, 16, 3), vocabulary=["a", "red", "two"])
    learner, batch = make_learner(config, model), abstract_batch(config, model)
    key = jax.eval_shape(lambda: run_key(0, "train"))
    params = jax.eval_shape(learner.init, key)
    losses, metrics = jax.eval_shape(learner.loss, params, batch, key)
    assert model.objective.guided and losses.shape == (32,) and "error" in metrics
    generate = make_generate(model, make_sampling(config, model.process), make_mesh(1))
    rows = jax.ShapeDtypeStruct((4, *batch["text"].shape[1:]), batch["text"].dtype)
    images, _ = jax.eval_shape(generate, params, rows, rows, np.uint32(0), np.arange(4))
    assert images.shape == (4, 16, 16, 3)
