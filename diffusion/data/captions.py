"""Images with captions: a `Source` whose label says which caption belongs to the image. Read from folders, too."""

import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from diffusion.data.pictures import decode
from diffusion.data.sources import Source, array_source


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


def caption_folder(
    folder: str | os.PathLike, image_size: int | None, split: str = "train", skip_broken: bool = False
) -> CaptionedSource:
    """The pairs of FOLDER/captions.jsonl, decoded once and held in memory as RGB.

    Each line is {"image": "path within the folder", "caption": "..."}, or "caption": [several], each a pair of its own.
    With `image_size` every picture is cropped to its central square and resized; without, all must be of one square
    size. A picture that cannot be read is an error, or with `skip_broken` left out, and a warning says how many were.

    Raises:
      ValueError: with the line's number, if the file, a caption or a picture is missing, broken or of another shape.
    """
    folder = Path(folder)
    path = folder / "captions.jsonl"
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f'cannot read {path} ({error}): write a line {{"image": "name.png", "caption": "..."}} for each pair there'
        ) from error
    images: list[np.ndarray] = []
    pictures, labels, broken = [], [], []
    captions: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, said = _pair(line, f"{path}, line {number}")
        if not (folder / name).is_file():
            raise ValueError(f"{path}, line {number}: a caption without an image, there is no {folder / name}")
        try:
            image = read_picture(folder / name, image_size)
        except ValueError as error:
            if not skip_broken or "cannot be read" not in str(error):
                raise ValueError(f"{path}, line {number}: {error}") from error
            broken.append(name)
            continue
        if images and image.shape != images[0].shape:
            raise ValueError(
                f"{path}, line {number}: {name} is {_size(image)}, the first {_size(images[0])}: give image_size to "
                "resize them"
            )
        images.append(image)
        pictures += [len(images) - 1] * len(said)
        labels += [captions.setdefault(caption, len(captions)) for caption in said]
    if broken:
        logging.warning("%s: %d of %d pictures cannot be read: %s ...", path, len(broken), len(lines), broken[0])
    if not images:
        raise ValueError(f"{path} holds no pair that can be read")
    label = np.array(labels, np.int32)
    source = array_source(np.stack(images)[pictures], label, folder.name, split, len(captions))
    return CaptionedSource(source, tuple(captions))


def read_picture(path: str | os.PathLike, image_size: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a picture file as RGB: with `image_size` its central square, resized (Lanczos); without, it is square.

    Raises:
      ValueError: if it is missing or broken, or not square.
    """
    image = decode(path, channels=3, size=image_size)
    if image.shape[0] != image.shape[1]:
        raise ValueError(f"{path} is {_size(image)}, not square: give image_size to crop it")
    return image


def open_picture(path: str | os.PathLike) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a picture file as RGB. Raises ValueError if it is missing or broken."""
    return decode(path, channels=3)


def _pair(line: str, where: str) -> tuple[str, list[str]]:
    try:
        pair = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON ({error})") from error
    name = pair.get("image") if isinstance(pair, dict) else None
    said = pair.get("caption") if isinstance(pair, dict) else None
    said = [said] if isinstance(said, str) else said
    if not isinstance(name, str) or not isinstance(said, list) or not said or not all(isinstance(s, str) for s in said):
        raise ValueError(f'{where}: not {{"image": "name.png", "caption": "..."}}')
    return name, said


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]}x{image.shape[0]}"
