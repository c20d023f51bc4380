"""The parts of the benchmarks that measure nothing: comparison of results, their JSON, their settings; small runs."""

import copy
import json
import platform
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

import diffusion
from benchmarks import common, compare, few_step, processes, samplers, saving, scenes, soak, turns
from diffusion.data.sources import digits
from diffusion.training.workdir import flatten

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
# A result with a machine, a setting, a rate and a compile time, each round of the rate 1 s.
RESULT: dict[str, Any] = {
    "device": "cpu",
    "cpu_count": 2,
    "versions": {"jax": "0.10.2", "threads": 2},
    "date": "2026-01-01",
    "batch_size": 8,
    "compile_seconds": {"train": 20.0},
    "train": {
        "images_per_second": {"ours": 8.0, "torch eager": 4.0},
        "ours_over": {"torch eager": 2.0},
        "gflop_per_second": 100.0,
        "rounds": {"ours": [1.0, 1.0, 1.0], "torch eager": [2.0, 2.0, 2.0]},
    },
}


def changed(**fields: Any) -> dict[str, Any]:
    """RESULT with fields at dotted places changed; __ stands for the dot."""
    result = copy.deepcopy(RESULT)
    for place, value in fields.items():
        *parents, last = place.split("__")
        block = result
        for parent in parents:
            block = block[parent]
        block[last] = value
    return result


def verdicts(old: dict[str, Any], new: dict[str, Any], noise: float = 0.1) -> dict[str, str]:
    return {row.name: row.verdict for row in compare.compare(old, new, noise)}


def test_a_result_is_no_worse_than_itself():
    assert set(verdicts(RESULT, RESULT).values()) == {"", "-"}


@pytest.mark.parametrize(
    "seconds, noise, verdict", [(21.9, 0.1, ""), (22.1, 0.1, "worse"), (22.1, 0.2, ""), (18, 0.1, "better")]
)
def test_seconds_are_worse_when_more_than_the_noise_is_added(seconds, noise, verdict):
    found = verdicts(RESULT, changed(compile_seconds__train=seconds), noise)
    assert found["compile_seconds / train"] == verdict


@pytest.mark.parametrize("rate, verdict", [(7.3, ""), (7.2, "worse"), (8.7, ""), (8.9, "better")])
def test_rates_are_worse_when_lower(rate, verdict):
    """A rate of 8 / 1.1 = 7.27 takes 10% longer."""
    found = verdicts(RESULT, changed(train__images_per_second__ours=rate))
    assert found["train / images_per_second / ours"] == verdict


def test_a_figure_of_no_known_direction_is_shown_and_not_judged():
    name = "train / gflop_per_second"
    assert verdicts(RESULT, changed(train__gflop_per_second=10.0))[name] == "differs"
    assert verdicts(RESULT, RESULT)[name] == "-"


def test_the_spread_of_the_rounds_is_no_change():
    """The worst old round takes 1.5 s: 1.6 s is within 10% of it, 1.7 s is not."""
    old = changed(train__rounds__ours=[0.9, 1.0, 1.5])
    slower = {"train__images_per_second__ours": 5.0}
    name = "train / images_per_second / ours"
    assert verdicts(old, changed(**slower, train__rounds__ours=[1.6, 1.6, 1.6]))[name] == ""
    assert (
        verdicts(old, changed(train__images_per_second__ours=8 / 1.7, train__rounds__ours=[1.7] * 3))[name] == "worse"
    )
    # The new rounds' best is what counts.
    assert verdicts(RESULT, changed(**slower, train__rounds__ours=[1.05, 1.6, 1.7]))[name] == ""
    assert verdicts(RESULT, changed(**slower, train__rounds__ours=[1.2, 1.6, 1.7]))[name] == "worse"


def test_the_spread_of_a_ratio_is_that_of_both_sides_rounds():
    """A machine that slows down in one round slows both: the ratio has no spread."""
    drifting = changed(train__rounds={"ours": [1.0, 2.0, 1.0], "torch eager": [2.0, 4.0, 2.0]})
    lower = copy.deepcopy(drifting)
    lower["train"]["ours_over"]["torch eager"] = 1.7
    name = "train / ours_over / torch eager"
    assert verdicts(drifting, lower)[name] == "worse"
    lower["train"]["rounds"]["torch eager"] = [2.0, 5.0, 1.8]  # ratios of 2, 2.5 and 1.8
    assert verdicts(drifting, lower)[name] == ""


def test_figures_that_are_not_finite_are_worse():
    assert verdicts(RESULT, changed(compile_seconds__train=float("nan")))["compile_seconds / train"] == "worse"
    assert verdicts(RESULT, changed(compile_seconds__train=float("inf")))["compile_seconds / train"] == "worse"


