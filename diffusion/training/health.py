"""Bad numbers: noticed in the step in which they occur, and reported with what helps to find the cause."""

import math
from collections.abc import Callable
from pathlib import Path

import jax

from diffusion.training.errors import RunError
from diffusion.training.step import Report

MOST_IN_A_ROW = 10  # skipped steps; with more of them the data of one step is not the cause


class Watch:
    """Checks the report of every step; a bad one ends the run or, with `skip_bad_steps`, is reported and skipped.

    Args:
      workdir: of the run, for messages.
      skip_bad_steps: as in `Settings`.
      report_line: prints a line.
    """

    def __init__(self, workdir: Path, *, skip_bad_steps: bool, report_line: Callable[[str], None]):
        self._workdir = workdir
        self._skip = skip_bad_steps
        self._report_line = report_line
        self._seen = 0
        self._in_a_row = 0

    def check(self, report: Report, step: int) -> None:
        """Checks the report of step number `step`; a second check of the same step does nothing.

        Raises:
          RunError: it is bad and not to be skipped, or one of too many bad ones in a row.
        """
        if step <= self._seen:
            return
        self._seen = step
        if not report.bad:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        line = f"step {step}: {describe(jax.device_get(report))}"
        if not self._skip:
            raise RunError(
                f"{line}. Stopped; the checkpoints in {self._workdir / 'checkpoints'} are from before it. Check the "
                "data of that step, lower the learning rate, or resume with training.skip_bad_steps=True"
            )
        if self._in_a_row > MOST_IN_A_ROW:
            raise RunError(f"{line}. Stopped: {self._in_a_row} steps in a row were bad: lower the learning rate")
        self._report_line(f"{line}. Skipped: it changed no weights")


def describe(report: Report) -> str:
    """Returns what is wrong with a step in a line: loss, gradient, and where in parameters and loss it is worst."""
    loss, grad_norm = float(report.loss), float(report.grad_norm)
    words = [f"loss {loss:.6g}, gradient norm {grad_norm:.6g}"]
    if math.isfinite(loss) and math.isfinite(grad_norm):
        words.append(f"the loss of the steps before is {float(report.usual_loss):.6g}")

    norms = {name: float(norm) for name, norm in report.group_norms.items()}
    not_finite = [name for name, norm in norms.items() if not math.isfinite(norm)]
    if not_finite:
        words.append(f"not finite in {len(not_finite)} of {len(norms)} parameter groups: {', '.join(not_finite[:3])}")
        words[-1] += ", ..." if len(not_finite) > 3 else ""
    else:
        worst = max(norms, key=lambda name: norms[name])
        words.append(f"largest in the parameters of {worst} ({norms[worst]:.6g})")

    means = {name: float(mean.total / mean.count) for name, mean in report.metrics.items() if mean.count > 0}
    parts = {name: mean for name, mean in means.items() if name != "loss"}
    bad = [name for name, mean in parts.items() if not math.isfinite(mean)]
    if parts and math.isfinite(loss) and not bad:
        bad = [max(parts, key=lambda name: parts[name])]
    if bad:
        words.append("worst in: " + ", ".join(f"{name} {parts[name]:.6g}" for name in bad))
    return "; ".join(words)
