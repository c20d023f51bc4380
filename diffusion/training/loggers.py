"""What a run reports while it trains: a progress bar, and all that its writers are given."""

import contextlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffusion.training.errors import RunError
from diffusion.training.writers import MakeWriter, metrics_file


class Loggers:
    """The progress bar and the writers of a run. A context manager.

    A run that resumes from step s drops what it had logged after s: it will log that again, with the same numbers.

    Args:
      workdir: of the run.
      start_step: the step that it begins or resumes from.
      num_steps: the last step.
      writers: beside metrics.jsonl, in which every run has its course.
      config: of the run, which each writer is given.
      active: whether anything is written; only in process 0.

    Raises:
      RunError: a writer cannot begin.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        num_steps: int,
        writers: Sequence[MakeWriter] = (),
        config: Mapping[str, Any] | None = None,
        active: bool = True,
    ):
        self._active = active
        self._workdir = workdir
        with contextlib.ExitStack() as made:
            self._writers = []
            for make in (metrics_file, *writers) if active else ():
                with self._reporting("the metrics cannot be written"):
                    writer = make(workdir, start_step)
                    made.callback(writer.close)
                    self._writers.append(writer)
                    writer.config(config or {})
            self._close = made.pop_all()
        # In a log file each refresh is a line.
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self._bar = tqdm(
            total=num_steps,
            initial=start_step,
            unit="step",
            mininterval=interval,
            disable=not active,
            dynamic_ncols=True,
        )

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        with self._reporting("the metrics cannot be written"):
            self._close.close()

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs named numbers after `step` updates.

        Raises:
          RunError: they cannot be written (the disk is full, the folder is gone).
        """
        with self._reporting(f"step {step}: its metrics cannot be written"):
            for writer in self._writers:
                writer.numbers(step, values)
        self._bar.set_postfix({"loss": f"{values['loss']:.4f}"} if "loss" in values else {}, refresh=False)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Gives a picture, uint8[H, W, C], to the writers.

        Raises:
          RunError: it cannot be written.
        """
        with self._reporting(f"step {step}: its picture cannot be written"):
            for writer in self._writers:
                writer.picture(step, name, image)

    def print_line(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self._active:
            tqdm.write(line, file=sys.stderr)

    @contextlib.contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RunError(f"{what} to {self._workdir}: {error}") from error
