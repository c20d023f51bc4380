"""The table of modes, and `main`: what runs when an experiment is run."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags

from diffusion.runs import begin, command_line, compare, edit, evaluate, export, sample, sweep, target, weights
from diffusion.runs.call import Task
from diffusion.runs.check import check
from diffusion.runs.command_line import Mode
from diffusion.runs.likelihood import likelihood
from diffusion.runs.train import run_training

MODES: dict[str, Mode] = {
    "train": run_training,
    "check": check,
    "sample": sample.sample,
    "evaluate": evaluate.evaluate,
    "sweep": sweep.sweep,
    "compare": compare.compare,
    "likelihood": likelihood,
    "interpolate": edit.interpolate,
    "inpaint": edit.inpaint,
    "img2img": edit.img2img,
    "progressive": edit.progressive,
    "import": weights.import_weights,
    "export": export.export_weights,
}
FLAGS = (begin, target, sample, evaluate, sweep, compare, edit, weights)  # modules that define flags of their modes


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of all modes."""
    for module in FLAGS:
        module.define_flags(values)


def main(
    file: str,
    doc: str | None,
    task: Task,
    *,
    config: str,
    modes: dict[str, Mode] = MODES,
    extra_flags: Callable[[flags.FlagValues], None] = define_flags,
) -> NoReturn:
    """Runs the experiment in `file` as the command line says; never returns.

    Args:
      file: the experiment module's `__file__`; config files are in configs/ beside it.
      doc: its docstring, shown by --help.
      task: its data and its own questions.
      config: stem of the config file without --config.
      modes: what --mode can name; "train" is the default.
      extra_flags: defines the flags of these modes.
    """

    def work() -> None:
        values = flags.FlagValues()
        extra_flags(values)
        folder = Path(file).parent / "configs"
        call, mode = command_line.parse(compare.named(sys.argv), task, doc, folder, config, modes, values)
        modes[mode](call)

    command_line.run_to_end(work)
