"""One figure over several runs: the courses of their training, and a score over what was varied."""

import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion.evaluation.figures import _figure, _save, plain_ticks

LOG = ("loss", "grad_norm")  # metrics on a logarithmic scale
FEW = 10  # runs that differ by colours of their own; of more, the first and the last are the ends of a range of colours


class Scores(NamedTuple):
    """A panel of scores over what was varied.

    Attributes:
      x_label: what was varied.
      y_label: what the score is.
      lines: points (x, score) by name, "" for a single line. Where an x is no number all are places side by side.
    """

    x_label: str
    y_label: str
    lines: Mapping[str, Sequence[tuple[float | str, float]]]


def draw_runs(
    path: str | os.PathLike,
    courses: Mapping[str, Sequence[Mapping[str, float]]],
    metrics: Sequence[str] = ("loss",),
    scores: Scores | None = None,
) -> None:
    """Draws metrics over the steps, a panel each with a line per run, and beside them a score; names stand below.

    Args:
      path: of the picture.
      courses: by the name of the run, {"step": s, metric: value} each time.
      metrics: those that are drawn.
      scores: the panel at the right.
    """
    figure, panels = _figure(len(metrics) + (scores is not None))
    for axes, metric in zip(panels, metrics, strict=False):
        for number, course in enumerate(courses.values()):
            points = [(line["step"], line[metric]) for line in course if metric in line]
            if points:
                marker = "." if len(points) < 3 else None
                axes.plot(*zip(*points, strict=True), color=colour(number, len(courses)), marker=marker, linewidth=1.2)
        if metric in LOG:
            axes.set_yscale("log")
            plain_ticks(axes)
        axes.set_xlabel("step")
        axes.set_title(metric.replace("_", " "), fontsize=10)
        axes.grid(alpha=0.3, which="both")
    if scores is not None:
        draw_scores(panels[-1], scores)
    # On empty lines, so that a run without a course has its name too; they are not in the way of the curves.
    lines = [panels[0].plot([], [], color=colour(i, len(courses)), label=name)[0] for i, name in enumerate(courses)]
    columns = max(1, int(len(panels) * 60 / (8 + max(map(len, courses)))))
    figure.set_figheight(4 + 0.22 * -(-len(courses) // columns))
    figure.legend(
        handles=lines, loc="outside lower center", ncols=min(columns, len(courses)), frameon=False, fontsize=9
    )
    _save(figure, path)


def draw_scores(axes: Any, scores: Scores) -> None:
    """Draws a panel of `Scores`."""
    every: list[Any] = [x for points in scores.lines.values() for x, _ in points]
    numeric = all(isinstance(x, int | float) for x in every)
    places = sorted(set(every)) if numeric else list(dict.fromkeys(every))
    for name, points in scores.lines.items():
        xs = [x if numeric else places.index(x) for x, _ in points]
        axes.plot(xs, [y for _, y in points], marker="o", label=name)
    if numeric:
        if min(places) > 0 and max(places) >= 5 * min(places):
            axes.set_xscale("log")
        axes.set_xticks(places, [f"{x:g}" for x in places])
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(places)), places)
    axes.set_xlabel(scores.x_label)
    axes.set_title(scores.y_label, fontsize=10)
    axes.grid(alpha=0.3)
    if any(scores.lines):
        axes.legend(frameon=False, fontsize=8)


def colour(number: int, count: int) -> tuple[float, ...]:
    """Returns the colour of a run among so many."""
    import matplotlib

    if count <= FEW:
        return matplotlib.colormaps["tab10"](number)
    return matplotlib.colormaps["viridis"](float(np.linspace(0, 0.95, count)[number]))
