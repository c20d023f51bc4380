"""Captioned scenes: one to three handwritten digits of scikit-learn in named colours, sizes and places.

Every word of a caption can be checked in the picture: the digits do not touch, the background is plain and dark, and
the content of a scene is known. A *combination* is the set of (colour, digit) that a picture shows. A fifth of all
combinations never occurs in the training scenes, whatever the sizes, places, counts and wording.
"""

import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from diffusion.data.captions import with_captions
from diffusion.data.pictures import Size
from diffusion.data.sources import Source, array_source, digits

COLOURS = {
    "red": (255, 0, 0),
    "green": (0, 255, 0),
    "blue": (0, 0, 255),
    "yellow": (255, 255, 0),
    "cyan": (0, 255, 255),
    "magenta": (255, 0, 255),
    "white": (255, 255, 255),
    "orange": (255, 128, 0),
}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
PLURALS = (*(f"{name}s" for name in DIGITS[:6]), "sixes", "sevens", "eights", "nines")
# Side of the square of a digit, and the smallest gap between two, in sixteenths of the canvas.
SIZES = {"small": 6, "medium": 7, "large": 9}
GAP = 1
RELATIONS = ("to the left of", "to the right of", "above", "below")
# By row and column, thirds of the canvas.
PLACES = (
    ("in the top left corner", "at the top", "in the top right corner"),
    ("on the left", "in the middle", "on the right"),
    ("in the bottom left corner", "at the bottom", "in the bottom right corner"),
)
KINDS = ("single", "position", "size", "colours", "relation", "counting")
BRIGHTEST_BACKGROUND = 32

Pick = Callable[[int], int]  # n -> one of 0..n-1
Words = tuple[str, int]  # the colour of a digit, and which digit it is


class Box(NamedTuple):
    """A square of pixels: columns left..left + side - 1, rows top..top + side - 1."""

    left: int
    top: int
    side: int


class Object(NamedTuple):
    """A digit of a scene; `picture` is its row in the split of scikit-learn's digits."""

    digit: int
    colour: str
    size: str
    box: Box
    picture: int


class Scene(NamedTuple):
    """The content of a picture, and its description.

    Attributes:
      caption: names the objects, with every size that is not medium.
      kind: one of `KINDS`.
      objects: in the order of the caption.
      relation: of the first object to the second, where the caption names one.
      place: of the first object, where the caption names one.
      background: grey level.
    """

    caption: str
    kind: str
    objects: tuple[Object, ...]
    relation: str | None
    place: str | None
    background: int


def scene(seed: int, split: str, index: int, canvas: int = 16, kinds: Sequence[str] = KINDS) -> Scene:
    """Returns scene number `index` of a split, a pure function of the arguments.

    "train" shows training digits; "test" and "held_out" show digits of the test split, "test" in combinations that
    occur in training scenes, "held_out" in those that never do. All kinds are equally frequent:

      single     "a blue four", anywhere
      position   "a blue four in the top right corner": nine places
      size       "a small white zero above a large yellow nine", or "a large red two"
      colours    "a red three and a blue seven", anywhere
      relation   "a red three to the left of a blue seven"
      counting   "two green fives", "three red ones"

    Raises:
      ValueError: if the split or a kind is none of these, or the canvas is not a multiple of 16 pixels.
    """
    if split not in ("train", "test", "held_out"):
        raise ValueError(f"scenes have the splits 'train', 'test' and 'held_out', not '{split}'")
    if canvas < 16 or canvas % 16:
        raise ValueError(f"a canvas of {canvas} pixels: scenes are drawn on multiples of 16")
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(f"scenes of kind {', '.join(kinds) or 'none'}: choose among {', '.join(KINDS)}")
    pick = functools.partial(_pick, _numbers(seed, split, index))
    kind = kinds[pick(len(kinds))]
    while True:  # the kind is kept: it is as frequent in one split as in another
        words, sizes, relation, place = _content(kind, pick)
        if held_out(words) == (split == "held_out"):
            break
    boxes = _layout(sizes, relation, place, canvas, pick)
    pictures = _atlas("train" if split == "train" else "test", canvas).rows
    objects = tuple(
        Object(digit, colour, size, box, int(pictures[digit][pick(len(pictures[digit]))]))
        for (colour, digit), size, box in zip(words, sizes, boxes, strict=True)
    )
    said = relation if kind in ("relation", "size") and len(words) == 2 else None
    caption = _caption(kind, words, sizes, said, place)
    return Scene(caption, kind, objects, said, place, pick(BRIGHTEST_BACKGROUND + 1))


