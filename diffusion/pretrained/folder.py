"""Folders of published weights: a JSON file of settings and files of named arrays. Nothing in them is ever run.

resolve(folder)        a hub's cache directory -> the folder in it
read_json(path)        settings
read_weights(folder)   arrays by name: one file or shards, safetensors or PyTorch's, read one array at a time
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 (makes bfloat16 known to NumPy, as which safetensors returns it)
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusion.files import new_folder as new_folder  # where its readers look for it
from diffusion.pretrained.strict import few
from diffusion.pretrained.torch_files import read_torch_file

_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}  # safetensors' names
_DTYPES = _FLOATS | {"I64": "int64"}  # counters and positions, which some importers leave out
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_TORCH_STEMS = {"model": ("pytorch_model", "model")}  # transformers calls its two formats differently


@dataclass(frozen=True)
class Stored:
    """An array that is still in its file: its shape is known, and `np.asarray` reads it.

    Attributes:
      place: the file and the name, for error messages.
      shape: of the array.
      stored: name of the dtype in the file.
      dtype: what floats are converted to when they are read; None for as they are stored.
      read: returns the array.
    """

    place: str
    shape: tuple[int, ...]
    stored: str
    dtype: Any
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the array in `dtype`, else in its own; raises ValueError where a number is not finite."""
        array = self.read()
        if self.stored in _FLOATS.values():
            with np.errstate(over="ignore"):  # of float64, reported below
                array = np.array(array, self.dtype if dtype is None else dtype, copy=copy)
            if bad := array.size - np.count_nonzero(np.isfinite(array)):
                raise ValueError(f"{self.place} holds {bad} numbers of {array.size} that are not finite")
        return array


def resolve(folder: str | os.PathLike) -> Path:
    """Returns `folder`, or of a hub's cache directory (models--OWNER--NAME) the snapshot that it points to.

    Raises:
      ValueError: the directory has several snapshots and none is its main one.
    """
    folder = Path(folder).expanduser()
    if not (folder / "snapshots").is_dir():
        return folder
    snapshots = sorted(path for path in (folder / "snapshots").iterdir() if path.is_dir())
    main = folder / "refs" / "main"
    if main.is_file():
        newest = main.read_text().strip()
        snapshots = [path for path in snapshots if path.name == newest] or snapshots
    if len(snapshots) != 1:
        raise ValueError(f"{folder} is a cache of {len(snapshots)} snapshots: name one of {folder / 'snapshots'}")
    return snapshots[0]


