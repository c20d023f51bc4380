"""--mode=sweep: a score over the number of sampling steps, or over the length of the average."""

import math
from collections.abc import Callable, Mapping

import jax
from absl import flags

from diffusion import evaluation
from diffusion.evaluation import Measurement
from diffusion.runs.call import Call
from diffusion.runs.evaluate import first_metric
from diffusion.runs.report import finish
from diffusion.runs.run import Run


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this mode."""
    flags.DEFINE_list("sweep_steps", [], "sweep: score samples of each of these numbers of steps", flag_values=values)
    flags.DEFINE_list("sweep_ema", [], "sweep: score samples of averages of each of these lengths", flag_values=values)


def sweep(call: Call) -> None:
    """Scores samples over what --sweep_steps and --sweep_ema vary; writes a report and a picture of each."""
    if not call.flags.sweep_steps and not call.flags.sweep_ema:
        raise ValueError("--mode=sweep needs what to vary: --sweep_steps=5,10,20,50 or --sweep_ema=0.03,0.05,0.1")
    steps = numbers("sweep_steps", call.flags.sweep_steps, whole=True)
    lengths = numbers("sweep_ema", call.flags.sweep_ema)
    if steps:
        newest = call.open()
        over(call, "steps", "sampling steps", steps, lambda x: newest.change({"sampling.num_steps": int(x)}))
    if lengths:
        over(call, "ema", "relative length of the average", lengths, call.open)


def over(call: Call, name: str, label: str, values: list[float], at: Callable[[float], Run]) -> None:
    """Scores the run that `at` makes of each value; writes sweeps/NAME."""
    score = call.task.score or first_metric
    rows: list[Measurement] = []
    for value in values:
        one = score(call, at(value))
        rows.append(one._replace(name=f"{one.name}, {label} {value:g}"))
    if jax.process_index() == 0:
        folder = call.workdir / "sweeps" / name
        title = rows[0].name.removesuffix(f", {label} {values[0]:g}")
        bars = [one for one in map(spread, (row.value for row in rows)) if one]
        said = f"{title}: {rows[0].num_samples} samples each" + (", bars: standard error" if bars else "")
        values_of = [headline(one.value) for one in rows]
        bars = bars if len(bars) == len(rows) else []
        evaluation.draw_sweep(values, values_of, folder / "score.png", label, said, bars)
        finish(folder, f"Over the {label}", rows, {"experiment": call.task.name})


def numbers(flag: str, values: list[str], whole: bool = False) -> list[float]:
    """Returns the numbers of a list flag.

    Raises:
      ValueError: one is no number above 0, or no whole one.
    """
    try:
        found = [float(value) for value in values]
    except ValueError as error:
        raise ValueError(f"--{flag}={','.join(values)}: numbers are needed") from error
    if any(not 0 < value < math.inf for value in found):
        raise ValueError(f"--{flag}={','.join(values)}: every number must be finite and above 0")
    if whole and any(value != int(value) for value in found):
        raise ValueError(f"--{flag}={','.join(values)}: whole numbers are needed")
    return found


def headline(value: float | Mapping[str, float]) -> float:
    """Returns a measurement's number: its mean, or its first part, where it has several."""
    return value.get("mean", next(iter(value.values()))) if isinstance(value, Mapping) else value


def spread(value: float | Mapping[str, float]) -> tuple[float, float] | None:
    """Returns how far below and above its headline a measurement may be, by its standard error; None: not known."""
    error = value.get("standard error") if isinstance(value, Mapping) else None
    return None if error is None else (error, error)
