"""Ctrl-C and SIGTERM end a run between two steps: the current step is finished and saved."""

import os
import signal
from types import FrameType


class StopSignal:
    """A context in which the first SIGINT or SIGTERM is only noted, in `received`; the second ends the process.

    It ends as with SIGKILL, at once: a save in progress then leaves no checkpoint.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._previous = {}

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        # Not print: a signal may arrive in the middle of another print, which is not reentrant.
        if self.received is not None:
            os.write(2, b"\nexiting at once\n")
            os._exit(128 + number)
        self.received = signal.Signals(number)
        line = f"\n{self.received.name}: finishing this step and saving; repeat to exit at once\n"
        os.write(2, line.encode())
