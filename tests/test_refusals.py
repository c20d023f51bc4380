"""What cannot work is refused before anything is computed or written; what changes nothing is reported."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS, make_call
from PIL import Image
from published_folders import write_folder
from safetensors.numpy import load_file, save_file

from diffusion import training
from diffusion.files import check_file, check_folder
from diffusion.model.config import make_settings, plain
from diffusion.model.experiment import abstract_batch, make_learner, make_model
from diffusion.model.fields import load_config
from diffusion.model.processes import make_process
from diffusion.model.sampling import make_sampling
from diffusion.model.warnings import warnings_of
from diffusion.runs import check, edit, modes, sample
from diffusion.runs.command_line import run_to_end
from diffusion.runs.draw import draw
from diffusion.runs.report import finish_run
from diffusion.runs.run import open_run
from diffusion.training import Checkpoints, RunError, TrainState, settings
from diffusion.training.dry_run import Findings
from experiments import captions, cifar10, clip, digits, folder

CLIP: Any = {"modes": clip.MODES, "define_flags": clip.define_flags}


def do(call):
    """Does what a call asks for."""
    modes.MODES[call.flags.mode](call)


def of(spec, **changes):
    """Returns the config of `spec` with fields changed: process__num_steps=100."""
    return load_config(spec, {name.replace("__", "."): value for name, value in changes.items()}, CONFIGS)


def listing(folder):
    """Returns every path under a folder, with its time."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def refused(tmp_path):
    """refused(message, work) checks that work() is refused in a line of that message, and that no file changes."""

    def one(message, work):
        before = listing(tmp_path)
        with pytest.raises((RunError, ValueError), match=message) as error:
            work()
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
        assert listing(tmp_path) == before

    return one


class Begun(Exception):
    """What would be compiled is begun: a training, with its settings and experiment, or a drawing."""

    settings: Any
    experiment: Any


@pytest.fixture
def untrained(monkeypatch):
    """What would train raises `Begun` instead, after the check of its settings."""

    def train(experiment, given, *, mesh, **more):
        settings.check_settings(given, experiment, mesh)
        begun = Begun()
        begun.settings, begun.experiment = given, experiment
        raise begun

    monkeypatch.setattr(training, "train", train)


# --- numbers that are not finite


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("digits", ("--config=digits:flow", "--config.loss.prediction=eps", "--config.sampling.threshold=none")),
        ("digits", ("--config.process.zero_terminal_snr=True",)),
        ("scenes", ("--config.loss.prediction=eps",)),
        ("captions", ("--config.loss.prediction=eps", "--config.sampling.grid=log_snr")),
    ],
)
def test_eps_is_refused_where_sampling_begins_with_noise_alone(kinds, kind, changes, tmp_path, untrained, refused):
    call = kinds[kind].call(tmp_path / "run", *kinds[kind].flags, *changes)
    refused("loss.prediction=eps holds no image where sampling begins, .* predict v, velocity or x_0", lambda: do(call))
    with pytest.raises(Begun):  # what holds one there
        do(kinds[kind].call(tmp_path / "run", *kinds[kind].flags, *changes, "--config.loss.prediction=v"))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_guidance_is_finite(kinds, trained, tmp_path, value, refused):
    flag, line = f"--config.sampling.guidance={value}", f"sampling.guidance is {value}: give a finite number"
    kind = kinds["digits"]
    refused(line, lambda: do(kind.call(trained("digits"), "--mode=sample", flag, f"--out={tmp_path / 'a.npz'}")))
    refused(line, lambda: do(kind.call(tmp_path / "run", *kind.flags, flag)))


def broken(sampler: Any, denoise: Any, grid: Any, keys: Any, eps: Any) -> Any:
    """Returns samples of which the second and the third hold one number each that is not finite."""
    return eps.at[1, 0, 0, 0].set(jnp.nan).at[2, 7, 7, 0].set(-jnp.inf)


def test_samples_that_are_not_finite_are_counted(trained, tmp_path, refused):
    run = open_run(trained("digits"), num_devices=1)
    asked: Any = ([None] * 4, np.arange(4), 0)
    refused(r"2 of 4 samples are not finite \(NaN or infinity\)", lambda: draw(run.painter, *asked, use=broken))
    # As pictures these would be black: NaN becomes 0.
    nothing = run._replace(params=jax.tree.map(lambda x: x * jnp.nan, run.params))
    refused("4 of 4 samples are not finite", lambda: nothing.sample(4))
    refused("4 of 4 samples", lambda: sample.draw_samples(nothing, *asked, out=tmp_path / "a.npz"))


