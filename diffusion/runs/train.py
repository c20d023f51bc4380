"""--mode=train: trains, or resumes training, in the run's folder."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion import training
from diffusion.data.captions import with_text
from diffusion.data.sources import Source
from diffusion.model import formats, prompts
from diffusion.model.config import Config, make_settings, plain
from diffusion.model.experiment import make_experiment, make_model, stored_of, warnings_of
from diffusion.model.model import Model, Parts, parts
from diffusion.model.space import with_latents
from diffusion.runs.call import TRAIN, Call, words_of_captions
from diffusion.runs.evaluate import evaluate, ready
from diffusion.runs.published import is_published
from diffusion.runs.run import Run, load, model_of
from diffusion.training import Experiment, RunError, make_mesh
from diffusion.training.checkpoints import open_existing, steps_in

NUM_EXAMPLES = 24  # captions of the training set that previews show where the experiment has no examples


def run_training(call: Call) -> None:
    """Trains, then evaluates where the config says so."""
    if call.config.evaluation.after_training:
        (call.task.ready or ready)(call)
    source = call.task.read(call.config, TRAIN)
    vocabulary = [] if call.stored else list(call.task.vocabulary(call.config, source))
    examples = list(call.task.examples(call.config))
    run = train_on(call.task.name, call.config, source, call.workdir, call.mesh, call.stored, vocabulary, examples)
    if call.config.evaluation.after_training:
        evaluate(call, run)


def train_run(
    config: Config, source: Source, workdir: str | Path, *, name: str = "run", num_devices: int | None = None
) -> Run:
    """Trains a model of `config` on `source` in a new or existing work folder, and returns the run.

    Args:
      config: of `diffusion.load_config`, or any with the fields of experiments/configs/_base.py.
      source: of uint8 images, as `data.sources.array_source` makes one.
      workdir: the folder of the run; a run that is there is resumed.
      name: of the experiment, stored with the run.
      num_devices: how many devices it works on; None: all.

    Raises:
      RunError: settings that cannot run, or a folder of another run.
      ValueError: a config that cannot be built.

    Example:
      config = diffusion.load_config("digits:flow", {"training.num_steps": 100})
      run = diffusion.train(config, digits("train"), "runs/mine")
    """
    workdir = Path(workdir).expanduser()
    stored = stored_in(workdir)
    vocabulary = words_of_captions(config, source) if source.captions and not stored else []
    mesh = make_mesh(num_devices, config.training.get("mesh", ""))
    return train_on(name, config, source, workdir, mesh, stored, vocabulary, ())


def stored_in(workdir: Path) -> dict[str, Any] | None:
    """Returns the description of the run in a folder, in today's format; None where there is none yet."""
    if is_published(workdir):
        raise RunError(f"{workdir} is a published model, which is not trained further there: name another --workdir")
    if not steps_in(workdir / "checkpoints"):
        return None
    with open_existing(workdir) as checkpoints:
        return formats.current(checkpoints.description())


def train_on(
    name: str,
    config: Config,
    source: Source,
    workdir: Path,
    mesh: Mesh,
    stored: Any,
    vocabulary: Sequence[str],
    examples: Sequence[str],
) -> Run:
    """Trains `config` on `source` in `workdir`; `stored` is the description of the run there, None for a new one."""
    model, description = describe(name, config, source, stored, vocabulary)
    for line in warnings_of(config, model):
        logging.warning(line)
    experiment = prepare(config, model, source, workdir, mesh, stored, examples)
    settings = make_settings(config)
    state = training.train(
        experiment, settings, workdir=workdir, mesh=mesh, description=description, migrate=formats.current
    )
    params = training.averaged(state.params, state.ema, model.frozen)
    return Run(name, workdir, config, mesh, model, params, int(state.step), settings.ema_decay, {})


def describe(
    name: str, config: Config, source: Source, stored: Any, vocabulary: Sequence[str]
) -> tuple[Model, dict[str, Any]]:
    """Returns the model of a config on these images, and what is stored of it beside the weights.

    Raises:
      RunError: the run in the folder is of images of another shape or with other classes.
    """
    facts = {"image_shape": list(source.image_shape), "num_classes": None if source.captions else source.num_classes}
    if stored is not None:
        if stored["experiment"] != name:
            raise RunError(f"the folder holds a run of experiment {stored['experiment']}, not {name}")
        for fact, value in facts.items():
            if stored[fact] != value:
                raise RunError(f"the run was trained on images of {fact} {stored[fact]}, and these have {value}")
        return model_of(config, stored), dict(stored) | {"config": plain(config)}
    model = make_model(config, source.image_shape, facts["num_classes"], None, vocabulary)
    return model, {"experiment": name, "config": plain(config), **facts, **stored_of(model)}


def prepare(
    config: Config, model: Model, source: Source, workdir: Path, mesh: Mesh, stored: Any, examples: Sequence[str]
) -> Experiment:
    """Returns the experiment on `source`, read with what the space and the condition need."""
    if model.space.precomputed is not None:
        if config.data.flip:
            raise ValueError("data.flip=True mirrors images, and latents are not mirrored: set space.precomputed=False")
        source, space = with_latents(source, model.space, frozen(config, model, workdir, mesh, stored).space)
        model = model._replace(space=space)
    if model.condition.kind == "prompts":
        if not source.captions:
            raise ValueError(f"condition.name={config.condition.name} needs captions, and {source.name} has none")
        if not examples:
            shown = np.linspace(0, len(source.captions) - 1, NUM_EXAMPLES).astype(int)
            examples = [source.captions[i] for i in shown]
        if config.condition.get("precomputed"):
            text = frozen(config, model, workdir, mesh, stored).text
            source = prompts.with_features(source, model.condition, text)
        else:
            source = with_text(source, model.condition.read)
    return make_experiment(config, model, source, mesh, examples)


def frozen(config: Config, model: Model, workdir: Path, mesh: Mesh, stored: Any) -> Parts:
    """Returns the weights of what is not trained: the checkpoint's, or those that a run starts with."""
    if stored is not None:
        return parts(model, load(workdir, stored, config, mesh).params)
    key = training.run_key(config.seed, "init")
    text, space = (jax.device_get(part.init(key)) if part.init else None for part in (model.condition, model.space))
    return Parts(None, text, space)
