"""How costs grow: time per image over batch, devices, sampling steps and images; memory; compile time over depth.

    python -m benchmarks.growth [--rounds=3]

The U-Net of the digits and the MM-DiT of the scenes, as their configs have them. More devices than one are simulated on
the same cores, and the batch grows with them (weak scaling): a flat line is the best there can be. Writes
benchmarks/results/growth.json, and the figure growth.png beside it.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.figure

from benchmarks.common import make_parser, write_results
from benchmarks.meshes import compare_depths
from benchmarks.steps import CASES, Timed, sampling, training
from diffusion.files import replacing
from diffusion.training import make_mesh

NUM_DEVICES = 8
PER_DEVICE = 16  # images
SAMPLED = 32  # images, where something else grows
SAMPLING_STEPS = 10
DEPTHS = (3, 6, 12, 24)


class Growth(NamedTuple):
    """What one number costs as it grows.

    Attributes:
      label: of the number.
      values: that it takes.
      make: (case, value) -> the program.
      images: value -> how many images a run of it makes or learns from.
    """

    label: str
    values: Sequence[int]
    make: Callable[[str, int], Timed]
    images: Callable[[int], int]


def trained(case: str, batch_size: int, num_devices: int = 1) -> Timed:
    """Returns the training step of a case."""
    return training(case, case, {"data.batch_size": batch_size}, make_mesh(num_devices))


def drawn(case: str, num_images: int, num_steps: int = SAMPLING_STEPS) -> Timed:
    """Returns the sampling of a case."""
    return sampling(case, case, {"sampling.num_steps": num_steps}, make_mesh(1), num_images)


GROWTHS = {
    "batch": Growth("images in a batch of training", (1, 4, 16, 64, 256), trained, int),
    "devices": Growth(
        f"simulated devices, {PER_DEVICE} images of training on each",
        (1, 2, 4, 8),
        lambda case, count: trained(case, count * PER_DEVICE, count),
        lambda count: count * PER_DEVICE,
    ),
    "sampling_steps": Growth(
        f"steps of sampling {SAMPLED} images",
        (5, 10, 20, 50, 100),
        lambda case, count: drawn(case, SAMPLED, count),
        lambda _: SAMPLED,
    ),
    "images": Growth(f"images sampled at once, {SAMPLING_STEPS} steps", (1, 4, 16, 64, 256), drawn, int),
}


def measure(growth: Growth, case: str, rounds: int) -> list[dict[str, Any]]:
    """Returns a row for each value: seconds of each round, the median per image, and temporary memory."""
    rows = []
    for value in growth.values:
        timed = growth.make(case, value)
        seconds = [timed.run(1) for _ in range(rounds)]
        per_image = statistics.median(seconds) / growth.images(value)
        rows.append(
            {
                "value": value,
                "seconds": [round(one, 5) for one in seconds],
                "seconds_per_image": float(f"{per_image:.4g}"),
                "temporary_bytes": timed.temporary_bytes,
            }
        )
        print(f"{case:<8} {growth.label:<56} {value:>4} {1e3 * per_image:9.3f} ms per image", flush=True)
        jax.clear_caches()
    return rows


def draw(found: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]], depths: Mapping[str, Any], path: Path) -> None:
    """Draws a panel of each growth, the memory of sampling, and compile time over depth."""
    figure = matplotlib.figure.Figure(figsize=(13, 7.2), layout="constrained")
    panels = iter(figure.subplots(2, 3).ravel())

    def panel(x: str, y: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
        axes = next(panels)
        for name, (values, heights) in lines.items():
            axes.plot(values, heights, marker="o", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        ticks = sorted({value for values, _ in lines.values() for value in values})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0.5 * min(min(heights) for _, heights in lines.values()))
        axes.set_xlabel(x)
        axes.set_ylabel(y)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    def lines_of(rows: Mapping[str, Sequence[Mapping[str, Any]]], field: str, scale: float) -> dict[str, Any]:
        return {
            case: ([row["value"] for row in of_case], [scale * row[field] for row in of_case])
            for case, of_case in rows.items()
        }

    for name, growth in GROWTHS.items():
        panel(growth.label, "ms per image", lines_of(found[name], "seconds_per_image", 1e3))
    panel(GROWTHS["images"].label, "MB of temporaries", lines_of(found["images"], "temporary_bytes", 1e-6))
    kinds = sorted({name.partition(", ")[2] for name in depths})
    compiled = {
        kind: (
            DEPTHS,
            [
                sum(depths[f"depth {depth}, {kind}"][f"seconds {what}"] for what in ("tracing", "compiling"))
                for depth in DEPTHS
            ],
        )
        for kind in kinds
    }
    panel("blocks of an MM-DiT", "s of CPU time to trace and compile a step", compiled)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/growth.json"))
    asked = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    found = {name: {case: measure(growth, case, asked.rounds) for case in CASES} for name, growth in GROWTHS.items()}
    depths = compare_depths(DEPTHS)
    write_results(asked.out, {"growths": found, "depths": depths})
    draw(found, depths, asked.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
