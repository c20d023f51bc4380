"""Files that are either whole or not there, and the folder for what can be made again."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside `path` to write to; it takes the place of `path` when the block ends well.

    A reader sees the old file or the new one, never half of one, and a failed write leaves nothing behind. Parent
    folders are made. The temporary name keeps the suffix, by which some writers choose their format.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{uuid.uuid4().hex}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """The folder for what can be made again at any time: $XDG_CACHE_HOME/diffusion, else ~/.cache/diffusion."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion"
