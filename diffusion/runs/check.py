"""--mode=check: what a run would need and whether its parts work, in under a minute and without beginning it.

With --target=MACHINE the same is asked of a machine that is not there; see `target`.
"""

import sys
from collections.abc import Sequence

import jax

from diffusion.data.sources import Source
from diffusion.model.config import make_settings
from diffusion.model.warnings import warnings_of_training
from diffusion.runs.begin import asked_origin, first_weights
from diffusion.runs.call import TRAIN, Call
from diffusion.runs.target import check_target, is_asked, report_target
from diffusion.runs.train import describe, prepare
from diffusion.training import Experiment
from diffusion.training.dry_run import dry_run
from diffusion.training.loop import draw_previews


def check(call: Call) -> None:
    """Prints the findings of a dry run; pictures of samples after one step remain in its check/."""
    if is_asked(call):
        return check_target(call)
    config = call.config
    source = call.task.read(config, TRAIN)
    vocabulary = [] if call.stored else list(call.task.vocabulary(config, source))
    origin = None if call.stored else asked_origin(call.flags, config)
    model, _ = describe(call.task.name, config, source, call.stored, vocabulary, origin)
    examples = list(call.task.examples(config))
    begun = first_weights(config, model, origin, call.mesh)[0] if call.stored is None else {}
    experiment = prepare(config, model, source, call.workdir, call.mesh, call.stored, examples, begun)
    try_out(call, experiment, source, warnings_of_training(config, model))


def try_out(call: Call, experiment: Experiment, source: Source, warnings: Sequence[str] = ()) -> None:
    """Prints the findings of a dry run of `experiment` on `source`, and the warnings beside its own."""
    if is_asked(call):
        batches = experiment.batches(0)
        rows = next(batches)
        batches.close()
        return report_target(call, experiment, rows, [])
    folder = call.workdir / "check"
    found = dry_run(
        experiment,
        make_settings(call.config),
        mesh=call.mesh,
        num_examples=source.num_examples,
        folder=folder / "checkpoints",
    )
    shape = "x".join(map(str, source.image_shape))
    lines = [f"data         {source.name} {source.split}, {source.num_examples} images {shape}, {source.fingerprint}"]
    lines += found.lines
    if experiment.preview:
        draw_previews(experiment, found.state, folder / "samples")
        lines.append(f"samples      {folder / 'samples_ema.png'}")
    if jax.process_index() == 0:
        print("\n".join(lines))
        warnings = [*found.warnings, *warnings]
        for line in warnings:
            print(f"warning: {line}", file=sys.stderr)
        print(f"{len(warnings)} warning(s)" if warnings else "nothing to warn of")
