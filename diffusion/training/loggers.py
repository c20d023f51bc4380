"""What a run says while it goes: a progress bar, metrics.jsonl and TensorBoard scalars."""

import json
import sys
from pathlib import Path

from tensorboardX import SummaryWriter
from tqdm import tqdm

from diffusion.files import replacing


class Loggers:
    """Writes from process 0 alone. A context manager.

    A run that goes on from step s drops what it had logged after s: that will be logged again, with the same numbers.
    """

    def __init__(self, workdir: Path, *, start_step: int, num_steps: int, active: bool = True):
        self._active = active
        # One line a refresh is too much for a log file.
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
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def __enter__(self) -> "Loggers":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        if self._active:
            self._file.close()
            self._board.close()

    def advance(self) -> None:
        """Moves the progress bar by a step."""
        self._bar.update()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Logs named numbers after `step` updates."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)
        self._bar.set_postfix({"loss": f"{values['loss']:.4f}"} if "loss" in values else {}, refresh=False)

    def say(self, line: str) -> None:
        """Prints a line above the progress bar."""
        if self._active:
            tqdm.write(line, file=sys.stderr)


def _drop_lines_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        # A line cut short by a kill is not JSON: it and what follows was logged after the last checkpoint.
        try:
            if json.loads(line)["step"] > step:
                break
        except json.JSONDecodeError:
            break
        kept.append(line)
    with replacing(path) as temporary:
        temporary.write_text("".join(kept))
