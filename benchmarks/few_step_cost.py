"""What a training step of a few-step loss costs beside flow matching's: time and memory of the whole step.

    python -m benchmarks.few_step_cost
    python -m benchmarks.few_step_cost --only scenes --losses mean_flow mean_flow_predicted

The digits' U-Net and the scenes' MM-DiT, each with the batch of its config, in turns on the same random images. Writes
benchmarks/results/few_step_cost.json: seconds of each loss in each round, the median of its ratios to flow matching,
round by round, and the temporary memory of the compiled step.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import make_parser, median_ratio, take_turns, write_results
from diffusion.model.experiment import abstract_batch, make_learner, make_model
from diffusion.model.fields import change, load
from diffusion.training import init_state, make_mesh, make_train_step, place_batch

CONFIGS = Path("experiments/configs")
# Of each case the config of flow matching, its shape of images, and its number of classes.
CASES: dict[str, tuple[str, tuple[int, int, int], int | None]] = {
    "digits": ("digits:flow", (8, 8, 1), 10),
    "scenes": ("scenes", (16, 16, 3), None),
}
PREDICTED = {"loss.tangent": "predicted"}
LOSSES: dict[str, tuple[str, dict[str, Any]]] = {
    "mean_flow": ("mean_flow", {"loss.kappa": 0.0}),
    "mean_flow_predicted": ("mean_flow", {"loss.kappa": 0.0, **PREDICTED}),
    "mean_flow_guided": ("mean_flow", {"loss.kappa": 0.5}),
    "consistency": ("consistency", {}),
    "continuous_consistency": ("continuous_consistency", {}),
}
GUIDED = "mean_flow_guided"  # needs a condition, which the digits here have not
BASE = "flow"
VOCABULARY = [f"word{i}" for i in range(30)]


def make_timer(spec: str, changes: dict[str, Any], case: str, steps: int) -> tuple[Callable[[], float], int]:
    """Returns a timer of one training step (the mean of `steps`), and its temporary memory in bytes."""
    _, shape, num_classes = CASES[case]
    config = change(load(spec, CONFIGS)[0], changes)
    model = make_model(config, shape, num_classes, None, VOCABULARY)
    learner = make_learner(config, model)
    random = np.random.default_rng(0)

    def fill(of: jax.ShapeDtypeStruct) -> np.ndarray:
        largest = {"uint8": 256, "int32": 10}[of.dtype.name]
        return random.integers(0, largest, of.shape).astype(of.dtype)

    batch = place_batch(make_mesh(1), jax.tree.map(fill, abstract_batch(config, model)))
    state = jax.jit(lambda: init_state(learner, 0, batch))()
    step = make_train_step(learner, seed=0, ema_decay=0.999)
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    analysis = compiled.memory_analysis()
    kept = {"state": state}

    def run() -> float:
        begun = time.perf_counter()
        for _ in range(steps):
            kept["state"], report = compiled(kept["state"], batch)
        jax.block_until_ready((kept["state"], report))
        return (time.perf_counter() - begun) / steps

    run()
    return run, int(analysis.temp_size_in_bytes) if analysis else 0


def measure(case: str, losses: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Returns the seconds of a step, ratios to flow matching's and memory, by loss."""
    flow = CASES[case][0]
    chosen = [name for name in losses if name != GUIDED or case != "digits"]
    specs = {BASE: (flow, {})} | {name: (f"{case}:{LOSSES[name][0]}", LOSSES[name][1]) for name in chosen}
    made = {name: make_timer(spec, changes, case, steps) for name, (spec, changes) in specs.items()}
    seconds = take_turns({name: run for name, (run, _) in made.items()}, rounds)
    return {
        name: {
            "seconds": [round(one, 5) for one in seconds[name]],
            "median_seconds": round(statistics.median(seconds[name]), 5),
            "ratio_to_flow": round(median_ratio(seconds[name], seconds[BASE]), 3),
            "temporary_bytes": memory,
        }
        for name, (_, memory) in made.items()
    }


def main() -> None:
    """Measures what was asked for, prints it and writes it."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=[*CASES], default=[*CASES], help="cases; default: all")
    parser.add_argument("--losses", nargs="*", choices=[*LOSSES], default=[*LOSSES], help="default: all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/few_step_cost.json"))
    asked = parser.parse_args()
    found = {case: measure(case, asked.losses, asked.rounds, asked.steps) for case in asked.only}
    print(write_results(asked.out, {"num_rounds": asked.rounds, "steps_per_round": asked.steps, "cases": found}))


if __name__ == "__main__":
    main()
