"""Which images make batch number `step`: a pure function of (seed, step), so the position in the data is the step.

Every epoch is a new permutation of the whole set, and epochs follow each other without a gap: an image is seen exactly
once per epoch whatever the batch size. NumPy's RandomState is used because its streams are frozen.
"""

import functools
import sys
from collections.abc import Callable, Generator, Sequence

import numpy as np
from jaxtyping import Bool, Int64

from diffusion.data.augmentations import augment, check_augmentations
from diffusion.data.buckets import bucket_rows
from diffusion.data.sources import Source
from diffusion.data.streams import stream

_ORDER, _FLIP = 1, 2  # purposes: each has its own stream of random numbers


@functools.lru_cache(maxsize=8)  # a batch touches at most two epochs, the batches read ahead hardly more
def _permutation(seed: int, epoch: int, num_examples: int) -> Int64[np.ndarray, "num_examples"]:
    return stream(seed, _ORDER, epoch).permutation(num_examples)


@functools.lru_cache(maxsize=8)
def _coins(seed: int, epoch: int, num_examples: int) -> Bool[np.ndarray, "num_examples"]:
    return stream(seed, _FLIP, epoch).random_sample(num_examples) < 0.5


def _rows(of_epoch: Callable[[int, int, int], np.ndarray], seed: int, step: int, batch_size: int, num_examples: int):
    """Returns positions step * B .. step * B + B - 1 of the stream of epochs `of_epoch(seed, epoch, N)`."""
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in 0..2^64-1, not {seed}")
    if step < 0:
        raise ValueError(f"batches are counted from 0: there is no batch number {step}")
    if not 1 <= batch_size <= num_examples:
        raise ValueError(
            f"data.batch_size is {batch_size}: it must be at least 1 and at most the data's {num_examples} images"
        )
    epoch, start = divmod(step * batch_size, num_examples)
    rows = of_epoch(seed, epoch, num_examples)[start : start + batch_size]
    if len(rows) < batch_size:
        return np.concatenate([rows, of_epoch(seed, epoch + 1, num_examples)[: batch_size - len(rows)]])
    return rows.copy()


def batch_indices(seed: int, step: int, batch_size: int, num_examples: int) -> Int64[np.ndarray, "B"]:
    """Returns the images of batch number `step` (from 0), a pure function of the arguments.

    Raises:
      ValueError: if the batch is larger than the data set, the step negative or the seed not in 0..2^64-1.
    """
    return _rows(_permutation, seed, step, batch_size, num_examples)


def batch_flips(seed: int, step: int, batch_size: int, num_examples: int) -> Bool[np.ndarray, "B"]:
    """Returns which images of batch number `step` are mirrored, each with probability 1/2, likewise a pure function."""
    return _rows(_coins, seed, step, batch_size, num_examples)


def full_batches(count: int, batch_size: int) -> Generator[Int64[np.ndarray, "B"], None, None]:
    """Yields rows 0..count-1 in batches that are all full, so that one compiled program serves them all.

    Rows past the end start again from 0; the caller drops what was made of them.
    """
    for first in range(0, count, batch_size):
        yield np.arange(first, first + batch_size) % count


def make_batches(
    source: Source,
    seed: int,
    batch_size: int,
    *,
    start_step: int = 0,
    num_steps: int | None = None,
    flip: bool = False,
    augmentations: Sequence[str] = (),
    process_index: int = 0,
    process_count: int = 1,
    num_threads: int = 4,
    prefetch: int = 16,
) -> Generator[dict[str, np.ndarray], None, None]:
    """Yields batches {"image": uint8[B/P, H, W, C], "label": int32[B/P]}, read ahead in threads.

    An error while reading is raised by the `next` that would have returned that batch. `close()` ends the threads; left
    open, they can keep the interpreter from exiting.

    Args:
      source: of the images.
      seed: of the order, the flips and the augmentations.
      batch_size: B, of all processes together.
      start_step: number of the first batch.
      num_steps: how many batches; None: without end.
      flip: mirror half of the images.
      augmentations: of `augmentations.AUGMENTATIONS`, done to the images in turn, after the flip.
      process_index: p; process p returns rows [p * B/P, (p + 1) * B/P) of every batch, and reads no others.
      process_count: P. The global batch does not depend on it.
      num_threads: that read.
      prefetch: batches that are held at most.

    Raises:
      ValueError: if the processes do not divide the batch, the batch is larger than the data set, or the images cannot
        be flipped or augmented so.
    """
    import grain  # half a second that only training needs to spend

    if source.parts and flip:
        raise ValueError("data.flip=True does not go with data.buckets: leave one of them out")
    check_augmentations(augmentations, [part.image_shape for part in source.parts or (source,)])
    batch_indices(seed, start_step, batch_size, source.num_examples)  # to refuse bad arguments now, not in a thread
    if not 0 <= process_index < process_count or batch_size % process_count:
        raise ValueError(
            f"data.batch_size is {batch_size}: it does not divide among {process_count} processes (this is number "
            f"{process_index})"
        )
    rows = batch_size // process_count
    mine = slice(process_index * rows, (process_index + 1) * rows)
    columns_reversed = np.arange(source.image_shape[1])[::-1]  # taking these is twice as fast as [:, :, ::-1]

    def read(step: int) -> dict[str, np.ndarray]:
        if source.parts:
            part, indices = bucket_rows(seed, step, batch_size, [part.num_examples for part in source.parts])
            return source.parts[part].read(indices[mine])
        found = source.read(batch_indices(seed, step, batch_size, source.num_examples)[mine])
        if flip:
            mirrored = batch_flips(seed, step, batch_size, source.num_examples)[mine]
            found["image"][mirrored] = found["image"][mirrored].take(columns_reversed, axis=2)
        return found

    def batch(step: int) -> dict[str, np.ndarray]:
        found = read(step)
        if augmentations:
            found["image"] = augment(found["image"], augmentations, seed, step, batch_size, mine)
        return found

    def read_ahead() -> Generator[dict[str, np.ndarray], None, None]:
        stop = sys.maxsize if num_steps is None else start_step + num_steps
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
        batches = iter(grain.MapDataset.range(start_step, stop).map(batch).to_iter_dataset(options))
        try:
            yield from batches
        finally:
            batches.close()

    return read_ahead()
