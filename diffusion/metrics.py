"""Distances between two sets of images by their features: from arrays to numbers, in float64, on the host.

Features are float [N, D] of any extractor.

- A number has a meaning only with the extractor, the reference set and the counts (`evaluation.report` keeps them
  together).
- No result depends on the order of the rows, except the split of the inception score.
- NaN, infinities and too few rows raise ValueError.

In the examples

>>> corners = np.asarray([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float64

_BLOCK = 2048  # rows of a pairwise matrix held at a time


class Statistics(NamedTuple):
    """Mean [D] and unbiased covariance [D, D] of `count` features."""

    mean: Float64[np.ndarray, "D"]
    cov: Float64[np.ndarray, "D D"]
    count: int


class Estimate(NamedTuple):
    """An estimate and its standard error."""

    value: float
    standard_error: float


class Score(NamedTuple):
    """Mean and standard deviation over splits."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """The share of generated images among the real ones' neighbours, and of real ones among the generated ones'."""

    precision: float
    recall: float


def statistics(features: np.ndarray) -> Statistics:
    """Returns mean and covariance of features [N, D]; the batches that the features were made in do not matter.

    Example:
      >>> print(statistics(corners).mean, statistics(corners).cov.round(3).tolist())
      [0.5 0.5] [[0.333, 0.0], [0.0, 0.333]]
    """
    _check(features)
    mean = np.asarray(np.mean(features, axis=0, dtype=np.float64))
    cov = np.zeros((len(mean), len(mean)))
    for rows in _blocks(len(features)):
        centred = features[rows] - mean
        cov += centred.T @ centred
    return Statistics(mean, cov / (len(features) - 1), len(features))


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Returns |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), Fréchet's distance of two Gaussians: the FID.

    With C = F F', the trace of the root is the sum of the singular values of F1' F2: no root of a product that is not
    symmetric, and exact also for singular covariances (fewer features than dimensions).

    Source: Heusel et al. 2017, eq. 6.

    Raises:
      ValueError: the sizes differ, a number is not finite, or a covariance has a negative eigenvalue.

    Example:
      >>> round(frechet_distance(np.zeros(2), np.eye(2), np.ones(2), 4 * np.eye(2)), 6)  # 2 * 1^2 + 2 * (2 - 1)^2
      4.0
    """
    shapes = [np.shape(array) for array in (mean_1, cov_1, mean_2, cov_2)]
    if len(shapes[0]) != 1 or shapes != [shapes[0], shapes[0] * 2] * 2:
        raise ValueError(f"means [D] and covariances [D, D] must agree in D, but their shapes are {shapes}")
    if not all(np.isfinite(array).all() for array in (mean_1, cov_1, mean_2, cov_2)):
        raise ValueError("a mean or a covariance holds NaN or infinity")
    root = np.linalg.svd(_factor(cov_1).T @ _factor(cov_2), compute_uv=False).sum()
    difference = np.asarray(mean_1, np.float64) - mean_2
    return max(0.0, float(difference @ difference + np.trace(cov_1) + np.trace(cov_2) - 2 * root))


def _factor(cov: np.ndarray) -> np.ndarray:
    """Returns F [D, rank] with cov = F F'."""
    eigenvalue, eigenvector = np.linalg.eigh(np.asarray(cov, np.float64))
    rounding = len(cov) * np.finfo(np.float64).eps * max(eigenvalue[-1], 0.0)
    if eigenvalue[0] < -1e3 * rounding:
        raise ValueError(
            f"a covariance has the negative eigenvalue {eigenvalue[0]:.3g}: it is not the covariance of anything"
        )
    kept = eigenvalue > rounding
    return eigenvector[:, kept] * np.sqrt(eigenvalue[kept])


def kernel_distance(features_1: np.ndarray, features_2: np.ndarray) -> Estimate:
    """Returns the unbiased squared MMD with the kernel (x'y / D + 1)^3: the KID.

    - It is taken over all pairs, so nothing is drawn at random. Published figures average it over subsets of 1000,
      which estimates the same value with more noise.
    - The standard error is the delete-one jackknife's over both sets, which is on the large side where the two
      distributions are equal.
    - It costs N1 N2 D products: 20 s for 10,000 x 2048 features on 2 CPU cores.

    Source: Bińkowski et al. 2018, section 4.

    Example:
      >>> round(kernel_distance(corners, corners + 1).value, 3)
      22.865
    """
    _check_pair(features_1, features_2, at_least=3)
    m, n = len(features_1), len(features_2)
    own_1, across_1 = _kernel_sums(features_1, features_1, same=True), _kernel_sums(features_1, features_2)
    own_2, across_2 = _kernel_sums(features_2, features_2, same=True), _kernel_sums(features_2, features_1)
    within_1, within_2 = own_1.sum() / (m * (m - 1)), own_2.sum() / (n * (n - 1))
    across = across_1.sum()
    without_1 = (own_1.sum() - 2 * own_1) / ((m - 1) * (m - 2)) + within_2 - 2 * (across - across_1) / ((m - 1) * n)
    without_2 = within_1 + (own_2.sum() - 2 * own_2) / ((n - 1) * (n - 2)) - 2 * (across - across_2) / (m * (n - 1))
    variance = (m - 1) * without_1.var() + (n - 1) * without_2.var()
    return Estimate(float(within_1 + within_2 - 2 * across / (m * n)), float(np.sqrt(variance)))


