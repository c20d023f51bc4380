"""What a run begins with: weights that are drawn, those of published parts and, with --init_from=RUN, another run's.

    python -m experiments.digits --init_from=runs/digits:2000 --workdir=runs/more --config.optimizer.learning_rate=1e-5
    python -m experiments.sd3 --init_from=runs/sd3 --workdir=runs/mine --config.data.dir=DIR

RUN is a work folder: of a training, or of a published pipeline. The new run has its weights, averaged or raw, and a new
optimizer; its config has to fit them. What it leaves open, text encoders and an autoencoder without a `folder`, is
RUN's, and then so are the network's settings and those it is sampled with: steps, guidance, the shift of their times.
Where the weights are from is stored with the new run.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict

from diffusion.model.config import Config, from_plain, plain
from diffusion.model.model import Model, init, parts
from diffusion.model.teacher import fit_network
from diffusion.runs.published import is_published
from diffusion.runs.run import load, model_of, read_description
from diffusion.training import RunError, run_key
from diffusion.training.checkpoints import steps_in

PARTS = {"network": "network", "text": "condition", "space": "space"}  # groups of weights, and their blocks in a config
# Fields of these blocks that say how a part is used, not what it is: those of the new run.
OWN = {
    "network": ("dtype", "remat", "fused_norms", "scan", "dropout"),
    "condition": ("folder", "precomputed", "dropout", "null"),
    "space": ("folder", "precomputed", "sample", "fitted"),
}
SAMPLED = ("num_steps", "guidance")  # fields of sampling that belong to the network
NAMED = 3  # arrays in a message


class Origin(NamedTuple):
    """A run that another begins with.

    Attributes:
      folder: its work folder.
      step: of its checkpoint; None: the newest.
      raw: whether its raw weights are taken, not the averaged ones.
      parts: of `PARTS`, those that are taken.
      stored: its description.
    """

    folder: Path
    step: int | None
    raw: bool
    parts: tuple[str, ...]
    stored: Mapping[str, Any]

    @property
    def description(self) -> dict[str, Any]:
        """What is stored of the parts that are taken."""
        return {block: self.stored.get(block) for part, block in PARTS.items() if part in self.parts}


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that say what a training begins with."""
    flags.DEFINE_string("init_from", None, "begin with the weights of a run: RUN, or RUN:STEP", flag_values=values)
    flags.DEFINE_list("init_only", [], "of them, only these parts: network, text, space", flag_values=values)
    flags.DEFINE_bool("init_raw", False, "the raw weights, not the averaged ones", flag_values=values)


def asked_origin(values: flags.FlagValues, config: Config) -> Origin | None:
    """Returns the run that --init_from names, else the teacher of a config; None where there is neither."""
    if values.init_from is None:
        if values.init_only or values.init_raw:
            raise RunError(f"--{'init_only' if values.init_only else 'init_raw'} is of --init_from=RUN: give that too")
        return teacher_of(config)
    return find_origin(values.init_from, values.init_only, values.init_raw)


def teacher_of(config: Config) -> Origin | None:
    """Returns the run that a config's loss learns from; None where it learns from images alone."""
    if "teacher" not in config.get("loss", {}):
        return None
    if not config.loss.teacher:
        raise RunError(
            f"loss.name={config.loss.name} learns from a trained model: name its work folder, --config.loss.teacher=RUN"
        )
    return find_origin(config.loss.teacher, flag="config.loss.teacher")


def find_origin(spec: str | Path, only: Sequence[str] = (), raw: bool = False, flag: str = "init_from") -> Origin:
    """Returns the run that another is to begin with; no weights are read.

    Args:
      spec: its work folder, or FOLDER:STEP.
      only: of "network", "text" and "space", the parts that are taken; (): all that it has.
      raw: see `Origin`.
      flag: that names it, for messages.

    Raises:
      RunError: there is no such run or step, it draws no pictures, or it has no such part.
    """
    folder, step = split(spec)
    if not is_published(folder) and not steps_in(folder / "checkpoints"):
        raise RunError(f"--{flag}={spec}: {folder} holds no checkpoint: name the work folder of a trained run")
    stored = read_description(folder, step)
    if "image_shape" not in stored:
        raise RunError(f"--{flag}={spec}: it holds experiment {stored['experiment']}, which draws no pictures")
    model = model_of(from_plain(stored["config"]), stored)
    has = {"network": True, "text": model.condition.init is not None, "space": model.space.init is not None}
    there = tuple(name for name, is_there in has.items() if is_there)
    if unknown := [name for name in only if name not in there]:
        raise RunError(f"--init_only={','.join(only)}: {folder} has no {unknown[0]}: choose from {', '.join(there)}")
    return Origin(folder, step, raw, tuple(name for name in there if name in only or not only), stored)


