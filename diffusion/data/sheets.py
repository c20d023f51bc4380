"""Pictures for people of many images in columns that have heads, and rows that have labels."""

import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from diffusion.data.images import FONT_SIZE, check_uint8_images, image_grid, save_png, wrap

BETWEEN, APART, MARGIN = 4, 12, 6  # white pixels between images, between blocks, and around all
LINE = FONT_SIZE + 4  # pixels from a line of text to the next
SMALL, LARGE, WIDE = 64, 240, 600  # sides of a sample, and what several together are to fill
WIDEST_LABEL = 96  # pixels; where all labels fit they are at the left of their rows, otherwise beneath
WIDEST_TABLE = 20  # columns

Heads = Sequence[str | Sequence[str]]


def sheet(
    blocks: Sequence[np.ndarray], heads: Heads = (), labels: Sequence[str] | None = None, smallest_side: int = SMALL
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns blocks uint8[R, K_i, H, W, C] side by side in R rows, with a head above each column.

    Args:
      blocks: of images of one size.
      heads: of each block one for all of it, or one per column; (): none.
      labels: of the rows; None: none.
      smallest_side: to which small images are enlarged, by a whole factor.

    Raises:
      ValueError: images are not uint8, or heads or labels are not as many as blocks, columns or rows.

    Example:
      sheet([image[:, None], drawn], ["an image", ["strength 0.2", "0.8"]])
    """
    from PIL import ImageFont

    measure = ImageFont.load_default(FONT_SIZE).getlength
    whole = [_enlarged(block, smallest_side) for block in blocks]
    rows = [_row([block[number] for block in whole]) for number in range(len(whole[0]))]
    if labels is not None:
        if len(labels) != len(rows):
            raise ValueError(f"{len(rows)} rows and {len(labels)} labels: one for each is needed")
        widest = math.ceil(max(measure(label) for label in labels)) + 8
    else:
        widest = 0
    left = widest if labels is not None and widest <= WIDEST_LABEL else 0
    found = []
    for number, row in enumerate(rows):
        found += [np.full((BETWEEN, left + row.shape[1], 3), 255, np.uint8)] if number else []
        if labels is None:
            found.append(row)
        elif left:
            found.append(np.concatenate([_text(labels[number], left, row.shape[0]), row], axis=1))
        else:
            found += [row, _text(labels[number], row.shape[1])]
    width = left + rows[0].shape[1]
    if heads:
        found.insert(0, _heads([block.shape[1:4] for block in whole], heads, left, width))
    return np.concatenate(found)


def save_sheet(
    path: str | os.PathLike,
    blocks: Sequence[np.ndarray],
    heads: Heads = (),
    labels: Sequence[str] | None = None,
    smallest_side: int = SMALL,
) -> None:
    """Writes the `sheet` of blocks as a PNG file, with a margin."""
    _save(path, sheet(blocks, heads, labels, smallest_side))


def save_classes(path: str | os.PathLike, image: np.ndarray, labels: Sequence[str]) -> None:
    """Writes images uint8[N, H, W, C] with their labels as a PNG file.

    A table with a column for each label where they come in turn, as all classes do; otherwise each has its own above.
    """
    period = len(set(labels))
    in_turn = all(label == labels[i % period] for i, label in enumerate(labels))
    if in_turn and period <= WIDEST_TABLE:
        missing = -len(image) % period
        image = np.concatenate([image, np.full((missing, *image.shape[1:]), 255, np.uint8)])
        side = min(LARGE, max(SMALL, WIDE // period))
        save_sheet(path, [image.reshape(-1, period, *image.shape[1:])], [list(labels[:period])], None, side)
    else:
        columns = min(len(image), max(math.ceil(math.sqrt(len(image))), 4))
        side = min(LARGE, max(SMALL, WIDE // columns))
        missing = -len(image) % columns
        image = np.concatenate([image, np.full((missing, *image.shape[1:]), 255, np.uint8)])
        rows = image.reshape(-1, 1, columns, *image.shape[1:])
        texts = np.array([*labels, *[""] * missing], object).reshape(-1, columns)
        sheets = [sheet([row], [list(heads)], None, side) for row, heads in zip(rows, texts, strict=True)]
        _save(path, np.concatenate(sheets))


def _save(path: str | os.PathLike, picture: np.ndarray) -> None:
    """Writes a sheet as a PNG file, with a margin."""
    save_png(path, np.pad(picture, ((MARGIN, MARGIN), (MARGIN, MARGIN), (0, 0)), constant_values=255), smallest_side=1)


def _enlarged(block: np.ndarray, smallest_side: int) -> np.ndarray:
    """Returns a block in colour, its images enlarged by a whole factor."""
    check_uint8_images(block.reshape(-1, *block.shape[2:]))
    factor = math.ceil(smallest_side / min(block.shape[2:4]))
    block = block.repeat(factor, axis=2).repeat(factor, axis=3)
    return np.repeat(block, 3, axis=-1) if block.shape[-1] == 1 else block[..., :3]


def _row(parts: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the images [K_i, H, W, 3] of a row side by side."""
    found = []
    for part in parts:
        table = image_grid(part, columns=len(part), separator=BETWEEN)
        table[:, [x for x in range(table.shape[1]) if x % (part.shape[2] + BETWEEN) >= part.shape[2]]] = 255
        found += [table, np.full((table.shape[0], APART, 3), 255, np.uint8)]
    return np.concatenate(found[:-1], axis=1)


def _heads(shapes: Sequence[tuple[int, ...]], heads: Heads, left: int, width: int) -> np.ndarray:
    """Returns the strip above the rows, of blocks with (K, H, W) each."""
    if len(heads) != len(shapes):
        raise ValueError(f"{len(shapes)} blocks and {len(heads)} heads: one for each is needed")
    places, x = [], left
    for (count, _, side), head in zip(shapes, heads, strict=True):
        across = count * (side + BETWEEN) - BETWEEN
        if isinstance(head, str):
            places.append((x, across, head))
        elif len(head) != count:
            raise ValueError(f"{count} columns and {len(head)} heads: one for each is needed")
        else:
            places += [(x + i * (side + BETWEEN), side, text) for i, text in enumerate(head)]
        x += across + APART
    drawn = [(x, _text(text, across, centred=True)) for x, across, text in places]
    strip = np.full((max(text.shape[0] for _, text in drawn), width, 3), 255, np.uint8)
    for x, text in drawn:
        strip[strip.shape[0] - text.shape[0] :, x : x + text.shape[1]] = text
    return strip


def _text(text: str, width: int, height: int | None = None, *, centred: bool = False) -> np.ndarray:
    """Returns a text in lines within `width` as a picture uint8[h, width, 3]; of this height, it is in the middle."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(FONT_SIZE)
    lines = wrap(text, width, font.getlength)
    needed = LINE * len(lines) + 4
    strip = Image.new("RGB", (width, height or needed), "white")
    top = max(0, (height - needed) // 2) if height else 0
    pen = ImageDraw.Draw(strip)
    for number, line in enumerate(lines):
        left = max(0, (width - font.getlength(line)) / 2) if centred else 0
        pen.text((left, top + LINE * number), line, fill="black", font=font)
    return np.asarray(strip)
