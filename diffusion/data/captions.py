"""Images with captions: a `Source` whose label is the row of the image's caption; from folders with captions.jsonl."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from diffusion.data.buckets import bucket_shapes, nearest_bucket
from diffusion.data.decoded import DecodedFiles, decoded_files
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
        return {**images.read(row[indices]), "label": label[indices]}

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
    references: int = 0,
) -> Source:
    """Returns the pairs of FOLDER/captions.jsonl, the pictures decoded once, as RGB.

    Each line is {"image": "path within the folder", "caption": "..."}, or "caption": [several], each a pair of its own.
    With "references": ["path", ...] a line names the pictures that the caption makes the image of: they are read beside
    it as "reference_image" [B, references, H, W, 3], cropped and resized as it is.

    Args:
      folder: of captions.jsonl.
      image_size: side, or (H, W), to which every picture is cropped and resized. Without it all must have one size.
      split: what the source is called.
      skip_broken: skip pictures that cannot be read, with one warning, instead of raising.
      buckets: what divides the sides of buckets of aspect ratios of about image_size^2 pixels, of one side then: each
        picture is cropped to the nearest, and the source has a part for each. 0: all are cropped alike.
      references: how many every line names; 0: those that are named are not read.

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
    captions: dict[tuple[str, ...], list[str]] = {}  # of an image and its references
    places = []
    for number, line in read_lines(path):
        place = f"{path}, line {number}: "
        name, own, others = _pair(line, place)
        if references and len(others) != references:
            raise ValueError(
                f"{place}{len(others)} references, where data.references={references} is asked of every line"
            )
        names = (name, *(others if references else ()))
        if names not in captions:
            if missing := [one for one in names if not (folder / one).is_file()]:
                what = "a caption without an image" if missing[0] == name else "a caption without its reference"
                raise ValueError(f"{place}{what}, there is no {folder / missing[0]}")
            places.append(place)
        captions.setdefault(names, []).extend(own)
    if not captions:
        raise ValueError(f"{path} holds no pair")
    files = [[folder / name for name in names] for names in captions]
    every = list(captions.values())
    if buckets:
        return _in_buckets(files, every, places, split, image_size, buckets, skip_broken)
    decoded = _decoded(files, places, split, image_size, skip_broken)
    return with_captions(decoded.source, [every[number] for number in decoded.kept])


def _decoded(
    files: Sequence[Sequence[Path]], places: Sequence[str], split: str, size: Size | None, skip_broken: bool
) -> DecodedFiles:
    """Returns the first file of each row as an image, read with the others as its references."""
    name = files[0][0].parent.resolve().name

    def decode(own: Sequence[Path], own_places: Sequence[str], size: Size | None) -> DecodedFiles:
        return decoded_files(
            own, None, name, split, None, size=size, channels=3, skip_broken=skip_broken, places=own_places
        )

    images = decode([row[0] for row in files], places, size)
    others = {file: place for row, place in zip(files, places, strict=True) for file in row[1:]}
    if not others:
        return images
    references = decode(list(others), list(others.values()), images.source.image_shape[:2])
    number = {list(others)[kept]: i for i, kept in enumerate(references.kept)}
    whole = [i for i, kept in enumerate(images.kept) if all(file in number for file in files[kept][1:])]
    rows, beside = np.array(whole), np.array([[number[file] for file in files[images.kept[i]][1:]] for i in whole])

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        seen = references.source.read(beside[indices].reshape(-1))["image"]
        return {
            **images.source.read(rows[indices]),
            "reference_image": seen.reshape(*beside[indices].shape, *seen.shape[1:]),
        }

    digest = hashlib.sha256(json.dumps([images.source.fingerprint, references.source.fingerprint]).encode())
    digest.update(beside.tobytes())
    source = images.source._replace(num_examples=len(rows), read=read, fingerprint=f"sha256:{digest.hexdigest()}")
    return DecodedFiles(source, [images.kept[i] for i in whole])


def _in_buckets(
    files: Sequence[Sequence[Path]],
    captions: Sequence[Sequence[str]],
    places: Sequence[str],
    split: str,
    side: Size | None,
    multiple: int,
    skip_broken: bool,
) -> Source:
    """Returns a source with a part for each bucket that has pictures."""
    if not isinstance(side, int):
        raise ValueError("data.buckets have about data.image_size^2 pixels each: set data.image_size, to one side")
    shapes = bucket_shapes(side, multiple)
    numbers: dict[int, list[int]] = {}
    for number, file in enumerate(files):
        try:
            height, width, _ = shape_of(file[0])
        except ValueError as error:
            if skip_broken:
                continue
            raise ValueError(f"{places[number]}{error}") from error
        numbers.setdefault(nearest_bucket(height, width, shapes), []).append(number)
    parts = []
    for bucket in sorted(numbers):
        own = numbers[bucket]
        decoded = _decoded([files[i] for i in own], [places[i] for i in own], split, shapes[bucket], skip_broken)
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


def _pair(line: str, place: str) -> tuple[str, list[str], list[str]]:
    """Returns the image's name, the captions and the references of a line of JSON."""
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
    others = pair.get("references", [])
    if not isinstance(others, list) or not all(isinstance(other, str) for other in others):
        raise ValueError(f'{place}references are a list of pictures to edit: "references": ["a.png", "b.png"]')
    return name, own, others