def test_figures_of_zero():
    zero = changed(compile_seconds__train=0.0, train__images_per_second__ours=0.0)
    assert {*verdicts(zero, zero).values()} == {"", "-"}
    assert verdicts(zero, RESULT)["compile_seconds / train"] == "worse"
    assert verdicts(RESULT, zero)["train / images_per_second / ours"] == "worse"
    assert "compile_seconds / train" in compare.table(compare.compare(zero, RESULT))


def test_figures_of_only_one_result_are_named():
    more = changed(compile_seconds__forward=3.0)
    assert verdicts(RESULT, more)["compile_seconds / forward"] == "only in NEW"
    assert verdicts(more, RESULT)["compile_seconds / forward"] == "only in OLD"


def test_rows_of_a_list_are_matched_by_their_texts_and_whole_numbers():
    rows = [
        {"sampler": "ddim", "evaluations": 5, "frechet_distance": 1.0},
        {"sampler": "ddim", "evaluations": 10, "frechet_distance": 0.5},
    ]
    worse = [{**rows[1], "frechet_distance": 0.9}, rows[0]]
    found = verdicts(changed(rows=rows), changed(rows=worse))
    assert found["rows / ddim, 5 / frechet_distance"] == ""
    assert found["rows / ddim, 10 / frechet_distance"] == "worse"


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"device": "NVIDIA H100 80GB HBM3"},
            "different machines: device is 'cpu' in OLD and 'NVIDIA H100 80GB HBM3' in NEW",
        ),
        ({"cpu_count": 4}, "different machines: cpu_count is 2 in OLD and 4 in NEW"),
        ({"batch_size": 16}, "different settings: batch_size is 8 in OLD and 16 in NEW"),
    ],
)
def test_results_of_different_machines_or_settings_are_refused_in_one_line(
    fields, message, tmp_path, monkeypatch, capsys
):
    assert run_compare(RESULT, changed(**fields), tmp_path, monkeypatch) == 2
    out, error = capsys.readouterr()
    assert out == "" and error == f"error: the results are of {message}\n"


def test_a_result_without_a_device_is_refused(tmp_path, monkeypatch, capsys):
    new = copy.deepcopy(RESULT)
    del new["device"]
    assert run_compare(RESULT, new, tmp_path, monkeypatch) == 2
    assert "NEW does not name its device" in capsys.readouterr().err


def test_other_versions_and_dates_are_what_one_compares():
    new = changed(versions={"jax": "0.12.0", "threads": 4}, date="2026-02-02", git="abc")
    assert verdicts(RESULT, new) == verdicts(RESULT, RESULT)


def run_compare(old: dict, new: dict, folder: Path, monkeypatch: pytest.MonkeyPatch, *flags: str) -> int | None:
    """Returns the exit code of the command."""
    paths = [folder / "old.json", folder / "new.json"]
    for path, result in zip(paths, (old, new), strict=True):
        path.write_text(json.dumps(result))
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, paths), *flags])
    try:
        compare.main()
    except SystemExit as ending:
        assert ending.code is None or isinstance(ending.code, int)
        return ending.code
    return 0


def test_the_exit_code_and_the_table(tmp_path, monkeypatch, capsys):
    slower = changed(compile_seconds__train=30.0)
    assert run_compare(RESULT, RESULT, tmp_path, monkeypatch) == 0
    assert capsys.readouterr().err == ""
    assert run_compare(RESULT, slower, tmp_path, monkeypatch, "--noise", "0.6") == 0
    assert run_compare(slower, RESULT, tmp_path, monkeypatch) == 0  # faster
    capsys.readouterr()
    assert run_compare(RESULT, slower, tmp_path, monkeypatch) == 1
    out, error = capsys.readouterr()
    assert error == "1 of 6 figures are worse by more than 10%\n"
    head, *lines = out.splitlines()
    end = head.index("new/old") + len("new/old")
    ratios = {line.split("  ")[0]: line[:end].split()[-1] for line in lines}  # columns end where their titles do
    assert ratios == {
        "batch_size": "1.000",
        "compile_seconds / train": "1.500",
        "train / images_per_second / ours": "1.000",
        "train / images_per_second / torch eager": "1.000",
        "train / ours_over / torch eager": "1.000",
        "train / gflop_per_second": "1.000",
    }


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_recorded_results_can_be_compared(path):
    result = json.loads(path.read_text())
    if "device" not in result:
        with pytest.raises(compare.Refused, match="OLD and NEW does not name its device"):
            compare.compare(result, result)
    else:
        rows = compare.compare(result, result)
        assert rows and {row.verdict for row in rows} <= {"", "-"}


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
