"""Quality against network evaluations and against the cost of training: few-step models beside their flow teacher.

    python -m benchmarks.few_step digits flow=runs/digits_flow mean_flow=runs/mean_flow progressive=runs/pd_2,runs/pd_4
    python -m benchmarks.few_step scenes flow=runs/scenes imitation=runs/scenes_imitation

The first is the teacher, which is also drawn in --teacher_steps steps. A distilled model is drawn in the numbers of
steps that it was distilled for; where each has a run of its own, all are named. Digits: Fréchet
distance in pixels of --num_samples samples to the training images. Scenes: share of prompts, in combinations that
training never shows, that pictures wholly satisfy.
Writes benchmarks/results/few_step_NAME.json, and a figure beside it.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure

import diffusion
from benchmarks.common import make_parser, write_results
from benchmarks.samplers import distance_to
from benchmarks.scenes import losses, satisfied
from diffusion.data.sources import digits
from diffusion.files import replacing
from diffusion.model.config import plain
from diffusion.runs.run import Run
from experiments import scenes

STEPS = (1, 2, 4, 8)

Quality = Callable[[Run], float]


def counts_of(run: Run, counts: Sequence[int]) -> list[int]:
    """Returns the numbers of steps that a run is drawn in: `counts`, or those that it was distilled for."""
    trained = run.config.loss.get("num_steps", tuple(counts))
    return list(trained) if isinstance(trained, tuple) else [trained]


def measure(runs: Sequence[Run], counts: Sequence[int], quality: Quality) -> list[dict[str, Any]]:
    """Returns the quality of each run at its numbers of steps: one evaluation each, or two with guidance."""
    rows = []
    for run in runs:
        calls = 1 if run.config.sampling.guidance == 1.0 else 2
        for count in counts_of(run, counts):
            value = quality(run.change({"sampling.num_steps": count}))
            rows.append({"steps": count, "evaluations": calls * count, "quality": value})
            print(f"{run.workdir.name:32} {count:5} {value:8.4f}", flush=True)
    return rows


def about(runs: Sequence[Run]) -> dict[str, Any]:
    """Returns how the runs of a method were made: steps, minutes spent in them, loss, sampler and parameters."""
    curves = [losses(run.workdir, run.config.data.batch_size) for run in runs]
    config = plain(runs[0].config)
    return {
        "steps": [run.step for run in runs],
        "minutes": [curve[-1]["minutes"] for curve in curves],
        "loss": {name: Path(value).name if name == "teacher" else value for name, value in config["loss"].items()},
        "sampler": config["sampling"]["sampler"],
        "guidance": config["sampling"]["guidance"],
        "weights": [run.digest for run in runs],
        "begun": [run.stored.get("begun") for run in runs],
    }


def table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the methods as Markdown: a line for each, evaluations across, minutes of training last."""
    counts = sorted({row["evaluations"] for method in methods.values() for row in method["rows"]})
    lines = ["| method | " + " | ".join(map(str, counts)) + " | minutes |", "|---" * (len(counts) + 2) + "|"]
    for name, method in methods.items():
        of = {row["evaluations"]: f"{row['quality']:.3f}" for row in method["rows"]}
        minutes = ", ".join(f"{value:.1f}" for value in method["minutes"])
        lines.append(f"| {name} | " + " | ".join(of.get(count, "") for count in counts) + f" | {minutes} |")
    return "\n".join(lines)


def draw(methods: Mapping[str, Mapping[str, Any]], label: str, path: Path, log: bool) -> None:
    """Draws quality over evaluations, and over the minutes of training, the teacher's best as a line."""
    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    by_count, by_cost = figure.subplots(1, 2, sharey=True)
    teacher = next(iter(methods.values()))
    for number, (name, method) in enumerate(methods.items()):
        rows = sorted(method["rows"], key=lambda row: row["evaluations"])
        counts, values = ([row[field] for row in rows] for field in ("evaluations", "quality"))
        by_count.plot(counts, values, marker="o", label=name, color=f"C{number}")
        # A method with one run for each number of evaluations has a cost for each.
        costs = method["minutes"] if len(method["minutes"]) == len(rows) > 1 else [sum(method["minutes"])] * len(rows)
        by_cost.plot(costs, values, marker="o", linestyle="", color=f"C{number}")
        for cost, value, count in zip(costs, values, counts, strict=True):
            by_cost.annotate(f" {count}", (cost, value), fontsize=8, va="center")
    best = max(teacher["rows"], key=lambda row: row["evaluations"])
    for axes in (by_count, by_cost):
        axes.axhline(best["quality"], color="C0", linestyle=":", linewidth=1)
        axes.set_yscale("log" if log else "linear")
        axes.grid(alpha=0.3)
    counts = sorted({row["evaluations"] for method in methods.values() for row in method["rows"]})
    by_count.set_xscale("log")
    by_count.set_xticks(counts, [str(count) for count in counts])
    by_count.minorticks_off()
    by_count.set_xlabel("network evaluations per image")
    by_count.set_ylabel(label)
    by_count.legend(frameon=False)
    by_cost.set_xlim(0, 1.08 * max(sum(method["minutes"]) for method in methods.values()))
    by_cost.set_xlabel("minutes of training, beside the teacher's (numbers: evaluations)")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)


def quality_of(data: str, first: Run, num_samples: int, num_prompts: int) -> tuple[Quality, str]:
    """Returns the quality of a run on this data, and what it is called."""
    if data == "digits":
        distance = distance_to(digits("train"))
        return lambda run: distance(run.sample(num_samples, seed=0)), "Fréchet distance in pixels, to training digits"
    judge = scenes.make_judge(first)
    return lambda run: satisfied(run, num_prompts, judge)["all"], "never-seen prompts wholly satisfied"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("data", choices=("digits", "scenes"))
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR[,WORKDIR]", help="the teacher first")
    parser.add_argument("--num_steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--teacher_steps", type=int, default=50)
    parser.add_argument("--num_samples", type=int, default=2000, help="digits")
    parser.add_argument("--num_prompts", type=int, default=600, help="scenes")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/few_step_DATA.json")
    arguments = parser.parse_args()

    named = {}
    for one in arguments.runs:
        name, equals, folders = one.partition("=")
        if not equals:
            parser.error(f"{one}: give NAME=WORKDIR")
        named[name] = [diffusion.open_run(folder) for folder in folders.split(",")]
    teacher = next(iter(named))
    quality, label = quality_of(arguments.data, named[teacher][0], arguments.num_samples, arguments.num_prompts)
    methods: dict[str, Any] = {}
    for name, runs in named.items():
        counts = [*arguments.num_steps, *([arguments.teacher_steps] if name == teacher else [])]
        methods[name] = {**about(runs), "rows": measure(runs, counts, quality)}
    out = arguments.out or Path(f"benchmarks/results/few_step_{arguments.data}.json")
    counted = {"digits": {"num_samples": arguments.num_samples}, "scenes": {"num_prompts": arguments.num_prompts}}
    write_results(out, {"data": arguments.data, "quality": label, **counted[arguments.data], "methods": methods})
    draw(methods, label, out.with_suffix(".png"), log=arguments.data == "digits")
    print(table(methods))


if __name__ == "__main__":
    main()