def read_json(path: Path) -> dict[str, Any]:
    """Returns the object in a JSON file; raises ValueError when it is missing or is something else."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path} ({error}): copy the published folder whole") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object: copy the published folder whole")
    return found


def read_weights(
    folder: str | os.PathLike,
    stem: str = "diffusion_pytorch_model",
    variant: str | None = None,
    dtype: Any = np.float32,
) -> dict[str, Stored]:
    """Returns the arrays of a folder by name; each is read, converted and checked when it is asked for.

    Args:
      folder: of one network, or a hub's cache directory of it.
      stem: of the file's name.
      variant: as in STEM.fp16.safetensors; None for the file without one, or for the only variant there is.
      dtype: what floats are converted to; None for as they are stored.

    Raises:
      ValueError: a file is missing or damaged, shards and their index disagree, or an array is of a dtype that is
        neither a float of at least 16 bits nor int64.
    """
    weights: dict[str, Stored] = {}
    for path, names in _files(resolve(folder), stem, variant).items():
        found = read_file(path, dtype)
        if names is not None and set(found) != names:
            raise ValueError(
                f"{path} and its index disagree: missing {few(sorted(names - set(found)))}, "
                f"left over {few(sorted(set(found) - names))}"
            )
        weights |= found
    return weights


def weights_files(
    folder: str | os.PathLike, stem: str = "diffusion_pytorch_model", variant: str | None = None
) -> list[Path]:
    """Returns the files that `read_weights` reads arrays from: one, or the shards."""
    return list(_files(resolve(folder), stem, variant))


def _files(folder: Path, stem: str, variant: str | None) -> dict[Path, set[str] | None]:
    """Returns the files of arrays, of shards with the names that the index promises."""
    stems = [(stem, "safetensors"), *((name, "bin") for name in _TORCH_STEMS.get(stem, (stem,)))]
    infix = f".{variant}" if variant else ""
    files = _find(folder, stems, infix)
    if files is None and variant is None:
        names = "|".join(
            rf"{re.escape(name)}(?:(\.\w+)\.{suffix}|\.{suffix}\.index(\.\w+)\.json)" for name, suffix in stems
        )
        entries = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        matches = [match for entry in entries if (match := re.fullmatch(names, entry))]
        variants = sorted({group for match in matches for group in match.groups() if group})
        if len(variants) > 1:
            raise ValueError(f"{folder} has {stem} only in the variants {few(v[1:] for v in variants)}: name one")
        files = _find(folder, stems, variants[0]) if variants else None
    if files is None:
        file = f"{stem}{infix}.safetensors"
        raise ValueError(f"{file} cannot be read: {folder} has no such file, no index of shards, nor a .bin of PyTorch")
    return files


def _find(folder: Path, stems: list[tuple[str, str]], infix: str) -> dict[Path, set[str] | None] | None:
    for stem, suffix in stems:
        whole, index = folder / f"{stem}{infix}.{suffix}", folder / f"{stem}.{suffix}.index{infix}.json"
        for path in (whole, index):
            if path.is_symlink() and not path.exists():
                raise ValueError(f"{path} is a link to a file that is missing: download it again")
        if whole.is_file():
            return {whole: None}
        if index.is_file():
            return _shards(index)
    return None


def _shards(index: Path) -> dict[Path, set[str] | None]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map: copy the published folder whole")
    shards: dict[Path, set[str] | None] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{index}: weight_map names the file {few([str(shard)])}, which is not beside it")
        names = shards.setdefault(index.parent / shard, set())
        assert names is not None
        names.add(name)
    if missing := sorted(path.name for path in shards if not path.is_file()):
        raise ValueError(f"{index.parent} lacks {few(missing)} of {len(shards)} shards: download them again")
    return shards


def read_file(path: Path, dtype: Any = np.float32) -> dict[str, Stored]:
    """Returns the arrays of one file, safetensors or a state dict of PyTorch, by name; see `read_weights`."""

    def stored(name: str, kind: str, shape: Sequence[int], read: Callable[[], np.ndarray]) -> Stored:
        if kind not in _DTYPES.values():
            raise ValueError(f"{path}: {few([name])} is {kind}: take this model's file in float32, bfloat16 or float16")
        return Stored(f"{path}: {few([name])}", tuple(shape), kind, dtype, read)

    if path.suffix in TORCH_SUFFIXES:
        arrays = read_torch_file(path)
        return {
            name: stored(name, array.dtype.name, array.shape, partial(np.asarray, array))
            for name, array in arrays.items()
        }
    try:
        with safe_open(path, "np"):  # which checks that the header is well-formed and the file as long as it says
            places, first = _header(path)
    except (SafetensorError, OSError, TypeError) as error:
        raise ValueError(f"{path} is not an intact safetensors file ({error}): download it again") from error
    weights = {}
    for name, place in places.items():
        kind, shape = str(_DTYPES.get(place["dtype"], place["dtype"])), tuple(place["shape"])
        read = partial(_mapped, path, first + place["data_offsets"][0], kind, shape)
        weights[name] = stored(name, kind, shape, read)
    return weights


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """Returns the header of a safetensors file, without its metadata, and where the arrays begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        places = json.loads(file.read(length))
    places.pop("__metadata__", None)
    return places, 8 + length


def _mapped(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a copy of an array in a file. It alone is mapped meanwhile: a file that is mapped whole would count as
    memory in use wherever it has been read."""
    if not math.prod(shape):
        return np.zeros(shape, dtype)
    return np.array(np.memmap(path, dtype, "r", offset, shape or (1,))).reshape(shape)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as diffusers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file, with the mark by which its readers know that layouts are PyTorch's."""
    # Not ascontiguousarray, which gives a scalar an axis.
    save_file({name: np.array(weight, order="C") for name, weight in weights.items()}, path, {"format": "pt"})
