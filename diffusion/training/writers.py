"""Where a run's numbers, pictures and config go as it trains: metrics.jsonl, TensorBoard, Weights & Biases, any other.

A writer is four functions; a new one is a function that returns them, and is passed to the trainer:

    def mine(workdir, start_step):
        return Writer(numbers=lambda step, values: print(step, values["loss"]))

    diffusion.train(config, source, "runs/mine", writers=[tensorboard, mine])
"""

import importlib
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]

from diffusion.extras import need
from diffusion.files import replacing
from diffusion.training.errors import RunError


def ignore(*arguments: Any) -> None:
    """Does nothing."""


class Writer(NamedTuple):
    """What a run reports, in one place. An OSError of any of these stops the run with a line that has the reason.

    Attributes:
      numbers: (step, {name: value}): the metrics after so many updates; of an evaluation "evaluation/NAME".
      picture: (step, name, uint8[H, W, C]): previews.
      config: (plain JSON): what the run is, once, before all else.
      close: () -> None: nothing more comes.
    """

    numbers: Callable[[int, Mapping[str, float]], None] = ignore
    picture: Callable[[int, str, np.ndarray], None] = ignore
    config: Callable[[Mapping[str, Any]], None] = ignore
    close: Callable[[], None] = ignore


# (work folder, step) -> Writer. What was written of later steps is superseded; of no step where it is None, as when a
# run that is trained is evaluated. Called in process 0 alone, when the first step is about to be made.
MakeWriter = Callable[[Path, int | None], Writer]


def metrics_file(workdir: Path, start_step: int | None) -> Writer:
    """Returns the writer of metrics.jsonl, a line {"step": s, "loss": ...} each time."""
    path = workdir / "metrics.jsonl"
    if start_step is not None:
        drop_lines_after(path, start_step)
    file = path.open("a")

    def numbers(step: int, values: Mapping[str, float]) -> None:
        file.write(json.dumps({"step": step, **values}) + "\n")
        file.flush()

    return Writer(numbers, close=file.close)


def tensorboard(workdir: Path, start_step: int | None) -> Writer:
    """Returns the writer of a TensorBoard file in tensorboard/.

    Not `SummaryWriter`: it writes in a thread, and if that fails the run would wait for it forever.
    """
    folder = workdir / "tensorboard"
    folder.mkdir(parents=True, exist_ok=True)
    # Files are named by the second: two that a process begins in one would be the same file.
    board = EventsWriter(str(folder / "events"), filename_suffix=f".{os.getpid()}.{time.monotonic_ns()}")

    def write(step: int, **what: Any) -> None:
        board.write_event(Event(wall_time=time.time(), step=step, **what))

    def numbers(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            write(step, summary=summary.scalar(name, value))

    def picture(step: int, name: str, image: np.ndarray) -> None:
        write(step, summary=summary.image(name, image, dataformats="HWC"))

    def config(plain: Mapping[str, Any]) -> None:
        lines = json.dumps(plain, indent=2).splitlines()
        write(start_step or 0, summary=summary.text("config", "\n".join(f"    {line}" for line in lines)))  # as code

    if start_step is not None:
        write(start_step + 1, session_log=SessionLog(status=SessionLog.START))  # TensorBoard drops what is later

    def close() -> None:
        board.close()

    return Writer(numbers, picture, config, close)


def wandb(workdir: Path, start_step: int | None, **settings: Any) -> Writer:
    """Returns the writer of a run of Weights & Biases, which a resumed run continues.

    Args:
      workdir: of the run; wandb's files are in its wandb/.
      start_step: where given, what it had of later steps is written again.
      **settings: of `wandb.init`, as project="digits"; by functools.partial.

    Raises:
      RunError: it is not installed.
    """
    check_wandb()
    module = importlib.import_module("wandb")
    known = workdir / "wandb" / "run_id"
    if not known.exists():
        with replacing(known) as temporary:
            temporary.write_text(uuid.uuid4().hex[:12])
    given = {"project": "diffusion", "name": workdir.name, **settings}
    run = module.init(id=known.read_text(), resume="allow", dir=str(workdir), **given)
    run.define_metric("*", step_metric="step")  # its own count never goes back, as a resumed run's may

    def numbers(step: int, values: Mapping[str, float]) -> None:
        run.log({"step": step, **values})

    def picture(step: int, name: str, image: np.ndarray) -> None:
        run.log({"step": step, name: module.Image(image)})

    def config(plain: Mapping[str, Any]) -> None:
        run.config.update(dict(plain), allow_val_change=True)

    return Writer(numbers, picture, config, run.finish)


def check_wandb() -> None:
    """Raises RunError where Weights & Biases is not installed."""
    try:
        need("wandb")
    except ImportError as error:
        raise RunError(f"writer wandb: {error}") from error


WRITERS: dict[str, MakeWriter] = {"tensorboard": tensorboard, "wandb": wandb}
DEFAULT = ("tensorboard",)


def named(names: Sequence[str]) -> list[MakeWriter]:
    """Returns the writers of these names.

    Raises:
      RunError: an unknown name, or one that is not installed.
    """
    if unknown := [name for name in names if name not in WRITERS]:
        raise RunError(f"unknown writer {unknown[0]!r}: choose from {', '.join(WRITERS)}")
    if "wandb" in names:
        check_wandb()
    return [WRITERS[name] for name in names]


def drop_lines_after(path: Path, step: int) -> None:
    """Drops the lines of metrics.jsonl that are of later steps than this one."""
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
