"""Images with captions: a `Source` whose label says which caption belongs to the image."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from diffusion.data.sources import Source


class CaptionedSource(NamedTuple):
    """Images whose label is the row of their caption in `captions`; no caption stands there twice."""

    source: Source
    captions: tuple[str, ...]


def with_text(captioned: CaptionedSource, encode: Callable[[Sequence[str]], np.ndarray]) -> Source:
    """The same images, read with a third array, "text": `encode(captions)`, row by row.

    `encode` is called once, with all captions: token ids int32[N, L], or features of any shape [N, ...].

    Raises:
      ValueError: if it does not give one row for each caption.
    """
    source, captions = captioned
    text = np.asarray(encode(captions))
    if len(text) != len(captions):
        raise ValueError(f"{len(captions)} captions were encoded to {len(text)} rows: one for each is needed")

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = source.read(indices)
        return {**batch, "text": text[batch["label"]]}

    return source._replace(read=read)
