"""From picture files to a source: decoded once, in parallel, into memory or a memory-mapped file of the cache."""

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from diffusion.data.pictures import VERSION, Size, decode, height_width, shape_of
from diffusion.data.sources import LARGEST_IN_MEMORY, Source, Unfit, array_source
from diffusion.files import cache_folder, replacing

Shape = tuple[int, int, int]
AHEAD = 256  # pictures that are decoded in parallel and held until they are stored


class DecodedFiles(NamedTuple):
    """Picture files as a source.

    Attributes:
      source: their images.
      kept: the number of the file of each image, rising; files that cannot be read are missing.
    """

    source: Source
    kept: list[int]


def decoded_files(
    files: Sequence[Path],
    label: np.ndarray | None,
    name: str,
    split: str,
    num_classes: int | None,
    *,
    size: Size | None = None,
    channels: int | None = None,
    skip_broken: bool = False,
    in_memory: bool | None = None,
    places: Sequence[str] = (),
) -> DecodedFiles:
    """Decodes picture files.

    Args:
      files: at least one.
      label: int[N], one per file, or None.
      name: of the source.
      split: of the source.
      num_classes: of the labels, or None.
      size: to which every picture is cropped and resized. Without it all must have one size.
      channels: of every picture, 1, 3 or 4. None makes all grey if all are grey, else RGB.
      skip_broken: skip files that cannot be read, with one warning, instead of raising.
      in_memory: False keeps the pixels in a memory-mapped file under `cache_folder()`, which later calls reuse. None
        does so for more than 2 GiB.
      places: one per file, where it is mentioned ("captions.jsonl, line 3: "), which begins errors about it.

    Raises:
      ValueError: a file cannot be read, sizes differ, no file is left, or there is no room for the cache.
    """
    places = places or [""] * len(files)
    each = partial(_each, files=files, places=places, skip_broken=skip_broken)
    cached = _cache_path(name, files, label, (num_classes, size, channels, skip_broken))
    found = None if in_memory else _open_cache(cached, len(files))
    if found:
        image, kept, fingerprint = found
    else:
        if size is not None and channels:
            shape = (*height_width(size), channels)
        else:
            headers = list(each(shape_of, f"reading the headers of {name} {split}"))
            shape = _shape(headers, files, places, size, channels)
        if in_memory is None:
            in_memory = len(files) * math.prod(shape) <= LARGEST_IN_MEMORY

        def read(file: Path) -> np.ndarray:
            pixels = decode(file, channels=shape[2], size=None if size is None else shape[:2])
            if pixels.shape != shape:
                raise ValueError(f"{file} is {pixels.shape[1]}x{pixels.shape[0]}, which is not the size in its header")
            return pixels

        decoded = each(read, f"decoding {name} {split}")
        fingerprint = None
        if in_memory:
            image, kept = _to_memory(decoded, len(files), shape)
        else:
            image, kept = _to_file(decoded, len(files), shape, cached)
    if not kept:
        raise ValueError(f"none of the {len(files)} pictures can be read, the first is {files[0]}")
    source = array_source(image, None if label is None else label[kept], name, split, num_classes, fingerprint)
    if broken := sorted(set(range(len(files))) - set(kept)):
        logging.warning("%s: %d of %d pictures cannot be read: %s ...", name, len(broken), len(files), files[broken[0]])
    if not in_memory and not found:
        with replacing(cached.with_suffix(".json")) as temporary:  # written last: with it the cache is complete
            temporary.write_text(json.dumps({"fingerprint": source.fingerprint, "broken": broken}))
    return DecodedFiles(source, kept)


