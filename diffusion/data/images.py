"""Images in files (uint8) and in networks ([-1, 1]), and grids of images as PNG files."""

import math
import os
from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from diffusion.files import replacing

FONT_SIZE = 12  # of labels, in pixels


def to_float(image: UInt8[Array | np.ndarray, "*shape"]) -> Float[Array, "*shape"]:
    """Returns x / 127.5 - 1 in the default float type: 0..255 become [-1, 1] (DDPM, section 3.3). May be jitted.

    Example:
      >>> print(to_float(np.array([0, 255], np.uint8)))
      [-1.  1.]
    """
    return jnp.asarray(image).astype(jnp.result_type(float)) / 127.5 - 1.0


def to_uint8(x: Float[Array | np.ndarray, "*shape"]) -> UInt8[Array, "*shape"]:
    """Returns the nearest of the levels 0..255 to x in [-1, 1], clipped outside. Inverts `to_float`. May be jitted.

    Example:
      >>> print(to_uint8(np.array([-1.0, 0.999, 7.0])))
      [  0 255 255]
    """
    return jnp.clip(jnp.round((jnp.asarray(x) + 1.0) * 127.5), 0.0, 255.0).astype(jnp.uint8)


def check_uint8_images(image: np.ndarray, what: str = "images") -> None:
    """Raises ValueError, with one line that says what to do, unless `image` is uint8 [N >= 1, H, W, C in 1, 3, 4]."""
    if image.dtype != np.uint8:
        if np.issubdtype(image.dtype, np.floating) and image.size:
            bad = ~np.isfinite(image)
            if bad.any():
                first = np.argwhere(bad)[0]
                raise ValueError(
                    f"{what} hold {image[tuple(first)]} at example {first[0]}: repair or remove that example"
                )
            ends = f" in [{image.min():.4g}, {image.max():.4g}]"
            remedy = "floats in [-1, 1] are converted by images.to_uint8"
            if image.min() >= 0 and image.max() <= 1:
                remedy = "floats in [0, 1] are converted by np.round(255 * x).astype(np.uint8)"
        else:
            ends, remedy = "", "0..255 are converted by .astype(np.uint8)"
        raise ValueError(f"{what} are {image.dtype}{ends}, not uint8: {remedy}")
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or 0 in image.shape:
        raise ValueError(
            f"{what} have shape {list(image.shape)}, not [N, H, W, C] with C = 1, 3 or 4 and nothing empty"
        )


def image_grid(image: np.ndarray, columns: int | None = None, separator: int = 1) -> UInt8[np.ndarray, "h w C"]:
    """Returns images uint8[N, H, W, C] side by side, in rows.

    Args:
      image: of any size.
      columns: images per row; None: nearly a square.
      separator: mid-grey pixels between images.

    Raises:
      ValueError: if images are not uint8, or there is no column.
    """
    check_uint8_images(image)
    count, height, width, channels = image.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else columns
    if columns < 1:
        raise ValueError(f"a grid needs at least 1 column, not {columns}")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    grid = np.full((rows * columns, height + separator, width + separator, channels), 128, np.uint8)
    grid[:count, :height, :width] = image
    grid = grid.reshape(rows, columns, height + separator, width + separator, channels).swapaxes(1, 2)
    grid = grid.reshape(rows * (height + separator), columns * (width + separator), channels)
    return grid[: grid.shape[0] - separator, : grid.shape[1] - separator]


def labelled_grid(
    image: np.ndarray, labels: Sequence[str], smallest_side: int = 64, width: int = 1000
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns groups of images uint8[N, K, H, W, C] as a picture: each group of K in a row, its label beneath.

    Args:
      image: of any size.
      labels: N texts, broken into lines; of very long ones the end is left out.
      smallest_side: to which small images are enlarged, by a whole factor.
      width: of the picture; as many groups are put side by side as fit.

    Raises:
      ValueError: images are not uint8, or there is not one label for each group.
    """
    from PIL import Image, ImageDraw, ImageFont

    check_uint8_images(image.reshape(-1, *image.shape[2:]))
    factor = math.ceil(smallest_side / min(image.shape[2:4]))
    lines = math.ceil(image.shape[1] * (image.shape[3] * factor + 2) / width)  # of equal length
    in_line = math.ceil(image.shape[1] / lines)
    rows = [image_grid(row.repeat(factor, axis=1).repeat(factor, axis=2), in_line, separator=2) for row in image]
    rows = [np.repeat(row, 3, axis=2) if row.shape[2] == 1 else row[..., :3] for row in rows]
    across = max(rows[0].shape[1], 120)
    font = ImageFont.load_default(FONT_SIZE)
    wrapped = ["\n".join(wrap(label, across, font.getlength)) for label in labels]
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    below = math.ceil(max(pen.multiline_textbbox((0, 0), text, font=font)[3] for text in wrapped)) + 4
    blocks = []
    for row, text in zip(rows, wrapped, strict=True):
        strip = Image.new("RGB", (across, below), "white")
        ImageDraw.Draw(strip).multiline_text((0, 0), text, fill="black", font=font)
        row = np.pad(row, ((0, 0), (0, across - row.shape[1]), (0, 0)), constant_values=255)
        blocks.append(np.pad(np.concatenate([row, np.asarray(strip)]), ((4, 4), (4, 4), (0, 0)), constant_values=255))
    columns = max(1, width // blocks[0].shape[1])
    blocks += [np.full_like(blocks[0], 255)] * (-len(blocks) % columns if len(blocks) > columns else 0)
    return image_grid(np.stack(blocks), columns, separator=0)


def wrap(text: str, width: float, measure: Callable[[str], float], most: int = 12) -> list[str]:
    """Returns the lines of a text broken between words, and within a word that is wider than a line.

    Args:
      text: white space within it counts as one blank.
      width: that no line exceeds.
      measure: the width of a string.
      most: lines; of a longer text the last one ends in an ellipsis.
    """
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if measure(longer) <= width:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and measure(lines[-1] + character) > width:
                lines.append("")
            lines[-1] += character
            if len(lines) > most:
                break
        if len(lines) > most:
            break
    if len(lines) > most:
        last = lines[most - 1]
        while last and measure(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last}…"]
    return lines


def save_png(path: str | os.PathLike, image: np.ndarray, smallest_side: int = 256) -> None:
    """Writes uint8[H, W, C] as a PNG file, a small picture enlarged.

    Args:
      path: of the file.
      image: with 1, 3 or 4 channels.
      smallest_side: the picture is enlarged by the least whole factor that brings its shorter side to this; pixels stay
        square and sharp.
    """
    from PIL import Image

    check_uint8_images(image[None], "the picture")
    factor = math.ceil(smallest_side / min(image.shape[:2]))
    image = image.repeat(factor, axis=0).repeat(factor, axis=1)
    with replacing(path) as temporary:
        Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(temporary, "png")


def save_labelled_png(path: str | os.PathLike, image: np.ndarray, labels: Sequence[str]) -> None:
    """Writes the `labelled_grid` of uint8[N, K, H, W, C] as a PNG file."""
    save_png(path, labelled_grid(image, labels), smallest_side=1)
