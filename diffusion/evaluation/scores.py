"""Samples against a reference set: one call from images to named scores, the same whatever order they come in."""

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, UInt8

from diffusion import metrics
from diffusion.data.images import check_uint8_images
from diffusion.data.sources import Source
from diffusion.evaluation.features import Extracted, Extractor
from diffusion.evaluation.report import Reference, reference_of
from diffusion.files import cache_folder, replacing

UNBIASED_COUNT = 50_000  # what published FIDs take
LARGEST_PAIRED = 10_000  # images of a set that are compared pair by pair; a choice of them, by content
NUM_SPLITS = 10  # of the inception score, as in the released code


class ReferenceSet(NamedTuple):
    """What samples are compared with.

    Attributes:
      reference: its name and count, for reports.
      statistics: of its features.
      features: of its images, [N, D]; None where only statistics are known.
    """

    reference: Reference
    statistics: metrics.Statistics
    features: np.ndarray | None

    @property
    def num_images(self) -> int:
        """How many images it has, 0 where only statistics are known."""
        return 0 if self.features is None else len(self.features)


class Score(NamedTuple):
    """A metric's value.

    Attributes:
      value: a number, or several by name.
      num_samples: over which it was taken.
    """

    value: float | Mapping[str, float]
    num_samples: int


class Metric(NamedTuple):
    """A metric of samples against a reference.

    Attributes:
      title: its name in every report.
      score: computes it.
      num_samples: it needs at least.
      num_reference: images of the reference that it needs at least; 0: it needs none.
      needs_images: whether statistics of the reference are not enough.
      needs_classifier: whether it reads the probabilities of classes.
    """

    title: str
    score: Callable[[Extracted, ReferenceSet], Score]
    num_samples: int
    num_reference: int
    needs_images: bool = False
    needs_classifier: bool = False


def reference_set(source: Source, extractor: Extractor) -> ReferenceSet:
    """Returns the features and statistics of a whole source, from the cache if they are there.

    The key of the cache, `cache_folder()/features`, is the source's fingerprint and the extractor's name. It may be
    deleted.
    """
    key = hashlib.sha256(f"{source.fingerprint} {extractor.name} 1".encode()).hexdigest()[:32]
    path = cache_folder() / "features" / f"{source.name.replace('/', '_').replace(':', '_')}-{key}.npz"
    reference = reference_of(source)
    with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile), np.load(path) as stored:
        statistics = metrics.Statistics(stored["mean"], stored["cov"], source.num_examples)
        features = stored["features"] if extractor.costly else None
        return ReferenceSet(reference, statistics, _features(source, extractor) if features is None else features)
    features = _features(source, extractor)
    statistics = metrics.statistics(features)
    kept: Any = {"features": features} if extractor.costly else {}
    with contextlib.suppress(OSError), replacing(path) as temporary:  # without a cache the next time is slower
        np.savez(temporary, mean=statistics.mean, cov=statistics.cov, **kept)
    return ReferenceSet(reference, statistics, features)


def all_images(source: Source) -> UInt8[np.ndarray, "N H W C"]:
    """Returns all images of a source."""
    return source.read(np.arange(source.num_examples))["image"]


def _features(source: Source, extractor: Extractor) -> np.ndarray:
    return extractor.extract(all_images(source)).features