def test_weights_that_are_not_finite_are_not_opened(copied, refused):
    folder = copied("digits")
    run = open_run(folder, num_devices=1)
    learner, batch = make_learner(run.config, run.model), abstract_batch(run.config, run.model)
    abstract = training.abstract_train_state(learner, make_settings(run.config), run.mesh, batch)
    with Checkpoints(folder / "checkpoints") as checkpoints:
        state: Any = checkpoints.restore(abstract)
        state.ema["params"]["conv_in"]["bias"] *= jnp.nan
        checkpoints.save(7, state, checkpoints.description())
    line = f"the averaged weights in {folder} cannot be used: 8 of its weights are not finite, .*params/conv_in/bias"
    refused(line, lambda: open_run(folder, num_devices=1))
    assert open_run(folder, step=6, num_devices=1).step == 6


def test_weights_that_are_not_finite_are_not_imported(tmp_path, refused):
    folder = write_folder(tmp_path / "theirs")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["conv_in.bias"][2] = np.nan
    save_file(weights, path)
    call = make_call(cifar10.TASK, "cifar10", tmp_path / "run", "--mode=import", f"--weights={folder}")
    refused(r"conv_in\.bias holds 1 numbers of 4 that are not finite", lambda: do(call))


# --- fields that only training may set


@pytest.mark.parametrize("mode", ["sample", "evaluate", "img2img", "export"])
def test_what_was_trained_is_not_another_run_afterwards(kinds, trained, mode, refused):
    kind, folder = kinds["digits"], trained("digits")
    for change, difference in [
        ("process.num_steps=100", r"process\.num_steps: 1000 -> 100"),
        ("loss.prediction=v", r"loss\.prediction: eps -> v"),
        ("training.ema_decay=0.9999", r"training\.ema_decay: 0\.995 -> 0\.9999"),
        ("process=flow", r"process\.beta: linear -> \(none\); .*process\.name: ddpm -> flow"),
        ("seed=1", "seed: 0 -> 1"),
    ]:
        line = rf"{folder} was trained with another config \(there -> asked\): {difference}"
        refused(line, lambda change=change: kind.call(folder, f"--mode={mode}", f"--config.{change}"))
    free = ("--config.sampling.guidance=2", "--config.evaluation.num_samples=7", "--config.data.dir=elsewhere")
    config = kind.call(folder, f"--mode={mode}", *free, "--steps=4").config
    assert (config.sampling.num_steps, config.sampling.guidance, config.data.dir) == (4, 2.0, "elsewhere")


@pytest.mark.parametrize("mode", ["evaluate", "score", "export"])
def test_neither_is_a_clip(tmp_path, mode, refused):
    folder = tmp_path / "run"
    with Checkpoints(folder / "checkpoints") as checkpoints:  # of which only the description is read
        state = TrainState(jnp.zeros((), jnp.int32), {}, {}, {}, {}, {})
        checkpoints.save(0, state, {"experiment": "clip", "config": plain(of("clip"))})
    call = lambda *more: make_call(clip.TASK, "clip", folder, f"--mode={mode}", *more, **CLIP)  # noqa: E731
    refused(r"network\.projection: 512 -> 8", lambda: call("--config.network.projection=8"))
    refused(r"training\.ema_decay: 0\.995 -> 0\.5", lambda: call("--config.training.ema_decay=0.5"))
    assert call("--config.evaluation.num_sets=3").config.evaluation.num_sets == 3


# --- seeds


@pytest.mark.parametrize("seed", [2**32, -1])
def test_a_seed_is_checked_wherever_it_is_given(kinds, trained, tmp_path, seed, refused):
    line = f"seed is {seed}: it must be 0 to 4294967295"
    kind, folder = kinds["digits"], trained("digits")
    refused(line, lambda: kind.call(tmp_path / "run", f"--config.seed={seed}"))
    for mode in ("sample", "img2img", "evaluate", "train"):
        refused(line, lambda mode=mode: kind.call(folder, *kind.flags, f"--mode={mode}", f"--seed={seed}"))
    refused(line, lambda: kinds["captions"].call(tmp_path / "run", "--mode=sample", f"--seed={seed}"))
    refused(line, lambda: make_call(clip.TASK, "clip", tmp_path / "run", f"--config.seed={seed}", **CLIP))
    refused(line, lambda: open_run(folder, num_devices=1).sample(2, seed=seed))


