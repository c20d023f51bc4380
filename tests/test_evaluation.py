"""Evaluation: sample files, the held-out score, the classifier, and reports without bare numbers."""

import json
import pickle
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import metrics
from diffusion.data import digits, text
from diffusion.data.images import save_png
from diffusion.data.samples import load_samples, save_samples
from diffusion.evaluation import (
    METRICS,
    PIXELS,
    Measurement,
    Reference,
    bias_note,
    class_shares,
    compare,
    count_bias,
    fit_classifier,
    fixed_subset,
    held_out_score,
    load_encoder,
    network_extractor,
    over_seeds,
    pixel_features,
    reference_of,
    reference_set,
    write_report,
)
from diffusion.evaluation.__main__ import main as command_line
from diffusion.evaluation.clip_features import OPENAI_MEAN, OPENAI_STD
from diffusion.networks.clip import CLIP, ImageTower, TextTower
from diffusion.pretrained.clip import load_clip, save_clip

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


@pytest.fixture(scope="module")
def train_set(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield reference_set(digits("train"), PIXELS)


def test_held_out_score_tells_good_from_bad(real, train_set):
    train, held_out = real["train"]["image"], real["test"]["image"]
    itself = held_out_score(held_out, held_out, train_set)
    assert itself.ratio == 1 and itself.count == 500 and itself.samples == itself.held_out
    # Training images shown again are nearer than any fresh ones; noise and blur are farther, and by how much.
    assert held_out_score(fixed_subset(train, 500), held_out, train_set).ratio < 0.7
    noisy = np.clip(held_out + rng.normal(0, 40, held_out.shape), 0, 255).astype(np.uint8)
    noisier = np.clip(held_out + rng.normal(0, 80, held_out.shape), 0, 255).astype(np.uint8)
    ratios = [held_out_score(image, held_out, train_set).ratio for image in (noisy, noisier, 255 - held_out)]
    assert 2 < ratios[0] < ratios[1] < ratios[2]


def test_held_out_score_is_taken_at_one_count_and_in_no_order(real, train_set):
    held_out = real["test"]["image"]
    many = np.concatenate([held_out, 255 - held_out])
    score = held_out_score(many, held_out, train_set)
    assert score.count == 500
    again = held_out_score(many[rng.permutation(1000)], held_out[::-1], train_set)
    assert again == pytest.approx(score, rel=1e-10)
    few = held_out_score(held_out[:100], held_out, train_set)
    assert few.count == 100 and few.held_out > score.held_out  # the bias of a small count is in both
    with pytest.raises(ValueError, match=r"samples have shape \[8, 8, 3\] but held-out images \[8, 8, 1\]"):
        held_out_score(held_out.repeat(3, -1), held_out, train_set)
    with pytest.raises(ValueError, match="at least 2 features are needed, not 1"):
        held_out_score(held_out[:1], held_out, train_set)


# --- scores


def small_network(batch_size, num_devices=1):
    """A seeded convolution as a feature extractor that also classifies."""
    kernel = np.random.RandomState(0).normal(size=(3, 3, 1, 12)).astype(np.float32)

    def apply(params, image):
        x = jax.lax.conv_general_dilated(
            image.astype(jnp.float32) / 255,
            params["kernel"],
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        features = jnp.tanh(x).mean((1, 2))
        return features, 5 * features[:, :4]

    devices = jax.devices()[:num_devices]
    return network_extractor("small", apply, {"kernel": kernel}, batch_size, classifies=True, devices=devices)


def test_scores_do_not_depend_on_batch_size_devices_or_order(real, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    image = real["test"]["image"]
    expected = None
    backwards = slice(None, None, -1)
    for batch_size, devices, order in ((64, 1, slice(None)), (7, 1, rng.permutation(500)), (60, 8, backwards)):
        extractor = small_network(batch_size, devices)
        scores = compare(image[order], extractor, reference_set(digits("train"), extractor), list(METRICS))
        expected = expected or scores
        for name, score in scores.items():
            assert score.num_samples == 500
            assert score.value == pytest.approx(expected[name].value, rel=1e-3, abs=1e-9)


def test_scores_are_those_of_the_formulas(real, train_set):
    image = fixed_subset(real["test"]["image"], 300)
    scores = compare(image, PIXELS, train_set, ["fid", "kid", "precision_recall"])
    own, other = (metrics.statistics(pixel_features(x)) for x in (image, real["train"]["image"]))
    fid = metrics.frechet_distance(own.mean, own.cov, other.mean, other.cov)
    assert scores["fid"] == (pytest.approx(fid, rel=1e-9), 300)
    kid = metrics.kernel_distance(pixel_features(image), pixel_features(real["train"]["image"]))
    assert scores["kid"].value == pytest.approx({"mean": kid.value, "standard error": kid.standard_error}, rel=1e-9)
    both: Any = scores["precision_recall"].value
    assert 0.7 < both["precision"] <= 1


def test_references_are_computed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source, calls = digits("train"), []
    network = small_network(100)
    counted = network._replace(extract=lambda image: (calls.append(len(image)), network.extract(image))[1])
    first = reference_set(source, counted)
    again = reference_set(source, counted)
    assert calls == [1297]
    np.testing.assert_array_equal(first.features, again.features)
    np.testing.assert_array_equal(first.statistics.cov, again.statistics.cov)
    reference_set(digits("test"), counted)
    reference_set(source, counted._replace(name="other"))
    assert calls == [1297, 500, 1297]
    (stored,) = [path for path in tmp_path.rglob("*.npz") if np.load(path)["features"].shape[0] == 500]
    stored.write_bytes(stored.read_bytes()[:1000])  # a damaged cache is made anew
    reference_set(digits("test"), counted)
    assert calls == [1297, 500, 1297, 500]


def test_the_bias_of_a_small_count_is_measured(train_set):
    found: Any = [count_bias(train_set, count) for count in (50, 200, 600, 1000)]
    biases = [one.value for one in found]
    assert biases[0] > 2 * biases[1] > 2 * biases[2] > 0
    assert found[-1].num_samples == 648  # half of the reference at most
    assert f"600 of the reference's own images are {biases[2]:.4g} from its others" in bias_note(train_set, 600)
    assert bias_note(train_set, 50_000) == ""
    assert "statistics alone" in bias_note(train_set._replace(features=None), 600)


def test_over_seeds():
    assert over_seeds([1.5]) == 1.5
    assert over_seeds([{"mean": 1.0, "error": 2.0}]) == {"mean": 1.0, "error": 2.0}
    assert over_seeds([3.0, 1.0, 2.0]) == {"mean": 2.0, "min": 1.0, "max": 3.0}
    assert over_seeds([{"mean": 1.0, "error": 2.0}, {"mean": 3.0, "error": 4.0}]) == {
        "mean": 2.0, "min": 1.0, "max": 3.0, "error mean": 3.0, "error min": 2.0, "error max": 4.0,
    }  # fmt: skip


# --- python -m diffusion.evaluation


def test_the_command_scores_any_two_sets(real, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_samples(tmp_path / "a.npz", real["test"]["image"])
    for number, image in enumerate(real["test"]["image"]):
        save_png(tmp_path / "pictures" / f"{number:04d}.png", image, smallest_side=1)
    own = metrics.statistics(pixel_features(real["train"]["image"]))
    np.savez(tmp_path / "statistics.npz", mu=own.mean, sigma=own.cov)
    printed = []
    for samples, reference in (("a.npz", "digits:train"), ("pictures", "digits:train"), ("a.npz", "statistics.npz")):
        reference = reference if ":" in reference else str(tmp_path / reference)
        command_line([str(tmp_path / samples), reference, "--features=pixels", f"--out={tmp_path / 'out'}"])
        printed.append(capsys.readouterr().out)
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        names = [one["name"] for one in report["measurements"]]
        assert names == (["fid"] if "statistics" in reference else ["fid", "kid", "precision_recall"])
        assert report["measurements"][0]["value"] == pytest.approx(0.29806, rel=1e-4)  # as held-out images have
        assert "biased upwards, for 500 samples" in printed[-1]
    assert (tmp_path / "out" / "nearest.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A published CLIP, tiny, that has learned nothing."""
    tokenizer = text.train_tokenizer(["a red digit", "a blue digit"], 300)
    sizes: Any = dict(width=16, num_layers=1, num_heads=2, mlp_width=16, projection=8)
    end = text.end_of_text(tokenizer)
    clip = CLIP(
        ImageTower(image_size=8, patch_size=4, **sizes),
        TextTower(vocabulary_size=tokenizer.get_vocab_size(), end_of_text=end, length=12, **sizes),
    )
    params = clip.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 12), jnp.int32))
    folder = tmp_path_factory.mktemp("published") / "clip"
    save_clip(folder, clip, params, text.to_json(tokenizer))
    return folder


def test_clip_judges_samples_by_features_and_by_prompts(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = [rng.randint(0, 256, (40, 8, 8, 3), np.uint8) for _ in range(2)]
    for name, image in zip("ab", images, strict=True):
        save_samples(tmp_path / f"{name}.npz", image)
    prompts = ["a red digit", "a blue digit"] * 20
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    samples, reference = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    clip = ["--features=clip", f"--weights={clip_folder}", f"--out={tmp_path}"]
    command_line([samples, reference, *clip, f"--prompts={tmp_path / 'prompts.txt'}"])
    report = json.loads((tmp_path / "report.json").read_text())
    found = {one["name"]: one["value"] for one in report["measurements"]}

    clip_network, params = load_clip(clip_folder)
    pixels = (images[0] / 255 - np.array(OPENAI_MEAN)) / np.array(OPENAI_STD)
    ids = text.encode(text.read_tokenizer(clip_folder), prompts, 12)
    image, caption, *_ = clip_network.apply(params, jnp.asarray(pixels, jnp.float32), jnp.asarray(ids))
    cosine = np.sum(np.asarray(image) * np.asarray(caption), axis=1)
    assert found["CLIP score"] == pytest.approx(100 * np.maximum(cosine, 0).mean(), rel=1e-4)
    own, other = (metrics.statistics(load_encoder(clip_folder).image(x).astype(np.float64)) for x in images)
    assert found["fid"] == pytest.approx(metrics.frechet_distance(own.mean, own.cov, other.mean, other.cov), rel=1e-6)
    for arguments, line in (
        ([samples, reference, "--features=clip"], "needs the folder of a published CLIP"),
        ([samples, reference, "--features=pixels", "--prompts=x.txt"], "add --features=clip"),
        ([samples, reference, "--features=clip", f"--weights={tmp_path}"], "config.json"),
    ):
        with pytest.raises(SystemExit, match=line):
            command_line(arguments)


def test_bad_input_of_the_command_gets_one_line(real, tmp_path):
    save_samples(tmp_path / "one.npz", real["test"]["image"][:1])
    save_samples(tmp_path / "colour.npz", real["test"]["image"].repeat(3, -1))
    save_samples(tmp_path / "good.npz", real["test"]["image"])
    (tmp_path / "cut.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:-50])
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((9, 8, 8, 1)))
    np.savez(tmp_path / "nan.npz", mu=np.zeros(64), sigma=np.full((64, 64), np.nan))
    np.savez(tmp_path / "square.npz", mu=np.zeros(64), sigma=np.zeros((64, 3)))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"no picture")
    statistics = str(tmp_path / "good_statistics.npz")
    np.savez(statistics, mu=np.zeros(64), sigma=np.eye(64))
    for arguments, line in (
        (["one.npz", "digits:train"], "at least 2 features are needed, not 1"),
        (["colour.npz", "digits:train"], r"shape \[8, 8, 3\] have 192 features, the reference digits has 64"),
        (["cut.npz", "digits:train"], "cut.npz is not a whole .npz"),
        (["missing.npz", "digits:train"], "missing.npz is not a whole .npz"),
        (["float.npz", "digits:train"], "float64 in .* not uint8"),
        (["empty", "digits:train"], "holds no pictures"),
        (["broken", "digits:train"], "a.png cannot be read as a picture"),
        (["good.npz", "digits:all"], "splits 'train' and 'test'"),
        (["good.npz", str(tmp_path / "nan.npz")], "not a mean and a covariance"),
        (["good.npz", str(tmp_path / "square.npz")], "not a mean and a covariance"),
        (["good.npz", statistics, "--metrics=kid"], "kid needs the reference's images"),
        (["good.npz", "digits:train", "--metrics=fid,beauty"], "no metric 'beauty'"),
        (["good.npz", "digits:train", "--features=inception", "--weights=none.pth"], "none.pth is not a file"),
    ):
        with pytest.raises(SystemExit) as left:
            command_line(["--features=pixels", str(tmp_path / arguments[0]), *arguments[1:]])
        assert re.search(line, str(left.value)) and "\n" not in str(left.value), left.value


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
