"""The command line of every experiment: flags, configs, the work folder, errors in one line."""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import flags
from ml_collections import config_flags

from diffusion.compiler import hush_cache
from diffusion.extras import MissingExtra
from diffusion.files import cache_folder, check_file, check_folder
from diffusion.model import formats
from diffusion.model.config import Config, check_ranges, from_plain, plain
from diffusion.model.fields import SIDES, check_field, check_items, choose, is_choice, load, nearest, retype
from diffusion.model.idle import refuse_idle
from diffusion.runs.begin import asked_origin, settle
from diffusion.runs.call import Call, Task
from diffusion.runs.help import help_text
from diffusion.runs.run import check_changes, read_description
from diffusion.runs.train import stored_in
from diffusion.training import RunError, check_seed, make_mesh, processes, workdir
from diffusion.training.ahead import target_mesh
from diffusion.training.chips import parse_target
from diffusion.training.errors import one_line
from diffusion.training.writers import DEFAULT, WRITERS

Mode = Callable[[Call], None]
LONGEST = 560  # characters of an error
BEGIN = ("train", "check", "import")  # modes that need no checkpoint
DRAW = ("sample", "interpolate", "inpaint", "img2img", "progressive")
SCORE = ("train", "evaluate", "sweep")
MANY = 10**8  # samples are not meant
HELP = {"--help", "-h"}
# Which modes read a flag, of those that not all do.
READ_BY = {
    **dict.fromkeys(("prompt", "negative_prompt", "label", "lora"), DRAW),
    "prompts": (*DRAW, "score"),
    "images": ("sample", "interpolate", "inpaint", "img2img", "score", "reconstruct"),
    **dict.fromkeys(("like", "trajectory"), ("sample",)),
    "strength": ("interpolate", "img2img", "sample"),
    "mask": ("inpaint", "sample"),
    "resample": ("inpaint",),
    **dict.fromkeys(("sweep_steps", "sweep_ema"), ("sweep",)),
    **dict.fromkeys(("metrics", "num_seeds"), SCORE),
    "num_samples": (*DRAW, *SCORE, "likelihood", "reconstruct"),
    "out": (*DRAW, "train", "evaluate", "reconstruct"),
    "weights": ("import", "export"),
    "target": ("check",),
    "writers": ("train", "evaluate"),
    "with": ("compare",),
    **dict.fromkeys(("init_from", "init_only", "init_raw"), ("train", "check")),
    **dict.fromkeys(("variant", "tokenizers", "null_class", "new_attention_order"), ("import",)),
}


def run_to_end(work: Callable[[], None]) -> NoReturn:
    """Does `work` and exits: 0, or after what a user can mend one line and 1; --traceback shows where it came from."""
    try:
        work()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe, as head, has what it wants
        for stream in (sys.stdout, sys.stderr):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        sys.exit(141)
    except (RunError, ValueError, OSError, MissingExtra, flags.Error) as error:
        if "--traceback" in sys.argv:
            traceback.print_exc()
        line = f"error: {one_line(error, LONGEST)}"
        line += "" if is_slip(error) else " (--traceback shows where)"
        processes.leave(1, line)
        sys.exit(line)
    except MemoryError as error:
        sys.exit(f"error: not enough memory ({one_line(error)}): lower what was asked for")
    except KeyboardInterrupt:
        processes.leave(130)
        sys.exit(130)
    except Exception as error:
        if processes.peer_died(error):
            reason = f"another process of this run has ended ({one_line(error, 200)})"
            processes.leave(1, f"error: {reason}; the same command resumes from the newest checkpoint")
        traceback.print_exc()
        processes.leave(1)
        sys.exit(1)
    sys.exit(0)


def is_slip(error: Exception) -> bool:
    """Returns whether the line of an error is all that its reader needs: a value or a file that we refuse by its name.

    Others come from within a package that was called, and where from is what is to be known.
    """
    if isinstance(error, RunError | MissingExtra | flags.Error):
        return True
    if isinstance(error, OSError):
        return error.filename is not None
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "").partition(".")[0] in ("diffusion", "experiments", "__main__")