def test_every_seed_of_several_is_checked(kinds, trained, monkeypatch, refused):
    monkeypatch.setattr("diffusion.runs.evaluate.draw_samples", None)
    flags = ("--mode=evaluate", "--seed=4294967295", "--num_seeds=2", "--num_samples=24")
    refused("seed is 4294967296", lambda: do(kinds["digits"].call(trained("digits"), *flags)))


# --- chains that do not end in noise


def warned(config, shape=(8, 8, 1), num_classes=10):
    """Returns the warnings of a config."""
    return warnings_of(config, make_model(config, shape, num_classes))


def test_a_chain_that_does_not_end_in_noise_is_reported():
    (line,) = warned(of("digits", process__num_steps=100))
    assert "process.num_steps=100 ends at alpha_bar_T = 0.36" in line
    assert "process.last" in line and "process.beta=linear_for_steps" in line
    for fine in ({}, {"process__beta": "cosine"}, {"process__beta": "linear_for_steps"}, {"process__last": 0.2}):
        config = of("digits", **fine) if not fine else of("digits", process__num_steps=100, **fine)
        assert warned(config) == [], fine
    for method in ("flow", "edm", "cosine_hybrid", "v_min_snr"):
        assert warned(of(f"digits:{method}")) == []


def test_training_and_check_report_it(kinds, tmp_path, untrained, monkeypatch, caplog, capsys):
    kind, short = kinds["digits"], "--config.process.num_steps=100"
    with pytest.raises(Begun):
        do(kind.call(tmp_path / "run", *kind.flags, short))
    assert [record.getMessage().split(" = ")[0] for record in caplog.records] == [
        "process.num_steps=100 ends at alpha_bar_T"
    ]
    nothing: Any = None
    monkeypatch.setattr(check, "dry_run", lambda *given, **more: Findings([], [], nothing))
    do(kind.call(tmp_path / "run", *kind.flags, short, "--mode=check", "--config.training.num_previews=0"))
    shown = capsys.readouterr()
    assert "warning: process.num_steps=100 ends at alpha_bar_T" in shown.err and "1 warning(s)" in shown.out


# --- guidance


@pytest.mark.parametrize(
    ("spec", "interval"), [("digits", (0.3, 5.0)), ("digits:flow", (0.3, 5.0)), ("digits:edm", (0.28, 2.9))]
)
def test_guidance_acts_exactly_at_the_steps_whose_noise_over_signal_is_within_its_interval(spec, interval):
    config = of(spec, sampling__guidance=3.0, sampling__guidance_interval=interval, sampling__threshold="none")
    sampling = make_sampling(config, make_process(config))
    signal, noise, time = (np.asarray(field)[:-1] for field in sampling.grid)
    with np.errstate(divide="ignore"):
        within = (noise / signal >= interval[0]) & (noise / signal <= interval[1])
    assert 2 < within.sum() < len(within) - 2
    one, zero = (lambda x, time, value=value: jnp.full_like(x, value) for value in (1.0, 0.0))
    pair = lambda x_t, time: (one(x_t, time), zero(x_t, time))  # noqa: E731
    found: Any = jax.vmap(lambda step: sampling.guide(one, pair)(jnp.zeros((1, 1)), step))(jnp.asarray(time))
    np.testing.assert_array_equal(np.ravel(found), np.where(within, 3.0, 1.0))


@pytest.mark.parametrize(
    ("interval", "line"),
    [
        ((0.3,), "guidance_interval is .*: give the least and the largest noise / signal"),
        ((5.0, 0.3), "give the least and the largest"),
        ((1.0, 2.0, 3.0), "give the least and the largest"),
        ((1e4, 1e5), "no step of the grid has noise / signal within it, they have .* to 157"),
        ((float("nan"), 1.0), "give the least and the largest"),
    ],
)
def test_intervals_without_a_step_are_refused(interval, line, refused):
    config = of("digits", sampling__guidance=3.0, sampling__guidance_interval=interval)
    refused(line, lambda: make_sampling(config, make_process(config)))


