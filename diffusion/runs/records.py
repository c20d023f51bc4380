"""What is left of a run in its folder, for tables and figures over several: the course of its training, its scores."""

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

Course = list[dict[str, float]]  # lines of metrics.jsonl
LAST = "loss (mean of the last tenth)"


class Record(NamedTuple):
    """A run as it is compared with others.

    Attributes:
      name: by which it is shown.
      course: of its training, [] where there was none.
      scores: of its report, by name; {} where there is none.
    """

    name: str
    course: Course
    scores: dict[str, float]

    @property
    def numbers(self) -> dict[str, float]:
        """Its last loss, where there is one, and its scores."""
        return {**last_loss(self.course), **self.scores}


def read_record(folder: Path, name: str) -> Record:
    """Returns the record of the run in a folder; an empty one of a run that has not begun."""
    return Record(name, read_course(folder / "metrics.jsonl"), read_scores(folder / "report.json"))


def read_course(path: Path) -> Course:
    """Returns the lines of a metrics.jsonl, [] where there is none."""
    course = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):  # the last one of a run that was killed
            course.append(json.loads(line))
    return course


def read_scores(path: Path) -> dict[str, float]:
    """Returns the numbers of a report.json, {} where there is none: those of one measurement as "NAME, PART"."""
    found: dict[str, float] = {}
    for one in json.loads(path.read_text())["measurements"] if path.exists() else ():
        parts = one["value"] if isinstance(one["value"], dict) else {"": one["value"]}
        found |= {f"{one['name']}, {part}" if part else one["name"]: value for part, value in parts.items()}
    return found


def last_loss(course: Course) -> dict[str, float]:
    """Returns the mean loss of the last tenth of the steps, {} where there is none."""
    lines = [line for line in course if "loss" in line]
    if not lines:
        return {}
    since = 0.9 * lines[-1]["step"]
    return {LAST: float(np.mean([line["loss"] for line in lines if line["step"] > since]))}


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a table in Markdown, its columns aligned; numbers have five digits."""
    cells = [
        [f"{cell:.5g}" if isinstance(cell, float) else str(cell).replace("|", "\\|") for cell in row] for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = [heads, ["-" * width for width in widths], *cells]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )


def common(records: Sequence[Record]) -> list[str]:
    """Returns the names of numbers that any of the runs has, in their order."""
    names: Mapping[str, None] = dict.fromkeys(name for record in records for name in record.numbers)
    return list(names)
