"""Figures of a report: curves of training, terms of the bound, nearest training images, sweeps."""

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from diffusion.data.sheets import save_sheet
from diffusion.files import replacing

WHOLES = ("loss", "error")  # metrics that have parts, NAME_part_...
TITLES = {"grad_norm": "norm of the gradient"}
LARGEST_PART = 2**26  # numbers of training images that samples are compared with at a time
SPEED = ("learning_rate", "images_per_second")  # on even scales


def _figure(panels: int, width: float = 5.0, across: int | None = None) -> tuple[Any, list[Any]]:
    import matplotlib.figure  # 0.4 s that only figures need to spend
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    matplotlib.use("agg")
    across = min(panels, across or panels)
    rows, layout = -(-panels // across), ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    figure = matplotlib.figure.Figure(figsize=(width * across, 4 * rows), layout=layout)
    found = list(np.ravel(figure.subplots(rows, across)))
    for axes in found[panels:]:
        axes.remove()
    return figure, found[:panels]


def _save(figure: Any, path: str | os.PathLike) -> None:
    """Writes a figure as PNG, and beside it as SVG."""
    import matplotlib

    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")
    # Text stays text, and the same figure has the same bytes.
    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "diffusion"}
    with matplotlib.rc_context(style), replacing(Path(path).with_suffix(".svg")) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None})


def draw_curves(metrics: str | os.PathLike, path: str | os.PathLike, others: Sequence[str] = ()) -> None:
    """Draws loss and its parts, the norm of the gradient, learning rate and speed over the steps.

    Args:
      metrics: the metrics.jsonl of a run.
      path: of the picture.
      others: metrics of which each has a panel of its own, on an even scale.
    """
    lines = []
    for line in Path(metrics).read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):  # the last one of a run that was killed
            lines.append(json.loads(line))
    names = sorted({name for line in lines for name in line})
    groups = [[name for name in names if name == whole or name.startswith(f"{whole}_part")] for whole in WHOLES]
    shown = [group for group in (*groups, *([name] for name in ("grad_norm", *others, *SPEED))) if {*group} & {*names}]
    if not shown:
        return
    figure, panels = _figure(len(shown), across=2 if len(shown) in (2, 4) else 3)
    for axes, group in zip(panels, shown, strict=True):
        for name in group:
            points = [(line["step"], line[name]) for line in lines if name in line]
            marker = "." if len(points) < 3 else None
            axes.plot(*zip(*points, strict=True), label=part_name(name), marker=marker, linewidth=1.2)
        even = group[0] in (*others, *SPEED)
        axes.set_yscale("linear" if even else "log")
        if group[0] in SPEED:
            axes.set_ylim(bottom=0)
        if not even:
            plain_ticks(axes)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3, which="both")
        by_noise = any("_of_" in name for name in group)
        title = TITLES.get(group[0], group[0].replace("_", " "))
        title += ": all, and by quarters of training times" if by_noise else " and its parts" if group[1:] else ""
        axes.set_title(title, fontsize=10)
        if group[1:]:
            columns = len(group) if by_noise else 2
            axes.legend(
                loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=columns, frameon=False, fontsize=9,
                columnspacing=1.0, handlelength=1.2,
            )  # fmt: skip
    _save(figure, path)


def part_name(name: str) -> str:
    """Returns what a line of a panel is called: of parts by noise, from least to most."""
    whole, part, rest = name.partition("_part_")
    if not part:
        return "all" if whole in WHOLES else whole.replace("_", " ")
    number, of, count = rest.partition("_of_")
    if not of:
        return rest.replace("_", " ")
    return f"{number} (least noise)" if number == "1" else f"{number} (most)" if number == count else number


def plain_ticks(axes: Any) -> None:
    """Writes the numbers of a logarithmic scale of few powers of ten as they are written elsewhere."""
    least, largest = axes.get_ylim()
    if not 0 < least < largest < 1000 * least:
        return
    written = range(2, 10) if largest < 8 * least else (2, 5)

    def minor(x: float, place: int) -> str:
        return f"{x:g}" if round(x / 10 ** np.floor(np.log10(x) + 1e-9)) in written else ""

    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(minor)
    axes.tick_params(which="both", labelsize=9)