def test_a_number_for_an_interval_is_refused(tmp_path, refused):
    def build(value):
        flag = f"--config.sampling.guidance_interval={value}"
        config = make_call(digits.TASK, "digits:class_conditional", tmp_path / "run", flag).config
        make_sampling(config, make_process(config))

    for value in ("0.3", "(0.3,)"):
        refused("give the least and the largest", lambda value=value: build(value))


def test_guidance_that_changes_nothing_is_reported():
    unseen = "sampling.guidance=1.5 leads away from no condition, which condition.dropout=0 never shows in training"
    assert warned(of("digits:class_conditional", condition__dropout=0.0)) == [unseen]
    assert warned(of("digits:class_conditional", condition__dropout=0.0, sampling__guidance=1.0)) == []
    assert warned(of("digits:class_conditional")) == []
    (line,) = warned(of("digits", sampling__guidance_interval=(0.3, 5.0)))
    assert line == "sampling.guidance_interval changes nothing at sampling.guidance=1"


@pytest.mark.parametrize("mode", ["sample", "img2img", "progressive"])
def test_a_negative_prompt_without_guidance_is_reported(kinds, trained, mode, monkeypatch, tmp_path, caplog):
    def make_generate(*given):
        raise Begun

    monkeypatch.setattr("diffusion.runs.draw.make_generate", make_generate)
    asked = (f"--mode={mode}", "--prompt=a red two", "--num_samples=1", f"--out={tmp_path / 'a.npz'}")
    for negative, scale, expected in (("a blue two", 1, 1), ("a blue two", 3, 0), (None, 1, 0)):
        caplog.clear()
        flags = (f"--negative_prompt={negative}",) if negative else ()
        flags = (*flags, f"--config.sampling.guidance={scale}")
        with pytest.raises(Begun):
            do(kinds["scenes"].call(trained("scenes"), *asked, *flags))
        lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(lines) == expected and all("negative prompt changes nothing" in line for line in lines), lines


# --- zeros


class Zero(NamedTuple):
    """A field at 0: the line that refuses it, or what it then is where it means none."""

    kind: str
    field: str
    line: str = ""


ZEROS = [
    Zero("digits", "training.preview_every"),
    Zero("digits", "training.log_every"),
    Zero("digits", "training.checkpoint_every"),
    Zero("digits", "training.snapshot_every"),
    Zero("digits", "training.keep_every"),
    Zero("digits", "training.num_previews"),
    Zero("digits", "optimizer.warmup_steps"),
    Zero("digits", "evaluation.bound_terms"),
    Zero("captions", "condition.size"),
    Zero("digits", "training.num_steps", "training.num_steps is 0: it must be at least 1"),
    Zero("digits", "training.keep_newest", "training.keep_newest is 0: it must be at least 1"),
    Zero("digits", "training.accumulate", "training.accumulate is 0: it must be at least 1"),
    Zero("digits", "sampling.batch_size", "sampling.batch_size is 0: it must be at least 1"),
    Zero("digits", "sampling.num_steps", "num_steps is 0"),
    Zero("digits", "data.batch_size", "batch_size is 0"),
    Zero("digits", "data.image_size"),
    Zero("digits", "process.num_steps", "num_steps is 0"),
    Zero("digits", "network.channels", "network.channels is 0"),
    Zero("digits", "network.num_blocks", "network.num_blocks is 0"),
    Zero("digits", "network.num_groups", "network.num_groups is 0"),
    Zero("digits", "optimizer.clip_norm", "optimizer.clip_norm is 0"),
    Zero("digits", "evaluation.num_samples", "evaluation.num_samples is 0: it must be at least 1"),
    Zero("digits", "evaluation.ode_steps", "ode_steps is 0"),
    Zero("digits", "evaluation.likelihood_images", "likelihood_images is 0"),
    Zero("captions", "network.depth", "network.depth is 0"),
    Zero("captions", "network.patch", "network.patch is 0"),
    Zero("captions", "network.table_size", "make table_size larger"),
    Zero("digits", "network.attention_resolutions", "network.attention_resolutions is \\(0,\\): it must be at least 1"),
    Zero("captions", "condition.length", "condition.length is 0"),
    Zero("captions", "evaluation.num_samples", "evaluation.num_samples is 0: it must be at least 1"),
    Zero("clip", "text.length", "a length of 0 tokens is too short"),
    Zero("clip", "text.size", "text.size is 0: it must be at least 258"),
    Zero("clip", "data.image_size", "a canvas of 0 pixels"),
    Zero("clip", "data.num_examples", "data.num_examples is 0: it must be at least 1"),
    Zero("clip", "network.image.patch_size", "patch_size is 0"),
    Zero("clip", "network.text.num_heads", "num_heads is 0"),
    Zero("clip", "network.image.num_layers", "num_layers is 0"),
    Zero("clip", "loss.rows"),
    Zero("clip", "evaluation.num_candidates", "num_candidates is 0"),
    Zero("clip", "evaluation.num_sets", "num_sets is 0"),
    Zero("clip", "evaluation.num_examples", "at least 1 scene, not 0"),
]
SMALL_CLIP = ("--config.data.num_examples=300", "--config.evaluation.num_examples=200", "--config.text.size=300")


