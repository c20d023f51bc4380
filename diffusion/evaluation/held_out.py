"""A distance means little alone: samples against the training set, beside real images it has never seen against it."""

from typing import NamedTuple

import numpy as np

from diffusion import metrics
from diffusion.data.images import check_uint8_images
from diffusion.evaluation.features import PIXELS, Extractor
from diffusion.evaluation.scores import ReferenceSet, fixed_subset


class HeldOutScore(NamedTuple):
    """Fréchet distances to the training images, of `count` samples and of `count` held-out real images."""

    samples: float
    held_out: float
    ratio: float
    count: int


def held_out_score(
    samples: np.ndarray, held_out: np.ndarray, train: ReferenceSet, extractor: Extractor = PIXELS
) -> HeldOutScore:
    """Scores samples against held-out images at the same count, to which the larger set is cut (`fixed_subset`).

    Both are uint8[N, H, W, C]. A ratio of 1 is what fresh images of the true distribution would get; the distance is
    larger for smaller counts, so only the ratio compares between counts.

    Raises:
      ValueError: if the sets do not hold images of one shape, or too few of them.
    """
    for image, what in ((samples, "samples"), (held_out, "held-out images")):
        check_uint8_images(image, what)
    if samples.shape[1:] != held_out.shape[1:]:
        raise ValueError(f"samples have shape {list(samples.shape[1:])} but held-out images {list(held_out.shape[1:])}")
    count = min(len(samples), len(held_out))

    def distance(image: np.ndarray) -> float:
        own = metrics.statistics(extractor.extract(fixed_subset(image, count)).features)
        return metrics.frechet_distance(own.mean, own.cov, train.statistics.mean, train.statistics.cov)

    ours, real = distance(samples), distance(held_out)
    return HeldOutScore(ours, real, ours / real, count)
