"""What every experiment's command line shares: flags, configs, the work folder, errors in one line."""

import difflib
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
from absl import flags
from jax.sharding import Mesh
from ml_collections import ConfigDict, config_flags

from diffusion.files import cache_folder
from diffusion.training import RunError, distributed, make_mesh, workdir
from diffusion.training.checkpoints import open_existing
from diffusion.training.errors import one_line

Config = Any  # an ml_collections.ConfigDict, whose fields type checkers cannot know


class Run(NamedTuple):
    """One call of an experiment: what to do is settled, nothing is done yet."""

    experiment: str
    config: Config
    workdir: Path
    mesh: Mesh
    flags: flags.FlagValues

    @property
    def description(self) -> dict[str, Any]:
        """What a checkpoint says of itself, plain JSON."""
        return {"experiment": self.experiment, "config": plain(self.config)}


Mode = Callable[[Run], None]


def main(
    file: str,
    doc: str | None,
    *,
    default_config: str,
    modes: dict[str, Mode],
    extra_flags: Callable[[flags.FlagValues], None] = lambda values: None,
) -> NoReturn:
    """Runs the experiment in `file` as the command line says; never returns.

    Args:
      file: the experiment module's `__file__`; its stem is the experiment's name.
      doc: its docstring, shown by --help.
      default_config: a file beside it, used without --config.
      modes: what --mode can name; "train" is the default; it, "check" and "import" need no checkpoint to begin with.
      extra_flags: defines the flags that only this experiment has.
    """

    def work() -> None:
        values = flags.FlagValues()
        extra_flags(values)
        run, mode = parse(sys.argv, Path(file), doc, default_config, modes, values)
        modes[mode](run)

    run_to_end(work)


def run_to_end(work: Callable[[], None]) -> NoReturn:
    """Does `work` and exits: 0, or after what a user can mend one line and 1; --traceback shows where it came from."""
    try:
        work()
    except (RunError, ValueError, OSError, flags.Error) as error:
        if "--traceback" in sys.argv:
            traceback.print_exc()
        line = "error: " + " ".join(str(error).split())
        line += "" if isinstance(error, RunError) else " (--traceback shows where)"
        distributed.leave(1, line)
        sys.exit(line)
    except KeyboardInterrupt:
        distributed.leave(130)
        sys.exit(130)
    except Exception as error:
        if distributed.peer_died(error):
            reason = f"another process of this run has ended ({one_line(error, 200)})"
            distributed.leave(1, f"error: {reason}; the same command goes on from the newest checkpoint")
        traceback.print_exc()
        distributed.leave(1)
        sys.exit(1)
    sys.exit(0)


