"""The fields of a config: files by name, blocks that choose by name, changes of single fields.

load("digits:flow", folder)                    # a file of the folder with methods, or any FILE:METHODS
change(config, {"process.name": "vp", "training.num_steps": 100})
"""

import contextlib
import difflib
import inspect
import runpy
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion.model.choices import fields_of
from diffusion.model.config import Config, from_plain, plain
from diffusion.model.experiment import CONDITIONS, NETWORKS
from diffusion.model.lora import make_lora
from diffusion.model.losses import LOSSES
from diffusion.model.optimizers import OPTIMIZERS, SCHEDULES, SHARED
from diffusion.model.processes import PROCESSES
from diffusion.model.sampling import GRIDS, SAMPLERS, THRESHOLDS
from diffusion.model.space import SPACES
from diffusion.training import RunError
from diffusion.training.errors import one_line
from diffusion.training.workdir import flatten

# Blocks that hold a name and the fields of that name, and what every name of a block has.
CHOICES: dict[str, Mapping[str, Any]] = {
    "process": PROCESSES,
    "network": NETWORKS,
    "condition": CONDITIONS,
    "space": SPACES,
    "loss": LOSSES,
    "optimizer": OPTIMIZERS,
    "optimizer.schedule": SCHEDULES,
    "sampling.sampler": SAMPLERS,
    "sampling.grid": GRIDS,
    "sampling.threshold": THRESHOLDS,
}
ALWAYS = {"optimizer": SHARED}
# Tuples of names; all others hold numbers.
NAMES = ("evaluation.metrics", "condition.leave_out", "lora.targets", "data.augment")
SIDES = ("data.image_size",)  # hold one side, or a tuple of (height, width): a value of either type is taken
NEAR = 0.75  # of difflib's ratio: a name less alike is not offered


def load(spec: str, folder: Path) -> tuple[Config, str]:
    """Returns the config that `spec` names, locked, and a name for its runs.

    Args:
      spec: a FILE, or the stem of one in `folder`; with methods as FILE:METHODS, separated by commas, or STEM_METHOD.
      folder: of config files.

    Raises:
      RunError: there is no such file, or it does not have these methods.
    """
    path, methods = find_file(spec, folder)
    try:
        with importing_from(folder.resolve().parent.parent):  # config files share experiments/configs/_base.py
            get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise RunError(f"{path} has no function get_config: it is not a config file")
        if methods and not inspect.signature(get_config).parameters:
            raise RunError(f"{path} takes no methods: leave out :{methods}")
        config = get_config(methods) if methods else get_config()
    except ValueError as error:
        raise RunError(f"{path}: {error}") from error
    except (Exception, SystemExit) as error:  # the file is a program, which may do anything
        if isinstance(error, RunError):
            raise
        raise RunError(f"{path} cannot be read as a config: {type(error).__name__}: {one_line(error)}") from error
    if not isinstance(config, ConfigDict) or "seed" not in config:
        raise RunError(f"{path}: get_config returns no config of a run, a ConfigDict as _base.image_config makes it")
    return complete(config), "_".join([path.stem, *filter(None, methods.split(","))])


def find_file(spec: str, folder: Path) -> tuple[Path, str]:
    """Returns the file that `spec` of `load` names, and its methods.

    Raises:
      RunError: there is no such file.
    """
    name, _, methods = spec.partition(":")
    path = Path(name).expanduser()
    if path.is_file():
        return path, methods
    there = sorted(path.stem for path in folder.glob("[!_]*.py"))
    stem = next((stem for stem in there if name == stem or name.startswith(f"{stem}_")), None)
    if stem is None or path.suffix:
        near = nearest(name, there) if not path.suffix else ""
        where = f"{folder.parent.name}/{folder.name}"
        raise RunError(
            f"no config file {name}{near}{'; ' if not near else ' '}those in {where} are: {', '.join(there)}"
        )
    return folder / f"{stem}.py", ",".join(filter(None, (name[len(stem) + 1 :], methods)))


@contextlib.contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Modules in `folder` can be imported within the block, as when Python was started there."""
    sys.path.append(str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def load_config(
    spec: str, changes: Mapping[str, Any] | None = None, folder: str | Path = "experiments/configs"
) -> Config:
    """Returns the config that `spec` names, with `changes` of its fields.

    Args:
      spec: FILE, or NAME of a file in `folder`; with methods FILE:METHOD,METHOD.
      changes: as {"training.num_steps": 100}.
      folder: of config files.

    Raises:
      RunError: there is no such file, method or field.

    Example:
      load_config("digits:flow", {"training.num_steps": 100})
    """
    return change(load(spec, Path(folder))[0], changes or {})


def complete(config: Config) -> Config:
    """Returns `config` locked, every choice with all fields of its name: those that are missing have their defaults."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        if "process" in config and "space" not in config:  # stored before there were others
            config.space = ConfigDict(dict(name="pixels"))
        if "process" in config and "size" not in config.sampling:
            config.sampling.size = ()
        if "process" in config and "lora" not in config:
            config.lora = ConfigDict(defaults_of(make_lora))
        if "process" in config and "name" not in config.loss:
            config.loss.name = "denoising"
        if "skip_broken" in config.get("data", {}) and "split" in config.data and "buckets" not in config.data:
            config.data.buckets = 0  # of captioned folders
        if "flip" in config.get("data", {}) and "augment" not in config.data:
            config.data.augment = ()
        if config.get("optimizer", {}).get("name") in OPTIMIZERS and "schedule" not in config.optimizer:
            config.optimizer.schedule = ConfigDict(dict(name="wsd"))
        for place, table in CHOICES.items():
            block = block_at(config, place)
            if block is not None and block.get("name") in table:
                for field, default in defaults_of(table[block.name]).items():
                    if field not in block:
                        block[field] = default
    return config.lock()


