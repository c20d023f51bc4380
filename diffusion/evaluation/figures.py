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


def _figure(panels: int, width: float = 5.0) -> tuple[Any, list[Any]]:
    import matplotlib.figure  # 0.4 s that only figures need to spend

    matplotlib.use("agg")
    figure = matplotlib.figure.Figure(figsize=(width * panels, 4), layout="constrained")
    return figure, list(np.atleast_1d(figure.subplots(1, panels)))


def _save(figure: Any, path: str | os.PathLike) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)


def draw_curves(metrics: str | os.PathLike, path: str | os.PathLike, others: Sequence[str] = ()) -> None:
    """Draws loss, its parts and the norm of the gradient over the steps.

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
    losses = [name for name in names if name == "loss" or name.startswith("loss_part")]
    figure, panels = _figure(2 + len(others))
    for axes, shown in zip(panels, (losses, ["grad_norm"], *([name] for name in others)), strict=True):
        for name in shown:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) < 2 else None)
        axes.set_yscale("linear" if shown and shown[0] in others else "log")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_lines():  # an imported run has no metrics
            axes.legend(frameon=False)
    _save(figure, path)


def draw_terms(t: np.ndarray, values: Mapping[str, np.ndarray], path: str | os.PathLike, bins: int = 40) -> None:
    """Draws quantities over the steps of a chain, as means over ranges of log t.

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
        total = np.bincount(inside, value.ravel().astype(np.float64), len(edges) - 1)
        axes.plot((centre / np.maximum(count, 1))[count > 0], (total / np.maximum(count, 1))[count > 0], marker=".")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("t")
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    _save(figure, path)


def nearest(image: np.ndarray, real: np.ndarray, count: int) -> Int[np.ndarray, "N K"]:
    """Returns which of `real` are nearest to each image by the distance of their pixels, the nearest first.

    Args:
      image: uint8[N, H, W, C].
      real: uint8[M, H, W, C].
      count: at most M.
    """
    queries, keys = (array.reshape(len(array), -1).astype(np.float32) for array in (image, real))
    squares = np.einsum("nd,nd->n", keys, keys)
    distance = squares - 2 * queries @ keys.T  # every product is a whole number below 2^24: enough digits to rank by
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


def draw_sweep(x: Sequence[float], value: Sequence[float], path: str | os.PathLike, x_label: str, y_label: str) -> None:
    """Draws a score over what was varied.

    Args:
      x: what was varied.
      value: the score at each x.
      path: of the picture.
      x_label: what x is.
      y_label: what the score is.
    """
    figure, (axes,) = _figure(1)
    axes.plot(x, value, marker="o")
    axes.set_xscale("log")
    axes.set_xticks(x, [f"{number:g}" for number in x])
    axes.minorticks_off()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    _save(figure, path)