@pytest.mark.parametrize("zero", ZEROS, ids=lambda zero: f"{zero.kind} {zero.field}")
def test_zero_means_none_or_is_refused_before_anything_is_compiled(kinds, tmp_path, zero, untrained, refused):
    zeros = "(0,)" if zero.field == "network.attention_resolutions" else "0"
    last = (
        f"--config.{zero.field}={zeros}",
        f"--config.evaluation.after_training={zero.field.startswith('evaluation')}",
    )

    def begin():
        if zero.kind == "clip":
            call = make_call(clip.TASK, "clip", tmp_path / "run", *SMALL_CLIP, *last, num_devices=1, **CLIP)
            clip.MODES["train"](call)
        do(kinds[zero.kind].call(tmp_path / "run", *kinds[zero.kind].flags, *last))

    if zero.line:
        refused(zero.line, begin)
        return
    with pytest.raises(Begun) as begun:
        begin()
    name = zero.field.removeprefix("training.")
    if name == "num_previews":
        assert begun.value.experiment.preview is None
    elif name != zero.field:
        assert getattr(begun.value.settings, name) == 0


# --- tuples


@pytest.mark.parametrize(
    ("kind", "field", "value", "line"),
    [
        ("digits", "training.ema_profiles", "('long',)", r"\('long',\): numbers are needed, as \(0.05, 0.1\)"),
        ("scenes", "training.ema_profiles", "('long',)", r"\('long',\): numbers are needed$"),
        ("digits", "training.ema_profiles", "(0.05, None)", r"\(0.05, None\): numbers are needed"),
        ("digits", "network.multipliers", "(1, 'a')", r"\(1, 'a'\): numbers are needed, as \(1, 2\)"),
        ("digits", "network.multipliers", "(1.5, 2)", r"\(1.5, 2\): whole numbers are needed"),
        ("digits", "network.attention_resolutions", "('4',)", r"\('4',\): numbers are needed"),
        ("digits", "network.attention_resolutions", "(4.5,)", r"\(4.5,\): whole numbers are needed"),
        ("digits", "network.attention_resolutions", "(True,)", r"\(True,\): numbers are needed"),
        ("digits", "sampling.guidance_interval", "('a', 'b')", r"\('a', 'b'\): numbers are needed"),
        ("digits", "process.table", "(0.1, 'x')", r"\(0.1, 'x'\): numbers are needed"),
        ("digits", "evaluation.metrics", "(1,)", r"\(1,\): names are needed, as \('fid', "),
        ("scenes", "evaluation.guidance", "(1.0, 'two')", r"\(1.0, 'two'\): numbers are needed"),
        ("clip", "data.mean", "(0.5,)", r"\(0.5,\): give 3 finite numbers, for red, green and blue"),
        ("clip", "data.mean", "(0.5, 0.5, 1e999)", r"\(0.5, 0.5, inf\): give 3 finite numbers"),
        ("clip", "data.std", "(0.5, 0.5, 0.5, 0.5)", r"\(0.5, .*\): give 3 finite numbers"),
        ("clip", "data.std", "(0.5, 0.5, 0.0)", r"\(0.5, 0.5, 0.0\): it must be above 0"),
    ],
)
def test_tuples_hold_what_their_field_reads(kinds, tmp_path, kind, field, value, line, refused):
    flag = f"--config.{field}={value}"

    def parse():
        if kind == "clip":
            make_call(clip.TASK, "clip", tmp_path / "run", flag, **CLIP)
        kinds[kind].call(tmp_path / "run", *kinds[kind].flags, flag)

    refused(rf"^{field} is {line}", parse)


