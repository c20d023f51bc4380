"""When this process started, which is before anything of Python was imported."""

import os
import time
from pathlib import Path

IMPORTED = time.perf_counter()


def process_start() -> float:
    """Returns the `time.perf_counter()` of this process's start; of this module's import where it is not known.

    Linux has it in /proc, in ticks since the machine was booted, which is what CLOCK_BOOTTIME counts too.
    """
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()  # a name may hold blanks
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return IMPORTED
    start = time.perf_counter() - age
    return start if 0 <= IMPORTED - start < 600 else IMPORTED  # some containers fill /proc with another clock