def held_out(words: Sequence[Words]) -> bool:
    """Returns whether this combination, whatever the order and the count, is held out of training: a fifth are.

    Of the 80 combinations of one kind of digit, two in each colour are held out, and every digit in one or two colours;
    those of two kinds are chosen by a hash.
    """
    combination = sorted(set(words))
    if len(combination) == 1:
        ((colour, digit),) = combination
        return (list(COLOURS).index(colour) + digit) % 5 == 0
    return zlib.crc32(repr(combination).encode()) % 5 == 0


def draw(scene: Scene, split: str, canvas: int = 16) -> UInt8[np.ndarray, "canvas canvas 3"]:
    """Returns the picture of a scene."""
    atlas = _atlas("train" if split == "train" else "test", canvas)
    image = np.full((canvas, canvas, 3), scene.background, np.float32)
    for digit in scene.objects:
        left, top, side = digit.box
        ink = atlas.ink[digit.size][digit.picture]
        part = image[top : top + side, left : left + side]
        part += ink * (np.array(COLOURS[digit.colour], np.float32) - scene.background)
    return np.round(image).astype(np.uint8)


def scenes(
    split: str, canvas: Size = 16, num_examples: int = 50_000, seed: int = 0, kinds: Sequence[str] = KINDS
) -> Source:
    """Returns scenes 0..num_examples - 1 of a split, drawn once and held in memory.

    Raises:
      ValueError: as `scene`, or if `num_examples` is below 1, or the canvas is not one side.
    """
    if not isinstance(canvas, int):
        raise ValueError(f"scenes are drawn on squares, not on {canvas}: give one side, as data.image_size=32")
    if num_examples < 1:
        raise ValueError(f"a source needs at least 1 scene, not {num_examples}")
    image = np.empty((num_examples, canvas, canvas, 3), np.uint8)
    captions = []
    for index in range(num_examples):
        made = scene(seed, split, index, canvas, kinds)
        image[index] = draw(made, split, canvas)
        captions.append([made.caption])
    return with_captions(array_source(image, None, f"scenes{canvas}", split, None), captions)


def relation_holds(relation: str, first: Box, second: Box) -> bool:
    """Returns whether `first` is in `relation` to `second`: clear of it, and farther along that axis than across."""
    right, down = (
        (first.left + first.side / 2) - (second.left + second.side / 2),
        (first.top + first.side / 2) - (second.top + second.side / 2),
    )
    along, across = (right, down) if relation in RELATIONS[:2] else (down, right)
    if relation in ("to the left of", "above"):
        along = -along
    return along >= (first.side + second.side) / 2 and along > abs(across)


def place_of(box: Box, canvas: int) -> str:
    """Returns the one of the nine places in which the centre of the box lies."""
    column, row = (int(3 * (start + box.side / 2) / canvas) for start in (box.left, box.top))
    return PLACES[row][column]


def _numbers(seed: int, split: str, index: int) -> Iterator[float]:
    """Yields random numbers in [0, 1) for this scene, without end."""
    random = np.random.RandomState([zlib.crc32(split.encode()), seed & 0xFFFFFFFF, seed >> 32, index])
    while True:
        yield from random.random_sample(32).tolist()  # one by one would take most of a scene's time


def _pick(numbers: Iterator[float], n: int) -> int:
    return int(next(numbers) * n)


def _content(kind: str, pick: Pick) -> tuple[list[Words], list[str], str, str | None]:
    """Returns the digits, their sizes, the relation of the first to the second, and the place of a single one."""
    colours = tuple(COLOURS)
    words = [(colours[pick(len(colours))], pick(10)) for _ in range(2)]
    relation, place, sizes = RELATIONS[pick(4)], PLACES[pick(3)][pick(3)], ["medium", "medium"]
    match kind:
        case "single":
            return words[:1], sizes[:1], relation, None
        case "position":
            return words[:1], sizes[:1], relation, place
        case "counting":
            count = 2 + pick(2)
            return words[:1] * count, ["medium"] * count, relation, None
        case "size":
            sizes = [["small", "large"], ["large", "small"]][pick(2)]
            if pick(2):
                return words[:1], sizes[:1], relation, None
    if words[0] == words[1]:  # that is counting
        return _content(kind, pick)
    return words, sizes, relation, None


