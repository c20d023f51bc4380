"""What is likely not meant is reported: chains that do not end in noise, guidance that changes nothing."""

import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Begun, config_of, do, make_call

from diffusion.model.experiment import make_model
from diffusion.model.losses import make_objective
from diffusion.model.processes import make_process
from diffusion.model.sampling import make_sampling
from diffusion.model.warnings import warnings_of, warnings_of_training
from diffusion.runs import check
from diffusion.schedules import flow_grid
from diffusion.training.dry_run import Findings
from experiments import digits

# --- chains that do not end in noise


def warned(config, shape=(8, 8, 1), num_classes=10):
    """Returns the warnings of a config."""
    return warnings_of(config, make_model(config, shape, num_classes))


def test_a_chain_that_does_not_end_in_noise_is_reported():
    (line,) = warned(config_of("digits", process__num_steps=100))
    assert "process.num_steps=100 ends at alpha_bar_T = 0.36" in line
    assert "process.last" in line and "process.beta=linear_for_steps" in line
    for fine in ({}, {"process__beta": "cosine"}, {"process__beta": "linear_for_steps"}, {"process__last": 0.2}):
        config = config_of("digits", **fine) if not fine else config_of("digits", process__num_steps=100, **fine)
        assert warned(config) == [], fine
    for method in ("flow", "edm", "cosine_hybrid", "v_min_snr"):
        assert warned(config_of(f"digits:{method}")) == []


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


# --- a learning rate that is never reached


def test_a_cooldown_that_begins_in_the_warm_up_is_reported():
    def of(num_steps):
        config = config_of("digits", training__num_steps=num_steps)
        model = make_model(config, (8, 8, 1), 10)
        assert warnings_of(config, model) == []  # nothing to whoever draws
        return warnings_of_training(config, model)

    assert of(1100) == []  # 100 up, 1,000 down
    (line,) = of(550)
    assert "optimizer.cooldown_steps=1000 begins before the warm-up ends, at training.num_steps=550" in line
    assert "reaches 50% of optimizer.learning_rate" in line


# --- steps that training did not show


def test_steps_of_a_progressive_student_are_its_own_or_it_is_reported():
    config = config_of("emoji:progressive")
    assert config.loss.shift == config.sampling.grid.shift == 3.0
    own = make_objective(config, make_process(config)).grids
    np.testing.assert_allclose([one.time for one in own], [flow_grid(4, 3.0).time])
    assert warned(config_of("digits:progressive")) == []
    for changes in ({"sampling__num_steps": 8}, {"sampling__grid__shift": 3.0}):
        (line,) = warned(config_of("digits:progressive", **changes))
        assert "loss.name=progressive trained for 4 steps of sampling.grid.name=uniform with shift 1" in line


# --- guidance


@pytest.mark.parametrize(
    ("spec", "interval"), [("digits", (0.3, 5.0)), ("digits:flow", (0.3, 5.0)), ("digits:edm", (0.28, 2.9))]
)
def test_guidance_acts_exactly_at_the_steps_whose_noise_over_signal_is_within_its_interval(spec, interval):
    config = config_of(spec, sampling__guidance=3.0, sampling__guidance_interval=interval, sampling__threshold="none")
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
    config = config_of("digits", sampling__guidance=3.0, sampling__guidance_interval=interval)
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
    assert warned(config_of("digits:class_conditional", condition__dropout=0.0)) == [unseen]
    assert warned(config_of("digits:class_conditional", condition__dropout=0.0, sampling__guidance=1.0)) == []
    assert warned(config_of("digits:class_conditional")) == []
    (line,) = warned(config_of("digits", sampling__guidance_interval=(0.3, 5.0)))
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
