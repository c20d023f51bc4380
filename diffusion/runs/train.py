"""--mode=train: trains, or resumes training, in the run's folder."""

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion import training
from diffusion.data.captions import with_text
from diffusion.data.sources import Source, each_part, facts_of
from diffusion.model import formats, prompts
from diffusion.model.config import Config, from_plain, make_settings, plain
from diffusion.model.experiment import check_references, make_experiment, make_model, stored_of
from diffusion.model.model import Model
from diffusion.model.optimizers import GIVEN
from diffusion.model.space import with_latents
from diffusion.model.teacher import check_teacher, describe_teacher
from diffusion.model.warnings import warnings_of_training
from diffusion.runs.begin import Origin, asked_origin, check_fit, find_origin, first_weights, settle, teacher_of
from diffusion.runs.call import TRAIN, Call, words_of_captions
from diffusion.runs.evaluate import evaluate, ready
from diffusion.runs.published import is_published
from diffusion.runs.run import Run, load, model_of
from diffusion.training import Experiment, RunError, make_mesh
from diffusion.training.checkpoints import open_existing, steps_in
from diffusion.training.settings import refuse_shorter
from diffusion.training.started import process_start
from diffusion.training.workdir import check_same_data
from diffusion.training.writers import MakeWriter, tensorboard

# Of a description, what the step of a config depends on.
FACTS = ("image_shape", "num_classes", "data", "condition", "space", "frozen", "teacher")
NUM_EXAMPLES = 24  # captions of the training set that previews show where the experiment has no examples


def run_training(call: Call) -> None:
    """Trains, then evaluates where the config asks for it."""
    writers = call.writers
    check_length(call.workdir, call.config.training.num_steps)
    if call.config.evaluation.after_training:
        (call.task.ready or ready)(call)
    kept = training.kept_program(call.mesh, call.task.name, plain(call.config))
    source = call.task.read(call.config, TRAIN)
    origin = None if call.stored else asked_origin(call.flags, call.config)
    vocabulary = [] if call.stored else list(call.task.vocabulary(call.config, source))
    examples = list(call.task.examples(call.config))
    run = train_on(
        call.task.name,
        call.config,
        source,
        call.workdir,
        call.mesh,
        call.stored,
        vocabulary,
        examples,
        origin,
        writers=writers,
        started=process_start(),
        kept=kept,
    )
    if call.config.evaluation.after_training:
        evaluate(call, run)


def check_length(workdir: Path, num_steps: int) -> None:
    """Raises RunError where the run in a folder has made more steps already; before its data is read."""
    if max(steps_in(workdir / "checkpoints"), default=0) > num_steps:
        with open_existing(workdir) as checkpoints:  # of damaged ones the newest does not count
            refuse_shorter(workdir, checkpoints.newest or 0, num_steps)


def train_run(
    config: Config,
    source: Source,
    workdir: str | Path,
    *,
    name: str = "run",
    num_devices: int | None = None,
    init_from: str | Path | None = None,
    init_only: Sequence[str] = (),
    init_raw: bool = False,
    optimizer: optax.GradientTransformation | None = None,
    writers: Sequence[MakeWriter] = (tensorboard,),
) -> Run:
    """Trains a model of `config` on `source` in a new or existing work folder, and returns the run.

    Args:
      config: of `diffusion.load_config`, or any with the fields of experiments/configs/_base.py.
      source: of uint8 images, as `data.sources.array_source` makes one.
      workdir: the folder of the run; a run that is there is resumed.
      name: of the experiment, stored with the run.
      num_devices: how many devices it works on; None: all.
      init_from: work folder, or FOLDER:STEP, of a run whose weights a new one begins with; see `diffusion.runs.begin`.
      init_only: of "network", "text" and "space", the parts that are taken of it; (): all that it has.
      init_raw: its raw weights, not the averaged ones.
      optimizer: any optax transformation, in place of `config.optimizer`: its own rate, nothing is clipped. The run
        records that it was given, as optimizer.name=given; to resume, pass it again.
      writers: of what is reported, beside metrics.jsonl; see `diffusion.training.writers`.

    Raises:
      RunError: settings that cannot run, a folder of another run, or weights that do not fit.
      ValueError: a config that cannot be built, or an optimizer that has to be given.

    Example:
      config = diffusion.load_config("digits:flow", {"training.num_steps": 100})
      run = diffusion.train(config, digits("train"), "runs/mine")
    """
    workdir = Path(workdir).expanduser()
    if optimizer is not None:
        config = with_given(config)
    stored = stored_in(workdir)
    origin = None
    if stored is None:
        origin = teacher_of(config) if init_from is None else find_origin(init_from, init_only, init_raw)
    config = settle(config, workdir, stored, init_from, origin)
    vocabulary = words_of_captions(config, source) if source.captions and not stored else []
    mesh = make_mesh(num_devices, config.training.get("mesh", ""))
    kept = training.kept_program(mesh, name, plain(config))
    return train_on(name, config, source, workdir, mesh, stored, vocabulary, (), origin, optimizer, writers, kept=kept)


