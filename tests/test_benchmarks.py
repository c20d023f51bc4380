"""The parts of the benchmarks that measure nothing: their JSON, their turns, their settings; small runs."""

import json
import platform
import random
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import diffusion
from benchmarks import common, compare, few_step, processes, samplers, saving, scenes, soak, turns
from diffusion.data.sources import digits
from diffusion.training.workdir import flatten


def test_results_are_written_with_the_machine(tmp_path):
    path = tmp_path / "new" / "result.json"
    text = common.write_results(path, {"batch_size": 8, "versions": {"torch": "2.0"}, "device_count": 99})
    result = json.loads(path.read_text())
    assert path.read_text() == text
    assert result["batch_size"] == 8 and result["device_count"] == 99
    assert result["device"] == jax.devices()[0].device_kind
    assert result["versions"]["jax"] == jax.__version__ and result["versions"]["torch"] == "2.0"
    assert {"processor", "cpu_count", "date", "git"} <= result.keys()
    assert set(compare.MACHINE) <= result.keys()


@pytest.mark.parametrize(
    "info, expected",
    [
        (
            "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n",
            "AMD EPYC, family 25, model 17",
        ),
        ("processor\t: 0\ncpu family\t: 26\nmodel\t\t: 2\nmodel name\t: AMD EPYC\n\n", "AMD EPYC, family 26, model 2"),
        ("model name\t: Some ARM\n\nmodel name\t: Another\n", "Some ARM"),
        ("BogoMIPS : 100\n", platform.processor() or platform.machine()),
    ],
)
def test_a_processor_is_named_by_its_generation_too(tmp_path, monkeypatch, info, expected):
    (tmp_path / "cpuinfo").write_text(info)
    monkeypatch.setattr(common, "CPU_INFO", tmp_path / "cpuinfo")
    assert common.processor() == expected


def test_nothing_is_written_without_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert json.loads(common.write_results(None, {"x": 1}))["x"] == 1
    assert not list(tmp_path.iterdir())


def test_turns_are_taken_in_both_orders():
    order = []
    timers = {name: lambda name=name: order.append(name) or float(len(order)) for name in "abc"}
    seconds = common.take_turns(timers, 3)
    assert order == [*"abc", *"cba", *"abc"]
    assert seconds == {"a": [1, 6, 7], "b": [2, 5, 8], "c": [3, 4, 9]}


def test_ratios_are_taken_round_by_round():
    """The ratio of the medians would be 2 / 3."""
    assert common.median_ratio([1.0, 2.0, 9.0], [4.0, 2.0, 3.0]) == 1.0


def test_rates_and_ratios_of_timers():
    """Ours takes 1 s, then 3, then 2, after a first turn that does not count."""
    seconds = iter([9.0, 1.0, 3.0, 2.0] * 2)

    def ours(what: str, count: int) -> float:
        return next(seconds)

    found = turns.measure({"ours": ours}, rounds=3, count=3, batch_size=8, flop=1e9)
    assert found["train"]["images_per_second"] == {"ours": 4.0}
    assert found["train"]["rounds"] == {"ours": [1.0, 3.0, 2.0]}
    assert found["train"]["gflop_per_second"] == 3 * found["forward"]["gflop_per_second"] == 12.0


def test_the_first_two_runs_of_a_turn_do_not_count(monkeypatch):
    clock = iter([10.0, 16.0])
    monkeypatch.setattr(turns.time, "perf_counter", lambda: next(clock))
    ours, runs = object.__new__(turns.Ours), []
    monkeypatch.setattr(ours, "run", runs.append)
    assert ours("train", 3) == 2.0
    assert len(runs) == 5


@pytest.mark.parametrize("name, changes", samplers.SAMPLERS.items())
def test_samplers_exist_with_their_fields(name, changes):
    config = flatten(diffusion.load_config("digits", changes).to_dict())
    assert {field: config[field] for field in changes} == changes


@pytest.mark.parametrize("sampler, evaluations, steps", [("ddim", 10, 10), ("heun", 10, 5), ("heun", 5, 3)])
def test_steps_of_a_number_of_evaluations(sampler, evaluations, steps):
    assert samplers.num_steps_of(sampler, evaluations) == steps


def test_samplers_are_measured(trained):
    """The chosen sampler draws, at the chosen number of steps: 3 of DDIM, 2 of Heun."""
    run = diffusion.open_run(trained("digits"), num_devices=1)
    few = {name: samplers.SAMPLERS[name] for name in ("DDIM", "Heun, Karras grid")}
    drawn = []
    rows = samplers.measure(run, lambda image: drawn.append(image) or float(len(drawn)), 9, few, (3, 4))
    assert [(row["sampler"], row["evaluations"]) for row in rows] == [
        ("DDIM", 3),
        ("DDIM", 4),
        ("Heun, Karras grid", 3),
    ]
    assert [row["frechet_distance"] for row in rows] == [1.0, 2.0, 3.0] and all(row["seconds"] > 0 for row in rows)
    for image, row, num_steps in zip(drawn, rows, (3, 4, 2), strict=True):
        expected = run.change({**few[row["sampler"]], "sampling.num_steps": num_steps}).sample(9, seed=0)
        np.testing.assert_array_equal(image, expected)
    lines = samplers.table(rows).splitlines()
    assert lines[0] == "| sampler | 3 | 4 |" and lines[2] == "| DDIM | 1.000 | 2.000 |"
    assert lines[3] == "| Heun, Karras grid | 3.000 |  |"


