"""What a visitor holds of a request: a ticket, whose updates report how far its pictures have come."""

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from diffusion.demo.requests import Request


class Update(NamedTuple):
    """How far a request has come.

    Attributes:
      position: in the queue; 0: its pictures are being drawn, or done.
      step: of the sampler.
      num_steps: of the sampler.
      previews: x_0_hat of the pictures that are begun, uint8[N, H, W, C]; those that are finished come first.
      pictures: uint8[N, H, W, C], in the last update of a request that was drawn.
      provenance: of each picture, see `runs.provenance`.
      seconds: since its drawing began.
      error: a sentence, in the last update of a request that failed.
      cancelled: whether this is the last update of one that was cancelled.
    """

    position: int = 0
    step: int = 0
    num_steps: int = 0
    previews: np.ndarray | None = None
    pictures: np.ndarray | None = None
    provenance: list[dict[str, Any]] | None = None
    seconds: float = 0.0
    error: str | None = None
    cancelled: bool = False

    @property
    def last(self) -> bool:
        """Whether no other follows."""
        return self.pictures is not None or self.error is not None or self.cancelled


class Ticket:
    """A request in the engine's hands.

    Attributes:
      id: random, so that nobody can guess another's.
      request: with every field explicit.
    """

    def __init__(self, request: Request, cancel: Callable[["Ticket"], None]):
        self.id = secrets.token_urlsafe(16)
        self.request = request
        self.begun = 0  # pictures that are drawn or being drawn
        self.drawn: list[np.ndarray] = []
        self.made: list[dict[str, Any]] = []
        self.alone = False  # whether it shares no batch, for one that it was in has failed
        self.since: float | None = None
        self._cancel = cancel
        self._changed = threading.Condition()
        self._latest, self._count = Update(num_steps=request.num_steps), 0

    @property
    def finished(self) -> bool:
        """Whether its last update is there."""
        return self._latest.last

    @property
    def newest(self) -> Update:
        """The newest update."""
        return self._latest

    def post(self, **fields: Any) -> None:
        """Replaces the newest update; after the last one, does nothing."""
        with self._changed:
            if self._latest.last:
                return
            seconds = 0.0 if self.since is None else time.monotonic() - self.since
            kept = {name: getattr(self._latest, name) for name in ("step", "previews")}
            self._latest = Update(num_steps=self.request.num_steps, seconds=seconds, **{**kept, **fields})
            self._count += 1
            self._changed.notify_all()

    def updates(self, timeout: float | None = None) -> Iterator[Update]:
        """Yields updates until the last; a slow reader is given the newest and misses those between.

        Args:
          timeout: seconds to wait for the next.

        Raises:
          TimeoutError: there was none; call again to continue.
        """
        seen = 0
        while True:
            with self._changed:
                if not self._changed.wait_for(lambda seen=seen: self._count > seen, timeout):
                    raise TimeoutError(f"no news for {timeout} s")
                update, seen = self._latest, self._count
            yield update
            if update.last:
                return

    def cancel(self) -> None:
        """Takes the request back: pictures of others in its batch are drawn on."""
        self._cancel(self)
