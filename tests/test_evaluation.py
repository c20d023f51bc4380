"""Evaluation: sample files, the held-out score, the classifier, and reports without bare numbers."""

import json
import pickle

import numpy as np
import pytest

from diffusion.data import digits
from diffusion.data.samples import load_samples, save_samples
from diffusion.evaluation import (
    Measurement,
    Reference,
    class_shares,
    fit_classifier,
    fixed_subset,
    held_out_score,
    pixel_features,
    reference_of,
    write_report,
)

rng = np.random.RandomState(0)


@pytest.fixture(scope="module")
def real():
    """The digits: {"train", "test"} -> {"image", "label"}."""
    return {split: digits(split).read(np.arange(digits(split).num_examples)) for split in ("train", "test")}


# --- sample files


def test_samples_are_the_convention_of_adm(tmp_path):
    image = rng.randint(0, 256, (5, 4, 3, 1), np.uint8)
    save_samples(tmp_path / "new" / "samples.npz", image)
    with np.load(tmp_path / "new" / "samples.npz") as arrays:
        assert arrays.files == ["arr_0"] and arrays["arr_0"].dtype == np.uint8 and (arrays["arr_0"] == image).all()
    assert (load_samples(tmp_path / "new" / "samples.npz") == image).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["samples.npz"]


def test_bad_samples_are_not_written(tmp_path):
    for image, name, line in [
        (np.zeros((5, 4, 4, 3), np.float32), "a.npz", r"float32 in \[0, 0\], not uint8"),
        (np.zeros((5, 4, 4), np.uint8), "a.npz", r"shape \[5, 4, 4\]"),
        (np.zeros((5, 4, 4, 1), np.uint8), "a.npy", r"\.npz file, not to .*a\.npy"),
    ]:
        with pytest.raises(ValueError, match=line):
            save_samples(tmp_path / name, image)
    assert not list(tmp_path.iterdir())


class Hostile:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


def test_bad_sample_files_get_one_line_and_run_nothing(tmp_path):
    trace = tmp_path / "trace"
    whole = tmp_path / "whole.npz"
    save_samples(whole, rng.randint(0, 256, (50, 8, 8, 3), np.uint8))
    content = whole.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 4
    for name, written in [
        ("truncated.npz", content[:-100]),
        ("flipped.npz", bytes(flipped)),
        ("empty.npz", b""),
        ("text.npz", b"these are not samples"),
        ("pickle.npz", pickle.dumps(Hostile(trace))),
    ]:
        (tmp_path / name).write_bytes(written)
    np.savez(tmp_path / "object.npz", arr_0=np.array([Hostile(trace)], object))
    np.savez(tmp_path / "other.npz", images=np.zeros(3))
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "nan.npz", arr_0=np.full((2, 4, 4, 3), np.nan))
    np.savez(tmp_path / "flat.npz", arr_0=np.zeros((2, 48), np.uint8))
    np.save(tmp_path / "array.npy", np.zeros((2, 4, 4, 3), np.uint8))
    for name, line in [
        ("truncated.npz", "not a whole .npz"),
        ("flipped.npz", "not a whole .npz"),
        ("empty.npz", "not a whole .npz"),
        ("text.npz", "not a whole .npz"),
        ("pickle.npz", "not a whole .npz"),
        ("object.npz", "not a whole .npz"),
        ("missing.npz", "not a whole .npz.*No such file"),
        ("array.npy", "not a whole .npz"),
        ("other.npz", "no array arr_0"),
        ("float.npz", r"float64 in \[0, 0\], not uint8"),
        ("nan.npz", "nan at example 0"),
        ("flat.npz", r"shape \[2, 48\]"),
    ]:
        with pytest.raises(ValueError, match=line) as error:
            load_samples(tmp_path / name)
        assert "\n" not in str(error.value) and name in str(error.value)
    assert not trace.exists()


# --- features and scores


