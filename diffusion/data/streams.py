"""Random numbers of the data's order: a stream for each (seed, purpose, count), the same on every machine."""

import numpy as np


def stream(seed: int, purpose: int, count: int) -> np.random.RandomState:
    """Returns the random numbers of a purpose: 1 and 2 are those of `batches`, 3 and above of `buckets`.

    Args:
      seed: in 0..2^64 - 1.
      purpose: what they are for.
      count: which of its streams, an epoch for instance.

    Example:
      >>> int(stream(0, purpose=1, count=0).randint(1000))
      688
    """
    words = (purpose, seed & 0xFFFFFFFF, seed >> 32, count & 0xFFFFFFFF, count >> 32)
    return np.random.RandomState(np.array(words, np.uint32))
