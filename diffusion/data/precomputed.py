"""What is computed once for every example of a data set, and read from then on: latents, features of captions."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffusion.data.batches import full_batches
from diffusion.files import replacing

Arrays = Mapping[str, np.ndarray]


def precomputed(
    folder: Path, count: int, compute: Callable[[np.ndarray], Arrays], batch_size: int, what: str
) -> dict[str, np.ndarray]:
    """Returns arrays [count, ...] by name, mapped from files in `folder`, which are made where they are missing.

    Rows are written as they are computed: an interrupted call resumes at the first row that is missing.

    Args:
      folder: of these arrays alone, named by all that they depend on.
      count: of the rows.
      compute: rows int[B] -> arrays [B, ...] by name; B is always `batch_size`, rows past the end begin again at 0.
      batch_size: rows per call.
      what: is computed, for the progress bar.

    Raises:
      ValueError: the disk is full, with what is missing.

    Example:
      precomputed(cache_folder() / "latents" / key, source.num_examples, encode, 64, "encoding images")
    """
    if not (folder / "rows.json").exists():
        _make(folder, count, compute, batch_size, what)
    names = json.loads((folder / "rows.json").read_text())
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


def _make(folder: Path, count: int, compute: Callable[[np.ndarray], Arrays], batch_size: int, what: str) -> None:
    """Makes the folder beside its place, and moves it there when it is whole."""
    making = folder.with_name(f"{folder.name}.making")
    making.mkdir(parents=True, exist_ok=True)
    progress = making / "progress.json"
    made = json.loads(progress.read_text()) if progress.exists() else {}
    done = made.get("rows", 0) if made.get("batch_size") == batch_size else 0  # of others the batches begin elsewhere
    stored: dict[str, np.memmap] = {}
    batches = [rows for rows in full_batches(count, batch_size) if rows[0] >= done]
    for rows in tqdm(batches, desc=what, unit="batch", delay=5):
        first = int(rows[0])
        wanted = min(batch_size, count - first)
        for name, values in compute(rows).items():
            if name not in stored:
                stored[name] = _open(making / f"{name}.npy", (count, *values.shape[1:]), values.dtype)
            stored[name][first : first + wanted] = values[:wanted]
        if rows is batches[-1] or (first // batch_size) % 16 == 15:
            for array in stored.values():
                array.flush()
            made = {"rows": first + wanted, "names": sorted(stored), "batch_size": batch_size}
            with replacing(progress) as temporary:
                temporary.write_text(json.dumps(made))
    (making / "rows.json").write_text(json.dumps(json.loads(progress.read_text())["names"]))
    progress.unlink()
    try:
        os.rename(making, folder)
    except OSError:  # another process was first, with the same rows
        if not (folder / "rows.json").exists():
            raise
        shutil.rmtree(making, ignore_errors=True)


def _open(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Returns the array in a file, to be written to; a file that is there is used where it fits."""
    if path.exists():
        there = np.lib.format.open_memmap(path, mode="r+")
        if there.shape == shape and there.dtype == dtype:
            return there
    needed = int(np.prod(shape)) * dtype.itemsize
    if (free := shutil.disk_usage(path.parent).free) < needed:
        raise ValueError(
            f"{path.parent} needs {needed / 1e9:.1f} GB and its disk has {free / 1e9:.1f}: point XDG_CACHE_HOME to a "
            "larger one"
        )
    temporary = path.with_name(f".{uuid.uuid4().hex}.npy")
    np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape).flush()
    os.replace(temporary, path)
    return np.lib.format.open_memmap(path, mode="r+")
