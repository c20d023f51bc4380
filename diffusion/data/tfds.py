"""Image sets prepared by TensorFlow Datasets, read without TensorFlow.

Only array_record files can be read in any order. They are found by listing the data folder, never through the names of
TFDS, which searches the network for minutes where there is none.
"""

import contextlib
import hashlib
import math
import os
import re
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from diffusion.data.pictures import VERSION, Size, decode, height_width
from diffusion.data.sources import LARGEST_IN_MEMORY, Source, Unfit, array_source
from diffusion.extras import need
from diffusion.files import cache_folder, replacing


def tfds_source(
    name: str,
    split: str,
    data_dir: str | os.PathLike | None = None,
    in_memory: bool | None = None,
    image_size: Size | None = None,
    channels: int | None = None,
) -> Source:
    """Returns a split of a prepared TFDS image set: its feature "image", and "label" where there is one.

    Args:
      name: NAME, NAME/CONFIG or NAME:1.2.3.
      split: as TFDS writes it: "train", "train[:90%]".
      data_dir: where prepared sets are; None: $TFDS_DATA_DIR, else ~/tensorflow_datasets.
      in_memory: True decodes once, holds the images in memory, and caches them under `cache_folder()`; False decodes
        as images are read. None: True for at most 2 GiB.
      image_size: side, or (H, W), to which every image is cropped and resized; needed where images differ in size.
      channels: 1, 3 or 4; None: those of the set.

    Raises:
      ValueError: as `open_set` does, or if images differ in size while no `image_size` is given.
    """
    folder, features, records = open_set(name, split, data_dir)
    import tensorflow_datasets as tfds

    height, width, depth = features["image"].shape
    if image_size is not None:
        height, width = height_width(image_size)
    if height is None or width is None:
        raise Unfit(
            f"the images of {name} differ in size",
            "give image_size (--config.data.image_size=N) to resize them",
            "write them as a folder of pictures of one size",
        )
    shape = (height, width, channels or depth)
    names = tuple(features["label"].names) if isinstance(features.get("label"), tfds.features.ClassLabel) else ()
    num_classes = len(names) or None

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        try:
            examples = records.__getitems__(indices.tolist())
            image = np.stack([decode(example["image"], channels=shape[2], size=image_size) for example in examples])
        except (OSError, RuntimeError, ValueError) as error:
            raise unreadable(folder, error) from error
        label = [example["label"] if num_classes else 0 for example in examples]
        return {"image": image, "label": np.array(label, np.int32)}

    digest = hashlib.sha256(repr((name, split, shape, image_size)).encode())
    for path in sorted(folder.iterdir()):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        if path.suffix == ".json":
            digest.update(path.read_bytes())
    source = Source(name, split, len(records), shape, num_classes, read, f"files-sha256:{digest.hexdigest()}")
    if in_memory is None:
        in_memory = source.num_examples * math.prod(shape) <= LARGEST_IN_MEMORY
    return (_decoded_once(source, folder) if in_memory else source)._replace(class_names=names)


class UnknownSet(ValueError):
    """There is no prepared set of that name."""


class PreparedSet(NamedTuple):
    """A split as TFDS prepared it: its folder, its features, and its records by index, with encoded images."""

    folder: Path
    features: dict[str, Any]
    records: Any


def open_set(name: str, split: str, data_dir: str | os.PathLike | None) -> PreparedSet:
    """Returns the prepared split of that name; no records are read.

    Raises:
      UnknownSet: if the set is not in `data_dir`; the line has the two ways to get it.
      ValueError: if it is not in array_record form, has no such split or no uint8 images.
    """
    folder = _find(name, Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser())
    need("tfds")
    import tensorflow_datasets as tfds  # 0.4 s, and without a set there is no use for it

    try:
        builder: Any = tfds.builder_from_directory(folder, file_format="array_record")
    except ValueError as error:
        raise ValueError(f"{folder}: prepare it again with file_format='array_record' ({_line(error)})") from error
    features = dict(builder.info.features)
    try:
        decoders = {"image": tfds.decode.SkipDecoding()} if "image" in features else None
        records = builder.as_data_source(split=split, decoders=decoders)
    except ValueError as error:
        raise ValueError(f"{folder}: {_line(error)}") from error
    if not isinstance(features.get("image"), tfds.features.Image) or features["image"].np_dtype != np.uint8:
        raise ValueError(f"{folder} has no feature 'image' of uint8 images, only {', '.join(sorted(features))}")
    return PreparedSet(folder, features, records)


