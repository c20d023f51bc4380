"""What a sweep's points have come to: table.md, results.json and sweep.png."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.evaluation.run_figures import Scores, draw_runs
from diffusion.files import replacing
from diffusion.runs.records import LAST, Record, common, read_record, table

DONE = "sweep_point.json"  # in a point's folder: the arguments it was trained with, its seconds, or why it failed
SHOWN = 4  # numbers of a run in table.md; results.json has all


class Point(NamedTuple):
    """One run of a sweep.

    Attributes:
      settings: value by the name that tells it apart, as {"learning_rate": "1e-4"}.
      folder: of the run.
      arguments: of its command.
    """

    settings: dict[str, str]
    folder: Path
    arguments: list[str]

    @property
    def name(self) -> str:
        """By which it is shown."""
        return ", ".join(f"{field} {value}" for field, value in self.settings.items())


def done(point: Point) -> dict[str, Any]:
    """Returns what is noted of a point that was trained or failed, {} before."""
    path = point.folder / DONE
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(folder: Path, experiment: str, points: Sequence[Point]) -> None:
    """Writes table.md, results.json and sweep.png over the points, as far as they are."""
    records = [read_record(point.folder, point.name) for point in points]
    notes = [done(point) for point in points]
    status = [f"failed: {note['error']}" if "error" in note else "finished" if note else "to come" for note in notes]
    content = [
        {
            "settings": point.settings,
            "folder": str(point.folder),
            "status": how,
            "seconds": note.get("seconds"),
            "numbers": record.numbers,
        }
        for point, note, how, record in zip(points, notes, status, records, strict=True)
    ]
    shown = common(records)[:SHOWN]
    heads = [*points[0].settings, *shown, "minutes", "status"]
    rows = [
        [
            *point.settings.values(),
            *(record.numbers.get(name, "-") for name in shown),
            f"{note['seconds'] / 60:.1f}" if note else "-",
            how,
        ]
        for point, note, how, record in zip(points, notes, status, records, strict=True)
    ]
    lines = [f"# Sweep of {experiment}", "", table(heads, rows), "", "![courses and scores](sweep.png)"]
    with replacing(folder / "results.json") as temporary:
        temporary.write_text(json.dumps({"experiment": experiment, "points": content}, indent=2) + "\n")
    with replacing(folder / "table.md") as temporary:
        temporary.write_text("\n".join(lines) + "\n")
    courses = {record.name.replace("_", " "): record.course for record in records}
    draw_runs(folder / "sweep.png", courses, ["loss"], scores_of(points, records))


def scores_of(points: Sequence[Point], records: Sequence[Record]) -> Scores | None:
    """Returns the panel of a score over the first setting that has several values, a line for each of the others.

    The score is the first of the report, where each run that was trained has it, else the last loss.
    """
    trained = [(point, record) for point, record in zip(points, records, strict=True) if record.course]
    if not trained:
        return None
    score = next((name for name in common(records) if name != LAST), LAST)
    if not all(score in record.numbers for _, record in trained):
        score = LAST
    first = points[0].settings
    x_name = next((name for name in first if len({point.settings[name] for point in points}) > 1), next(iter(first)))
    lines: dict[str, list[tuple[float | str, float]]] = {}
    numeric = all(is_number(point.settings[x_name]) for point in points)
    for point, record in trained:
        others = ", ".join(
            f"{name.replace('_', ' ')} {value}" for name, value in point.settings.items() if name != x_name
        )
        x = point.settings[x_name]
        if score in record.numbers:
            lines.setdefault(others, []).append((float(x) if numeric else x, record.numbers[score]))
    ordered = {name: sorted(line) if numeric else line for name, line in lines.items()}
    return Scores(x_name.replace("_", " "), score, ordered) if ordered else None


def is_number(text: str) -> bool:
    """Returns whether a value is a finite number."""
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