def define_flags(values: flags.FlagValues, modes: dict[str, Mode]) -> None:
    """Defines the flags of every experiment."""
    flags.DEFINE_string(
        "config", None, "NAME in experiments/configs, or a FILE; with methods NAME:METHOD,METHOD", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "folder of the run; default: runs/CONFIG", flag_values=values)
    flags.DEFINE_enum("mode", "train", list(modes), "what to do", flag_values=values)
    flags.DEFINE_integer("num_samples", None, "how many samples", lower_bound=1, upper_bound=MANY, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of the samples (the training's is config.seed)", flag_values=values)
    flags.DEFINE_integer("checkpoint", None, "use the one of this step, not the newest", flag_values=values)
    flags.DEFINE_float(
        "ema_length",
        None,
        "use the power-function average of this relative length, not the run's own (Karras et al. 2024)",
        flag_values=values,
    )
    flags.DEFINE_string("out", None, "samples as .npz (default: in the work folder)", flag_values=values)
    flags.DEFINE_string("sampler", None, "in place of config.sampling.sampler.name", flag_values=values)
    flags.DEFINE_integer(
        "sampling_steps", None, "in place of config.sampling.num_steps", lower_bound=1, flag_values=values
    )
    flags.DEFINE_alias("steps", "sampling_steps", flag_values=values)
    flags.DEFINE_list(
        "writers", list(DEFAULT), f"of what is reported, beside metrics.jsonl: {', '.join(WRITERS)}", flag_values=values
    )
    flags.DEFINE_bool("traceback", False, "show where an error comes from", flag_values=values)


def parse(
    argv: list[str],
    task: Task,
    doc: str | None,
    configs: Path,
    default_config: str,
    modes: dict[str, Mode],
    values: flags.FlagValues,
) -> tuple[Call, str]:
    """Returns what `argv` asks for and its mode.

    Args:
      argv: the program's name and its arguments.
      task: of the experiment.
      doc: its docstring, shown by --help.
      configs: folder of config files.
      default_config: stem of the one without --config.
      modes: what --mode can name.
      values: where the flags of the modes are defined; those of every experiment are added.

    Raises:
      RunError: unknown flag, config field or config file; a bad value; a work folder that does not fit.
    """
    define_flags(values, modes)
    asked = HELP & set(argv)
    rest = values([argument for argument in argv if argument not in HELP], known_only=True)
    if asked:
        spec = values.config or default_config
        config = override(load(spec, configs)[0], rest, values)
        print(help_text(doc or "", modes, values, READ_BY, config, spec, configs), flush=True)
        raise SystemExit(0)
    if empty := [name for name in values if values[name].present and values[name].value in ("", [], [""])]:
        raise RunError(f"--{empty[0]}= is empty: give it a value, or leave it out")
    refuse_unread(values, modes)
    check_seed(values.seed)
    if values.out and not values.out.endswith(".npz"):
        raise RunError(f"--out={values.out}: images are written to an .npz file, with a picture of them beside it")
    if values.out:
        check_file(Path(values.out).expanduser(), f"--out={values.out}")
    begins = values.mode in BEGIN
    config, name = load(values.config or default_config, configs)
    folder = Path(values.workdir).expanduser() if values.workdir else Path("runs") / name
    if begins and (values.checkpoint is not None or values.ema_length is not None):
        flag = "--checkpoint" if values.checkpoint is not None else "--ema_length"
        raise RunError(f"{flag} is for the use of a trained model, not for --mode={values.mode}")
    if begins:
        check_folder(folder, f"--workdir={folder}")

    if begins:
        stored = stored_in(folder) if values.mode != "import" else None
        config = override(config, rest, values)
        check_seed(config.seed)
        if values.mode != "import":  # which refuses any folder that exists
            if "init_from" in values:
                origin = asked_origin(values, config) if stored is None else None
                asked = (*fields_asked(rest), *(("sampling.num_steps",) if values.steps is not None else ()))
                config = settle(config, folder, stored, values.init_from, origin, asked)
            workdir.check(folder, task.name, plain(config), formats.current)
    else:
        stored = read_description(folder, values.checkpoint)
        if stored["experiment"] != task.name:
            raise RunError(f"{folder} holds experiment {stored['experiment']}, not {task.name}")
        old = from_plain(stored["config"])
        if values.config is not None:
            check_changes(folder, old, config)
        config = override(config if values.config is not None else old, rest, values)
        check_changes(folder, old, config)
    check_ranges(config)
    refuse_idle(config, fields_asked(rest))
    use_compilation_cache()
    processes.join()
    if "target" in values and values.target:
        mesh = target_mesh(parse_target(values.target), config.training.mesh)
    else:
        mesh = make_mesh(spec=config.training.mesh)
    return Call(task, config, folder, mesh, values, stored, fields_asked(rest)), values.mode


def fields_asked(arguments: list[str]) -> tuple[str, ...]:
    """Returns the fields of the config that arguments name."""
    return tuple(name.removeprefix("config.") for name in map(name_of, arguments) if name.startswith("config."))


def refuse_unread(values: flags.FlagValues, modes: Mapping[str, Mode]) -> None:
    """Raises RunError where a flag is given that the mode does not read."""
    for name, readers in READ_BY.items():
        if name in values and values[name].present and values.mode not in readers:
            known = ", ".join(mode for mode in readers if mode in modes)
            raise RunError(f"--{name} is not read by --mode={values.mode}, but by {known}: leave it out")


def name_of(argument: str) -> str:
    """Returns NAME of an argument --NAME=VALUE."""
    return argument.lstrip("-").partition("=")[0]


def override(config: Config, arguments: list[str], known: flags.FlagValues) -> Config:
    """Returns `config` changed by `--config.FIELD=VALUE` arguments, --sampler and --sampling_steps.

    A choice's name is applied first, so that the fields of that name can be given too.

    Raises:
      RunError: a field or flag that does not exist (names the nearest), or a value that is not of the field's type.
    """
    config = from_plain(plain(config))
    named = {argument: place for argument in arguments if (place := place_named(argument, config))}
    for argument, place in named.items():
        choose(config, place, argument.partition("=")[2])
    arguments = [argument for argument in arguments if argument not in named]
    fields = [argument for argument in arguments[1:] if argument.startswith("-")]  # not the value of the flag before
    samplers = [argument for argument, place in named.items() if place == "sampling.sampler"]
    steps = [argument for argument in arguments if name_of(argument) == "config.sampling.num_steps"]
    for flag, said in (("sampler", samplers), ("sampling_steps", steps)):
        if known[flag].value is not None and said:
            raise RunError(f"--{flag} and --{name_of(said[0])} say the same: leave one out")
    if known.sampler is not None:
        choose(config, "sampling.sampler", known.sampler)
    for argument in fields:
        name = argument.lstrip("-").split("=")[0]
        if not name.startswith("config."):
            names = [*known, *(f"config.{field}" for field in workdir.flatten(plain(config)))]
            near = nearest(name, names).replace("you mean ", "you mean --").replace(" or ", " or --")
            raise RunError(f"unknown flag {argument.split('=')[0]}{near} (--help lists all)")
        check_field(config, name.removeprefix("config."))
    flat = workdir.flatten(plain(config))
    arguments = [whole(argument, flat) for argument in last_tuples(with_value(arguments), flat)]
    for argument in arguments:
        retype(config, name_of(argument).removeprefix("config."), "," in argument.partition("=")[2])
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        unused = values(arguments)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        raise RunError(str(error)) from error
    for field, value in workdir.flatten(plain(config)).items():
        check_items(field, flat[field], value)
    if unused:
        raise RunError(f"unexpected argument {unused[0]!r}: flags look like --name=value (--help lists all)")
    if known.sampling_steps is not None:
        check_field(config, "sampling.num_steps")
        config.sampling.num_steps = known.sampling_steps
    return config


def place_named(argument: str, config: Config) -> str:
    """Returns the place of the choice that --config.PLACE=NAME or --config.PLACE.name=NAME names; "" for others."""
    name, equals, _ = argument.partition("=")
    place = name.lstrip("-").removeprefix("config.").removesuffix(".name")
    return place if equals and name.lstrip("-").startswith("config.") and is_choice(config, place) else ""


def whole(argument: str, fields: dict[str, Any]) -> str:
    """Returns --config.FIELD=1e3 of a field that holds a whole number as 1000; other arguments as they are."""
    name, _, value = argument.partition("=")
    if type(fields.get(name.lstrip("-").removeprefix("config."))) is int:
        with contextlib.suppress(ValueError, OverflowError):
            if float(value) == int(float(value)):
                return f"{name}={int(float(value))}"
    return argument


def with_value(arguments: list[str]) -> list[str]:
    """Returns the arguments, --config.FIELD VALUE of a field that takes values of two types as one, FIELD=VALUE."""
    found: list[str] = []
    for argument in arguments:
        if found and found[-1].lstrip("-") in {f"config.{field}" for field in SIDES}:
            found[-1] += f"={argument}"
        else:
            found.append(argument)
    return found


def last_tuples(arguments: list[str], fields: dict[str, Any]) -> list[str]:
    """Returns the arguments without a tuple that a later --config.FIELD=VALUE replaces; absl would join both."""
    last: dict[str, str] = {}
    for number, argument in enumerate(arguments):
        name = name_of(argument)
        field = name.removeprefix("config.")
        joined = "=" in argument and (field in SIDES or isinstance(fields.get(field), list))
        key = name if joined else str(number)
        last.pop(key, None)
        last[key] = argument
    return list(last.values())


def use_compilation_cache() -> None:
    """Keeps compiled programs between runs, so that the second start is fast. JAX_COMPILATION_CACHE_DIR moves it."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / "jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    hush_cache()