def split(spec: str | Path) -> tuple[Path, int | None]:
    """Returns folder and step of RUN or RUN:STEP."""
    name, _, step = str(spec).rpartition(":")
    if name and step.isdigit():
        return Path(name).expanduser(), int(step)
    return Path(spec).expanduser(), None


def settle(
    config: Config,
    workdir: Path,
    stored: Mapping[str, Any] | None,
    init_from: str | Path | None,
    origin: Origin | None,
    asked: Sequence[str] = (),
) -> Config:
    """Returns the config of a run that begins, or resumes, where it leaves parts open to the run that it begins with.

    Args:
      config: as it was given.
      workdir: folder of the run.
      stored: its description; None where it begins.
      init_from: what was asked for; None where nothing was.
      origin: the same, found; not read where the run resumes.
      asked: fields of `config` that the command line names.

    Raises:
      RunError: the run that resumes began with other weights, or a field asked for is one that the origin fixes.
    """
    if stored is None:
        return config if origin is None else adopt(config, origin, asked)
    begun = stored.get("begun")
    if init_from is not None and (begun is None or begun["folder"] != split(init_from)[0].name):
        began = f"began with {begun['folder']}" if begun else "began without --init_from"
        raise RunError(f"{workdir} {began}: leave --init_from={init_from} out to resume it, or name another --workdir")
    return adopt(config, Origin(workdir, None, False, tuple(begun["parts"]), stored), asked) if begun else config


def adopt(config: Config, origin: Origin, asked: Sequence[str] = ()) -> Config:
    """Returns `config` with the blocks of `origin` for the parts that it leaves open; see the module's lines."""
    theirs, config = from_plain(origin.stored["config"]), from_plain(plain(config))
    scaled = "time_scale" in config.process and config.process.name == theirs.process.name
    student = "teacher" in config.loss
    if scaled and student and "process.time_scale" not in asked:
        config.process.time_scale = theirs.process.time_scale  # a student embeds times as the teacher that it begins as
    if student and "prediction" in theirs.loss and "loss.prediction" not in asked:
        config.loss.prediction = theirs.loss.prediction  # and returns what that returns
    left_open = [
        block
        for part, block in PARTS.items()
        if part in origin.parts and config[block].get("folder") == "" and config[block].name == theirs[block].name
    ]
    if not left_open:
        return config
    config.unlock()
    for block in [*left_open, *(["network"] if "network" in origin.parts else [])]:
        own = {field: config[block][field] for field in OWN[block] if field in config[block]}
        fixed = {field: value for field, value in theirs[block].items() if field not in OWN[block]}
        for field, value in fixed.items():
            if f"{block}.{field}" in asked and config[block].get(field) != value:
                has = f"{origin.folder} has {value or 'none'}"
                raise RunError(f"--config.{block}.{field}={config[block].get(field)}: {has}: leave it out")
        config[block] = ConfigDict({**theirs[block], **fixed, **own})
    own = {field: theirs.sampling[field] for field in SAMPLED if f"sampling.{field}" not in asked}
    config.sampling.update(own)
    grid = config.sampling.grid
    if grid.name == theirs.sampling.grid.name:
        shared = {name: value for name, value in theirs.sampling.grid.items() if f"sampling.grid.{name}" not in asked}
        grid.update(shared)
    return config.lock()