def _kernel_sums(x: np.ndarray, y: np.ndarray, same: bool = False) -> np.ndarray:
    """Returns the sum of the kernel between every row of x and all rows of y, without itself in the same set."""
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    width = x.shape[1]
    total = np.concatenate([((x[rows] @ y.T / width + 1) ** 3).sum(1) for rows in _blocks(len(x))])
    return total - ((x * x).sum(1) / width + 1) ** 3 if same else total


def inception_score(probability: np.ndarray, num_splits: int = 10) -> Score:
    """Returns exp of the mean KL(p(y|x) || p(y)), in splits of consecutive rows.

    Args:
      probability: [N, K], a classifier's p(y|x) for every image.
      num_splits: over which mean and standard deviation are taken.

    Source: Salimans et al. 2016, section 4.

    Raises:
      ValueError: the rows are not probabilities, or there are fewer rows than splits.

    Example:
      >>> round(inception_score(np.eye(2), num_splits=1).mean, 6)
      2.0
    """
    _check(probability)
    if not 1 <= num_splits <= len(probability):
        raise ValueError(f"{len(probability)} images cannot be split into {num_splits} parts")
    if (probability < 0).any() or np.abs(probability.sum(1, dtype=np.float64) - 1).max() > 1e-3:
        raise ValueError("probabilities must be at least 0 and sum to 1 in every row: apply softmax to logits first")
    score = []
    ends = [i * len(probability) // num_splits for i in range(num_splits + 1)]  # as in the released code
    for start, end in itertools.pairwise(ends):
        part = np.asarray(probability[start:end], np.float64)
        score.append(np.exp(scipy.special.rel_entr(part, part.mean(0)).sum(1).mean()))
    return Score(float(np.mean(score)), float(np.std(score)))


def precision_recall(real: np.ndarray, generated: np.ndarray, num_neighbours: int = 3) -> PrecisionRecall:
    """Returns improved precision and recall: the shares inside balls around points to their k-th neighbour.

    They depend on the counts: compare only at equal ones (the paper takes 50,000 of each, k = 3).

    Source: Kynkäänniemi et al. 2019, eqs. 1-2.

    Example:
      >>> precision_recall(corners, corners + 0.5, num_neighbours=1)
      PrecisionRecall(precision=1.0, recall=1.0)
    """
    _check_pair(real, generated, at_least=num_neighbours + 1)
    centre = np.mean(real, axis=0, dtype=np.float64)  # differences of squares lose fewer digits near 0
    real, generated = real - centre, generated - centre
    return PrecisionRecall(
        _share_inside(generated, real, num_neighbours), _share_inside(real, generated, num_neighbours)
    )


def _share_inside(points: np.ndarray, centres: np.ndarray, num_neighbours: int) -> float:
    radius = np.concatenate(
        [
            np.partition(block, num_neighbours, axis=1)[:, num_neighbours]
            for block in _squared_distances(centres, centres)
        ]
    )  # the nearest of all is the point itself
    inside = [(block <= radius).any(1) for block in _squared_distances(points, centres)]
    return float(np.concatenate(inside).mean())


def _squared_distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    for rows in _blocks(len(x)):
        yield np.maximum((x[rows] ** 2).sum(1)[:, None] + (y**2).sum(1) - 2 * x[rows] @ y.T, 0.0)


def _blocks(count: int) -> Iterator[slice]:
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


def _check(features: np.ndarray, at_least: int = 2) -> None:
    if features.ndim != 2 or not np.issubdtype(features.dtype, np.floating):
        raise ValueError(f"features must be float [N, D], not {features.dtype}{list(features.shape)}")
    if len(features) < at_least:
        raise ValueError(f"at least {at_least} features are needed, not {len(features)}")
    finite = np.isfinite(features).all(1)
    if not finite.all():
        raise ValueError(f"features hold NaN or infinity at row {int(finite.argmin())}")


def _check_pair(features_1: np.ndarray, features_2: np.ndarray, at_least: int) -> None:
    _check(features_1, at_least)
    _check(features_2, at_least)
    if features_1.shape[1] != features_2.shape[1]:
        raise ValueError(f"features of {features_1.shape[1]} and of {features_2.shape[1]} numbers cannot be compared")
