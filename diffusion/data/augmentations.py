"""Changes of training images that leave what they show: `data.augment` names them, in their order.

Each is a pure function of an image and of numbers that are drawn for it: (seed, name, step) and its place in the batch
decide, whatever the processes and whatever else is named.
"""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float64, UInt8

from diffusion.data.pictures import refit
from diffusion.data.streams import stream

Image = UInt8[np.ndarray, "H W C"]
Numbers = Float64[np.ndarray, "3"]  # uniform in [0, 1)

FARTHEST = 8  # a shift is by up to a side divided by this
SMALLEST = 0.75  # of a crop's sides, as a share of the image's
CONTRAST, BRIGHTNESS = 0.2, 0.1  # changes at most: of the distance from the mean, and of the range


def shift(image: Image, numbers: Numbers) -> Image:
    """Moves the image by up to an eighth of its height and width; its edges are reflected."""
    for axis, number in enumerate(numbers[:2]):
        side = image.shape[axis]
        most = side // FARTHEST
        place = np.abs(np.arange(side) + whole(number, -most, most))
        image = image.take(np.where(place < side, place, 2 * (side - 1) - place), axis=axis)
    return image


def crop(image: Image, numbers: Numbers) -> Image:
    """Crops to three quarters or more of each side, in the same aspect ratio, somewhere, and resizes what is left."""
    (height, width, channels), share = image.shape, 1 - (1 - SMALLEST) * numbers[0]
    rows, columns = max(1, round(height * share)), max(1, round(width * share))
    top, left = whole(numbers[1], 0, height - rows), whole(numbers[2], 0, width - columns)
    part = np.ascontiguousarray(image[top : top + rows, left : left + columns])
    return refit(part, channels=channels, size=(height, width))


def rotate90(image: Image, numbers: Numbers) -> Image:
    """Rotates a square image by a multiple of 90 degrees."""
    return np.rot90(image, whole(numbers[0], 0, 3))


def colour(image: Image, numbers: Numbers) -> Image:
    """Changes contrast by up to 20%, about the mean, and brightness by up to 10% of the range; alpha is left alone."""
    levels = image[..., :3].astype(np.float64)
    contrast, brightness = 1 + CONTRAST * (2 * numbers[0] - 1), 255 * BRIGHTNESS * (2 * numbers[1] - 1)
    mean = levels.mean()
    changed = np.clip(np.rint(mean + contrast * (levels - mean) + brightness), 0, 255).astype(np.uint8)
    return np.concatenate([changed, image[..., 3:]], axis=-1)


AUGMENTATIONS: dict[str, Callable[[Image, Numbers], Image]] = {
    "shift": shift,
    "crop": crop,
    "rotate90": rotate90,
    "colour": colour,
}


def whole(number: float, first: int, last: int) -> int:
    """Returns a number of [0, 1) as one of the whole numbers first..last, which are equally likely."""
    return first + int(number * (last - first + 1))


def check_augmentations(names: Sequence[str], shapes: Sequence[tuple[int, int, int]]) -> None:
    """Raises ValueError, saying what to do, unless images of these shapes can be augmented so."""
    for name in names:
        if name not in AUGMENTATIONS:
            hint = ", which is data.flip=True" if name == "flip" else ""
            raise ValueError(f"data.augment names {name!r}{hint}: choose from {', '.join(AUGMENTATIONS)}")
    if len(set(names)) < len(names):
        raise ValueError(f"data.augment is {tuple(names)}: name each once")
    oblong = [shape for shape in shapes if shape[0] != shape[1]]
    if "rotate90" in names and oblong:
        raise ValueError(
            f"data.augment rotates images of {oblong[0][0]}x{oblong[0][1]}, which are not square: leave rotate90 out, "
            "or set data.image_size to one side"
        )


def augment(
    image: UInt8[np.ndarray, "B H W C"], names: Sequence[str], seed: int, step: int, batch_size: int, rows: slice
) -> UInt8[np.ndarray, "B H W C"]:
    """Returns images changed by each of `names` in turn.

    Args:
      image: rows of a batch.
      names: of `AUGMENTATIONS`.
      seed: of the numbers that are drawn.
      step: number of the batch.
      batch_size: of the whole batch.
      rows: which of it these are.

    Example:
      >>> image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2, 1)
      >>> augment(image, ["rotate90"], seed=0, step=0, batch_size=1, rows=slice(1))[0, ..., 0].tolist()
      [[2, 0], [3, 1]]
    """
    for name in names:
        purpose = 1 << 31 | zlib.crc32(name.encode())  # far from the purposes of orders, which are small numbers
        numbers = stream(seed, purpose, step).random_sample((batch_size, 3))[rows]
        image = np.stack([AUGMENTATIONS[name](*pair) for pair in zip(image, numbers, strict=True)])
    return image
