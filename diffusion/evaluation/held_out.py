"""The Fréchet distance of samples beside that of real images that training has never seen, at the same count."""

from typing import NamedTuple

import numpy as np

from diffusion import metrics
from diffusion.data.images import check_uint8_images
from diffusion.evaluation.features import PIXELS, Extractor
from diffusion.evaluation.scores import ReferenceSet, fixed_subset


class HeldOutScore(NamedTuple):
    """Fréchet distances to the training images.

    Attributes:
      samples: of the samples.
      held_out: of held-out real images.
      ratio: samples / held_out.
      count: images that each was taken over.
    """

    samples: float
    held_out: float
    ratio: float
    count: int


def held_out_score(
    samples: np.ndarray, held_out: np.ndarray, train: ReferenceSet, extractor: Extractor = PIXELS
) -> HeldOutScore:
    """Returns the Fréchet distances of samples and of held-out images, both over the count of the smaller set.

    A ratio of 1 is that of fresh images of the true distribution. The distances are larger for smaller counts, so that
    only the ratio compares between counts.

    Args:
      samples: uint8[N, H, W, C].
      held_out: uint8[M, H, W, C], kept from training.
      train: the training images; `extractor` made its features.
      extractor: of features.

    Raises:
      ValueError: the sets have other shapes or too few images, or the held-out images are the training images.
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
    if real == 0:
        raise ValueError(
            "the held-out images have the distance 0 from the training images: are they the same? choose others"
        )
    return HeldOutScore(ours, real, ours / real, count)
