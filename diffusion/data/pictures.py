"""Picture files: the one decoder, from encoded files to uint8 arrays, and the one list of the pictures in a folder."""

import contextlib
import io
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from jaxtyping import UInt8

SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Pictures too, but of formats that are not read: `picture_files` warns of them.
OTHER_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".psd", ".tga", ".ico", ".exr", ".hdr"),
    *(".pbm", ".pgm", ".ppm", ".pnm", ".eps", ".dng", ".cr2", ".nef", ".arw"),
)
DEEP_GREYS = ("I;16", "I;16B", "I;16L", "I;16N", "I")
GREYS = ("1", "L", "LA", "La", *DEEP_GREYS)
COLOURS = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA", "CMYK", "YCbCr")
ORIENTATION = 0x0112  # the tag of EXIF
MODES = {1: "L", 3: "RGB", 4: "RGBA"}

VERSION = 2  # of what `decode` returns, for the keys of caches: increase it when pixels change

Size = int | tuple[int, int]  # the side of a square, or (height, width)
PictureFile = str | os.PathLike | bytes | IO[bytes]


def height_width(size: Size) -> tuple[int, int]:
    """Returns (height, width) of a size that may be one side.

    Example:
      >>> height_width(64), height_width((48, 64))
      ((64, 64), (48, 64))
    """
    return (size, size) if isinstance(size, int) else size


def one_side(size: Size, what: str) -> int:
    """Returns the side of a square size.

    Args:
      size: of pictures.
      what: is square alone, for the error.

    Raises:
      ValueError: the size is not square.
    """
    height, width = height_width(size)
    if height != width:
        raise ValueError(f"{what} are square, and the size is {height}x{width}: give one side, as data.image_size=64")
    return height


def decode(source: PictureFile, *, channels: int | None = None, size: Size | None = None) -> UInt8[np.ndarray, "H W C"]:
    """Returns the pixels of a picture file (of an animation, the first frame), upright by its EXIF orientation.

    - Greys of 16 bits are scaled to 8.
    - Transparency is composited over white, except with `channels=4`.
    - With `size`, the central region of that aspect ratio is resized (Lanczos): cropped, never squeezed.

    Args:
      source: a path, the encoded bytes, or an open binary file.
      channels: 1 (grey), 3 (RGB) or 4 (RGBA). None returns 1 for grey files and 3 for all others.
      size: (H, W), or one number for a square. None keeps the size of the file.

    Raises:
      ValueError: in one line that names the file, if it cannot be read or has pixels of an unsupported kind.
    """
    from PIL import ImageOps

    try:
        with _open(source) as picture:
            picture.load()
            with contextlib.suppress(Exception):  # damaged EXIF data does not make the pixels unreadable
                ImageOps.exif_transpose(picture, in_place=True)
            image = _convert(picture, channels or _channels(picture.mode))
    except Exception as error:  # on damaged files Pillow's parsers raise errors of any kind
        raise _unreadable(source, error) from error
    return _pixels(image, size)


def refit(pixels: UInt8[np.ndarray, "h w c"], *, channels: int, size: Size | None = None) -> UInt8[np.ndarray, "H W C"]:
    """Returns decoded pixels as `decode` would have returned them with these channels and this size."""
    from PIL import Image

    return _pixels(_convert(Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels), channels), size)


def shape_of(source: PictureFile) -> tuple[int, int, int]:
    """Returns the (H, W, C) of `decode(source)` from the header of the file, without decoding its pixels.

    Raises:
      ValueError: as `decode`, for what the header shows.
    """
    from PIL import Image

    try:
        with _open(source) as picture:
            channels, (width, height), orientation = _channels(picture.mode), picture.size, 1
            with contextlib.suppress(Exception):
                # The base class's: a PNG's own `getexif` decodes the pixels. A TIFF's size is that of the upright.
                orientation = 1 if picture.format == "TIFF" else Image.Image.getexif(picture).get(ORIENTATION, 1)
            return (width, height, channels) if orientation in (5, 6, 7, 8) else (height, width, channels)
    except Exception as error:
        raise _unreadable(source, error) from error


def picture_files(folder: str | os.PathLike) -> list[Path]:
    """Returns all picture files under `folder` (those of `SUFFIXES`) in natural order: 2.png before 10.png.

    - Files and folders whose names begin with a dot are skipped.
    - Symbolic links to folders are followed; a folder that can be reached in several ways is listed once.
    - Pictures of other formats and links to nothing are left out; one warning counts them.

    Raises:
      ValueError: if there is no such folder, or a folder in it cannot be listed.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}")
    pictures, left_out = [], []
    try:
        for path in _walk(folder, set()):
            if path.suffix.lower() in SUFFIXES and path.is_file():
                pictures.append(path)
            elif path.suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES):
                left_out.append(path)
    except OSError as error:
        raise ValueError(f"{error.filename or folder} cannot be listed ({error.strerror})") from error
    if left_out:
        logging.warning(
            "%s: %d files are left out, the first is %s: convert them to one of %s",
            folder,
            len(left_out),
            left_out[0].relative_to(folder),
            " ".join(suffix[1:] for suffix in SUFFIXES),
        )
    return pictures


def natural_key(name: str) -> tuple[tuple[str | int, ...], str]:
    """Returns a sorting key that compares the numbers within names as numbers: a2 before a10."""
    parts = re.split("([0-9]+)", name)
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), name


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in seen:  # links may lead back to where they are
        return
    seen.add((status.st_dev, status.st_ino))
    for name in sorted(os.listdir(folder), key=natural_key):
        if name.startswith("."):
            continue
        if (folder / name).is_dir():
            yield from _walk(folder / name, seen)
        else:
            yield folder / name


def _open(source: PictureFile) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _pixels(picture: Any, size: Size | None) -> np.ndarray:
    """Returns the pixels of a PIL image, cropped to the aspect ratio of `size` and resized to it."""
    from PIL import Image, ImageOps

    if size is not None:
        height, width = height_width(size)
        if picture.size != (width, height):
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
    pixels = np.asarray(picture)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def _channels(mode: str) -> int:
    if mode not in (*GREYS, *COLOURS):
        kind = "floats" if mode == "F" else "unsupported"
        raise ValueError(f"pixels of mode {mode} are {kind}: convert it to 8 bits per channel, grey or RGB")
    return 1 if mode in GREYS else 3


def _convert(picture: Any, channels: int) -> Any:
    """Returns a loaded PIL image as one of mode L, RGB or RGBA."""
    from PIL import Image

    if channels not in MODES:
        raise ValueError(f"channels is {channels}: choose 1, 3 or 4")
    _channels(picture.mode)
    if picture.mode in DEEP_GREYS:
        level = np.asarray(picture)
        if level.min() < 0 or level.max() > 65535:
            raise ValueError(f"greys from {level.min()} to {level.max()} are not of 16 bits: scale them to 0..65535")
        # Pillow's own conversion clips at 255.
        picture = Image.fromarray(((level.astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif picture.has_transparency_data and channels != 4:
        colours = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", colours.size, "white"), colours).convert("RGB")
    return picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])


def _unreadable(source: PictureFile, error: Exception) -> ValueError:
    from PIL import UnidentifiedImageError

    name = f"a picture of {len(source)} bytes" if isinstance(source, bytes) else getattr(source, "name", None)
    if isinstance(source, str | os.PathLike):
        name = os.fspath(source)
    if isinstance(error, UnidentifiedImageError):
        reason = "it is empty, or not a picture of a known format"
    else:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ValueError(f"{name or 'a picture'} cannot be read ({' '.join(str(reason).split())})")
