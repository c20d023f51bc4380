"""Text to image on the scenes over the time of training: what runs have learned at each checkpoint they kept.

    ./launch.sh scenes
    ./launch.sh scenes --config=scenes:unet
    python -m benchmarks.scenes runs/scenes runs/scenes_unet

Prompts in combinations that training never shows are drawn and read back. Minutes are those spent in steps. Writes
benchmarks/results/scenes.json, with the report of each run, and scenes_curve.png beside it.
"""

import json
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np

import diffusion
from benchmarks.common import make_parser, write_results
from diffusion.evaluation import composition
from diffusion.files import replacing
from diffusion.model.config import plain
from diffusion.runs.run import Run
from diffusion.training.checkpoints import steps_in
from experiments import scenes


def losses(folder: Path, batch_size: int) -> list[dict[str, float]]:
    """Returns step, minutes spent in steps, and loss, at each line of a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = np.diff([line["step"] for line in lines], prepend=0)
    minutes = np.cumsum([n * batch_size / line["images_per_second"] / 60 for n, line in zip(steps, lines, strict=True)])
    return [
        {"step": line["step"], "minutes": round(spent, 2), "loss": round(line["loss"], 4)}
        for line, spent in zip(lines, minutes.tolist(), strict=True)
    ]


def satisfied(run: Run, count: int, judge: scenes.Read) -> dict[str, float]:
    """Returns the shares of `count` never-seen prompts that a run's pictures wholly satisfy, by kind."""
    wanted = scenes.prompts_of(run, "held_out", count)
    images = run.sample(prompts=[one.caption for one in wanted], seed=0)
    shares = composition.by_kind(wanted, judge(wanted, images))
    return {name: round(share, 3) for name, share in shares.items()}


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Returns a run's network, its report, and loss and satisfied prompts by minutes of training."""
    runs = {step: diffusion.open_run(folder, step=step) for step in sorted(steps_in(folder / "checkpoints"))}
    first = next(iter(runs.values()))
    curve = losses(folder, first.config.data.batch_size)
    minutes = {int(line["step"]): line["minutes"] for line in curve}
    judge = scenes.make_judge(first)
    points = []
    for step, run in runs.items():
        points.append({"step": step, "minutes": minutes[step], **satisfied(run, count, judge)})
        print(folder, json.dumps(points[-1]), flush=True)
    report = json.loads((folder / "report.json").read_text())
    return {
        "network": plain(first.config)["network"],
        "report": [
            {key: one[key] for key in ("name", "value", "num_samples", "note")} for one in report["measurements"]
        ],
        "loss": curve,
        "satisfied": points,
    }


def draw(results: dict[str, Any], count: int, path: Path) -> None:
    """Draws the losses and the shares of every run over the minutes."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for folder, run in results.items():
        name = f"{folder} ({run['network']['name']})"
        left.plot([p["minutes"] for p in run["loss"]], [p["loss"] for p in run["loss"]], label=name)
        right.plot(
            [p["minutes"] for p in run["satisfied"]], [p["all"] for p in run["satisfied"]], marker="o", label=name
        )
    left.set_ylabel("loss")
    left.set_yscale("log")
    right.set_ylabel(f"of {count} never-seen prompts wholly satisfied")
    right.set_ylim(0, 1)
    for axes in (left, right):
        axes.set_xlabel("minutes of training")
        axes.grid(alpha=0.3, which="both")
        axes.legend(frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=80)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="work folders")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scenes.json"))
    arguments = parser.parse_args()
    results = {folder.name: measure(folder, arguments.prompts) for folder in arguments.runs}
    draw(results, arguments.prompts, arguments.out.with_name(f"{arguments.out.stem}_curve.png"))
    write_results(arguments.out, {"prompts": arguments.prompts, **results})


if __name__ == "__main__":
    main()
