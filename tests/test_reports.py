"""Reports: no number without how it was made."""

import json

import numpy as np
import pytest

from diffusion.evaluation import Measurement, Reference, over_seeds, write_report
from diffusion.runs.report import finish_run

TRAIN = Reference("digits", "train", 1297, "sha256:abc")
DISTANCE = Measurement(
    name="Frechet distance",
    value=0.31254321,
    num_samples=500,
    features="pixels in [-1, 1]",
    reference=TRAIN,
    sampler="ddim",
    num_steps=50,
    seeds=(0, 1),
    ema=0.999,
    note="biased | at this count",
)
SHARES = DISTANCE._replace(
    name="shares", value={"0": np.float64(0.25), "1": 0.75}, reference=None, sampler="real images", num_steps=None,
    seeds=(), ema=None, note="",
)  # fmt: skip


def test_report_keeps_how_a_number_was_made(tmp_path):
    write_report(tmp_path / "new", "Digits", [DISTANCE, SHARES], {"step": 1000, "jax": "0.10.2"})
    content = json.loads((tmp_path / "new" / "report.json").read_text())
    assert content["title"] == "Digits" and content["about"] == {"step": 1000, "jax": "0.10.2"}
    first, second = content["measurements"]
    assert first == DISTANCE._asdict() | {"seeds": [0, 1], "reference": TRAIN._asdict()}
    assert second["value"] == {"0": 0.25, "1": 0.75} and second["reference"] is None and second["ema"] is None
    rows = [line for line in (tmp_path / "new" / "report.md").read_text().splitlines() if line.startswith("|")]
    assert rows[2] == (
        "| Frechet distance [1] | 0.31254 | 500 | ddim, 50 steps | 0, 1 | 0.999 | pixels in [-1, 1] | "
        "digits train, 1297 images |"
    )
    assert rows[3] == "| shares | 0 0.25, 1 0.75 | 500 | real images | - | - | pixels in [-1, 1] | - |"
    text = (tmp_path / "new" / "report.md").read_text()
    assert "- digits train: sha256:abc" in text and "1. biased | at this count" in text and "- step: 1000" in text
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["report.json", "report.md"]


def test_report_without_a_number_is_not_written(tmp_path):
    write_report(tmp_path, "Digits", [DISTANCE], {})
    before = (tmp_path / "report.json").read_text()
    for bad, where in [
        (DISTANCE._replace(value=float("nan")), "because Frechet distance is nan"),
        (SHARES._replace(value={"0": 0.5, "1": float("inf")}), "shares, 1 is inf"),
    ]:
        with pytest.raises(ValueError, match=where):
            write_report(tmp_path, "Digits", [DISTANCE, bad], {})
    assert (tmp_path / "report.json").read_text() == before


def test_over_seeds():
    assert over_seeds([1.5]) == 1.5
    assert over_seeds([{"mean": 1.0, "error": 2.0}]) == {"mean": 1.0, "error": 2.0}
    assert over_seeds([3.0, 1.0, 2.0]) == {"mean": 2.0, "min": 1.0, "max": 3.0}
    assert over_seeds([{"mean": 1.0, "error": 2.0}, {"mean": 3.0, "error": 4.0}]) == {
        "mean": 2.0, "min": 1.0, "max": 3.0, "error mean": 3.0, "error min": 2.0, "error max": 4.0,
    }  # fmt: skip


def test_a_log_whose_last_line_was_cut_off_keeps_no_report_from_being_written(copied):
    """As a run leaves it that was killed while it wrote the line."""
    folder = copied("digits")
    course = folder / "metrics.jsonl"
    course.write_text(course.read_text() + '{"step": 6, "lo')
    finish_run(folder, "digits", 6, [])
    assert (folder / "report.md").exists() and (folder / "curves.png").stat().st_size > 1000
