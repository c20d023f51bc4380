"""benchmarks.compare: what is worse than before, and results that cannot be compared."""

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers import with_fields

from benchmarks import compare

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
    """Returns RESULT with fields changed: train__gflop_per_second=12."""
    return with_fields(RESULT, **fields)


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
