"""Ctrl-C and SIGTERM end a run between two steps: the step in hand is finished and saved."""

import signal
import sys
from types import FrameType


class StopSignal:
    """A context in which the first SIGINT or SIGTERM is only noted, in `received`; the second one acts at once."""

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
        self.received = signal.Signals(number)
        self.__exit__()
        print(f"\n{self.received.name}: finishing this step and saving; once more to leave at once", file=sys.stderr)
