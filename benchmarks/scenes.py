"""Text to image on the scenes over the time of training: what runs have learned at each checkpoint they kept.

    ./launch.sh scenes
    ./launch.sh scenes --config=experiments/configs/scenes_unet.py
    python -m benchmarks.scenes runs/scenes runs/scenes_unet

Prompts in combinations that training never shows are drawn and read back. Minutes are those spent in steps. Writes
benchmarks/results/scenes.json, with the report of each run, and scenes_curve.png beside it.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import jax
import matplotlib.figure
import numpy as np
from absl import flags

from diffusion.data.scenes import scene
from diffusion.evaluation import composition
from diffusion.files import replacing
from diffusion.training.checkpoints import steps_in
from experiments import command_line, scenes, text_modes
from experiments.command_line import Run, plain


def open_run(folder: Path, step: int) -> Run:
    """Returns the run of a work folder as after `step` steps."""
    values = flags.FlagValues()
    text_modes.define_flags(values)
    arguments = ["scenes", f"--workdir={folder}", "--mode=evaluate", f"--checkpoint={step}"]
    modes: Any = {"evaluate": None, "train": None}
    return command_line.parse(arguments, Path(scenes.__file__), "", "scenes_mmdit.py", modes, values)[0]


def losses(folder: Path, batch_size: int) -> list[dict[str, float]]:
    """Returns step, minutes spent in steps, and loss, at each line of a run's metrics."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = np.diff([line["step"] for line in lines], prepend=0)
    minutes = np.cumsum([n * batch_size / line["images_per_second"] / 60 for n, line in zip(steps, lines, strict=True)])
    return [
        {"step": line["step"], "minutes": round(spent, 2), "loss": round(line["loss"], 4)}
        for line, spent in zip(lines, minutes.tolist(), strict=True)
    ]


def satisfied(run: Run, count: int, read: composition.Reader) -> dict[str, float]:
    """Returns the shares of `count` never-seen prompts that a run's pictures wholly satisfy, by kind."""
    parts, canvas = scenes.make_parts(run), run.config.data.canvas
    trained = text_modes.load(run, parts, scenes.a_batch(run))
    wanted = [scene(scenes.SEED, "held_out", i, canvas) for i in range(count)]
    images = text_modes.generate(run, parts, trained, [one.caption for one in wanted], np.arange(count))
    shares = composition.by_kind(wanted, composition.wholly(wanted, images, read))
    return {name: round(share, 3) for name, share in shares.items()}


def measure(folder: Path, count: int) -> dict[str, Any]:
    """Returns a run's network, its report, and loss and satisfied prompts by minutes of training."""
    runs = {step: open_run(folder, step) for step in sorted(steps_in(folder / "checkpoints"))}
    config = next(iter(runs.values())).config
    curve = losses(folder, config.data.batch_size)
    minutes = {int(line["step"]): line["minutes"] for line in curve}
    read = composition.fit_reader(config.data.canvas)
    points = []
    for step, run in runs.items():
        points.append({"step": step, "minutes": minutes[step], **satisfied(run, count, read)})
        print(folder, json.dumps(points[-1]), flush=True)
    report = json.loads((folder / "report.json").read_text())
    return {
        "network": plain(config)["network"],
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="work folders")
    parser.add_argument("--prompts", type=int, default=120)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scenes.json"))
    arguments = parser.parse_args()
    results = {folder.name: measure(folder, arguments.prompts) for folder in arguments.runs}
    draw(results, arguments.prompts, arguments.out.with_name(f"{arguments.out.stem}_curve.png"))
    content = {
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "prompts": arguments.prompts,
        **results,
    }
    with replacing(arguments.out) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
