"""A distance means little alone: samples against the training set, beside real images it has never seen against it."""

import hashlib
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from diffusion import metrics
from diffusion.data.images import check_uint8_images
from diffusion.evaluation.features import Features, pixel_features


class HeldOutScore(NamedTuple):
    """Fréchet distances to the training images, of `count` samples and of `count` held-out real images."""

    samples: float
    held_out: float
    ratio: float
    count: int


def held_out_score(
    samples: np.ndarray, train: np.ndarray, held_out: np.ndarray, features: Features = pixel_features
) -> HeldOutScore:
    """Scores samples against held-out images at the same count, to which the larger set is cut (`fixed_subset`).

    All are uint8[N, H, W, C]. A ratio of 1 is what fresh images of the true distribution would get; the distance is
    larger for smaller counts, so only the ratio compares between counts.

    Raises:
      ValueError: if the three do not hold images of one shape, or too few of them.
    """
    for image, what in ((samples, "samples"), (train, "training images"), (held_out, "held-out images")):
        check_uint8_images(image, what)
        if image.shape[1:] != train.shape[1:]:
            raise ValueError(f"{what} have shape {list(image.shape[1:])} but training images {list(train.shape[1:])}")
    count = min(len(samples), len(held_out))
    reference = metrics.statistics(features(train))

    def distance(image: np.ndarray) -> float:
        own = metrics.statistics(features(fixed_subset(image, count)))
        return metrics.frechet_distance(own.mean, own.cov, reference.mean, reference.cov)

    ours, real = distance(samples), distance(held_out)
    return HeldOutScore(ours, real, ours / real, count)


def fixed_subset(image: np.ndarray, count: int) -> UInt8[np.ndarray, "count H W C"]:
    """Chooses `count` images by their content alone, as if at random, whatever order they come in.

    Raises:
      ValueError: if there are fewer.
    """
    if count > len(image):
        raise ValueError(f"{count} images cannot be chosen from {len(image)}")
    drawn = [hashlib.blake2b(one.tobytes(), digest_size=16).digest() for one in image]
    return image[sorted(range(len(image)), key=drawn.__getitem__)[:count]]
