"""Images with captions: a `Source` whose label is the row of the image's caption; from folders with captions.jsonl."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from diffusion.data.buckets import bucket_shapes, nearest_bucket
from diffusion.data.decoded import decoded_files
from diffusion.data.lines import read_lines
from diffusion.data.pictures import Size, shape_of
from diffusion.data.sources import Source


def with_text(source: Source, encode: Callable[[Sequence[str]], np.ndarray]) -> Source:
    """Returns the same captioned images, read with a third array, "text": the row of their caption in encode(captions).

    Args:
      source: of captioned images.
      encode: called once, with all captions: token ids int32[N, L], or features of any shape [N, ...].

    Raises:
      ValueError: if `encode` does not return one row for each caption.
    """
    text = np.asarray(encode(source.captions))
    if len(text) != len(source.captions):
        raise ValueError(f"{len(source.captions)} captions were encoded to {len(text)} rows: one for each is needed")

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = source.read(indices)
        return {**batch, "text": text[batch["label"]]}

    return source._replace(read=read)


def with_captions(images: Source, captions: Sequence[Sequence[str]]) -> Source:
    """Returns the pairs of images with their captions: image i with each of captions[i], of which there may be none.

    The fingerprint covers the captions too.

    Raises:
      ValueError: if there is not a sequence of captions for each image, or not one caption.
    """
    if len(captions) != images.num_examples:
        raise ValueError(f"{images.num_examples} images but captions of {len(captions)}: one list for each is needed")
    known: dict[str, int] = {}
    rows, labels = [], []
    for row, own in enumerate(captions):
        rows += [row] * len(own)
        labels += [known.setdefault(caption, len(known)) for caption in own]
    if not known:
        raise ValueError(f"{images.name}: its {images.num_examples} examples of {images.split} have no caption")
    row, label = np.array(rows), np.array(labels, np.int32)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": images.read(row[indices])["image"], "label": label[indices]}

    kind, _, digest = images.fingerprint.partition(":")
    digest = hashlib.sha256(digest.encode() + json.dumps([list(own) for own in captions]).encode()).hexdigest()
    return images._replace(
        num_examples=len(label),
        num_classes=len(known),
        read=read,
        fingerprint=f"{kind}:{digest}",
        captions=tuple(known),
        class_names=(),
    )


def caption_folder(
    folder: str | os.PathLike,
    image_size: Size | None,
    split: str = "train",
    skip_broken: bool = False,
    buckets: int = 0,
) -> Source:
    """Returns the pairs of FOLDER/captions.jsonl, the pictures decoded once, as RGB.

    Each line is {"image": "path within the folder", "caption": "..."}, or "caption": [several], each a pair of its own.

    Args:
      folder: of captions.jsonl.
      image_size: side, or (H, W), to which every picture is cropped and resized. None needs squares of one size.
      split: what the source is called.
      skip_broken: skip pictures that cannot be read, with one warning, instead of raising.
      buckets: what divides the sides of buckets of aspect ratios of about image_size^2 pixels: each picture is cropped
        to the nearest, and the source has a part for each. 0: all are cropped alike.

    Raises:
      ValueError: with the number of the line, if the file, a caption or a picture is missing, broken or of another
        shape.
    """
    folder = Path(folder).expanduser()
    path = folder / "captions.jsonl"
    if not path.is_file():
        raise ValueError(
            f'there is no {path}: write a line {{"image": "name.png", "caption": "..."}} for each pair there'
        )
    captions: dict[str, list[str]] = {}
    places = []
    for number, line in read_lines(path):
        place = f"{path}, line {number}: "
        name, own = _pair(line, place)
        if name not in captions:
            if not (folder / name).is_file():
                raise ValueError(f"{place}a caption without an image, there is no {folder / name}")
            places.append(place)
        captions.setdefault(name, []).extend(own)
    if not captions:
        raise ValueError(f"{path} holds no pair")
    files = [folder / name for name in captions]
    every = list(captions.values())
    if buckets:
        return _in_buckets(files, every, places, split, image_size, buckets, skip_broken)
    decoded = decoded_files(
        files,
        None,
        folder.resolve().name,
        split,
        None,
        size=image_size,
        channels=3,
        skip_broken=skip_broken,
        places=places,
    )
    height, width, _ = decoded.source.image_shape
    if image_size is None and height != width:
        raise ValueError(
            f"{places[0]}{files[0]} is {width}x{height}, not square: crop it with image_size "
            "(--config.data.image_size=N)"
        )
    return with_captions(decoded.source, [every[number] for number in decoded.kept])


def _in_buckets(
    files: Sequence[Path],
    captions: Sequence[Sequence[str]],
    places: Sequence[str],
    split: str,
    side: Size | None,
    multiple: int,
    skip_broken: bool,
) -> Source:
    """Returns a source with a part for each bucket that has pictures."""
    if not isinstance(side, int):
        raise ValueError("data.buckets have about data.image_size^2 pixels each: set data.image_size")
    shapes = bucket_shapes(side, multiple)
    numbers: dict[int, list[int]] = {}
    for number, file in enumerate(files):
        try:
            height, width, _ = shape_of(file)
        except ValueError as error:
            if skip_broken:
                continue
            raise ValueError(f"{places[number]}{error}") from error
        numbers.setdefault(nearest_bucket(height, width, shapes), []).append(number)
    parts = []
    for bucket in sorted(numbers):
        own = numbers[bucket]
        decoded = decoded_files(
            [files[i] for i in own],
            None,
            files[0].parent.resolve().name,
            split,
            None,
            size=shapes[bucket],
            channels=3,
            skip_broken=skip_broken,
            places=[places[i] for i in own],
        )
        parts.append(with_captions(decoded.source, [captions[own[i]] for i in decoded.kept]))
    counts = ", ".join(f"{part.image_shape[1]}x{part.image_shape[0]}: {part.num_examples}" for part in parts)
    logging.info("pairs in buckets of aspect ratios: %s", counts)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        raise ValueError("pictures of several shapes are read part by part")

    known = tuple(dict.fromkeys(caption for part in parts for caption in part.captions))
    digest = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
    return Source(
        parts[0].name,
        split,
        sum(part.num_examples for part in parts),
        (side, side, 3),
        len(known),
        read,
        f"sha256:{digest}",
        captions=known,
        parts=tuple(parts),
    )


def _pair(line: str, place: str) -> tuple[str, list[str]]:
    """Returns the image's name and the captions of a line of JSON."""
    try:
        pair = json.loads(line)
        json.dumps(pair, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place}a lone surrogate, which is half of a character: write the whole one") from error
    except ValueError as error:
        raise ValueError(f"{place}not JSON ({error})") from error
    name = pair.get("image") if isinstance(pair, dict) else None
    own = pair.get("caption") if isinstance(pair, dict) else None
    own = [own] if isinstance(own, str) else own
    if not isinstance(name, str) or not isinstance(own, list) or not own or not all(isinstance(s, str) for s in own):
        raise ValueError(f'{place}not {{"image": "name.png", "caption": "..."}}')
    return name, own
