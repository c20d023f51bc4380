"""Compares two results of one benchmark on one machine; exits with 1 where a figure has become worse.

    python -m benchmarks.compare OLD.json NEW.json
    python -m benchmarks.compare OLD.json NEW.json --noise 0.3

Every figure is printed with its ratio, new / old, and its rounds: the least and the largest of their seconds, by their
median. A figure is worse where the best round of NEW is more than --noise beyond the worst of OLD. Rates, scores and
"ours_over" are better when higher; seconds, bytes, distances and losses when lower; no other figure is judged. Results
of different machines or settings are refused with exit code 2.
"""

import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import make_parser

MACHINE = ("device", "device_count", "processor", "cpu_count")
# What may differ between two results, and holds no figures.
APART = (*MACHINE, "versions", "git", "jax", "date")
HIGHER = re.compile(r"images_per_second|ours_over|real_over_same|satisfied|survived|accuracy|R@\d")
LOWER = re.compile(r"(?<!per_)second|minute|byte|\bMB\b|percent|distance|loss|bits_per_dim")

Place = tuple[str, ...]  # the names that lead to a figure


class Figure(NamedTuple):
    """A measured number.

    Attributes:
      value: the median of its rounds, or the only one.
      least: of its rounds, by the median; 1 where there are none. Of a rate, that of its seconds.
      largest: the same.
    """

    value: float
    least: float = 1.0
    largest: float = 1.0


class Row(NamedTuple):
    """A line of the table: a figure in both results, None where one lacks it."""

    name: str
    old: Figure | None
    new: Figure | None
    verdict: str


class Refused(ValueError):
    """Two results that cannot be compared."""


def figures(tree: Any, place: Place = (), rounds: Any = None) -> Iterator[tuple[Place, Figure]]:
    """Yields the figures of a result with their places; those of a list are named by their texts and whole numbers.

    Args:
      tree: a result, or a part of it.
      place: of it.
      rounds: of the figures of this part by name, in seconds: the nearest "rounds" of the result.
    """
    match tree:
        case bool() | str() | None:
            return
        case int() | float():
            yield place, Figure(float(tree), *spread(place, rounds))
        case dict():
            for name, child in tree.items():
                if name != "rounds" and (place or name not in APART):
                    yield from figures(child, (*place, name), tree.get("rounds", rounds))
        case [dict(), *_]:
            for row in tree:
                label = ", ".join(str(value) for value in row.values() if isinstance(value, str | int) and value != "")
                numbers = {name: value for name, value in row.items() if not isinstance(value, int)}
                yield from figures(numbers, (*place, label), rounds)


def spread(place: Place, rounds: Any) -> tuple[float, float]:
    """Returns the least and the largest of a figure's rounds, by their median: (1, 1) where there are none."""
    seconds = (rounds or {}).get(place[-1])
    if seconds and place[-2:-1] == ("ours_over",):
        seconds = [ours / peer for ours, peer in zip(rounds["ours"], seconds, strict=True)]
    if not seconds or not (median := statistics.median(seconds)) > 0:
        return 1.0, 1.0
    return min(seconds) / median, max(seconds) / median


def judge(place: Place, old: Figure, new: Figure, noise: float) -> str:
    """Returns "worse", "better", or "" for a change within the noise; "differs" or "-" where neither is better."""
    units = [name for name in reversed(place) if HIGHER.search(name) or LOWER.search(name)]
    if not units or min(old.value, new.value) < 0:
        return "-" if new.value == old.value else "differs"
    if not math.isfinite(new.value):
        return "worse"
    rate = HIGHER.search(units[0]) is not None
    before, after = (cost(figure.value, rate) for figure in (old, new))
    if after * new.least > before * old.largest * (1 + noise):
        return "worse"
    return "better" if after * new.largest * (1 + noise) < before * old.least else ""


def cost(value: float, rate: bool) -> float:
    """Returns what is less when better: the value, or of a rate its inverse."""
    return value if not rate else 1 / value if value else math.inf


def compare(old: Mapping[str, Any], new: Mapping[str, Any], noise: float = 0.1) -> list[Row]:
    """Returns a row for each figure of two results.

    Args:
      old: a result.
      new: another of the same benchmark.
      noise: how much worse, beyond the rounds of both, is worse.

    Raises:
      Refused: they are of different machines, or of different settings.
    """
    check_comparable(old, new)
    before, after = dict(figures(old)), dict(figures(new))
    rows = []
    for place in before | after:
        one, other = before.get(place), after.get(place)
        verdict = judge(place, one, other, noise) if one and other else "only in OLD" if one else "only in NEW"
        rows.append(Row(" / ".join(place), one, other, verdict))
    return rows


def check_comparable(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raises Refused where two results are of different machines or settings: their texts and whole numbers."""
    if missing := [name for name, one in (("OLD", old), ("NEW", new)) if "device" not in one]:
        raise Refused(f"{' and '.join(missing)} does not name its device: only results of one machine can be compared")
    for what, names in (("machines", MACHINE), ("settings", [name for name in old if name not in APART])):
        for name in names:
            one, other = old.get(name), new.get(name)
            if isinstance(one, str | int) and isinstance(other, str | int) and one != other and not is_figure(name):
                raise Refused(f"the results are of different {what}: {name} is {one!r} in OLD and {other!r} in NEW")


def is_figure(name: str) -> bool:
    """Returns whether a number of this name was measured."""
    return bool(HIGHER.search(name) or LOWER.search(name))


def table(rows: list[Row]) -> str:
    """Returns the rows as an aligned table."""
    cells: list[tuple[str, ...]] = [("figure", "old", "new", "new/old", "rounds of old", "rounds of new", "verdict")]
    for name, old, new, verdict in rows:
        ratio = f"{new.value / old.value:.3f}" if old and new and old.value else "-"
        values = [f"{one.value:.5g}" if one else "-" for one in (old, new)]
        spreads = [text_of_spread(one) for one in (old, new)]
        cells.append((name, *values, ratio, *spreads, verdict))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *middle, last in cells:
        padded = [cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded, last]).rstrip())
    return "\n".join(lines)


def text_of_spread(figure: Figure | None) -> str:
    """Returns the least and the largest round by their median, "-" where there are none."""
    return f"{figure.least:.2f}..{figure.largest:.2f}" if figure and figure.least < figure.largest else "-"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    parser.add_argument("--noise", type=float, default=0.1, help="0.1: 10%% beyond the rounds is worse")
    arguments = parser.parse_args()
    try:
        old, new = (json.loads(path.read_text()) for path in (arguments.old, arguments.new))
        rows = compare(old, new, arguments.noise)
    except (Refused, OSError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(table(rows))
    worse = [row.name for row in rows if row.verdict == "worse"]
    if worse:
        print(f"{len(worse)} of {len(rows)} figures are worse by more than {arguments.noise:.0%}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
