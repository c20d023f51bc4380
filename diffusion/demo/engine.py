"""The engine of the page: requests stand in one queue, and one thread draws those that fit together as one batch.

engine = Engine({"digits": open_run("runs/digits")})
ticket = engine.submit(Request(prompt="a red three", seed=1))
for update in ticket.updates():
    print(update.position, update.step)
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion.demo.previews import make_preview
from diffusion.demo.requests import DEFAULT_LIMITS, Limits, Request, check, find, plan_of, run_of
from diffusion.demo.tickets import Ticket
from diffusion.model.sampling import make_sampling
from diffusion.runs.plans import draw_plans
from diffusion.runs.provenance import made_of
from diffusion.runs.run import Run
from diffusion.runs.watch import Watch
from diffusion.training.errors import one_line

PROGRAMS = 16  # that are kept compiled per run
CLOSING = "The page is closing: ask again later."


class QueueFull(ValueError):
    """More requests wait than may."""


class Row(NamedTuple):
    """A picture to draw: of a request, with its number."""

    ticket: Ticket
    index: int


class Engine:
    """Draws what is submitted, in one thread of its own.

    Attributes:
      runs: by the names that requests give them.
      limits: of requests.
      statistics: pictures drawn; requests finished, failed and cancelled; evaluations of networks; batch sizes.
    """

    def __init__(self, runs: Mapping[str, Run], limits: Limits = DEFAULT_LIMITS):
        # What is compiled asks this engine's watch, and weights are hashed once.
        self.runs = {name: run._replace(programs={}, known_digest=run.digest) for name, run in runs.items()}
        self.limits = limits
        self.statistics: Counter[str] = Counter()
        self.batch_sizes: Counter[int] = Counter()
        self._previews = {name: make_preview(run) for name, run in self.runs.items()}
        self._watch = Watch()
        self._queue: list[Ticket] = []
        self._drawing: list[Row] = []
        self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    def submit(self, request: Request) -> Ticket:
        """Returns the ticket of a request, which is drawn when its turn comes.

        Raises:
          ValueError: in one sentence, what cannot be drawn.
          QueueFull: too many wait.
        """
        request = find(request, self.runs)
        request = check(request, self.runs[request.run], self.limits)
        ticket = Ticket(request, self._cancel)
        with self._changed:
            if self._closed:
                raise QueueFull(CLOSING)
            if len(self._queue) >= self.limits.queue:
                raise QueueFull(f"{len(self._queue)} requests wait already: try again in a minute.")
            self._queue.append(ticket)
            self._post_positions()
            self._changed.notify_all()
        return ticket

    def close(self) -> None:
        """Ends the work: what waits ends with an error."""
        with self._changed:
            self._closed = True
            for ticket in [*self._queue, *(row.ticket for row in self._drawing)]:
                ticket.post(error=CLOSING)
            self._queue.clear()
            self._changed.notify_all()
        self._worker.join()

    def _cancel(self, ticket: Ticket) -> None:
        with self._changed:
            if ticket.finished:
                return
            ticket.post(cancelled=True)
            self.statistics["cancelled"] += 1
            if ticket in self._queue:
                self._queue.remove(ticket)
                self._post_positions()

    def _post_positions(self) -> None:
        for position, ticket in enumerate(self._queue):
            if ticket.since is None and not ticket.finished:
                ticket.post(position=position + 1)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._queue)
                if self._closed:
                    return
                self._drawing = self._next_batch()
                self._post_positions()
            self._draw(self._drawing)
            with self._changed:
                self._drawing = []

    def _next_batch(self) -> list[Row]:
        """Takes the pictures of the first in the queue, and of all who can share its program, while there is room."""
        first = self._queue[0]
        room = min(self.limits.batch, self.runs[first.request.run].config.sampling.batch_size)
        room = 1 << (room.bit_length() - 1)  # to which the batch may be padded
        rows: list[Row] = []
        for ticket in list(self._queue):
            shares = self._program(ticket) == self._program(first) and not (ticket.alone or first.alone)
            if ticket is not first and not shares:
                continue
            last = min(ticket.request.num_pictures, ticket.begun + room - len(rows))
            rows += [Row(ticket, index) for index in range(ticket.begun, last)]
            ticket.begun = last
            if last == ticket.request.num_pictures:
                self._queue.remove(ticket)
            if len(rows) == room:
                break
        return rows

    def _program(self, ticket: Ticket) -> tuple[Any, ...]:
        """Returns what the compiled program of a request depends on."""
        asked = ticket.request
        sampling = (asked.run, asked.sampler, asked.num_steps, asked.guidance, asked.size)
        return *sampling, plan_of(asked, self.runs[asked.run], 0).program(asked.num_steps)

    def _draw(self, rows: Sequence[Row]) -> None:
        tickets = list(dict.fromkeys(row.ticket for row in rows))
        for ticket in tickets:
            ticket.since = ticket.since or time.monotonic()
            ticket.post(step=len(ticket.drawn) and ticket.request.num_steps)
        self._watch.wanted = lambda: any(not ticket.finished for ticket in tickets)
        self._watch.show = self._shower(rows)
        before = self._watch.evaluations
        try:
            pictures, made = self._pictures(rows)
        except Exception as error:  # the thread must not end with one visitor's request
            self._failed(tickets, rows, error)
            return
        finally:
            self.statistics["evaluations"] += self._watch.evaluations - before
            self._watch.show = lambda x_0_hat, time: None
        self.batch_sizes[len(rows)] += 1
        for row, picture, how in zip(rows, pictures, made, strict=True):
            row.ticket.drawn.append(picture)
            row.ticket.made.append(how)
            self.statistics["drawn"] += not row.ticket.finished
        for ticket in tickets:
            if len(ticket.drawn) == ticket.request.num_pictures and not ticket.finished:
                self.statistics["finished"] += 1
                done = np.stack(ticket.drawn)
                ticket.post(step=ticket.request.num_steps, previews=None, pictures=done, provenance=ticket.made)

    def _failed(self, tickets: Sequence[Ticket], rows: Sequence[Row], error: Exception) -> None:
        """Ends the request that failed; where several were in the batch, each is drawn again alone."""
        logging.exception("a batch of %d pictures failed", len(rows))
        with self._changed:
            left = [ticket for ticket in tickets if not ticket.finished]
            if len(tickets) > 1 and not self._closed:
                for ticket in left:
                    ticket.alone, ticket.begun = True, len(ticket.drawn)
                self._queue = left + [ticket for ticket in self._queue if ticket not in left]
                return
            for ticket in left:
                self.statistics["failed"] += 1
                ticket.post(error=sentence(error))
            self._queue = [ticket for ticket in self._queue if not ticket.finished]

    def _shower(self, rows: Sequence[Row]) -> Callable[[np.ndarray, float], None]:
        """Returns what hands previews of these rows to those who wait for them."""
        request = rows[0].ticket.request
        run = run_of(request, self.runs[request.run])
        preview = self._previews[request.run]
        times = grid_times(run)

        def show(x_0_hat: np.ndarray, time: float) -> None:
            step = int(np.argmin(np.abs(times - time))) + 1
            shown = preview(x_0_hat[: len(rows)], run.model.space.image_shape)
            for ticket in dict.fromkeys(row.ticket for row in rows):
                own = [shown[i] for i, row in enumerate(rows) if row.ticket is ticket]
                ticket.post(step=min(step, request.num_steps), previews=np.stack([*ticket.drawn, *own]))

        return show

    def _pictures(self, rows: Sequence[Row]) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """Returns the pictures of rows that share a program, and how each was made."""
        request = rows[0].ticket.request
        own = self.runs[request.run]
        run = run_of(request, own)
        plans = [plan_of(row.ticket.request, own, row.index) for row in rows]
        size = 1 << (len(plans) - 1).bit_length()  # few sizes: few programs
        pictures = draw_plans(run, plans + [plans[-1]] * (size - len(plans)), self._watch)
        for name in list(own.programs)[:-PROGRAMS]:
            del own.programs[name]
        return pictures[: len(plans)], [made_of(run, plan, row, size) for row, plan in enumerate(plans)]


def grid_times(run: Run) -> np.ndarray:
    """Returns the times of the run's grid."""
    return np.asarray(make_sampling(run.config, run.model.process).grid.time)


def sentence(error: Exception) -> str:
    """Returns what a visitor is told of an error."""
    if isinstance(error, ValueError):
        return one_line(error)
    if "RESOURCE_EXHAUSTED" in str(error) or isinstance(error, MemoryError):
        return "There is not enough memory: ask for fewer or smaller pictures."
    return "Drawing failed, for a reason that is in the server's log: ask for something else."