def test_tuples_are_checked_in_python_too(refused):
    refused(r"training.ema_profiles is \('long',\): numbers", lambda: of("digits", training__ema_profiles=("long",)))
    changed = of("digits", training__ema_profiles=(), evaluation__metrics=())
    assert load_config("digits", {"evaluation.metrics": ["kid"]}, CONFIGS).evaluation.metrics == ("kid",)
    assert changed.training.ema_profiles == changed.evaluation.metrics == ()


def test_a_tuple_that_is_given_twice_is_the_later_one(tmp_path):
    parse = lambda *flags: make_call(digits.TASK, "digits", tmp_path / "run", *flags).config  # noqa: E731
    first, later = "--config.network.multipliers=(1,)", "--config.network.multipliers=(1, 3)"
    assert parse(first, later).network.multipliers == (1, 3)  # and not (1, 1, 3)
    assert parse(later, first, "--config.training.num_steps=2").network.multipliers == (1,)
    assert parse(first, "--config.training.ema_profiles=(0.1,)").network.multipliers == (1,)


# --- flags that change nothing


@pytest.mark.parametrize(
    ("mode", "flag", "readers"),
    [
        ("progressive", "--images=a.png", "sample, interpolate, inpaint, img2img"),
        ("progressive", "--strength=0.5", "interpolate, img2img, sample"),
        ("img2img", "--mask=left", "inpaint, sample"),
        ("evaluate", "--label=3", "sample, interpolate, inpaint, img2img, progressive"),
        ("evaluate", "--sweep_steps=5", "sweep"),
        ("likelihood", "--out=a.npz", "sample, interpolate, inpaint, img2img, progressive, train, evaluate"),
        ("sample", "--metrics=fid", "train, evaluate, sweep"),
        ("export", "--variant=fp16", "import"),
        ("train", "--prompt=a red two", "sample, interpolate, inpaint, img2img, progressive"),
    ],
)
def test_flags_that_a_mode_does_not_read_are_refused(kinds, trained, mode, flag, readers, refused):
    line = f"{flag.partition('=')[0]} is not read by --mode={mode}, but by {readers}: leave it out"
    refused(line, lambda: kinds["digits"].call(trained("digits"), f"--mode={mode}", flag))


def test_two_flags_of_one_field_are_refused(kinds, trained, refused):
    for flags in (
        ("--steps=2", "--config.sampling.num_steps=2"),
        ("--sampler=euler", "--config.sampling.sampler=ddim"),
        ("--sampler=euler", "--config.sampling.sampler.name=ddim"),
    ):
        first = flags[0].partition("=")[0].replace("--steps", "--sampling_steps")  # of which it is the old name
        line = f"{first} and {flags[1].partition('=')[0]} say the same: leave one out"
        refused(line, lambda flags=flags: kinds["digits"].call(trained("digits"), "--mode=sample", *flags))


def test_fields_that_a_published_model_has_otherwise_are_refused(tmp_path, refused):
    folder = write_folder(tmp_path / "theirs")
    for change, difference in [
        ("network.channels=64", r"network\.channels=64: .*theirs has 4"),
        ("process.num_steps=500", r"process\.num_steps=500: .*theirs has 1000"),
        ("process=flow", r"process\.name=flow: .*theirs has ddpm"),
        ("process.beta=cosine", r"process\.beta=cosine: .*theirs has linear"),
    ]:
        flags = ("--mode=import", f"--weights={folder}", f"--config.{change}")
        call = make_call(cifar10.TASK, "cifar10", tmp_path / "run", *flags)
        refused(rf"--config\.{difference}: leave it out", lambda call=call: do(call))


# --- what the end needs


def test_where_a_run_and_its_files_are_written_is_checked_first(kinds, trained, tmp_path, refused):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    kind, folder = kinds["digits"], trained("digits")
    for out, line in (
        ("file/a.npz", r"--out=.*file/a\.npz: .*file is a file, not a folder"),
        ("folder.npz", r"--out=.*folder\.npz is a folder: name a file"),
        (f"{'y' * 250}.npz", "--out=.*: choose a name of at most 200 bytes"),
        (f"{'y' * 250}/a.npz", "--out=.*: choose a name of at most 200 bytes"),
    ):
        refused(line, lambda out=out: kind.call(folder, "--mode=sample", f"--out={tmp_path / out}"))
    for flags in ((), ("--mode=import",)):
        line = "--workdir=.*file/run: .*file is a file, not a folder"
        refused(line, lambda flags=flags: kind.call(tmp_path / "file" / "run", *flags))
    weights = f"--weights={tmp_path / 'file' / 'new'}"
    call = kind.call(folder, "--mode=export", weights)
    refused(f"{weights}: .*file is a file, not a folder", lambda: do(call))