def define_flags(values: flags.FlagValues, modes: dict[str, Mode]) -> None:
    """Defines the flags of every experiment."""
    flags.DEFINE_string("config", None, "config file, FILE or FILE:ARGUMENT", flag_values=values)
    flags.DEFINE_string("workdir", None, "folder of the run; default: runs/CONFIG", flag_values=values)
    flags.DEFINE_enum("mode", "train", list(modes), "what to do", flag_values=values)
    flags.DEFINE_integer("num_samples", None, "how many samples", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the samples (the training's is config.seed)", flag_values=values)
    flags.DEFINE_integer("checkpoint", None, "use the one of this step, not the newest", flag_values=values)
    flags.DEFINE_string("out", None, "samples as .npz (default: in the work folder)", flag_values=values)
    flags.DEFINE_string("sampler", None, "in place of config.sampling.sampler", flag_values=values)
    flags.DEFINE_integer("steps", None, "in place of config.sampling.num_steps", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("traceback", False, "show where an error comes from", flag_values=values)


def parse(
    argv: list[str],
    file: Path,
    doc: str | None,
    default_config: str,
    modes: dict[str, Mode],
    values: flags.FlagValues,
) -> tuple[Run, str]:
    """Returns the run that `argv` asks for and its mode.

    Raises:
      RunError: unknown flag, config field or experiment file; a bad value; a work folder that does not fit.
    """
    define_flags(values, modes)
    default_path = file.parent / "configs" / default_config
    if {"--help", "-h"} & set(argv):
        print(f"{doc}\nFlags:\n{values.get_help()}\n\nConfig ({default_path.name}), --config.FIELD=VALUE:")
        for name, value in workdir.flatten(plain(load(str(default_path)))).items():
            print(f"  {name} = {value}")
        raise SystemExit(0)
    rest = values(argv, known_only=True)
    path = values.config or str(default_path)
    folder = Path(values.workdir or f"runs/{file.stem if values.config is None else Path(path.split(':')[0]).stem}")
    begins = values.mode in ("train", "check", "import")
    config = load(path) if begins or values.config else None
    if begins and values.checkpoint is not None:
        raise RunError(f"--checkpoint is for the use of a trained model, not for --mode={values.mode}")

    if not begins:
        with open_existing(folder, values.checkpoint) as checkpoints:
            stored = checkpoints.description()
        if stored["experiment"] != file.stem:
            raise RunError(f"{folder} holds experiment {stored['experiment']}, not {file.stem}")
        if config is not None and (changed := workdir.differences(stored["config"], plain(config))):
            raise RunError(f"{folder} was trained with another config (there -> asked): {'; '.join(changed)}")
        config = config or from_plain(stored["config"])
    assert config is not None
    config = override(config, rest, values)
    if values.sampler is not None:
        config.sampling.sampler = values.sampler
    if values.steps is not None:
        config.sampling.num_steps = values.steps
    if begins and values.mode != "import":  # which refuses any folder that is there
        workdir.check(folder, file.stem, plain(config))
    use_compilation_cache()
    distributed.join()
    return Run(file.stem, config, folder, make_mesh(), values), values.mode


def load(path: str) -> Config:
    """Returns `get_config()` (or `get_config(ARGUMENT)` for FILE:ARGUMENT) of a config file, locked."""
    name, _, argument = path.partition(":")
    if not Path(name).is_file():
        there = ", ".join(sorted(p.stem for p in (Path(__file__).parent / "configs").glob("[!_]*.py")))
        raise RunError(f"no config file {name}; those in experiments/configs are: {there}")
    return runpy.run_path(name)["get_config"](*([argument] if argument else [])).lock()


def override(config: Config, arguments: list[str], known: flags.FlagValues) -> Config:
    """Applies `--config.FIELD=VALUE` arguments, each value read as its field's type.

    Raises:
      RunError: a field or flag that is not there (names the nearest), or a value that is not of the field's type.
    """
    fields = workdir.flatten(plain(config))
    for argument in arguments[1:]:
        if not argument.startswith("-"):
            continue  # the value of the flag before it
        name = argument.lstrip("-").split("=")[0]
        if name.startswith("config.") and name.removeprefix("config.") in fields:
            continue
        names = [f"config.{field}" for field in fields] + list(known)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
        kind = "config field" if name.startswith("config.") else "flag"
        raise RunError(f"unknown {kind} {argument.split('=')[0]}: did you mean --{near}? (--help lists all)")
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        unused = values(arguments)[1:]
    except (flags.Error, TypeError) as error:
        raise RunError(str(error)) from error
    if unused:
        raise RunError(f"unexpected argument {unused[0]!r}: flags look like --name=value (--help lists all)")
    return config


def plain(config: Config) -> dict[str, Any]:
    """Returns a config as JSON holds it (tuples become lists)."""
    return json.loads(json.dumps(config.to_dict()))


def from_plain(tree: dict[str, Any]) -> Config:
    """Returns the config that `plain` was made of: every list was a tuple."""

    def restore(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: restore(child) for name, child in value.items()}
        return tuple(restore(child) for child in value) if isinstance(value, list) else value

    return ConfigDict(restore(tree)).lock()


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, so that the second start is fast. JAX_COMPILATION_CACHE_DIR moves it."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
