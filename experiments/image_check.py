"""--mode=check: what a run would need and whether its parts work, in under a minute and without beginning it."""

import sys

import jax

from diffusion.data.sources import Source
from diffusion.training.dry_run import dry_run
from diffusion.training.loop import draw_previews
from experiments import image_diffusion
from experiments.command_line import Run


def check(run: Run, source: Source) -> None:
    """Prints the findings of a dry run; pictures of samples after one step stay in its check/."""
    experiment = image_diffusion.make_experiment(run.config, source, run.mesh)
    settings = image_diffusion.make_settings(run.config)
    folder = run.workdir / "check"
    found = dry_run(
        experiment, settings, mesh=run.mesh, num_examples=source.num_examples, folder=folder / "checkpoints"
    )
    shape = "x".join(map(str, source.image_shape))
    data = f"data         {source.name} {source.split}, {source.num_examples} images {shape}, {source.fingerprint}"
    draw_previews(experiment, found.state, folder / "samples")
    if jax.process_index() == 0:
        print("\n".join([data, *found.lines, f"samples      {folder / 'samples_ema.png'}"]))
        for line in found.warnings:
            print(f"warning: {line}", file=sys.stderr)
        print(f"{len(found.warnings)} warning(s)" if found.warnings else "nothing to warn of")