def is_choice(config: Config, place: str) -> bool:
    """Returns whether `place` is that of a choice: the loss of a model that is no diffusion is none."""
    return place in CHOICES and (place != "loss" or "process" in config)


def choose(config: Config, place: str, name: str) -> None:
    """Changes the choice at `place` to `name`, in place: fields that both have keep their values.

    Raises:
      RunError: there is no such choice.
    """
    block, table = block_at(config, place), CHOICES[place]
    if block is None:
        raise RunError(f"this experiment's config has no {place}")
    if name not in table:
        raise RunError(f"{place}.name is {name!r}: choose from {', '.join(table)}")
    fields = defaults_of(table[name]) | {field: block[field] for field in ALWAYS.get(place, ()) if field in block}
    kept = {field: block[field] for field in fields if field in block}
    if name == "ancestral":
        preserving = config.process.name in ("ddpm", "vp")  # elsewhere there is no beta, which "large" is
        fields["variance"] = "learned" if config.loss.get("learned_variance") else "large" if preserving else "small"
    with config.unlocked():
        for field in list(block):
            del block[field]
        block.update({"name": name, **fields, **kept})


def change(config: Config, changes: Mapping[str, Any]) -> Config:
    """Returns a copy of `config` with fields changed by their full names, choices first.

    A choice is changed by its name: {"process": "flow"}, or {"process.name": "flow"}.

    Example:
      change(config, {"process": "flow", "training.num_steps": 100})

    Raises:
      RunError: a field that does not exist, or a value of another type.
    """
    config = from_plain(plain(config))
    names = {field: value for field, value in changes.items() if is_choice(config, field.removesuffix(".name"))}
    for field, value in names.items():
        choose(config, field.removesuffix(".name"), value)
    for field, value in changes.items():
        if field in names:
            continue
        check_field(config, field)
        old = flatten(plain(config))[field]
        retype(config, field, isinstance(value, tuple | list))
        try:
            check_items(field, old, value)
            config.update_from_flattened_dict({field: value})
        except (TypeError, ValueError) as error:
            raise RunError(f"{field} is {value!r}: it must be like {old!r}") from error
    return config


def retype(config: Config, field: str, to_tuple: bool) -> None:
    """Makes a field of `SIDES` one that takes a tuple, or else a number, in place; others keep their type."""
    block, _, name = field.rpartition(".")
    if field in SIDES and isinstance(config[block][name], tuple) != to_tuple:
        with config.ignore_type():
            config[block][name] = () if to_tuple else 0


def check_field(config: Config, field: str) -> None:
    """Raises RunError, naming what there is, unless `config` has this field."""
    fields = flatten(plain(config))
    if field in fields:
        return
    place, _, last = field.rpartition(".")
    if is_choice(config, place) and "name" in (block := block_at(config, place) or {}):
        own = [name for name in block if name != "name"]
        has = f"it has {', '.join(own)}" if own else "it has no fields"
        raise RunError(f"{last} is not a field of {place}.name={block['name']}{nearest(last, own) or ':'} {has}")
    raise RunError(f"unknown config field {field}{nearest(field, fields)} (--help lists all)")


def check_items(field: str, old: Any, value: Any) -> None:
    """Raises RunError unless the items of a tuple are of the kind that they were: names, or else numbers."""
    if not isinstance(old, tuple | list) or not isinstance(value, tuple | list):
        return
    names = field in NAMES or any(isinstance(item, str) for item in old)
    kind, what = (str, "names") if names else (int | float, "numbers")
    if not all(isinstance(item, kind) and not isinstance(item, bool) for item in value):
        raise RunError(f"{field} is {tuple(value)}: {what} are needed{f', as {tuple(old)}' if old else ''}")


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns ": did you mean X?" for the names most like `name`, or ": did you mean X or Y?"; "" where none is near.

    What counts is the last part: its words, as steps of num_steps, their initials, as lr of learning_rate, or its
    letters. The block before it decides between equals.
    """
    block, _, last = name.rpartition(".")
    words = set(last.split("_"))

    def likeness(other: str) -> float:
        place, _, field = other.rpartition(".")
        others = field.split("_")
        own = difflib.SequenceMatcher(None, last, field).ratio()
        if len(last) > 1 and (last == "".join(word[:1] for word in others) or words <= {*others} or words >= {*others}):
            own = 0.9 + 0.1 * own
        same = difflib.SequenceMatcher(None, block, place).ratio() > NEAR
        return own + 0.1 * same if own > NEAR else 0.0

    found = {other: likeness(other) for other in names}
    best = max(found.values(), default=0.0)
    closest = [other for other, value in found.items() if value == best and best]
    return f": did you mean {' or '.join(closest[:4])}?" if closest else ""


def block_at(config: Config, place: str) -> Any:
    """Returns the block at a dotted place; None where there is none."""
    for name in place.split("."):
        if name not in config or not hasattr(config[name], "items"):
            return None
        config = config[name]
    return config


def defaults_of(function: Any) -> dict[str, Any]:
    """Returns the fields of a choice as a config holds them: None, which has no type to keep, is 0."""
    fields = {name: 0 if value is None else value for name, value in fields_of(function).items()}
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return fields | ({"dtype": "float32"} if "dtype" in fields else {})