def read_statistics(path: Path) -> ReferenceSet:
    """Returns published statistics, an .npz with `mu` [D] and `sigma` [D, D]: enough for the Fréchet distance alone.

    Raises:
      ValueError: the file is damaged, or `sigma` is not a covariance beyond the rounding of its own type.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            mean, cov = np.asarray(stored["mu"]), np.asarray(stored["sigma"])
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a whole .npz file with mu and sigma ({' '.join(str(error).split())})"
        ) from error
    if mean.ndim != 1 or cov.shape != mean.shape * 2 or not mean.size:
        raise ValueError(f"{path}: mu {list(mean.shape)} and sigma {list(cov.shape)} are not a mean and a covariance")
    for name, array in (("mu", mean), ("sigma", cov)):
        if array.dtype not in (np.float32, np.float64) or not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} is not all finite numbers of float32 or float64")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    reference = Reference(path.name, "statistics", None, f"file-sha256:{digest}")
    return ReferenceSet(reference, metrics.Statistics(mean.astype(np.float64), _covariance(cov, path), 0), None)


def _covariance(cov: np.ndarray, path: Path) -> Float64[np.ndarray, "D D"]:
    """Returns a covariance of float32 or float64 in float64; what rounding to float32 made negative is 0.

    Raises:
      ValueError: it is not symmetric, or has a negative eigenvalue, by more than rounding.
    """
    rounded = np.array_equal(cov, cov.astype(np.float32))  # some are computed in float32 and stored in float64
    exact = cov.astype(np.float64)
    value, vector = np.linalg.eigh((exact + exact.T) / 2)
    # The usual bound for singular values that are 0 (`numpy.linalg.matrix_rank`); of float64 the slack of
    # `metrics.frechet_distance`.
    epsilon = np.finfo(np.float32).eps if rounded else 1e3 * np.finfo(np.float64).eps
    rounding = len(cov) * float(epsilon) * max(value[-1], 0.0)
    asymmetry = np.abs(exact - exact.T).max()
    if asymmetry > rounding or value[0] < -rounding:
        raise ValueError(
            f"{path}: sigma is not a covariance: it differs from its transpose by up to {asymmetry:.3g}, and its "
            f"eigenvalues are from {value[0]:.3g} to {value[-1]:.3g}"
        )
    return (vector * np.maximum(value, 0.0)) @ vector.T if rounded and value[0] < 0 else exact


def extract(image: np.ndarray, extractor: Extractor, reference: ReferenceSet) -> Extracted:
    """Returns what is compared of samples, in an order that is that of their content alone (`fixed_subset`).

    Args:
      image: uint8[N, H, W, C].
      extractor: that made the features of the reference.
      reference: what they are to be compared with.

    Raises:
      ValueError: images that cannot be compared with it.
    """
    check_uint8_images(image, "samples")
    extracted = extractor.extract(fixed_subset(image, len(image)))
    if extracted.features.shape[1] != len(reference.statistics.mean):
        raise ValueError(
            f"samples of shape {list(image.shape[1:])} have {extracted.features.shape[1]} features, the reference "
            f"{reference.reference.name} has {len(reference.statistics.mean)}: is it of other features, or are its "
            "images of another size?"
        )
    return extracted


def compare(
    samples: Extracted, extractor: Extractor, reference: ReferenceSet, names: Sequence[str]
) -> dict[str, Score]:
    """Returns scores of samples by metric.

    Args:
      samples: of `extract`.
      extractor: that made their features and those of the reference.
      reference: what they are compared with.
      names: of `METRICS`.

    Raises:
      ValueError: a metric that is unknown or cannot be computed of these.
    """
    check_names(names, extractor, num_samples=len(samples.features), num_reference=reference.num_images)
    return {name: METRICS[name].score(samples, reference) for name in names}


def check_names(
    names: Sequence[str],
    extractor: Extractor | None = None,
    *,
    num_samples: int | None = None,
    num_reference: int | None = None,
) -> None:
    """Checks before anything is computed that these metrics can be; what is not known yet is not checked.

    Args:
      names: of metrics.
      extractor: of features.
      num_samples: how many there will be.
      num_reference: images in the reference; 0: there are statistics alone.

    Raises:
      ValueError: an unknown metric, or one that needs more than there is.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f"unknown metric {name!r}: choose from {', '.join(METRICS)}")
        metric = METRICS[name]
        if metric.needs_classifier and extractor is not None and not extractor.classifies:
            raise ValueError(f"{name} needs the probabilities of a classifier, and {extractor.name} returns none")
        if metric.needs_images and num_reference == 0:
            raise ValueError(f"{name} needs the reference's images, and the reference has statistics alone")
        if num_samples is not None and num_samples < metric.num_samples:
            raise ValueError(f"{name} needs at least {metric.num_samples} samples, not {num_samples}")
        if num_reference and num_reference < metric.num_reference:
            raise ValueError(f"{name} needs a reference of at least {metric.num_reference} images, not {num_reference}")


def _frechet(samples: Extracted, reference: ReferenceSet) -> Score:
    own, other = metrics.statistics(samples.features), reference.statistics
    return Score(metrics.frechet_distance(own.mean, own.cov, other.mean, other.cov), own.count)