def test_prompts_of_scenes_are_drawn_and_judged(trained):
    """A reader that accepts the first half of the pictures; a scene is judged by its own prompt's picture."""
    run = diffusion.open_run(trained("scenes"), num_devices=1)
    judged = []

    def judge(wanted, images):
        judged.append((wanted, images))
        return np.arange(len(wanted)) < len(wanted) // 2

    shares = scenes.satisfied(run, 8, judge)
    assert shares["all"] == 0.5
    ((wanted, images),) = judged
    assert images.shape == (8, 16, 16, 3)
    np.testing.assert_array_equal(images, run.sample(prompts=[one.caption for one in wanted], seed=0))


def test_the_cost_of_saving_is_measured(tmp_path):
    found = saving.measure(
        "digits", digits("train"), tmp_path / "saves", steps=1, rounds=1, changes=common.SMALL | {"data.batch_size": 8}
    )
    assert found["MB per checkpoint"] > 0 and found["seconds per step"] > 0 and found["steps between saves"] == 4
    assert not (tmp_path / "saves").exists()


def test_flags_of_the_small_run_are_its_changes():
    assert common.as_flags({"network.multipliers": (1,), "evaluation.after_training": False}) == [
        "--config.network.multipliers=(1,)",
        "--config.evaluation.after_training=False",
    ]
    config = flatten(diffusion.load_config("digits", common.SMALL).to_dict())
    assert {field: config[field] for field in common.SMALL} == common.SMALL


def test_minutes_are_those_spent_in_steps(tmp_path):
    """100 steps of 6 images at 10 a second are a minute, and 100 more at 20 half a minute."""
    lines = [
        {"step": 100, "loss": 0.5, "images_per_second": 10.0},
        {"step": 200, "loss": 0.25, "images_per_second": 20.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert scenes.losses(tmp_path, 6) == [
        {"step": 100, "minutes": 1.0, "loss": 0.5},
        {"step": 200, "minutes": 1.5, "loss": 0.25},
    ]


def test_a_curve_ends_before_a_line_that_is_being_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "images_per_second": 3.0}\n{"step": 2, "lo')
    assert processes.curve(tmp_path) == [{"step": 1}]
    assert processes.curve(tmp_path / "none") == []


@pytest.mark.parametrize("seed", range(12))
def test_damage_changes_the_file_or_removes_it(seed, tmp_path):
    path = tmp_path / "file"
    content = bytes(range(256)) * 4
    path.write_bytes(content)
    kind = soak.damage(path, random.Random(seed))
    assert (kind == "deletion") == (not path.exists())
    assert not path.exists() or path.read_bytes() != content


def test_every_kind_of_damage_is_drawn(tmp_path):
    kinds = set()
    for seed in range(40):
        (tmp_path / "file").write_bytes(b"\x01" * 100)
        kinds.add(soak.damage(tmp_path / "file", random.Random(seed)))
    assert kinds == {"bit flip", "truncation", "deletion", "garbage", "zeros"}


@pytest.mark.parametrize(
    "methods, expected", [("flow", [1, 2]), ("mean_flow", [1, 2]), ("imitation", [4]), ("progressive", [4])]
)
def test_distilled_models_are_drawn_with_their_own_numbers_of_steps(methods, expected):
    run: Any = SimpleNamespace(config=diffusion.load_config(f"digits:{methods}"))
    assert few_step.counts_of(run, (1, 2)) == expected


def test_few_step_methods_stand_in_one_table(tmp_path):
    teacher = {"minutes": [9.0], "rows": [{"evaluations": n, "quality": 1 / n} for n in (1, 2, 50)]}
    student = {"minutes": [1.0, 2.5], "rows": [{"evaluations": n, "quality": 0.125} for n in (1, 2)]}
    methods = {"flow": teacher, "progressive": student}
    assert few_step.table(methods).splitlines() == [
        "| method | 1 | 2 | 50 | minutes |",
        "|---|---|---|---|---|",
        "| flow | 1.000 | 0.500 | 0.020 | 9.0 |",
        "| progressive | 0.125 | 0.125 |  | 1.0, 2.5 |",
    ]
    few_step.draw(methods, "distance", tmp_path / "few.png", log=True)
    assert (tmp_path / "few.png").stat().st_size > 10_000
