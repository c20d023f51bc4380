"""Folders of published weights: a JSON file of settings and a file of named arrays. Nothing in them is ever run."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError when it is not there or is something else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path} ({error}): copy the published folder whole") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object: copy the published folder whole")
    return found


def read_weights(
    folder: Path, stem: str = "diffusion_pytorch_model", dtypes: Sequence[str] = ("float32",)
) -> dict[str, np.ndarray]:
    """The arrays of STEM.safetensors, or where there is none of STEM.bin (PyTorch's, read without running it).

    Raises:
      ValueError: neither file is there, it is not whole, or an array is of none of `dtypes`.
    """
    path = weights_file(folder, stem)
    if path.suffix == ".bin":
        from diffusion.pretrained.torch_files import read_torch_file

        weights = read_torch_file(path)
    else:
        try:
            weights = load_file(path)
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
    for name, weight in weights.items():
        if weight.dtype.name not in dtypes:
            raise ValueError(f"{path}: {name} is {weight.dtype}, not {dtypes[0]}: take the float32 file of this model")
    return weights


def weights_file(folder: Path, stem: str = "diffusion_pytorch_model") -> Path:
    """The file that `read_weights` reads."""
    for path in (folder / f"{stem}.safetensors", folder / f"{stem}.bin"):
        if path.is_file():
            return path
    raise ValueError(f"{stem}.safetensors cannot be read: {folder} has no {stem}.safetensors, nor a .bin")


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON as diffusers does."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Writes a safetensors file that says, as its readers want to know, that layouts are PyTorch's."""
    # Not ascontiguousarray, which gives a scalar an axis.
    save_file({name: np.array(weight, order="C") for name, weight in weights.items()}, path, {"format": "pt"})


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary folder beside `path` to fill; it becomes `path` when the block ends well, else it is removed.

    Raises:
      ValueError: `path` is there already.
    """
    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} is there already: name another folder, or move that one away")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        yield temporary
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
