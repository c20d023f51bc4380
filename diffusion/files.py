"""Files and folders that are written completely or not at all, and the cache folder."""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

LONGEST_NAME = 200  # bytes; file systems take 255, and temporary names are longer


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary path to write to, which replaces `path` when the block ends without an error.

    - A reader sees the old file or the new one, never a part of one; a failed write leaves nothing behind.
    - Parent folders are made.
    - The temporary name keeps the suffix, by which some writers choose their format.

    Example:
      with replacing("report.json") as temporary:
          temporary.write_text(text)
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Yields a temporary folder beside `path` to fill; it becomes `path` when the block ends well, else it is removed.

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


def check_folder(folder: str | os.PathLike, flag: str) -> None:
    """Checks that files can be written into `folder`, which may be new; `flag` begins the error.

    Raises:
      ValueError: in one line, a part of the path is a file, is too long or cannot be written to.
    """
    folder = Path(folder).absolute()
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    for name in folder.relative_to(there).parts:
        check_name(name, flag)
    if not os.path.isdir(there):
        raise ValueError(f"{flag}: {there} is a file, not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{flag}: {there} cannot be written to: choose another folder")


def check_file(path: str | os.PathLike, flag: str) -> None:
    """Checks that the file `path` can be written by `replacing`; `flag` begins the error.

    Raises:
      ValueError: in one line, as `check_folder`, or it is a folder.
    """
    path = Path(path)
    check_name(path.name, flag)
    if os.path.isdir(path):
        raise ValueError(f"{flag} is a folder: name a file")
    check_folder(path.parent, flag)


def check_name(name: str, flag: str) -> None:
    """Raises ValueError where a new file or folder cannot have this name."""
    if len(os.fsencode(name)) > LONGEST_NAME or "\0" in name:
        raise ValueError(f"{flag}: choose a name of at most {LONGEST_NAME} bytes")


def cache_folder() -> Path:
    """Returns the folder for what can be recomputed: $XDG_CACHE_HOME/diffusion, or else ~/.cache/diffusion."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion"
