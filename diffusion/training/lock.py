"""One run a folder: an advisory lock of the operating system, which a dead run cannot hold.

The kernel (on network file systems, the server) lets go of the lock when its process ends, however it ends; no clock
and no age is looked at. What stands in the file only says who to look for.
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from diffusion.training.errors import RunError

NAME = "run.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def sole_run(workdir: Path) -> Iterator[None]:
    """Makes this process the only run in `workdir` (which is made) until the block ends or the process does.

    Of several processes of one run only the first may take it.

    Raises:
      RunError: another run is in it (with its host and pid), or the folder cannot be written to.
    """
    path = workdir / NAME
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Not inherited by programs that are started meanwhile: the lock ends with this process.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise RunError(f"cannot write to --workdir={workdir}: {error}") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another run is in {workdir}: {holder(file)}. End it first, or name another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{workdir} is on a file system without locks: see that no second run writes to it", file=sys.stderr)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        # The file stays: to remove it would let two runs hold the lock of two files of one name.
        os.close(file)


def holder(file: int) -> str:
    """Returns who wrote to the lock file, as "pid 12 on HOST"."""
    try:
        said = json.loads(os.pread(file, 1000, 0))
        return f"pid {said['pid']} on {said['host']}"
    except (ValueError, LookupError, TypeError):
        return "a process that has not said yet who it is"
