"""What a run reports while it trains: a progress bar, metrics.jsonl and TensorBoard scalars."""

import json
import os
import sys
import time
from pathlib import Path

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tqdm import tqdm

from diffusion.files import replacing
from diffusion.training.errors import RunError


class Loggers:
    """The progress bar and the files of a run. A context manager.

    A run that resumes from step s drops what it had logged after s: it will log that again, with the same numbers.

    Args:
      workdir: of the run.
      start_step: the step that it begins or resumes from.
      num_steps: the last step.
      active: whether anything is written; only in process 0.
    """

    def __init__(self, workdir: Path, *, start_step: int, num_steps: int, active: bool = True):
        self._active = active
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
        if active:
            self._path = workdir / "metrics.jsonl"
            _drop_lines_after(self._path, start_step)
            self._file = self._path.open("a")
            self._board = _open_board(workdir / "tensorboard", start_step)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self._active:
            try:
                self._file.close()
                self._board.close()
            except OSError as error:
                raise RunError(f"the metrics cannot be written to {self._path.parent}: {error}") from error

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs named numbers after `step` updates.

        Raises:
          RunError: they cannot be written (the disk is full, the folder is gone).
        """
        if not self._active:
            return
        try:
            self._file.write(json.dumps({"step": step, **values}) + "\n")
            self._file.flush()
            for name, value in values.items():
                event = Event(wall_time=time.time(), step=step, summary=summary.scalar(name, value))
                self._board.write_event(event)
        except OSError as error:
            raise RunError(f"step {step}: its metrics cannot be written to {self._path.parent}: {error}") from error
        self._bar.set_postfix({"loss": f"{values['loss']:.4f}"} if "loss" in values else {}, refresh=False)

    def print_line(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self._active:
            tqdm.write(line, file=sys.stderr)


def _open_board(folder: Path, start_step: int) -> EventsWriter:
    """Opens a TensorBoard file that supersedes what earlier ones hold of the steps after `start_step`.

    Not `SummaryWriter`: it writes in a thread, and if that fails the run would wait for it forever.
    """
    folder.mkdir(parents=True, exist_ok=True)
    board = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}")
    board.write_event(
        Event(wall_time=time.time(), step=start_step + 1, session_log=SessionLog(status=SessionLog.START))
    )
    return board


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        # A line truncated by a kill is not JSON: it was logged after the last checkpoint.
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:
            break
        kept.append(line)
    with replacing(path) as temporary:
        temporary.write_text("".join(kept))
