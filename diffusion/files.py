"""Files that are written completely or not at all, and the cache folder."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


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


def cache_folder() -> Path:
    """Returns the folder for what can be recomputed: $XDG_CACHE_HOME/diffusion, or else ~/.cache/diffusion."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion"