def test_pixel_features_are_the_pixels():
    image = np.zeros((2, 2, 2, 1), np.uint8)
    image[1, 0, 1, 0] = 255
    assert pixel_features(image).tolist() == [[-1, -1, -1, -1], [-1, 1, -1, -1]]


def test_classifier_reads_held_out_digits(real):
    classify = fit_classifier(**real["train"])
    read = classify(real["test"]["image"])
    assert (read == real["test"]["label"]).mean() >= 0.98
    assert (read == fit_classifier(**real["train"])(real["test"]["image"])).all()
    with pytest.raises(ValueError, match="1297 images and 1 labels"):
        fit_classifier(real["train"]["image"], real["train"]["label"][:1])


def test_class_shares():
    assert class_shares(np.array([0, 3, 3, 1]), 5).tolist() == [0.25, 0.25, 0, 0.5, 0]


def test_held_out_score_tells_good_from_bad(real):
    train, held_out = real["train"]["image"], real["test"]["image"]
    itself = held_out_score(held_out, train, held_out)
    assert itself.ratio == 1 and itself.count == 500 and itself.samples == itself.held_out
    # Training images shown again are nearer than any fresh ones; noise and blur are farther, and by how much.
    assert held_out_score(fixed_subset(train, 500), train, held_out).ratio < 0.7
    noisy = np.clip(held_out + rng.normal(0, 40, held_out.shape), 0, 255).astype(np.uint8)
    noisier = np.clip(held_out + rng.normal(0, 80, held_out.shape), 0, 255).astype(np.uint8)
    ratios = [held_out_score(image, train, held_out).ratio for image in (noisy, noisier, 255 - held_out)]
    assert 2 < ratios[0] < ratios[1] < ratios[2]


def test_held_out_score_is_taken_at_one_count_and_in_no_order(real):
    train, held_out = real["train"]["image"], real["test"]["image"]
    many = np.concatenate([held_out, 255 - held_out])
    score = held_out_score(many, train, held_out)
    assert score.count == 500
    again = held_out_score(many[rng.permutation(1000)], train[rng.permutation(1297)], held_out[::-1])
    assert again == pytest.approx(score, rel=1e-10)
    few = held_out_score(held_out[:100], train, held_out)
    assert few.count == 100 and few.held_out > score.held_out  # the bias of a small count is in both
    with pytest.raises(ValueError, match=r"samples have shape \[8, 8, 3\] but training images \[8, 8, 1\]"):
        held_out_score(held_out.repeat(3, -1), train, held_out)
    with pytest.raises(ValueError, match="at least 2 features are needed, not 1"):
        held_out_score(held_out[:1], train, held_out)


def test_fixed_subset_depends_on_content_alone(real):
    image = real["train"]["image"]
    chosen = fixed_subset(image, 300)
    assert (chosen == fixed_subset(image[rng.permutation(len(image))], 300)).all()
    assert (chosen[:100] == fixed_subset(image, 100)).all()
    assert len(np.unique(chosen.reshape(300, -1), axis=0)) == 300
    # As if drawn at random: 10% of each class to four standard deviations of a draw without replacement.
    order = {one.tobytes(): label for one, label in zip(image, real["train"]["label"], strict=True)}
    shares = class_shares(np.array([order[one.tobytes()] for one in chosen]), 10)
    assert np.abs(shares - 0.1).max() < 4 * (0.1 * 0.9 / 300) ** 0.5
    with pytest.raises(ValueError, match="1298 images cannot be chosen from 1297"):
        fixed_subset(image, 1298)


# --- reports

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
        (DISTANCE._replace(value=float("nan")), "Frechet distance is nan"),
        (SHARES._replace(value={"0": 0.5, "1": float("inf")}), "shares, 1 is inf"),
    ]:
        with pytest.raises(ValueError, match=where):
            write_report(tmp_path, "Digits", [DISTANCE, bad], {})
    assert (tmp_path / "report.json").read_text() == before


def test_reference_names_the_whole_source():
    source = digits("test")
    assert reference_of(source) == ("digits", "test", 500, source.fingerprint)
