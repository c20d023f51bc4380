"""What every evaluation ends in: report.json, report.md and the curves in the run's folder, and the report printed."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from diffusion import evaluation
from diffusion.evaluation import Measurement
from diffusion.training.writers import MakeWriter


def made_by(run: Any) -> dict[str, Any]:
    """Returns the fields of a `Measurement` that say how a run's samples come to be."""
    settings = run.config.sampling
    grid = "" if settings.grid.name == "uniform" else f", {settings.grid.name} grid"
    guided = "" if settings.guidance == 1.0 else f", guidance {settings.guidance:g}"
    return {
        "sampler": settings.sampler.name + grid + guided,
        "num_steps": settings.num_steps,
        "ema": run.average,
    }


REAL: dict[str, Any] = {"sampler": "real images", "num_steps": None, "seeds": [], "ema": None}


def finish(folder: Path, title: str, measurements: Sequence[Measurement], about: dict[str, Any]) -> None:
    """Writes the report into `folder` and prints it, once for all processes."""
    if jax.process_index() != 0:
        return
    evaluation.write_report(folder, title, measurements, about)
    print(evaluation.print_report(title, measurements, about))
    print(folder / "report.md")


def finish_run(
    workdir: Path,
    experiment: str,
    step: int,
    measurements: Sequence[Measurement],
    curves: Sequence[str] = (),
    writers: Sequence[MakeWriter] = (),
) -> None:
    """Writes the report of a run after `step` steps, and the curves of its training where there was one.

    Args:
      workdir: folder of the run.
      experiment: its name.
      step: see above.
      measurements: of the report.
      curves: metrics that are drawn beside the loss and the gradient's norm.
      writers: are given the numbers too.
    """
    if jax.process_index() != 0:
        return
    course = workdir / "metrics.jsonl"
    if course.exists() and course.stat().st_size:  # an imported model has none
        evaluation.draw_curves(course, workdir / "curves.png", curves)
    about = {"experiment": experiment, "steps trained": step, "device": jax.devices()[0].device_kind}
    finish(workdir, f"{experiment} after {step} steps", measurements, about)
    for make in writers:
        writer = make(workdir, None)
        with contextlib.ExitStack() as cleanup:
            cleanup.callback(writer.close)
            writer.numbers(step, {f"evaluation/{name}": value for name, value in numbers_of(measurements).items()})


def numbers_of(measurements: Sequence[Measurement]) -> dict[str, float]:
    """Returns every measured number by its name; those of one measurement as "NAME, PART"."""
    found = {}
    for one in measurements:
        parts = one.value if isinstance(one.value, Mapping) else {"": one.value}
        found |= {f"{one.name}, {part}" if part else one.name: float(value) for part, value in parts.items()}
    return found