def test_folders_without_permission_are_named(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # to root everything is permitted
    line = f"--out=x: {tmp_path} cannot be written to: choose another folder"
    refused(line, lambda: check_file(tmp_path / "new" / "a.npz", "--out=x"))
    refused(line, lambda: check_folder(tmp_path / "new", "--out=x"))


@pytest.mark.parametrize("why", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_a_machine_without_the_device_asked_for_is_reported(kinds, tmp_path, why, monkeypatch, refused):
    def devices():
        raise why

    monkeypatch.setattr("jax.devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    line = rf"JAX_PLATFORMS=cuda names no device of this machine( \({why}\))?: set JAX_PLATFORMS=cpu"
    refused(line, lambda: kinds["digits"].call(tmp_path / "run", *kinds["digits"].flags))


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("image_size=-4", "data.image_size is -4: it must be at least 0"),
        ("channels=2", "data.channels is 2: choose 1, 3 or 4, or 0 for what the pictures have"),
        ("channels=-1", "data.channels is -1: choose 1, 3 or 4"),
    ],
)
def test_sizes_of_pictures_are_checked_before_they_are_read(tmp_path, field, line, refused):
    flags = (f"--config.data.dir={tmp_path}", f"--config.data.{field}")
    refused(line, lambda: do(make_call(folder.TASK, "folder", tmp_path / "run", *flags)))


@pytest.mark.parametrize("mode", ["sample", "evaluate", "img2img", "interpolate", "inpaint", "progressive"])
def test_where_images_are_written_is_checked_first(kinds, trained, tmp_path, mode, refused):
    line = "--out=.*foo.png: images are written to an .npz file, with a picture of them beside it"
    refused(line, lambda: kinds["digits"].call(trained("digits"), f"--mode={mode}", f"--out={tmp_path / 'foo.png'}"))


AFTER = "--config.evaluation.after_training=True"


@pytest.mark.parametrize(
    ("kind", "flags", "line"),
    [
        ("captions", ("--config.evaluation.dir=",), r"name one by --config\.evaluation\.dir=DIR"),
        ("captions", ("--config.evaluation.dir=nowhere",), r"there is no nowhere/captions\.jsonl"),
        ("captions", ("--config.evaluation.metrics=('FID',)",), "unknown metric 'FID': choose from fid, kid"),
        ("captions", ("--config.evaluation.judge=nowhere",), "nowhere"),
        ("captions", ("--config.evaluation.features=clip",), "features=clip needs the folder of a published CLIP"),
        ("digits", ("--config.evaluation.metrics=('fid','beauty')",), "unknown metric 'beauty': choose from"),
        ("digits", ("--config.evaluation.features=vgg",), "unknown features 'vgg': choose from inception, pixels"),
        ("digits", ("--config.evaluation.metrics=('inception_score',)",), "needs the probabilities of a classifier"),
        ("digits", ("--config.evaluation.num_samples=1",), "fid needs at least 2 samples, not 1"),
        ("digits", ("--config.evaluation.bound_terms=1000",), "bound_terms"),
        ("cifar10", ("--config.evaluation.features=inception",), "cannot fetch .*no network here.*: put https"),
        (
            "cifar10",
            ("--config.evaluation.features=inception", "--config.evaluation.weights=x.pth"),
            "x.pth is not a file",
        ),
    ],
)
def test_what_evaluation_needs_is_checked_before_training(
    kinds, kind, flags, line, tmp_path, untrained, refused, monkeypatch
):
    def offline(*given, **more):
        raise OSError("no network here")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "diffusion" / "weights").mkdir(parents=True)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    call = kinds[kind].call(tmp_path / "run", *kinds[kind].flags, AFTER, *flags)
    refused(line, lambda: do(call))


def test_a_log_whose_last_line_was_cut_off_keeps_no_report_from_being_written(copied):
    """As a run leaves it that was killed while it wrote the line."""
    folder = copied("digits")
    course = folder / "metrics.jsonl"
    course.write_text(course.read_text() + '{"step": 6, "lo')
    finish_run(folder, "digits", 6, [])
    assert (folder / "report.md").exists() and (folder / "curves.png").stat().st_size > 1000