def _each(
    read: Callable[[Path], Any], title: str, files: Sequence[Path], places: Sequence[str], skip_broken: bool
) -> Iterator[Any]:
    """Yields read(file) for each file in order, computed in parallel; None for those that are skipped."""

    def one(file: Path, place: str) -> Any:
        try:
            return read(file)
        except ValueError as error:
            if skip_broken:
                return None
            advice = "repair it, or skip such files with skip_broken (--config.data.skip_broken=True)"
            raise Unfit(f"{place}{error}", advice, "repair it, or move it away") from error

    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(desc=title, total=len(files), delay=2) as bar:
        for first in range(0, len(files), AHEAD):
            for result in pool.map(one, files[first : first + AHEAD], places[first : first + AHEAD]):
                yield result
                bar.update()


def _shape(
    shapes: list[Shape | None],
    files: Sequence[Path],
    places: Sequence[str],
    size: Size | None,
    channels: int | None,
) -> Shape:
    """Returns the shape of all images from those that the headers of the files give."""
    known = [(shape, i) for i, shape in enumerate(shapes) if shape is not None]
    if not known:
        raise ValueError(f"none of the {len(files)} pictures can be read, the first is {files[0]}")
    depth = channels or max(shape[2] for shape, _ in known)
    if size is not None:
        return (*height_width(size), depth)
    (height, width, _), first = known[0]
    for shape, i in known:
        if shape[:2] != (height, width):
            raise Unfit(
                f"{places[i]}{files[i]} is {shape[1]}x{shape[0]} but {files[first]} is {width}x{height}",
                "crop and resize all to one size with image_size (--config.data.image_size=N)",
                "crop and resize all to one size first",
            )
    return height, width, depth


def _to_memory(decoded: Iterable[np.ndarray | None], count: int, shape: Shape) -> tuple[np.ndarray, list[int]]:
    image, kept = np.empty((count, *shape), np.uint8), []
    for number, pixels in enumerate(decoded):
        if pixels is not None:
            image[len(kept)] = pixels
            kept.append(number)
    return image[: len(kept)], kept


def _to_file(
    decoded: Iterable[np.ndarray | None], count: int, shape: Shape, path: Path
) -> tuple[np.ndarray, list[int]]:
    kept = []
    try:
        # Written, not assigned to a memory map: there a full disk ends the process without an error.
        with replacing(path) as temporary, open(temporary, "wb") as file:
            _write_header(file, count, shape)
            for number, pixels in enumerate(decoded):
                if pixels is not None:
                    file.write(pixels.tobytes())
                    kept.append(number)
            file.seek(0)
            _write_header(file, len(kept), shape)
    except OSError as error:
        raise ValueError(
            f"cannot write {path} ({error.strerror or error}): {count * math.prod(shape) / 2**30:.1f} GiB of decoded "
            "pictures are needed there; free them, or set XDG_CACHE_HOME to a folder on another disk"
        ) from error
    return _map(path), kept


def _write_header(file: IO[bytes], count: int, shape: Shape) -> None:
    """Writes the header of an .npy file of uint8[count, *shape]; its length is the same for every count."""
    fields = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, fields)


def _map(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r"))


def _cache_path(name: str, files: Sequence[Path], label: np.ndarray | None, settings: tuple[Any, ...]) -> Path:
    """Returns where the pixels of these files are kept; files that change have another path."""
    digest = hashlib.sha256(repr((VERSION, settings, None if label is None else label.tolist())).encode())
    for file in files:
        status = file.stat()
        digest.update(repr((os.fspath(file.absolute()), status.st_size, status.st_mtime_ns)).encode())
    return cache_folder() / "pictures" / f"{name[:40]}-{digest.hexdigest()[:32]}.npy"


def _open_cache(path: Path, count: int) -> tuple[np.ndarray, list[int], str] | None:
    """Returns the images, the numbers of their files, and the fingerprint; None if they are missing or truncated."""
    try:
        stored = json.loads(path.with_suffix(".json").read_text())
        image = _map(path)
        kept = sorted(set(range(count)) - set(stored["broken"]))
        return (image, kept, stored["fingerprint"]) if len(image) == len(kept) else None
    except (OSError, ValueError, EOFError, KeyError):
        return None
