"""Public files that are fetched once: each has one address and one sha256, and is kept in the cache folder."""

import hashlib
import os
import urllib.request
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from diffusion.files import cache_folder, replacing


class PublicFile(NamedTuple):
    """A file that anyone can fetch.

    Attributes:
      name: of the file; messages name it so.
      address: where it is.
      sha256: of its content.
      folder: of the cache in which it is kept.
    """

    name: str
    address: str
    sha256: str
    folder: str = "weights"


def obtain(public: PublicFile, path: str | os.PathLike | None = None) -> Path:
    """Returns where the file is: at `path`, or in the cache, where it is fetched once.

    Raises:
      ValueError: there is no such file, it cannot be fetched, or it is not the public one to the last bit.
    """
    file = Path(path) if path is not None else cache_folder() / public.folder / public.name
    if path is not None and not file.is_file():
        raise ValueError(f"{file} is not a file: give the path of {public.name}, which is at {public.address}")
    if not file.is_file():
        _fetch(public, file)
    _check(public, file, file)
    return file


def _check(public: PublicFile, file: Path, place: Path) -> None:
    """Raises ValueError unless `file`, which is at `place` or is to be moved there, is the public one."""
    with open(file, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != public.sha256:
        raise ValueError(
            f"{place} is not {public.name}: its sha256 is {found}, not {public.sha256}; move it away and get "
            f"{public.address}"
        )


def _fetch(public: PublicFile, file: Path) -> None:
    """Downloads the public file to `file`, completely or not at all."""
    try:
        with (
            replacing(file) as temporary,
            urllib.request.urlopen(public.address, timeout=30) as response,
            open(temporary, "wb") as out,
            tqdm(
                total=int(response.headers.get("Content-Length", 0)), unit="B", unit_scale=True, desc=public.name
            ) as bar,
        ):
            while chunk := response.read(1 << 20):
                out.write(chunk)
                bar.update(len(chunk))
            out.flush()
            _check(public, temporary, file)
    except OSError as error:
        raise ValueError(f"cannot fetch {public.name} ({error}): put {public.address} at {file}") from None
