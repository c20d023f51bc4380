"""Which sampler is best at how many network evaluations? Fréchet distance of one trained model for all of them.

    ./launch.sh digits && .venv/bin/python -m benchmarks.samplers --workdir=runs/digits

Writes benchmarks/results/samplers.json, and the table in the README, printed too. Distances are in pixel space, of the
same number of samples against the training images; held-out real images at that count stand beside them.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion.data.sources import digits
from diffusion.evaluation import PIXELS, compare, reference_set
from diffusion.files import replacing
from experiments import command_line, image_modes
from experiments import digits as experiment

EVALUATIONS = (5, 10, 20, 50, 1000)
# name: (config.sampling, evaluations of N steps)
SAMPLERS: dict[str, dict[str, Any]] = {
    "ancestral, large variance": dict(sampler="ancestral", variance="large", grid="uniform"),
    "ancestral, small variance": dict(sampler="ancestral", variance="small", grid="uniform"),
    "DDIM": dict(sampler="ddim", grid="uniform"),
    "DDIM, quadratic grid": dict(sampler="ddim", grid="quadratic"),
    "DDIM, Karras grid": dict(sampler="ddim", grid="karras"),
    "Heun, Karras grid": dict(sampler="heun", grid="karras"),
    "DPM-Solver++(2M)": dict(sampler="dpm_solver_pp", order=2, grid="uniform"),
    "DPM-Solver++(2M), Karras grid": dict(sampler="dpm_solver_pp", order=2, grid="karras"),
    "DPM-Solver++(3M), Karras grid": dict(sampler="dpm_solver_pp", order=3, grid="karras"),
    "UniPC-2, Karras grid": dict(sampler="unipc", order=2, grid="karras"),
    "UniPC-3, Karras grid": dict(sampler="unipc", order=3, grid="karras"),
}
# Beyond 50 evaluations a solver of the ODE has little to gain; two are shown there.
LONG = ("ancestral, large variance", "DDIM")


def num_steps_of(sampler: str, evaluations: int) -> int:
    """Returns the steps that take so many evaluations, or one fewer: N of N, or for Heun 2N - 1."""
    return (evaluations + 1) // 2 if sampler == "heun" else evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", default="runs/digits", help="a trained run of the digits experiment")
    parser.add_argument("--num_samples", type=int, default=500)
    parser.add_argument("--json", default="benchmarks/results/samplers.json")
    arguments = parser.parse_args()

    modes = dict.fromkeys(["train", "sample"], lambda run: None)
    argv = ["digits", f"--workdir={arguments.workdir}", "--mode=sample"]
    run, _ = command_line.parse(argv, Path(experiment.__file__), __doc__, "digits_ddpm.py", modes, flags.FlagValues())
    train, test = digits("train"), digits("test")
    trained = image_modes.load(run, train)
    reference = reference_set(train, PIXELS)
    held_out = test.read(np.arange(test.num_examples))["image"]
    distance = lambda image: compare(image, PIXELS, reference, ["fid"])["fid"].value  # noqa: E731

    rows = []
    for name, settings in SAMPLERS.items():
        for evaluations in EVALUATIONS if name in LONG else EVALUATIONS[:-1]:
            config = run.config.copy_and_resolve_references()
            config.sampling.update(settings)
            config.sampling.num_steps = num_steps_of(settings["sampler"], evaluations)
            this_run = run._replace(config=config)
            image_modes.generate(this_run, train, trained, config.sampling.batch_size, seed=1)  # compiles
            begun = time.perf_counter()
            samples = image_modes.generate(this_run, train, trained, arguments.num_samples, seed=0)
            seconds = time.perf_counter() - begun
            found = distance(samples)
            rows.append({"sampler": name, "evaluations": evaluations, "frechet_distance": found, "seconds": seconds})
            print(f"{name:32} {evaluations:5} {found:8.4f} {seconds:7.1f} s", flush=True)

    result = {
        "device": jax.devices()[0].device_kind,
        "cpu_count": len(jax.devices()) if jax.default_backend() != "cpu" else platform.machine(),
        "jax": jax.__version__,
        "steps_trained": trained.step,
        "num_samples": arguments.num_samples,
        "seeds": [0],
        "features": "pixels in [-1, 1], 64 values",
        "reference": train.fingerprint,
        "held_out": {"frechet_distance": distance(held_out), "count": len(held_out)},
        "rows": rows,
    }
    with replacing(arguments.json) as temporary:
        temporary.write_text(json.dumps(result, indent=2) + "\n")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the rows as Markdown: a sampler a line, evaluations across."""
    lines = ["| sampler | " + " | ".join(map(str, EVALUATIONS)) + " |", "|---" * (len(EVALUATIONS) + 1) + "|"]
    for name in SAMPLERS:
        of = {row["evaluations"]: f"{row['frechet_distance']:.3f}" for row in rows if row["sampler"] == name}
        lines.append(f"| {name} | " + " | ".join(of.get(count, "") for count in EVALUATIONS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