# --- messages


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (RunError("two\nlines"), "error: two lines"),
        (ValueError("a  wide \t gap"), "error: a wide gap (--traceback shows where)"),
        (RunError("many " * 5000), "error: many many many"),
        (OSError(2, "No such file", "x" * 9000), "error: [Errno 2] No such file: 'xxx"),
        (MemoryError("72.8 TiB"), "error: not enough memory (72.8 TiB)"),
    ],
)
def test_an_error_is_one_line_that_can_be_read(error, line, capsys):
    def work():
        raise error

    with pytest.raises(SystemExit) as left:
        run_to_end(work)
    said = str(left.value.code)
    assert said.startswith(line) and "\n" not in said and len(said) < 600
    assert capsys.readouterr() == ("", "")


# --- spellings


@pytest.mark.parametrize(("spelled", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_common_spellings_of_types(tmp_path, spelled, dtype):
    config = make_call(digits.TASK, "digits", tmp_path / "run", f"--config.network.dtype={spelled}").config
    assert make_model(config, (8, 8, 1), 10).network.dtype == jnp.dtype(dtype)


def test_other_types_are_refused(refused):
    for name in ("float8", "int8", "complex64", ""):
        config = of("digits", network__dtype=name)
        line = f"network.dtype is '{name}': choose from bfloat16, float16, float32"
        refused(line, lambda config=config: make_model(config, (8, 8, 1), 10))


def test_configs_that_take_no_methods_are_named(tmp_path, refused):
    refused(r"clip\.py takes no methods: leave out :tiny", lambda: load_config("clip:tiny", folder=CONFIGS))


def test_whole_numbers_may_be_written_as_powers_of_ten(tmp_path, refused):
    parse = lambda *flags: make_call(digits.TASK, "digits", tmp_path / "run", *flags).config  # noqa: E731
    config = parse("--config.training.num_steps=1e3", "--config.optimizer.learning_rate=1e-3", "--config.seed=2e0")
    assert (config.training.num_steps, config.optimizer.learning_rate, config.seed) == (1000, 1e-3, 2)
    for value in ("1.5e0", "1e400", "nan", "1e", "5.5"):
        refused("invalid literal for int", lambda value=value: parse(f"--config.training.num_steps={value}"))


def test_a_network_is_refused_at_sampling_in_one_line(trained, kinds, refused):
    line = r"network\.channels: 8 -> 16; network\.num_groups: 4 -> 8$"
    flags = ("--mode=sample", "--config.network.channels=16", "--config.network.num_groups=8")
    refused(line, lambda: kinds["digits"].call(trained("digits"), *flags))


def test_paths_begin_with_a_tilde(kinds, trained, shared, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs").symlink_to(trained("digits").parent)
    (tmp_path / "pairs").symlink_to(shared / "pairs")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "prompts.txt").write_text("a red two\n")
    (tmp_path / "my.py").write_text((CONFIGS / "digits.py").read_text())

    call = make_call(
        digits.TASK, "digits", Path("~/runs/digits"), "--mode=img2img", "--images=~/a.png", "--out=~/b.npz"
    )
    run = call.open()
    assert call.workdir == tmp_path / "runs" / "digits"
    assert edit.make_place(call, run, "x", [None]).path == tmp_path / "b.npz"
    image, _ = edit.read_images(call, run, 1)
    assert image.shape == (1, 8, 8, 1) and edit.read_mask("~/a.png", (8, 8, 1)).all()
    assert open_run("~/runs/digits").workdir == tmp_path / "runs" / "digits"
    call = make_call(digits.TASK, "~/my.py:flow", Path("~/new"))
    assert call.config.process.name == "flow" and call.workdir == tmp_path / "new"

    flags = ("--config.data.dir=~/pairs/train", "--config.evaluation.dir=~/pairs/test")
    call = make_call(captions.TASK, "captions", Path("~/new"), *flags, "--config.data.image_size=16")
    assert [captions.read(call.config, split).num_examples for split in ("train", "test")] == [48, 24]
    call = make_call(captions.TASK, "captions", trained("captions"), "--mode=sample", "--prompts=~/prompts.txt")
    assert sample.read_prompts(call) == ["a red two"]
