"""Which of all true pictures a drawing shows: the nearest one, for captions whose true pictures are known.

gallery = Gallery(features, {"person": persons, "tone": tones}, trained_on)
found = nearest(drawn, gallery, wanted)       # drawn[i] was asked to be picture wanted[i]
shares(found.row, wanted, gallery)            # {"picture": 0.9, "person": 0.98, "tone": 0.91, "person and tone": 0.9}

No judge is needed but the truth. The ceiling is that of true pictures which went through the autoencoder, the chance
level that of a gallery's picture drawn at random.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

PICTURE = "picture"
CALIBRATED = 95  # percentile of the distances of true pictures through the autoencoder, up to which one is a copy
ROWS = 512  # drawings that are compared at once


class Gallery(NamedTuple):
    """All true pictures.

    Attributes:
      features: of each, by any extractor.
      aspects: what each shows, by the aspect's name.
      seen: whether it was trained on.
    """

    features: Float[np.ndarray, "M D"]
    aspects: Mapping[str, Sequence[str]]
    seen: Bool[np.ndarray, "M"]


class Nearest(NamedTuple):
    """The nearest true picture of each drawing.

    Attributes:
      row: its row in the gallery.
      distance: to it.
      seen_row: of the nearest among those that were trained on.
      seen_distance: to that one.
    """

    row: Int[np.ndarray, "N"]
    distance: Float[np.ndarray, "N"]
    seen_row: Int[np.ndarray, "N"]
    seen_distance: Float[np.ndarray, "N"]


def nearest(drawn: Float[np.ndarray, "N D"], gallery: Gallery, wanted: Int[np.ndarray, "N"]) -> Nearest:
    """Returns the nearest true pictures, by Euclidean distance; of equally near ones the wanted one.

    Args:
      drawn: features of the drawings, by the gallery's extractor.
      gallery: of true pictures.
      wanted: the row of each drawing's true picture.

    Raises:
      ValueError: no picture of the gallery was trained on.

    Example:
      >>> gallery = Gallery(np.array([[0.0], [3.0]]), {}, np.array([True, False]))
      >>> found = nearest(np.array([[1.0], [2.5]]), gallery, np.array([1, 1]))
      >>> print(found.row, found.distance, found.seen_distance)
      [0 1] [1.  0.5] [1.  2.5]
    """
    if not gallery.seen.any():
        raise ValueError("no picture of the gallery was trained on: give those of the training too")
    true = np.asarray(gallery.features, np.float64)
    own = np.square(true).sum(1)
    seen = np.flatnonzero(gallery.seen)
    parts = []
    for first in range(0, len(drawn), ROWS):
        x, mine = np.asarray(drawn[first : first + ROWS], np.float64), wanted[first : first + ROWS]
        squares = own + np.square(x).sum(1)[:, None] - 2 * x @ true.T
        each = np.arange(len(x))
        row = np.where(squares[each, mine] <= squares.min(1), mine, squares.argmin(1))
        seen_row = seen[squares[:, seen].argmin(1)]
        distance, to_seen = (np.sqrt(np.maximum(squares[each, rows], 0)) for rows in (row, seen_row))
        parts.append(Nearest(row, distance, seen_row, to_seen))
    return Nearest(*map(np.concatenate, zip(*parts, strict=True)))


def right(found: Int[np.ndarray, "N"], wanted: Int[np.ndarray, "N"], gallery: Gallery) -> dict[str, np.ndarray]:
    """Returns bool[N] by name: whether it is the wanted picture, one of the same in each aspect, and in all.

    Args:
      found: rows of the gallery.
      wanted: rows of the gallery.
      gallery: of true pictures.
    """
    of_aspect = {}
    for name, values in gallery.aspects.items():
        codes = np.unique(np.asarray(list(values)), return_inverse=True)[1]
        of_aspect[name] = codes[found] == codes[wanted]
    together = {" and ".join(of_aspect): np.all(list(of_aspect.values()), axis=0)} if len(of_aspect) > 1 else {}
    return {PICTURE: found == wanted, **of_aspect, **together}


def shares(found: Int[np.ndarray, "N"], wanted: Int[np.ndarray, "N"], gallery: Gallery) -> dict[str, float]:
    """Returns the means of `right`.

    Example:
      >>> gallery = Gallery(np.eye(3), {"person": "AAB", "tone": "121"}, np.ones(3, bool))
      >>> shares(np.array([0, 2]), np.array([0, 0]), gallery)
      {'picture': 0.5, 'person': 0.5, 'tone': 1.0, 'person and tone': 0.5}
    """
    return {name: float(values.mean()) for name, values in right(found, wanted, gallery).items()}


def chance(wanted: Int[np.ndarray, "N"], gallery: Gallery) -> dict[str, float]:
    """Returns the shares, in expectation, of pictures drawn evenly from the gallery.

    Example:
      >>> gallery = Gallery(np.eye(4), {"person": "AABB", "tone": "1231"}, np.ones(4, bool))
      >>> chance(np.array([0]), gallery)
      {'picture': 0.25, 'person': 0.5, 'tone': 0.5, 'person and tone': 0.25}
    """
    every = np.arange(len(gallery.seen))
    each = [shares(every, np.full(len(every), row), gallery) for row in wanted]
    return {name: float(np.mean([one[name] for one in each])) for name in each[0]}


def given_back(found: Nearest, gallery: Gallery, through: Float[np.ndarray, "K"]) -> dict[str, float]:
    """Returns how often drawings of captions that training never shows give back one of its pictures.

    "nearest" is the share whose nearest true picture was trained on; "copies" that of drawings which are as near to a
    training picture as true pictures are to themselves after the autoencoder, 95 of 100 of them.

    Args:
      found: of the drawings.
      gallery: of true pictures.
      through: distances of true pictures to themselves, after the autoencoder.
    """
    limit = np.percentile(through, CALIBRATED)
    return {
        "nearest": float(gallery.seen[found.row].mean()),
        "copies": float((gallery.seen[found.row] & (found.seen_distance <= limit)).mean()),
    }