def unreadable(folder: Path, error: Exception) -> ValueError:
    """Returns the error for damaged records of a prepared set."""
    return ValueError(f"{folder} cannot be read; copy or prepare it again ({_line(error)})")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _find(name: str, data_dir: Path) -> Path:
    """Returns the folder DATA_DIR/name[/config]/version of a prepared set; of several versions the newest."""
    parts = re.fullmatch(r"(\w+)(?:/([\w.\-+]+))?(?::(\d+\.\d+\.\d+))?", name)
    if not parts:
        raise UnknownSet(f"'{name}' does not name a TFDS data set: write it as NAME, NAME/CONFIG or NAME:1.2.3")
    base, config, version = parts.groups()
    found: dict[str, list[Path]] = {}
    for info in (*data_dir.glob(f"{base}/*/dataset_info.json"), *data_dir.glob(f"{base}/*/*/dataset_info.json")):
        folder = info.parent
        its_config = "" if folder.parent.name == base else folder.parent.name
        right = config in (None, its_config) and version in (None, folder.name)
        if right and re.fullmatch(r"\d+\.\d+\.\d+", folder.name):
            found.setdefault(its_config, []).append(folder)
    if len(found) > 1:
        raise ValueError(
            f"{data_dir / base} holds several configs: write {base}/CONFIG with one of {', '.join(sorted(found))}"
        )
    if not found:
        raise UnknownSet(
            f"no prepared data set '{name}' in {data_dir}: on a connected machine run pip install '.[prepare]' && "
            f"python -c \"import tensorflow_datasets as tfds; tfds.builder('{name}', data_dir='{data_dir}', "
            "file_format='array_record').download_and_prepare()\", "
            f"or copy {data_dir / base} from a machine that has it (--config.data.dir=DIR, or --data-dir=DIR of "
            "diffusion.evaluation, names another folder)"
        )
    (folders,) = found.values()
    return max(folders, key=lambda folder: [int(number) for number in folder.name.split(".")])


def _decoded_once(source: Source, folder: Path) -> Source:
    """Returns the same images, held in memory."""
    arrays = made_once(source.name, f"{source.fingerprint} {VERSION}", folder, lambda: _read_all(source))
    label = arrays["label"] if source.num_classes else None
    return array_source(arrays["image"], label, source.name, source.split, source.num_classes)


def made_once(name: str, key: str, folder: Path, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns make(), or what it returned for the same files before, from the cache.

    Args:
      name: of the data set, for the name of the cached file.
      key: distinguishes what is made of one folder.
      folder: of the files that `make` reads; when one changes, `make` is called again.
      make: returns arrays by name. A cached file that is damaged (by its CRC32) is made again.
    """
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.iterdir())]
    digest = hashlib.sha256(repr((key, str(folder.resolve()), files)).encode()).hexdigest()
    cached = cache_folder() / "decoded" / f"{name.split('/')[0].split(':')[0]}-{digest[:32]}.npz"
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        made = make()
        with contextlib.suppress(OSError), replacing(cached) as temporary:  # without a cache the next start is slower
            np.savez(temporary, **made)  # pyright: ignore[reportArgumentType]  # no array is called allow_pickle
        return made


def _read_all(source: Source) -> dict[str, np.ndarray]:
    image = np.empty((source.num_examples, *source.image_shape), np.uint8)
    label = np.empty(source.num_examples, np.int32)
    parts = [slice(start, min(start + 256, len(label))) for start in range(0, len(label), 256)]

    def read(part: slice) -> int:
        examples = source.read(np.arange(part.start, part.stop))
        image[part], label[part] = examples["image"], examples["label"]
        return part.stop - part.start

    title = f"decoding {source.name} {source.split}, once"
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(label), desc=title, unit=" images", delay=2) as bar:
        for count in pool.map(read, parts):
            bar.update(count)
    return {"image": image, "label": label}
