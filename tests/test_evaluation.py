"""Evaluation: features, the held-out score, the classifier, scores and the references they are of."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import metrics
from diffusion.data import digits
from diffusion.evaluation import (
    METRICS,
    PIXELS,
    HeldOutScore,
    Reference,
    ReferenceSet,
    bias_note,
    check_names,
    class_shares,
    compare,
    count_bias,
    extract,
    fit_classifier,
    fixed_subset,
    held_out_score,
    network_extractor,
    pixel_features,
    read_statistics,
    reference_of,
    reference_set,
)

rng = np.random.RandomState(0)


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


def beside(image: np.ndarray, held_out: np.ndarray, train: Any) -> HeldOutScore:
    return held_out_score(extract(image, PIXELS, train), held_out, train)


def test_held_out_score_separates_good_from_bad(real, train_set):
    train, held_out = real["train"]["image"], real["test"]["image"]
    itself = beside(held_out, held_out, train_set)
    assert itself.ratio == 1 and itself.count == 500 and itself.samples == itself.held_out
    assert itself.parts == 1 and itself.standard_error is None
    # Training images shown again are nearer than any fresh ones; noise and blur are farther, and by how much.
    assert beside(fixed_subset(train, 500), held_out, train_set).ratio < 0.7
    noisy = np.clip(held_out + rng.normal(0, 40, held_out.shape), 0, 255).astype(np.uint8)
    noisier = np.clip(held_out + rng.normal(0, 80, held_out.shape), 0, 255).astype(np.uint8)
    ratios = [beside(image, held_out, train_set).ratio for image in (noisy, noisier, 255 - held_out)]
    assert 2 < ratios[0] < ratios[1] < ratios[2]


def test_held_out_score_is_taken_at_one_count_and_in_no_order(real, train_set):
    held_out = real["test"]["image"]
    many = np.concatenate([held_out, 255 - held_out])
    score = beside(many, held_out, train_set)
    assert score.count == 500
    assert beside(many[rng.permutation(1000)], held_out[::-1], train_set) == pytest.approx(score, rel=1e-10)
    few = beside(held_out[:100], held_out, train_set)
    assert few.count == 100 and few.held_out > score.held_out  # the bias of a small count is in both
    with pytest.raises(
        ValueError, match=r"samples of shape \[8, 8, 3\] have 192 features, the reference digits has 64"
    ):
        beside(held_out, held_out.repeat(3, -1), train_set)
    with pytest.raises(ValueError, match="at least 2 features are needed, not 1"):
        beside(held_out[:1], held_out, train_set)


def test_held_out_score_of_many_samples_is_the_mean_of_sets(real, train_set):
    """Each of 500; the error is that of their mean, and samples that make no whole set are left out."""
    held_out = real["test"]["image"]
    many = np.clip(np.tile(held_out, (3, 1, 1, 1)) + rng.normal(0, 20, (1500, 8, 8, 1)), 0, 255).astype(np.uint8)
    score = beside(many, held_out, train_set)
    parts = [beside(part, held_out, train_set).ratio for part in np.split(fixed_subset(many, 1500), 3)]
    assert score.parts == 3 and score.count == 500
    assert score.ratio == pytest.approx(np.mean(parts)) and np.std(parts) > 0
    assert score.standard_error == pytest.approx(np.std(parts, ddof=1) / 3**0.5)
    samples = extract(many, PIXELS, train_set)
    fewer = held_out_score(samples._replace(features=samples.features[:1400]), held_out, train_set)
    assert fewer.parts == 2 and fewer.ratio == pytest.approx(np.mean(parts[:2]))


def test_held_out_images_that_are_the_training_images_are_refused(train_set):
    image = np.zeros((5, 8, 8, 1), np.uint8)
    itself = train_set._replace(statistics=metrics.statistics(pixel_features(image)))
    with pytest.raises(ValueError, match="distance 0 from the training images: are they the same"):
        beside(image + 9, image, itself)


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
        reference = reference_set(digits("train"), extractor)
        scores = compare(extract(image[order], extractor, reference), extractor, reference, list(METRICS))
        expected = expected or scores
        for name, score in scores.items():
            assert score.num_samples == 500
            assert score.value == pytest.approx(expected[name].value, rel=1e-3, abs=1e-9)


def test_scores_are_those_of_the_formulas(real, train_set):
    image = fixed_subset(real["test"]["image"], 300)
    scores = compare(extract(image, PIXELS, train_set), PIXELS, train_set, ["fid", "kid", "precision_recall"])
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
    measured = f"the distance of 600 of the reference's own images from its others is {biases[2]:.4g}"
    assert bias_note(train_set, 600) == f"biased upwards, because 600 samples are fewer than 50000: {measured}"
    assert bias_note(train_set, 50_000) == ""


def test_the_note_on_a_bias_that_cannot_be_measured_names_the_reason(train_set):
    cannot = "by how much cannot be measured, because the reference has"
    assert bias_note(train_set._replace(features=None), 600).endswith(f"{cannot} statistics alone")
    assert bias_note(train_set._replace(features=train_set.features[:3]), 600).endswith(f"{cannot} 3 images")


def test_metrics_are_checked_by_name_and_count_before_anything_is_computed():
    cases: list[tuple[list[str], dict[str, Any], str]] = [
        (["FID"], {}, "unknown metric 'FID': choose from fid, kid, inception_score, precision_recall"),
        (["fid", ""], {}, "unknown metric ''"),
        (["inception_score"], {"extractor": PIXELS}, "needs the probabilities of a classifier, and pixels in .* none"),
        (["kid"], {"num_reference": 0}, "kid needs the reference's images, and the reference has statistics alone"),
        (["fid", "kid"], {"num_samples": 2}, "kid needs at least 3 samples, not 2"),
        (["inception_score"], {"num_samples": 19}, "inception_score needs at least 20 samples, not 19"),
        (["precision_recall"], {"num_reference": 3}, "precision_recall needs a reference of at least 4 images, not 3"),
    ]
    for names, facts, line in cases:
        with pytest.raises(ValueError, match=line):
            check_names(names, **facts)
    check_names(list(METRICS))
    check_names(["fid"], PIXELS, num_samples=2, num_reference=0)


@pytest.mark.parametrize("name", list(METRICS))
def test_the_least_counts_are_those_that_can_be_computed(real, name):
    extractor, metric = small_network(20), METRICS[name]
    features = extractor.extract(real["train"]["image"][: max(metric.num_reference, 2)]).features
    reference = ReferenceSet(Reference("few", "train", len(features), ""), metrics.statistics(features), features)
    few = real["test"]["image"][: metric.num_samples]
    value: Any = compare(extract(few, extractor, reference), extractor, reference, [name])[name].value
    assert np.isfinite(list(value.values()) if isinstance(value, dict) else value).all()
    with pytest.raises(ValueError, match=f"{name} needs at least"):
        compare(extract(few[1:], extractor, reference), extractor, reference, [name])


def test_features_that_are_not_finite_are_refused():
    one = jax.devices()[:1]
    extractor = network_extractor("bad", lambda _, image: 1 / (image[:, :2, 3, 0] - 15.0), {}, devices=one)
    image = np.zeros((70, 8, 8, 1), np.uint8)
    assert extractor.extract(image).features.shape == (70, 2)
    image[[66, 68], 1, 3] = 15
    with pytest.raises(ValueError, match=r"2 of 70 features by bad, .* are not finite .* the first is number 66"):
        extractor.extract(image)


# --- references


def test_statistics_in_float32_are_read_despite_their_rounding(tmp_path, real, train_set):
    """Of 40 images in 64 dimensions: 24 eigenvalues are 0, of which rounding to float32 makes some negative."""
    own = metrics.statistics(pixel_features(real["test"]["image"][:40]))
    kept = (own.mean.astype(np.float32), own.cov.astype(np.float32))
    assert np.linalg.eigvalsh(kept[1].astype(np.float64))[0] < -1e-9
    train = train_set.statistics
    exact = metrics.frechet_distance(own.mean, own.cov, train.mean, train.cov)
    for dtype in (np.float32, np.float64):  # float64 as statistics that were computed in float32 are often stored
        np.savez(tmp_path / "f.npz", mu=kept[0].astype(dtype), sigma=kept[1].astype(dtype))
        found = read_statistics(tmp_path / "f.npz").statistics
        # Float32 rounds a trace of some 20 by 1e-6, and the roots of eigenvalues that are 0 by sqrt(1e-7).
        distance = metrics.frechet_distance(found.mean, found.cov, train.mean, train.cov)
        assert distance == pytest.approx(exact, rel=1e-3)
    np.savez(tmp_path / "f.npz", mu=own.mean, sigma=own.cov)
    np.testing.assert_array_equal(read_statistics(tmp_path / "f.npz").statistics.cov, own.cov)


def test_matrices_that_are_no_covariances_are_refused(tmp_path):
    for cov, line in (
        (np.diag([1, -1e-3]).astype(np.float32), "eigenvalues are from -0.001 to 1"),
        (np.array([[1.0, 0.5], [0.2, 1.0]]), "differs from its transpose by up to 0.3"),
        (np.eye(2).astype(np.float16), "sigma is not all finite numbers of float32 or float64"),
        (np.eye(2, dtype=int), "sigma is not all finite numbers of float32 or float64"),
        (np.full((2, 2), np.nan), "sigma is not all finite numbers"),
        (np.eye(3), r"mu \[2\] and sigma \[3, 3\] are not a mean and a covariance"),
        (np.zeros((0, 0)), "are not a mean and a covariance"),
    ):
        np.savez(tmp_path / "f.npz", mu=np.zeros(min(2, len(cov))), sigma=cov)
        with pytest.raises(ValueError, match=line):
            read_statistics(tmp_path / "f.npz")


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


def test_reference_names_the_whole_source():
    source = digits("test")
    assert reference_of(source) == ("digits", "test", 500, source.fingerprint)