def _caption(kind: str, words: list[Words], sizes: list[str], relation: str | None, place: str | None) -> str:
    if kind == "counting":
        colour, digit = words[0]
        return f"{DIGITS[len(words)]} {colour} {PLURALS[digit]}"
    names = []
    for (colour, digit), size in zip(words, sizes, strict=True):
        name = f"{colour} {DIGITS[digit]}" if size == "medium" else f"{size} {colour} {DIGITS[digit]}"
        names.append(f"an {name}" if name[0] in "aeiou" else f"a {name}")
    return f"{names[0]} {place}" if place else f" {relation or 'and'} ".join(names)


def _layout(sizes: list[str], relation: str, place: str | None, canvas: int, pick: Pick) -> list[Box]:
    """Returns squares at random places, with a gap between them, that agree with the relation or the place."""
    unit = canvas // 16
    gap, sides = GAP * unit, [SIZES[size] * unit for size in sizes]
    side, *others = sides
    if place:
        (row, column) = next((r, c) for r in range(3) for c in range(3) if PLACES[r][c] == place)
        left, top = (_start_in_third(third, side, canvas, pick) for third in (column, row))
        return [Box(left, top, side)]
    if not others:
        return [Box(pick(canvas - side + 1), pick(canvas - side + 1), side)]
    if len(others) == 1:
        if relation in ("to the right of", "below"):
            sides = sides[::-1]
        one = pick(canvas - sum(sides) - gap + 1)
        other = one + sides[0] + gap
        other += pick(canvas - sides[1] - other + 1)
        # Offset across by at most a quarter of the canvas, so that "to the left of" is not also "above".
        across = pick(canvas - sides[0] + 1)
        middle = across + (sides[0] - sides[1]) // 2
        lowest, highest = max(0, middle - canvas // 4), min(canvas - sides[1], middle + canvas // 4)
        starts = [(one, across), (other, lowest + pick(highest - lowest + 1))]
        if relation in ("above", "below"):
            starts = [(top, left) for left, top in starts]
        boxes = [Box(left, top, side) for (left, top), side in zip(starts, sides, strict=True)]
        return boxes[::-1] if relation in ("to the right of", "below") else boxes
    # Three: all but one of the four places of a grid whose lines are at random places.
    columns, rows = (_two_starts(side, gap, canvas, pick) for _ in range(2))
    corners = [(column, row) for row in rows for column in columns]
    del corners[pick(4)]
    return [Box(column, row, side) for column, row in corners]


def _start_in_third(third: int, side: int, canvas: int, pick: Pick) -> int:
    """Clear of the lines between the thirds."""
    slack = canvas // 12
    if third == 1:
        middle = (canvas - side) // 2
        return middle + pick(slack + 1) - slack // 2
    return pick(slack + 1) if third == 0 else canvas - side - pick(slack + 1)


def _two_starts(side: int, gap: int, canvas: int, pick: Pick) -> tuple[int, int]:
    first = pick(canvas - 2 * side - gap + 1)
    second = first + side + gap
    return first, second + pick(canvas - side - second + 1)


class _Atlas(NamedTuple):
    rows: tuple[np.ndarray, ...]  # of each digit
    ink: dict[str, np.ndarray]  # by size: float32 [N, side, side, 1] in 0..1


@functools.lru_cache(maxsize=8)
def _atlas(split: str, canvas: int) -> _Atlas:
    from PIL import Image

    source = digits(split)
    read = source.read(np.arange(source.num_examples))
    rows = tuple(np.flatnonzero(read["label"] == digit) for digit in range(10))

    def resized(side: int) -> np.ndarray:
        pictures = [Image.fromarray(image[..., 0]) for image in read["image"]]
        pictures = [np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC)) for picture in pictures]
        return np.stack(pictures).astype(np.float32)[..., None] / 255

    return _Atlas(rows, {size: resized(units * canvas // 16) for size, units in SIZES.items()})
