"""Whether a picture of a scene shows what its prompt describes, in the manner of GenEval (Ghosh et al. 2023).

- A picture is segmented into blobs, connected regions of ink on the background.
- Two support vector machines, trained on blobs of training scenes, classify digit and size; the hue gives the colour.
- A prompt is satisfied when its objects, and no others, are there in the number, colours, sizes and places that it
  names.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from diffusion.data.scenes import COLOURS, KINDS, RELATIONS, SIZES, Box, Scene, draw, place_of, scene
from diffusion.extras import need

ASPECTS = ("number", "digits", "colours", "sizes", "places")
# Ink from 0 to 1: fainter pixels belong to no blob, and a blob without a brighter one is a speck.
FAINT, BRIGHT = 0.12, 0.4
WINDOW = 12  # sixteenths of the canvas: a square that holds any digit
FACE = 10  # pixels a side of a digit brought to one size
HUES = np.array(list(COLOURS.values()), np.float32) / 255


class Found(NamedTuple):
    """An object that was read from a picture.

    Attributes:
      digit: 0 to 9.
      colour: of `COLOURS`.
      size: of `SIZES`.
      box: centred on its ink.
    """

    digit: int
    colour: str
    size: str
    box: Box


Reader = Callable[[np.ndarray], list[list[Found]]]


class Blob(NamedTuple):
    """A connected region of ink, from 0 to 1.

    Attributes:
      window: its ink, in a square around it.
      face: its ink, resized to `FACE` pixels.
      middle: (x, y), in pixels.
      extent: (width, height), in pixels.
      hue: mean colour, without the background.
    """

    window: Float[np.ndarray, "w w"]
    face: Float[np.ndarray, "f f"]
    middle: tuple[float, float]
    extent: tuple[int, int]
    hue: Float[np.ndarray, "3"]


def blobs(image: UInt8[np.ndarray, "H W 3"]) -> list[Blob]:
    """Returns the blobs of one picture, from its top.

    On a background of one grey, a pixel is background + ink * (colour - background), and every colour has a channel of
    255: so the largest channel determines the ink.
    """
    from PIL import Image
    from scipy import ndimage

    canvas = image.shape[0]
    background = float(np.median(image.max(axis=-1)))
    if background == 255:  # no ink can be told from it
        return []
    ink = np.clip((image.max(axis=-1) - background) / (255 - background), 0, 1)
    label: Any = ndimage.label(ink > FAINT, structure=np.ones((3, 3)))[0]  # pyright: ignore
    side = WINDOW * canvas // 16
    padded = np.pad(ink, side)
    found = []
    for number, (rows, columns) in enumerate(ndimage.find_objects(label), 1):
        own = label == number
        if ink[own].max() < BRIGHT or own.sum() < 3 * (canvas // 16) ** 2:
            continue
        top, left = (rows.start + rows.stop - side) // 2 + side, (columns.start + columns.stop - side) // 2 + side
        window = (padded * np.pad(own, side))[top : top + side, left : left + side]
        reach = min(max(rows.stop - rows.start, columns.stop - columns.start) / 2, side / 2)
        face = Image.fromarray(window.astype(np.float32)).resize(
            (FACE, FACE),
            Image.Resampling.BICUBIC,
            (side / 2 - reach, side / 2 - reach, side / 2 + reach, side / 2 + reach),
        )
        strong = own & (ink >= 0.5 * ink[own].max())
        hue = (image[strong] - background * (1 - ink[strong][:, None])).mean(axis=0)
        middle = (columns.start + columns.stop) / 2, (rows.start + rows.stop) / 2
        extent = columns.stop - columns.start, rows.stop - rows.start
        found.append(Blob(window, np.asarray(face), middle, extent, hue))
    return found


def colour_of(hue: Float[np.ndarray, "3"]) -> str:
    """Returns the named colour whose direction is nearest to that of `hue`."""
    directions = HUES / np.linalg.norm(HUES, axis=1, keepdims=True)
    return list(COLOURS)[int(np.argmax(directions @ hue))]


def fit_reader(canvas: int = 16, num_scenes: int = 6000, seed: int = 0) -> Reader:
    """Returns a reader, uint8[N, H, W, 3] -> the objects of each picture, trained on scenes of the training split.

    It takes half a minute on a CPU. Nothing but the scenes is random.

    Args:
      canvas: side of the pictures, in pixels.
      num_scenes: to train on.
      seed: of the scenes.
    """
    need("digits")
    from sklearn.svm import SVC

    seen, digits, sizes = [], [], []
    for index in range(num_scenes):
        made = scene(seed, "train", index, canvas)
        found = blobs(draw(made, "train", canvas))
        for thing in made.objects:
            inside = [blob for blob in found if _inside(blob.middle, thing.box)]
            if len(inside) == 1:
                seen += inside
                digits.append(thing.digit)
                sizes.append(thing.size)
    read_digit = SVC(C=10.0).fit(_faces(seen), digits)
    read_size = SVC(C=10.0).fit(_profiles(seen), sizes)

    def read(image: np.ndarray) -> list[list[Found]]:
        per_image = [blobs(one) for one in image]
        seen = [blob for one in per_image for blob in one]
        if not seen:
            return [[] for _ in image]
        found = iter(
            Found(int(digit), colour_of(blob.hue), str(size), _box(blob.middle, SIZES[str(size)] * canvas // 16))
            for blob, digit, size in zip(
                seen, read_digit.predict(_faces(seen)), read_size.predict(_profiles(seen)), strict=True
            )
        )
        return [[next(found) for _ in one] for one in per_image]

    return read


def satisfied(wanted: Scene, found: Sequence[Found], canvas: int) -> dict[str, bool]:
    """Returns which aspects of a prompt the objects of a picture satisfy, under the best matching of objects to words.

    With another number of objects no aspect is satisfied.

    Args:
      wanted: the scene of the prompt.
      found: the objects of the picture.
      canvas: side of the picture, in pixels.
    """
    if len(found) != len(wanted.objects):
        return dict.fromkeys(ASPECTS, False)
    best: dict[str, bool] = dict.fromkeys(ASPECTS, False)
    for order in permutations(found):
        pairs = list(zip(wanted.objects, order, strict=True))
        aspects = {
            "number": True,
            "digits": all(a.digit == b.digit for a, b in pairs),
            "colours": all(a.colour == b.colour for a, b in pairs),
            "sizes": all(a.size in ("medium", b.size) for a, b in pairs),
            "places": (wanted.place is None or _placed(wanted.place, order[0].box, canvas))
            and (wanted.relation is None or _related(wanted.relation, order[0].box, order[1].box)),
        }
        best = max(best, aspects, key=lambda one: sum(one.values()))
    return best


def wholly(wanted: Sequence[Scene], image: np.ndarray, read: Reader) -> Bool[np.ndarray, "N"]:
    """Returns whether each picture satisfies its prompt in all aspects.

    Args:
      wanted: the scene of each prompt.
      image: uint8[N, H, W, 3].
      read: the reader.
    """
    canvas = image.shape[1]
    return np.array(
        [all(satisfied(one, found, canvas).values()) for one, found in zip(wanted, read(image), strict=True)]
    )


def by_kind(wanted: Sequence[Scene], values: Bool[np.ndarray, "N"]) -> dict[str, float]:
    """Returns the mean of `values` over all prompts, over each kind, and over those of two different objects."""
    parts: Mapping[str, list[bool]] = {
        "all": [True] * len(wanted),
        **{kind: [one.kind == kind for one in wanted] for kind in KINDS},
        "two objects": [len({(thing.colour, thing.digit) for thing in one.objects}) == 2 for one in wanted],
    }
    return {name: float(values[np.array(rows)].mean()) for name, rows in parts.items() if any(rows)}


def _related(relation: str, first: Box, second: Box) -> bool:
    """Returns whether the first is mostly on that side of the second.

    Looser than the rule of scenes: a picture determines middles to half a pixel only.
    """
    right = (first.left + first.side / 2) - (second.left + second.side / 2)
    down = (first.top + first.side / 2) - (second.top + second.side / 2)
    along, across = (right, down) if relation in RELATIONS[:2] else (down, right)
    return (-along if relation in ("to the left of", "above") else along) > abs(across)


def _placed(place: str, box: Box, canvas: int) -> bool:
    """Returns whether the box is at the place, also if moved by a sixteenth: ink is not always in its middle."""
    step = canvas // 16
    moves = [(right, down) for right in (-step, 0, step) for down in (-step, 0, step)]
    return any(place_of(Box(box.left + right, box.top + down, box.side), canvas) == place for right, down in moves)


def _inside(middle: tuple[float, float], box: Box) -> bool:
    return box.left < middle[0] < box.left + box.side and box.top < middle[1] < box.top + box.side


def _box(middle: tuple[float, float], side: int) -> Box:
    return Box(round(middle[0] - side / 2), round(middle[1] - side / 2), side)


def _faces(seen: Sequence[Blob]) -> np.ndarray:
    return np.stack([blob.face.ravel() for blob in seen])


def _profiles(seen: Sequence[Blob]) -> np.ndarray:
    """Returns the features of a size: the ink of every row and column, and the extent."""
    ink = np.stack([blob.window for blob in seen])
    extent = np.array([blob.extent for blob in seen], np.float32) / ink.shape[1]
    return np.concatenate([ink.sum(1), ink.sum(2), 4 * extent], axis=1)