def draw_terms(t: np.ndarray, values: Mapping[str, np.ndarray], path: str | os.PathLike, bins: int = 40) -> None:
    """Draws quantities over the steps of a chain, as means over ranges of log t with their standard errors.

    Args:
      t: steps, from 1.
      values: by name, each of the shape of `t`: as the bound's terms in bits/dim.
      path: of the picture.
      bins: how many ranges.

    Source: Nichol & Dhariwal 2021, figure 2.
    """
    edges = np.unique(np.geomspace(t.min(), t.max() + 1, bins + 1).astype(int))
    inside = np.digitize(t.ravel(), edges) - 1
    count = np.bincount(inside, minlength=len(edges) - 1)
    centre = np.bincount(inside, t.ravel(), len(edges) - 1)
    figure, panels = _figure(len(values))
    for axes, (name, value) in zip(panels, values.items(), strict=True):
        flat = value.ravel().astype(np.float64)
        mean = np.bincount(inside, flat, len(edges) - 1) / np.maximum(count, 1)
        square = np.bincount(inside, (flat - mean[inside]) ** 2, len(edges) - 1)
        error = np.sqrt(square / np.maximum(count - 1, 1) / np.maximum(count, 1))
        below = np.minimum(error, 0.9 * mean)  # a logarithmic scale has no 0
        x, there = centre / np.maximum(count, 1), count > 0
        bars = np.stack([below, error])[:, there]
        axes.errorbar(x[there], mean[there], bars, marker=".", capsize=2, elinewidth=0.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("t, from least to most noise")
        axes.set_title(f"{name}: mean and its standard error", fontsize=10)
        axes.grid(alpha=0.3)
    _save(figure, path)


def nearest(image: np.ndarray, real: np.ndarray, count: int) -> Int[np.ndarray, "N K"]:
    """Returns which of `real` are nearest to each image by the distance of their pixels, the nearest first.

    Args:
      image: uint8[N, H, W, C].
      real: uint8[M, H, W, C].
      count: at most M.
    """

    def numbers(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(array), -1).astype(np.float32)

    queries, parts = numbers(image), []
    rows = max(1, LARGEST_PART // real[0].size)
    for first in range(0, len(real), rows):
        keys = numbers(real[first : first + rows])
        # Every product is a whole number below 2^24: enough digits to rank by.
        parts.append(np.einsum("nd,nd->n", keys, keys) - 2 * queries @ keys.T)
    distance = np.concatenate(parts, axis=1)
    return np.argsort(distance, axis=1, kind="stable")[:, :count]


def draw_nearest(image: np.ndarray, real: np.ndarray, path: str | os.PathLike, rows: int = 10, count: int = 8) -> None:
    """Draws samples, each with the training images nearest to it: a copy would show.

    Args:
      image: uint8[N, H, W, C].
      real: uint8[M, H, W, C], the training images.
      path: of the picture.
      rows: samples that are shown.
      count: training images that are shown of each, at most M.
    """
    shown = image[:rows]
    found = real[nearest(shown, real, count)]
    save_sheet(path, [shown[:, None], found], ["sample", "training images, the nearest first"])


def draw_sweep(
    x: Sequence[float],
    value: Sequence[float],
    path: str | os.PathLike,
    x_label: str,
    y_label: str,
    bars: Sequence[tuple[float, float]] = (),
) -> None:
    """Draws a score over what was varied.

    Args:
      x: what was varied.
      value: the score at each x.
      path: of the picture.
      x_label: what x is.
      y_label: what the score is.
      bars: how far below and above each value it may be; (): not known.
    """
    figure, (axes,) = _figure(1)
    axes.errorbar(x, value, np.transpose(bars) if len(bars) else None, marker="o", capsize=3)
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{number:g}" for number in x])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_title(y_label, fontsize=10)
    axes.grid(alpha=0.3)
    _save(figure, path)
