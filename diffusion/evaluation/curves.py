"""The course of a run as a picture."""

import json
import os
from pathlib import Path

import matplotlib
import matplotlib.figure

from diffusion.files import replacing


def draw_curves(metrics: str | os.PathLike, path: str | os.PathLike) -> None:
    """Draws the loss, whole and by part of the process, and the gradient's norm of a metrics.jsonl over the steps."""
    lines = [json.loads(line) for line in Path(metrics).read_text().splitlines()]
    names = sorted({name for line in lines for name in line})
    losses = [name for name in names if name == "loss" or name.startswith("loss_part")]

    matplotlib.use("agg")
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, shown in ((left, losses), (right, ["grad_norm"])):
        for name in shown:
            points = [(line["step"], line[name]) for line in lines if name in line]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), marker="." if len(points) < 2 else None)
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100)