def check_fit(origin: Origin, model: Model) -> None:
    """Raises RunError, naming the first arrays, where the weights of `origin` are not those of `model`."""
    theirs = model_of(from_plain(origin.stored["config"]), origin.stored)
    there, here = shapes_of(theirs, origin.parts, model), shapes_of(model, origin.parts, model)
    if "network" in origin.parts and theirs.process.time_scale != model.process.time_scale:
        logging.warning(
            f"the network of {origin.folder} learned with process.time_scale={theirs.process.time_scale:g}, and this "
            f"run has {model.process.time_scale:g}: what it learned of times is lost"
        )
    if "network" in origin.parts and theirs.objective.prediction != model.objective.prediction:
        logging.warning(
            f"the network of {origin.folder} returns {theirs.objective.prediction}, and this run reads it as "
            f"{model.objective.prediction}: it does not begin as that model; see --config.loss.prediction"
        )
    wrong = []
    for name in sorted(there | here):
        if there.get(name) != here.get(name):
            one = f"{name} is {there[name]} there" if name in there else f"{name} is not there"
            wrong.append(f"{one} and {here[name]} here" if name in here else f"{one} and not here")
    if wrong:
        more = f", and {len(wrong) - NAMED} more" if len(wrong) > NAMED else ""
        raise RunError(
            f"the weights of {origin.folder} do not fit this config: {'; '.join(wrong[:NAMED])}{more}. Give the run's "
            "own settings, or --init_only=PARTS that fit"
        )


def shapes_of(model: Model, names: Sequence[str], of: Model) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the arrays of a model's parts, by their paths, as a run of the model `of` begins with."""
    found = jax.eval_shape(lambda key: groups(model, init(model, key), names, of, key), jax.random.key(0))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(found)
    }


def groups(model: Model, params: Any, names: Sequence[str], of: Model, key: jax.Array) -> dict[str, Any]:
    """Returns the parameters of parts by name; the network's with its adapters merged, fit for the model `of`."""
    found = parts(model, params)._asdict()
    return {name: fit_network(of, found[name], key) if name == "network" else found[name] for name in names}


def first_weights(
    config: Config, model: Model, origin: Origin | None, mesh: Mesh
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the groups of parameters that a new run begins with, beside what is drawn, and what is stored of that.

    Args:
      config: of the run.
      model: of the run; it fits `origin`.
      origin: the run that it begins with, if any.
      mesh: the devices.

    Raises:
      RunError: weights that cannot be read, or are not finite.
    """
    key = run_key(config.seed, "init")
    found, about = read_weights(origin, model, key, mesh) if origin else ({}, {})
    if model.teacher is not None:
        found["teacher"], described = teacher_weights(config, model, mesh)
        about |= {"teacher": {**model.teacher.description, **described}}
    for name, part in (("text", model.condition), ("space", model.space)):
        if name in model.frozen and name not in found:
            assert part.init is not None
            found[name] = part.init(key)
    return (found if model.grouped else found.get("network", {})), about


def teacher_weights(config: Config, model: Model, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the averaged weights of a run's teacher, on the mesh, and where they are from."""
    origin = teacher_of(config)
    assert origin is not None
    run = load(origin.folder, origin.stored, from_plain(origin.stored["config"]), mesh, origin.step)
    own = parts(run.model, run.params)
    learned = {"text": own.text} if own.text is not None and not model.condition.frozen else {}
    about = {"folder": origin.folder.resolve().name, "step": run.step, "digest": run.digest}
    return {"network": own.network, **learned}, about


def read_weights(origin: Origin, model: Model, key: jax.Array, mesh: Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the weights of the parts that are taken, on the mesh, and {"begun": where they are from}."""
    config = from_plain(origin.stored["config"])
    published = "pipeline" in origin.stored
    if published:
        config.network.dtype = "float32"  # the numbers in the files, which training changes by less than bfloat16 shows
    run = load(origin.folder, origin.stored, config, mesh, origin.step, raw=origin.raw)
    about = {
        "folder": origin.folder.resolve().name,
        "step": run.step,
        "digest": run.digest,
        "weights": "published" if published else "raw" if origin.raw else "averaged",
        "parts": list(origin.parts),
    }
    return groups(run.model, run.params, origin.parts, model, key), {"begun": about}
