"""Checksums of a folder of files: it is read only if every byte is as it was written.

Orbax recognizes an interrupted save, but not a flipped bit, a truncated file or a shard that is lost later. A sealed
folder holds `checksums.json`: the size and CRC-32 of every other file in it.

- CRC-32 misses one accidental change in 2^32, and none within 32 neighbouring bits; it is faster than disks.
- It does not protect against intent.

    python -m diffusion.training.integrity FOLDER ...    seals folders that were written without checksums
"""

import json
import os
import sys
import zlib
from pathlib import Path, PurePosixPath

from diffusion.files import replacing

MANIFEST = "checksums.json"
CHUNK = 2**22  # bytes


def seal(folder: Path) -> None:
    """Writes the checksums of every file under `folder`, after each has been flushed to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    sums = {path.relative_to(folder).as_posix(): checksum(path, flush=True) for path in files}
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(sums, indent=1) + "\n")
        checksum(temporary, flush=True)


def flaw(folder: Path) -> str | None:
    """Returns what is wrong with a sealed folder, in a few words; None where every byte is as it was sealed."""
    try:
        sums = json.loads((folder / MANIFEST).read_text())
        if not isinstance(sums, dict) or not sums:
            return f"{MANIFEST} lists no files"
        for name, expected in sums.items():
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts:
                return f"{MANIFEST} lists {name!r}, which is outside the folder"
            if not (folder / path).is_file():
                return f"{name} is missing"
            size = (folder / path).stat().st_size
            if size != expected[0]:
                return f"{name} has {size} bytes, not {expected[0]}"
            if checksum(folder / path) != expected:
                return f"{name} does not have the checksum that it was written with"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except OSError as error:
        return f"it cannot be read: {error}"
    except (ValueError, LookupError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def checksum(path: Path, flush: bool = False) -> list[int]:
    """Returns [size in bytes, CRC-32] of a file; `flush` also makes it survive a power failure."""
    size = crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
            size += len(chunk)
        if flush:
            os.fsync(file.fileno())
    return [size, crc]


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        seal(Path(argument))