def _kernel(samples: Extracted, reference: ReferenceSet) -> Score:
    features = samples.features[:LARGEST_PAIRED]
    estimate = metrics.kernel_distance(features, paired(reference))
    return Score({"mean": estimate.value, "standard error": estimate.standard_error}, len(features))


def _inception_score(samples: Extracted, reference: ReferenceSet) -> Score:
    del reference
    assert samples.probability is not None
    score = metrics.inception_score(samples.probability, NUM_SPLITS)
    return Score({"mean": score.mean, "deviation over splits": score.std}, len(samples.probability))


def _precision_recall(samples: Extracted, reference: ReferenceSet) -> Score:
    real = paired(reference)
    count = min(len(real), len(samples.features), LARGEST_PAIRED)
    score = metrics.precision_recall(real[:count], samples.features[:count])
    return Score({"precision": score.precision, "recall": score.recall}, count)


METRICS: dict[str, Metric] = {
    "fid": Metric("FID", _frechet, 2, 2),
    "kid": Metric("KID", _kernel, 3, 3, needs_images=True),
    # Two samples per split: a split of one has the score 1, whatever it shows.
    "inception_score": Metric("inception score", _inception_score, 2 * NUM_SPLITS, 0, needs_classifier=True),
    # One more than the neighbours that span a ball.
    "precision_recall": Metric("precision and recall", _precision_recall, 4, 4, needs_images=True),
}


def paired(reference: ReferenceSet) -> np.ndarray:
    """Returns the features of the reference that are compared pair by pair, at most `LARGEST_PAIRED` chosen ones."""
    assert reference.features is not None
    order = np.random.RandomState(0).permutation(len(reference.features))
    return reference.features[order[:LARGEST_PAIRED]]


def count_bias(reference: ReferenceSet, count: int) -> Score | None:
    """Returns the Fréchet distance of `count` of the reference's images from its others: the bias of a small count.

    It is over half of the reference at most, so for larger counts it is too large. None for fewer than 4 images.
    """
    if reference.features is None or len(reference.features) < 4:
        return None
    count = min(count, len(reference.features) // 2)
    order = np.random.RandomState(0).permutation(len(reference.features))
    some, rest = (metrics.statistics(reference.features[np.sort(rows)]) for rows in (order[:count], order[count:]))
    return Score(metrics.frechet_distance(some.mean, some.cov, rest.mean, rest.cov), count)


def bias_note(reference: ReferenceSet, count: int) -> str:
    """Returns the note on a Fréchet distance of fewer than 50,000 samples; "" for enough of them."""
    if count >= UNBIASED_COUNT:
        return ""
    note = f"biased upwards, because {count} samples are fewer than {UNBIASED_COUNT}"
    bias = count_bias(reference, count)
    if bias is not None:
        return f"{note}: the distance of {bias.num_samples} of the reference's own images from its others is " + (
            f"{bias.value:.4g}"
        )
    what = f"{reference.num_images} images" if reference.num_images else "statistics alone"
    return f"{note}; by how much cannot be measured, because the reference has {what}"


def fixed_subset(image: np.ndarray, count: int) -> UInt8[np.ndarray, "count H W C"]:
    """Returns `count` images chosen by their content alone, as if at random, whatever order they come in.

    Raises:
      ValueError: there are fewer.
    """
    if count > len(image):
        raise ValueError(f"{count} images cannot be chosen from {len(image)}")
    drawn = [hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in image]
    return image[sorted(range(len(image)), key=drawn.__getitem__)[:count]]


def over_seeds(values: Sequence[float | Mapping[str, float]]) -> float | dict[str, float]:
    """Returns the value of one seed as it is, and the mean, least and largest over several; never the best alone."""
    if len(values) == 1:
        value = values[0]
        return dict(value) if isinstance(value, Mapping) else value
    rows = [value if isinstance(value, Mapping) else {"": value} for value in values]
    found = {}
    for part in rows[0]:
        numbers = [row[part] for row in rows]
        named = ("mean", "min", "max") if part in ("", "mean") else tuple(f"{part} {w}" for w in ("mean", "min", "max"))
        found |= dict(zip(named, (float(np.mean(numbers)), min(numbers), max(numbers)), strict=True))
    return found
