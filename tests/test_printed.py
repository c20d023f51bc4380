"""What is printed at the end: columns that fit the terminal, and no fact lost; figures of a run."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from diffusion import evaluation
from diffusion.evaluation import Measurement, Reference, draw_curves, draw_sweep, draw_terms, print_report
from diffusion.evaluation.figures import part_name
from diffusion.evaluation.printed import lines_of, number
from diffusion.runs.sweep import spread

TRAIN = Reference("digits", "train", 1297, "sha256:abc")
FID = Measurement("FID", 1.13394, 500, "pixels in [-1, 1]", TRAIN, "ddim, guidance 1.5", 20, (0,), 0.995)
REAL = FID._replace(name="FID of held-out real images", value=0.728, sampler="real images", num_steps=None, seeds=())
REAL = REAL._replace(ema=None)
MANY = [
    FID._replace(note="biased upwards, because 500 samples are fewer than 50000"),
    FID._replace(name="KID", value={"mean": 0.00793, "standard error": 0.00433}),
    FID._replace(name="precision and recall", value={"precision": 0.945, "recall": 0.545}),
    REAL,
    FID._replace(name="share of each class", value={str(i): 0.1 for i in range(10)}),
    FID._replace(name="bits/dim", value={"mean": 5.0854, "standard error": 0.064, "prior": 2.14e-5}, num_samples=50),
]


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_report_fits_the_terminal_and_loses_nothing(width):
    text = print_report("digits after 300 steps", MANY, {"steps trained": 300}, width)
    assert max(map(len, text.splitlines())) <= width
    said = " ".join(text.split())
    for word in ("1.134", "0.0079 ± 0.0043", "0.9450", "0.5450", "0.7280", "5.085 ± 0.064", "2.14e-05"):
        assert word in said, word
    assert "steps trained 300" in said
    common = "500 samples, ddim, guidance 1.5, 20 steps, seed 0, EMA 0.995, features: pixels in [-1, 1], compared with "
    assert said.count(f"Where no note says otherwise: {common}digits train, 1297 images.") == 1
    assert said.count("ddim") == said.count("EMA") == said.count("compared with") == 1  # not again with each number
    assert "[1] biased upwards, because 500 samples are fewer than 50000 [2] real images [3] 50 samples" in said
    assert "bits/dim [3]" in said and "KID 0" in said  # which has no note
    assert width == 60 or "FID of held-out real images [2] 0.7280" in said


def test_decimal_points_are_beneath_each_other():
    text = print_report("a", [FID._replace(value=value) for value in (1.5, 123.4, 0.02)], {}, 80)
    rows = [line for line in text.splitlines() if line.startswith("FID")]
    assert len(rows) == 3 and len({line.index(".") for line in rows}) == 1


def test_values_over_seeds_have_their_ends():
    (line,) = lines_of("FID", {"mean": 2.0, "min": 1.0, "max": 3.5})
    assert line == ("FID", "2.000 (1.000 to 3.500 over the seeds)")


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (1.13394, "1.134"), (12345.6, "1.235e+04"), (2e-5, "2e-05"), (-0.5, "-0.5000")]
)
def test_numbers_have_four_digits(value, text):
    assert number(value) == text


def test_a_metric_has_one_name_and_the_width_is_the_terminals(monkeypatch):
    assert evaluation.METRICS["fid"].title == "FID" and evaluation.METRICS["kid"].title == "KID"
    for columns, width in (("80", 80), ("200", 100), ("20", 40)):
        monkeypatch.setenv("COLUMNS", columns)
        assert max(map(len, print_report("a", MANY, {}).splitlines())) <= width


def test_an_empty_report_is_its_title():
    assert print_report("nothing", [], {"steps": 0}, 80) == "nothing\nsteps 0\n"


# --- figures


def texts(path):
    """Returns the texts in an SVG file."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


@pytest.fixture
def course(tmp_path):
    """A metrics.jsonl of a run whose loss is reported by noise level."""
    parts = {f"loss_part_{i}_of_4": 0.1 * i for i in range(1, 5)}
    lines = [
        {"step": step, "loss": 1 / step, "grad_norm": 2.0, "learning_rate": 1e-3, "images_per_second": 9.0, **parts}
        for step in range(1, 9)
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 9, "lo')
    return tmp_path / "metrics.jsonl"


def test_curves_explain_the_loss_by_noise_level_and_show_rate_and_speed(course, tmp_path):
    draw_curves(course, tmp_path / "a" / "curves.png")
    found = texts(tmp_path / "a" / "curves.svg")
    titles = ["loss: all, and by quarters of training times", "norm of the gradient", "learning rate"]
    titles.append("images per second")
    assert [text for text in found if text in titles] == titles and found.count("step") == 4
    assert {"all", "1 (least noise)", "2", "3", "4 (most)"} <= {*found}
    with Image.open(tmp_path / "a" / "curves.png") as picture:
        assert picture.size == (1000, 800)
    first = (tmp_path / "a" / "curves.svg").read_bytes()
    draw_curves(course, tmp_path / "a" / "curves.png")
    assert (tmp_path / "a" / "curves.svg").read_bytes() == first


def test_panels_are_of_what_was_measured(course, tmp_path):
    few = [{"step": 1, "error": 1.0, "error_part_1_of_4": 2.0, "loss": 1.0, "psnr": 20.0}]
    course.write_text(json.dumps(few[0]))
    draw_curves(course, tmp_path / "curves.png", ["psnr"])
    found = texts(tmp_path / "curves.svg")
    assert "psnr" in found and "learning rate" not in found and found.count("step") == 3
    assert "error: all, and by quarters of training times" in found and "loss" in found
    course.write_text("")
    (tmp_path / "curves.png").unlink()
    draw_curves(course, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_parts_have_names_that_say_what_they_are():
    names = ["loss", "loss_part_1_of_4", "loss_part_2_of_4", "loss_part_4_of_4", "loss_part_kl", "grad_norm"]
    assert [part_name(name) for name in names] == ["all", "1 (least noise)", "2", "4 (most)", "kl", "grad norm"]


def test_errors_of_a_mean_are_drawn(tmp_path, monkeypatch):
    """Of the bound's terms by range of steps: that of numpy's formula, for a bin of steps 1 and one of 2."""
    import matplotlib.axes

    drawn = []
    monkeypatch.setattr(matplotlib.axes.Axes, "errorbar", lambda self, x, y, bars, **_: drawn.append((x, y, bars)))
    t = np.array([[1, 2], [1, 2], [1, 2]])
    value = np.array([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])
    draw_terms(t, {"a": value}, tmp_path / "terms.png")
    ((x, y, (below, above)),) = drawn
    np.testing.assert_allclose(x, [1, 2])
    np.testing.assert_allclose(y, [3, 5])
    np.testing.assert_allclose(above, [float(np.std([1, 2, 6], ddof=1)) / 3**0.5, 0.0])
    np.testing.assert_allclose(below, above)
    draw_sweep([2, 5], [0.2, 0.1], tmp_path / "score.png", "steps", "KID", [(0.1, 0.2), (0.3, 0.4)])
    np.testing.assert_array_equal(drawn[1][2], [[0.1, 0.3], [0.2, 0.4]])


def test_the_bars_of_a_sweep_are_standard_errors_where_they_are_known():
    assert spread({"mean": 1.0, "standard error": 0.25}) == (0.25, 0.25)
    assert spread(1.0) is None and spread({"all": 0.5}) is None
