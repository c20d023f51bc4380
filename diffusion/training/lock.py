"""One run per folder: an advisory lock of the operating system, which a dead run cannot hold.

The kernel (on network file systems, the server) releases the lock when its process ends, however it ends; clocks and
file ages play no part. The file's content only names the holder, for messages.
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
    """Makes this process the only run in `workdir` until the block or the process ends.

    Args:
      workdir: made where it is missing. Of the processes of one run only the first may call this.

    Raises:
      RunError: another run is active in it (the line has host and pid), or the folder is not writable.
    """
    path = workdir / NAME
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        # Not inherited by child processes: the lock ends with this one.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise RunError(f"cannot write to --workdir={workdir}: {error}") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another run is active in {workdir}: {holder(file)}. End it first, or name another --workdir"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"{workdir} is on a file system without locks: start no second run in it", file=sys.stderr)
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps({"host": socket.gethostname(), "pid": os.getpid()}).encode(), 0)
        yield
    finally:
        # The file stays: if it were removed, two runs could lock two files of the same name.
        os.close(file)


def holder(file: int) -> str:
    """Returns who wrote to the lock file, as "pid 12 on HOST"."""
    try:
        written = json.loads(os.pread(file, 1000, 0))
        return f"pid {written['pid']} on {written['host']}"
    except (ValueError, LookupError, TypeError):
        return "a process that has not written its pid yet"
