"""Values of fields: zeros, tuples and spellings, read as they are meant or refused before anything is compiled."""

from typing import NamedTuple

import jax.numpy as jnp
import pytest
from helpers import CLIP, CONFIGS, Begun, config_of, do, make_call

from diffusion.model.experiment import make_model
from diffusion.model.fields import load_config
from experiments import clip, digits

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
    refused(
        r"training.ema_profiles is \('long',\): numbers", lambda: config_of("digits", training__ema_profiles=("long",))
    )
    changed = config_of("digits", training__ema_profiles=(), evaluation__metrics=())
    assert load_config("digits", {"evaluation.metrics": ["kid"]}, CONFIGS).evaluation.metrics == ("kid",)
    assert changed.training.ema_profiles == changed.evaluation.metrics == ()


def test_a_tuple_that_is_given_twice_is_the_later_one(tmp_path):
    parse = lambda *flags: make_call(digits.TASK, "digits", tmp_path / "run", *flags).config  # noqa: E731
    first, later = "--config.network.multipliers=(1,)", "--config.network.multipliers=(1, 3)"
    assert parse(first, later).network.multipliers == (1, 3)  # and not (1, 1, 3)
    assert parse(later, first, "--config.training.num_steps=2").network.multipliers == (1,)
    assert parse(first, "--config.training.ema_profiles=(0.1,)").network.multipliers == (1,)


# --- spellings


@pytest.mark.parametrize(("spelled", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32")])
def test_common_spellings_of_types(tmp_path, spelled, dtype):
    config = make_call(digits.TASK, "digits", tmp_path / "run", f"--config.network.dtype={spelled}").config
    assert make_model(config, (8, 8, 1), 10).network.dtype == jnp.dtype(dtype)


def test_other_types_are_refused(refused):
    for name in ("float8", "int8", "complex64", ""):
        config = config_of("digits", network__dtype=name)
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
