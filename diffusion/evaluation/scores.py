"""Samples against a reference set: one call from images to named scores, the same whatever order they come in."""

import contextlib
import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from diffusion import metrics
from diffusion.data.images import check_uint8_images
from diffusion.data.sources import Source
from diffusion.evaluation.features import Extracted, Extractor
from diffusion.evaluation.report import Reference, reference_of
from diffusion.files import cache_folder, replacing

UNBIASED_COUNT = 50_000  # what published FIDs take
LARGEST_PAIRED = 10_000  # images of a set that are compared pair by pair; a choice of them, by content


class ReferenceSet(NamedTuple):
    """What samples are compared with: statistics, and the features themselves where there are any."""

    reference: Reference
    statistics: metrics.Statistics
    features: np.ndarray | None


class Score(NamedTuple):
    """A metric's value, or several by name, and the number of samples that it was taken over."""

    value: float | Mapping[str, float]
    num_samples: int


def reference_set(source: Source, extractor: Extractor) -> ReferenceSet:
    """Returns the features and statistics of a whole source, from the cache where they are.

    The cache's key is the source's fingerprint and the extractor's name; `cache_folder()/features` may be deleted.
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


def _features(source: Source, extractor: Extractor) -> np.ndarray:
    return extractor.extract(source.read(np.arange(source.num_examples))["image"]).features


def read_statistics(path: Path) -> ReferenceSet:
    """Reads published statistics, an .npz with `mu` [D] and `sigma` [D, D]: only the Fréchet distance can be had.

    Raises:
      ValueError: if it is not a whole file of that kind.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            mean, cov = np.asarray(stored["mu"], np.float64), np.asarray(stored["sigma"], np.float64)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is not a whole .npz file with mu and sigma ({' '.join(str(error).split())})"
        ) from error
    if mean.ndim != 1 or cov.shape != mean.shape * 2 or not (np.isfinite(mean).all() and np.isfinite(cov).all()):
        raise ValueError(f"{path}: mu {list(mean.shape)} and sigma {list(cov.shape)} are not a mean and a covariance")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return ReferenceSet(
        Reference(path.name, "statistics", None, f"file-sha256:{digest}"), metrics.Statistics(mean, cov, 0), None
    )


def compare(image: np.ndarray, extractor: Extractor, reference: ReferenceSet, names: Sequence[str]) -> dict[str, Score]:
    """Scores samples uint8[N, H, W, C] by the metrics `names` (of `METRICS`) against a reference.

    Raises:
      ValueError: a metric that is not known or cannot be had here, or images that cannot be compared.
    """
    check_names(names, extractor, reference)
    check_uint8_images(image, "samples")
    image = fixed_subset(image, len(image))
    extracted = extractor.extract(image)
    if extracted.features.shape[1] != len(reference.statistics.mean):
        raise ValueError(
            f"samples of shape {list(image.shape[1:])} have {extracted.features.shape[1]} features, the reference "
            f"{reference.reference.name} has {len(reference.statistics.mean)}: are its images of another size?"
        )
    return {name: METRICS[name](extracted, reference) for name in names}


def check_names(names: Sequence[str], extractor: Extractor, reference: ReferenceSet | None = None) -> None:
    """Raises ValueError unless these metrics can be had, before anything is computed."""
    for name in names:
        if name not in METRICS:
            raise ValueError(f"there is no metric {name!r}: choose of {', '.join(METRICS)}")
        if name in PAIRED and reference is not None and reference.features is None:
            raise ValueError(f"{name} needs the reference's images: {reference.reference.name} holds statistics alone")
        if name == "inception_score" and not extractor.classifies:
            raise ValueError(f"inception_score needs a classifier's probabilities, and {extractor.name} gives none")


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
    score = metrics.inception_score(samples.probability, min(10, len(samples.probability)))
    return Score({"mean": score.mean, "deviation over splits": score.std}, len(samples.probability))


def _precision_recall(samples: Extracted, reference: ReferenceSet) -> Score:
    real = paired(reference)
    count = min(len(real), len(samples.features), LARGEST_PAIRED)
    score = metrics.precision_recall(real[:count], samples.features[:count])
    return Score({"precision": score.precision, "recall": score.recall}, count)


METRICS: dict[str, Callable[[Extracted, ReferenceSet], Score]] = {
    "fid": _frechet,
    "kid": _kernel,
    "inception_score": _inception_score,
    "precision_recall": _precision_recall,
}
PAIRED = ("kid", "precision_recall")


def paired(reference: ReferenceSet) -> np.ndarray:
    """The reference's features that are compared pair by pair: all, or a fixed choice of `LARGEST_PAIRED`."""
    assert reference.features is not None
    order = np.random.RandomState(0).permutation(len(reference.features))
    return reference.features[order[:LARGEST_PAIRED]]


def count_bias(reference: ReferenceSet, count: int) -> Score | None:
    """The Fréchet distance of `count` of the reference's own images from its others: what a small count alone costs.

    Over half of the reference at most, so beyond that it says more than is true. None where there are only statistics.
    """
    if reference.features is None or len(reference.features) < 4:
        return None
    count = min(count, len(reference.features) // 2)
    order = np.random.RandomState(0).permutation(len(reference.features))
    some, rest = (metrics.statistics(reference.features[np.sort(rows)]) for rows in (order[:count], order[count:]))
    return Score(metrics.frechet_distance(some.mean, some.cov, rest.mean, rest.cov), count)


def bias_note(reference: ReferenceSet, count: int) -> str:
    """Returns what must be said beside a Fréchet distance over fewer than 50,000 samples; "" for enough of them."""
    if count >= UNBIASED_COUNT:
        return ""
    note = f"biased upwards, for {count} samples are fewer than {UNBIASED_COUNT}"
    bias = count_bias(reference, count)
    if bias is None:
        return note + "; by how much cannot be measured from statistics alone"
    return note + f": {bias.num_samples} of the reference's own images are {bias.value:.4g} from its others"


def fixed_subset(image: np.ndarray, count: int) -> UInt8[np.ndarray, "count H W C"]:
    """Chooses `count` images by their content alone, as if at random, whatever order they come in.

    Raises:
      ValueError: if there are fewer.
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
