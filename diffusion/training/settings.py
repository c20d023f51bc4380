"""How a run is done, as numbers: `Settings`, and the check of them before anything is compiled."""

from pathlib import Path
from typing import NamedTuple

from jax.sharding import Mesh

from diffusion.averages import power_exponent
from diffusion.training.errors import RunError
from diffusion.training.experiment import Experiment, check_seed
from diffusion.training.sharding import describe_mesh, num_batch_parts


class Settings(NamedTuple):
    """How a run is done; `Experiment` is what it learns. Every interval is in steps.

    Attributes:
      seed: of the run, see `run_key`.
      num_steps: the step after which the run is finished.
      ema_decay: of the moving average of the parameters, in [0, 1).
      ema_profiles: relative lengths of the power-function averages that are stored, see `diffusion.averages`.
      accumulate: micro-batches per step, one after the other.
      log_every: interval of the log lines, whose metrics are means over it; 0: one line, at the end.
      checkpoint_every: interval of the checkpoints; 0: one, at the end. There is always one at the end.
      preview_every: interval of the pictures, also drawn at the end; 0: none.
      snapshot_every: interval at which `ema_profiles` are stored, also at the end; 0: never.
      keep_newest: how many of the newest checkpoints are kept.
      keep_every: every multiple of so many steps is kept as well; 0: none.
      skip_bad_steps: a step with a loss or gradient that is not finite changes nothing, instead of stopping the run.
      spike_factor: a loss over so many times the mean of those before is bad too; 0: no bound.
      spread: mesh axes over which parameters, averages and moments are cut: "fsdp", or "data" and "fsdp".
    """

    seed: int
    num_steps: int
    ema_decay: float
    ema_profiles: tuple[float, ...] = ()
    accumulate: int = 1
    log_every: int = 100
    checkpoint_every: int = 1000
    preview_every: int = 1000
    snapshot_every: int = 0
    keep_newest: int = 3
    keep_every: int = 0
    skip_bad_steps: bool = False
    spike_factor: float = 0.0
    spread: tuple[str, ...] = ("fsdp",)


# Of each number: the smallest value and, where there is one, the value that it must stay below.
RANGES = {
    "num_steps": (1, None),
    "ema_decay": (0, 1),
    "accumulate": (1, None),
    "log_every": (0, None),
    "checkpoint_every": (0, None),
    "preview_every": (0, None),
    "snapshot_every": (0, None),
    "keep_newest": (1, None),
    "keep_every": (0, None),
    "spike_factor": (0, None),
}


def check_settings(settings: Settings, experiment: Experiment, mesh: Mesh) -> None:
    """Refuses what cannot run.

    Raises:
      RunError: a number out of its range, a length that no average has, or a batch that cannot be split over the
        devices and micro-batches.
    """
    check_seed(settings.seed)
    for name, (smallest, limit) in RANGES.items():
        value = getattr(settings, name)
        if not (value >= smallest and (limit is None or value < limit)):  # in this form nan is refused too
            below = "" if limit is None else f" and less than {limit}"
            raise RunError(f"training.{name} is {value}: it must be at least {smallest}{below}")
    for sigma_rel in settings.ema_profiles:
        try:
            power_exponent(sigma_rel)
        except TypeError as error:
            raise RunError(f"training.ema_profiles is {settings.ema_profiles}: numbers are needed") from error
        except ValueError as error:
            raise RunError(f"training.ema_profiles: {error}") from error
    in_batch = num_batch_parts(mesh)
    parts = in_batch * settings.accumulate
    if experiment.batch_size % parts:
        raise RunError(
            f"a batch of {experiment.batch_size} cannot be split into {in_batch} devices x {settings.accumulate} "
            f"micro-batches (mesh {describe_mesh(mesh)}): make data.batch_size a multiple of {parts}"
        )


def refuse_shorter(workdir: Path, step: int, num_steps: int) -> None:
    """Raises RunError where a run has made `step` steps, and is to be finished after fewer."""
    if num_steps < step:
        raise RunError(
            f"training.num_steps is {num_steps}, but the run in {workdir} has made {step} steps: "
            "raise it, or name another --workdir"
        )


def is_due(step: int, every: int, last: bool = False) -> bool:
    """Returns whether what is done at an interval is due after `step`: at its multiples, and at the last step.

    An interval of 0 means never.
    """
    return every > 0 and (last or step % every == 0)
