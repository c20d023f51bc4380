"""What a training step of a few-step loss costs beside flow matching's: time and memory of the whole step.

    python -m benchmarks.few_step_cost
    python -m benchmarks.few_step_cost --only scenes --losses mean_flow mean_flow_predicted

The digits' U-Net and the scenes' MM-DiT, each with the batch of its config, in turns on the same random images. Writes
benchmarks/results/few_step_cost.json: seconds of each loss in each round, the median of its ratios to flow matching,
round by round, and the temporary memory of the compiled step.
"""

import statistics
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.common import make_parser, median_ratio, take_turns, write_results
from benchmarks.steps import training
from diffusion.training import make_mesh

# The config of flow matching, by case of `steps.CASES`.
FLOW = {"digits": "digits:flow", "scenes": "scenes"}
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


def measure(case: str, losses: list[str], rounds: int, steps: int) -> dict[str, Any]:
    """Returns the seconds of a step, ratios to flow matching's and memory, by loss."""
    chosen = [name for name in losses if name != GUIDED or case != "digits"]
    specs = {BASE: (FLOW[case], {})} | {name: (f"{case}:{LOSSES[name][0]}", LOSSES[name][1]) for name in chosen}
    made = {name: training(case, spec, changes, make_mesh(1)) for name, (spec, changes) in specs.items()}
    seconds = take_turns({name: partial(timed.run, steps) for name, timed in made.items()}, rounds)
    return {
        name: {
            "seconds": [round(one, 5) for one in seconds[name]],
            "median_seconds": round(statistics.median(seconds[name]), 5),
            "ratio_to_flow": round(median_ratio(seconds[name], seconds[BASE]), 3),
            "temporary_bytes": timed.temporary_bytes,
        }
        for name, timed in made.items()
    }


def main() -> None:
    """Measures what was asked for, prints it and writes it."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="*", choices=[*FLOW], default=[*FLOW], help="cases; default: all")
    parser.add_argument("--losses", nargs="*", choices=[*LOSSES], default=[*LOSSES], help="default: all")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=3, help="of a round")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/few_step_cost.json"))
    asked = parser.parse_args()
    found = {case: measure(case, asked.losses, asked.rounds, asked.steps) for case in asked.only}
    print(write_results(asked.out, {"num_rounds": asked.rounds, "steps_per_round": asked.steps, "cases": found}))


if __name__ == "__main__":
    main()
