"""The Fréchet distance of samples beside that of real images that training has never seen, at the same count."""

from typing import NamedTuple

import numpy as np

from diffusion import metrics
from diffusion.evaluation.features import PIXELS, Extracted, Extractor
from diffusion.evaluation.scores import ReferenceSet, extract, fixed_subset


class HeldOutScore(NamedTuple):
    """Fréchet distances to the training images.

    Attributes:
      samples: of the samples, the mean of `parts` sets of `count`.
      held_out: of held-out real images.
      ratio: samples / held_out.
      count: images that each distance was taken over.
      parts: sets of samples.
      standard_error: of the ratio, by how it differs between the sets; None of one. It is that of the draw of samples,
        not of the held-out images nor of the training.
    """

    samples: float
    held_out: float
    ratio: float
    count: int
    parts: int
    standard_error: float | None


def held_out_score(
    samples: Extracted, held_out: np.ndarray, train: ReferenceSet, extractor: Extractor = PIXELS
) -> HeldOutScore:
    """Returns the Fréchet distances of samples and of held-out images, both over the count of the smaller set.

    A ratio of 1 is that of fresh images of the true distribution. The distances are larger for smaller counts, so that
    only the ratio compares between counts. Where there are more samples than held-out images, the samples are as many
    whole sets of that count as they make, for one alone varies by more than models that differ: of 500 digits by 6%.

    Args:
      samples: of `extract`.
      held_out: uint8[M, H, W, C], kept from training.
      train: the training images; `extractor` made its features, as those of the samples.
      extractor: of features.

    Raises:
      ValueError: images of another shape, too few, or the held-out images are the training images.
    """
    count = min(len(samples.features), len(held_out))
    real = extract(fixed_subset(held_out, count), extractor, train).features
    parts = len(samples.features) // count

    def distance(features: np.ndarray) -> float:
        own = metrics.statistics(features)
        return metrics.frechet_distance(own.mean, own.cov, train.statistics.mean, train.statistics.cov)

    unseen = distance(real)
    if unseen == 0:
        raise ValueError(
            "the held-out images have the distance 0 from the training images: are they the same? choose others"
        )
    found = np.array([distance(samples.features[first : first + count]) for first in range(0, parts * count, count)])
    error = float(found.std(ddof=1) / parts**0.5 / unseen) if parts > 1 else None
    return HeldOutScore(float(found.mean()), unseen, float(found.mean() / unseen), count, parts, error)
