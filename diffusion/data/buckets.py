"""Pictures of several aspect ratios, each trained on at about its own: a batch holds those of one bucket, one shape.

Source: NovelAI 2022, as Stable Diffusion XL and 3 do it (Podell et al. 2023, section 2.3).
"""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from diffusion.data.streams import stream

_BUCKETS, _ROWS = 3, 4  # purposes of `stream`


def bucket_shapes(side: int, multiple: int, largest_ratio: float = 2.0) -> list[tuple[int, int]]:
    """Returns heights and widths of about side^2 pixels, wide ones first.

    Args:
      side: of the square among them.
      multiple: that divides every height and width, and `side`.
      largest_ratio: of the longer side to the shorter.

    Raises:
      ValueError: `multiple` does not divide `side`, or the ratio is below 1.

    Example:
      >>> bucket_shapes(64, 16)
      [(48, 80), (64, 64), (80, 48)]
    """
    if side % multiple or side < multiple or not largest_ratio >= 1:
        raise ValueError(f"buckets of {side}^2 pixels: {multiple} has to divide {side}, and the ratio be at least 1")
    shapes = set()
    for height in range(multiple, side + 1, multiple):
        width = side * side // height // multiple * multiple
        if width <= largest_ratio * height:
            shapes |= {(height, width), (width, height)}
    return sorted(shapes)


def nearest_bucket(height: int, width: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Returns the number of the shape whose ratio of sides is nearest, so that the least is cropped.

    Example:
      >>> nearest_bucket(300, 450, [(48, 80), (64, 64), (80, 48)])
      0
    """
    ratio = math.log(width / height)
    return min(range(len(shapes)), key=lambda i: abs(math.log(shapes[i][1] / shapes[i][0]) - ratio))


def bucket_rows(
    seed: int, step: int, batch_size: int, counts: Sequence[int]
) -> tuple[int, Int64[np.ndarray, "batch_size"]]:
    """Returns the bucket of batch number `step` (from 0) and its rows there, a pure function of the arguments.

    Each bucket is a stream of permutations of its images, without a gap, and an epoch holds of each as many batches as
    it then has: every image is seen equally often, to a batch. Their order is shuffled.

    Args:
      seed: of the order.
      step: number of the batch.
      batch_size: of all processes together.
      counts: images of each bucket.

    Raises:
      ValueError: there is no image, or the step is negative.

    Example:
      >>> bucket, rows = bucket_rows(0, step=0, batch_size=2, counts=[4, 2])
      >>> bucket in (0, 1), len(rows)
      (True, 2)
    """
    if step < 0 or not sum(counts):
        raise ValueError(f"batch number {step} of {sum(counts)} images in buckets: there is none")

    def begun(epoch: int) -> list[int]:
        """How many batches of each bucket there were before an epoch."""
        return [epoch * count // batch_size for count in counts]

    epoch = step * batch_size // sum(counts)  # no epoch has more batches than it has images for, so none is later
    while sum(begun(epoch + 1)) <= step:
        epoch += 1
    before, after = begun(epoch), begun(epoch + 1)
    buckets = np.repeat(np.arange(len(counts)), np.subtract(after, before))
    buckets = buckets[stream(seed, _BUCKETS, epoch).permutation(len(buckets))]
    place = step - sum(before)
    bucket = int(buckets[place])
    number = before[bucket] + int((buckets[:place] == bucket).sum())
    return bucket, _rows(seed, bucket, number * batch_size, batch_size, counts[bucket])


def _rows(seed: int, bucket: int, first: int, size: int, count: int) -> np.ndarray:
    """Returns places first .. first + size - 1 of a bucket's stream of permutations."""
    places = np.arange(first, first + size)
    epochs = {
        epoch: stream(seed, _ROWS + bucket, epoch).permutation(count)
        for epoch in range(first // count, (first + size - 1) // count + 1)
    }
    return np.array([epochs[place // count][place % count] for place in places.tolist()], np.int64)