def with_given(config: Config) -> Config:
    """Returns a config whose optimizer is not in it, but given from Python."""
    config = from_plain(plain(config)).unlock()
    config.optimizer = ConfigDict(dict(name=GIVEN))
    return config.lock()


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
    origin: Origin | None = None,
    optimizer: optax.GradientTransformation | None = None,
    writers: Sequence[MakeWriter] = (tensorboard,),
    started: float | None = None,
    kept: training.Kept | None = None,
) -> Run:
    """Trains `config` on `source` in `workdir`.

    `stored` is the description of the run there, None for a new one, which begins with the weights of `origin`;
    `started` and `kept` are those of `training.train`.
    """
    if (config.optimizer.name == GIVEN) != (optimizer is not None):
        raise ValueError("optimizer.name=given is one that Python passes: diffusion.train(..., optimizer=...)")
    model, description = describe(name, config, source, stored, vocabulary, origin)
    for line in warnings_of_training(config, model):
        logging.warning(line)
    if kept is not None:
        kept.compare({fact: description.get(fact) for fact in FACTS})
    begun: dict[str, Any] = {}
    examples = examples or spread_captions(source, NUM_EXAMPLES)
    if stored is None:
        begun, about = first_weights(config, model, origin, mesh)
        description |= about | ({"examples": list(examples)} if examples else {})
    known = kept is not None and kept.trusted
    experiment = prepare(config, model, source, workdir, mesh, stored, examples, begun, known)
    if optimizer is not None:
        experiment = experiment._replace(optimizer=optimizer)
    settings = make_settings(config)
    state = training.train(
        experiment,
        settings,
        workdir=workdir,
        mesh=mesh,
        description=description,
        migrate=formats.current,
        writers=writers,
        started=started,
        kept=kept,
    )
    params = training.averaged(state.params, state.ema, model.frozen)
    run = Run(name, workdir, config, mesh, model, params, int(state.step), settings.ema_decay, {})
    return run._replace(stored=description)


def describe(
    name: str, config: Config, source: Source, stored: Any, vocabulary: Sequence[str], origin: Origin | None = None
) -> tuple[Model, dict[str, Any]]:
    """Returns the model of a config on these images, and what is stored of it beside the weights.

    Raises:
      RunError: the run in the folder is of images of another shape, with other classes or of other data, or `origin`
        does not fit.
    """
    facts = {"image_shape": list(source.image_shape), "num_classes": None if source.captions else source.num_classes}
    if stored is not None:
        if stored["experiment"] != name:
            raise RunError(f"the folder holds a run of experiment {stored['experiment']}, not {name}")
        for fact, value in facts.items():
            if stored[fact] != value:
                raise RunError(f"the run was trained on images of {fact} {stored[fact]}, and these have {value}")
        check_same_data(stored, facts_of(source))
        return model_of(config, stored), dict(stored) | {"config": plain(config), "data": facts_of(source)}
    if config.lora.rank and (origin is None or "network" not in origin.parts):
        raise RunError(f"lora.rank={config.lora.rank} adapts a trained network: name its run, --init_from=RUN")
    taken: dict[str, Any] = origin.description if origin else {}
    if teacher := teacher_of(config):
        taken |= {"teacher": describe_teacher(teacher.stored)}
    model = make_model(config, source.image_shape, facts["num_classes"], taken, vocabulary)
    if teacher:
        check_teacher(config, model)
    if origin:
        check_fit(origin, model)
    return model, {"experiment": name, "config": plain(config), **facts, "data": facts_of(source), **stored_of(model)}


def prepare(
    config: Config,
    model: Model,
    source: Source,
    workdir: Path,
    mesh: Mesh,
    stored: Any,
    examples: Sequence[str],
    begun: dict[str, Any],
    known: bool = False,
) -> Experiment:
    """Returns the experiment on `source`, read with what the space and the condition need.

    `begun` are the groups of parameters that a run which starts, whose `stored` is None, begins with. `known` is that
    of `make_experiment`.
    """

    @cache
    def params() -> dict[str, Any]:
        return begun if stored is None else load(workdir, stored, config, mesh).params

    references: Sequence[np.ndarray] = ()
    if count := config.data.get("references", 0):
        check_references(config, f"data.references={count}")
        refuse_changes(config, "references", "leave one of them out")
        examples, references = spread_edits(source)
    if model.space.precomputed is not None:
        refuse_changes(config, "latents", "set space.precomputed=False")
        own = params()["space"]
        source, fitted = with_latents(source, model.space._replace(init=lambda key: own), own)
        assert fitted.init is not None
        begun = {**begun, "space": fitted.init(training.run_key(config.seed, "init"))} if stored is None else begun
    if model.condition.kind == "prompts":
        if not source.captions:
            raise ValueError(f"condition.name={config.condition.name} needs captions, and {source.name} has none")
        examples = examples or spread_captions(source, NUM_EXAMPLES)
        if config.condition.get("precomputed"):
            text = params()["text"]
            source = each_part(source, lambda part: prompts.with_features(part, model.condition, text))
        else:
            source = each_part(source, lambda part: with_text(part, model.condition.read))
    return make_experiment(config, model, source, mesh, examples, references, known)._replace(begun=begun)


def refuse_changes(config: Config, what: str, remedy: str) -> None:
    """Raises ValueError where training images are mirrored or augmented, and `what` is read beside them is not."""
    for field, done in (("flip", "mirror"), ("augment", "augment")):
        if value := config.data[field]:
            raise ValueError(f"data.{field}={value} {done}s images, and {what} are not {done}ed: {remedy}")


def spread_edits(source: Source) -> tuple[list[str], list[np.ndarray]]:
    """Returns captions of pairs with references, spread over a source, and these, uint8 [N, h, w, C] each."""
    part = (source.parts or (source,))[0]
    pairs = part.read(np.linspace(0, part.num_examples - 1, NUM_EXAMPLES).astype(int))
    return [part.captions[label] for label in pairs["label"]], list(pairs["reference_image"].swapaxes(0, 1))


def spread_captions(source: Source, count: int) -> list[str]:
    """Returns captions of a source, spread over it; none where it has none."""
    captions = source.captions
    return [captions[i] for i in np.linspace(0, len(captions) - 1, count).astype(int)] if captions else []
