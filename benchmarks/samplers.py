"""Which sampler is best at how many network evaluations? Fréchet distance of one trained model for all of them.

    ./launch.sh digits && .venv/bin/python -m benchmarks.samplers --workdir=runs/digits

Writes benchmarks/results/samplers.json and prints the table of docs/results.md. Distances are in pixel space, of the
same number of samples against the training images, beside that of held-out real images.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import diffusion
from benchmarks.common import make_parser, write_results
from diffusion.data.sources import Source, digits
from diffusion.evaluation import PIXELS, compare, extract, reference_set
from diffusion.runs.run import Run

EVALUATIONS = (5, 10, 20, 50, 1000)


def sampling(sampler: str, grid: str = "uniform", **fields: Any) -> dict[str, Any]:
    """Returns the changes of a run's config that choose a sampler with its fields, and a grid."""
    own = {f"sampling.sampler.{field}": value for field, value in fields.items()}
    return {"sampling.sampler.name": sampler, "sampling.grid.name": grid, **own}


SAMPLERS: dict[str, dict[str, Any]] = {
    "ancestral, large variance": sampling("ancestral", variance="large"),
    "ancestral, small variance": sampling("ancestral", variance="small"),
    "DDIM": sampling("ddim"),
    "DDIM, quadratic grid": sampling("ddim", "quadratic"),
    "DDIM, Karras grid": sampling("ddim", "karras"),
    "Heun, Karras grid": sampling("heun", "karras"),
    "DPM-Solver++(2M)": sampling("dpm_solver_pp", order=2),
    "DPM-Solver++(2M), Karras grid": sampling("dpm_solver_pp", "karras", order=2),
    "DPM-Solver++(3M), Karras grid": sampling("dpm_solver_pp", "karras", order=3),
    "UniPC-2, Karras grid": sampling("unipc", "karras", order=2),
    "UniPC-3, Karras grid": sampling("unipc", "karras", order=3),
}
# Beyond 50 evaluations a solver of the ODE has little to gain; two are shown there.
LONG = ("ancestral, large variance", "DDIM")


def num_steps_of(sampler: str, evaluations: int) -> int:
    """Returns the number of steps with that many evaluations, or one fewer: N take N, of Heun 2N - 1."""
    return (evaluations + 1) // 2 if sampler == "heun" else evaluations


def distance_to(train: Source) -> Callable[[np.ndarray], float]:
    """Returns image -> Fréchet distance to the training images, in pixels."""
    reference = reference_set(train, PIXELS)

    def distance(image: np.ndarray) -> float:
        value = compare(extract(image, PIXELS, reference), PIXELS, reference, ["fid"])["fid"].value
        assert isinstance(value, float)
        return value

    return distance


def measure(
    run: Run,
    distance: Callable[[np.ndarray], float],
    num_samples: int,
    samplers: Mapping[str, dict[str, Any]] = SAMPLERS,
    evaluations: Sequence[int] = EVALUATIONS,
) -> list[dict[str, Any]]:
    """Returns the distance and the seconds of each sampler at each number of evaluations; the last is for `LONG`.

    Args:
      run: the trained model.
      distance: of samples uint8[N, H, W, C] from the training images.
      num_samples: N.
      samplers: changes of the run's config by name.
      evaluations: of the network.
    """
    rows = []
    for name, changes in samplers.items():
        for count in evaluations if name in LONG else evaluations[:-1]:
            num_steps = num_steps_of(changes["sampling.sampler.name"], count)
            changed = run.change({**changes, "sampling.num_steps": num_steps})
            batch_size = changed.config.sampling.batch_size
            changed.sample(min(num_samples, batch_size), seed=1)  # compiles
            begun = time.perf_counter()
            samples = changed.sample(num_samples, seed=0)
            seconds = time.perf_counter() - begun
            found = distance(samples)
            rows.append({"sampler": name, "evaluations": count, "frechet_distance": found, "seconds": seconds})
            print(f"{name:32} {count:5} {found:8.4f} {seconds:7.1f} s", flush=True)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the rows as Markdown: a line per sampler, evaluations across."""
    counts = sorted({row["evaluations"] for row in rows})
    lines = ["| sampler | " + " | ".join(map(str, counts)) + " |", "|---" * (len(counts) + 1) + "|"]
    for name in dict.fromkeys(row["sampler"] for row in rows):
        of = {row["evaluations"]: f"{row['frechet_distance']:.3f}" for row in rows if row["sampler"] == name}
        lines.append(f"| {name} | " + " | ".join(of.get(count, "") for count in counts) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--workdir", default="runs/digits", help="a trained run of the digits experiment")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS, help="the last for two samplers")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/samplers.json"))
    arguments = parser.parse_args()

    run = diffusion.open_run(arguments.workdir)
    train, test = digits("train"), digits("test")
    distance = distance_to(train)
    held_out = test.read(np.arange(test.num_examples))["image"]
    rows = measure(run, distance, arguments.num_samples, evaluations=arguments.evaluations)
    results = {
        "steps_trained": run.step,
        "num_samples": arguments.num_samples,
        "seeds": [0],
        "features": "pixels in [-1, 1], 64 values",
        "reference": train.fingerprint,
        "held_out": {"frechet_distance": distance(held_out), "count": len(held_out)},
        "rows": rows,
    }
    write_results(arguments.out, results)
    print(table(rows))


if __name__ == "__main__":
    main()
