"""--mode=compare: what differs in the configs of runs, their courses in one figure, their scores side by side.

./launch.sh digits --mode=compare runs/a runs/b
./launch.sh digits --mode=compare --workdir=runs/a --with=runs/b,runs/c
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from diffusion.evaluation.run_figures import draw_runs
from diffusion.files import replacing
from diffusion.runs.call import Call
from diffusion.runs.records import common, read_record, table
from diffusion.runs.run import read_description
from diffusion.training import RunError
from diffusion.training.workdir import flatten

# What is stored beside the config and may differ.
ABOUT = ("experiment", "image_shape", "num_classes", "data", "begun", "provenance")
METRICS = ("loss", "grad_norm", "learning_rate")
NONE = "-"


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of this mode."""
    flags.DEFINE_list("with", [], "compare: work folders of the other runs", flag_values=values)


def named(argv: Sequence[str]) -> list[str]:
    """Returns arguments in which the folders after --mode=compare are those of --workdir and --with."""
    given = [one for one in argv[1:] if not one.startswith("-")]
    if "--mode=compare" not in argv or not given:
        return list(argv)
    flagged = [one for one in argv[1:] if one.startswith("-")]
    there = any(one.startswith("--workdir=") for one in flagged)
    first, others = ([], given) if there else (given[:1], given[1:])
    with_others = [f"--with={','.join(others)}"] if others else []
    return [argv[0], *flagged, *(f"--workdir={one}" for one in first), *with_others]


def compare(call: Call) -> None:
    """Compares the run in the work folder with those of --with; writes compare.md and compare.png, and prints it."""
    others = [Path(folder).expanduser() for folder in call.flags["with"].value or ()]
    if not others:
        raise ValueError("--mode=compare needs other runs: --mode=compare runs/a runs/b, or --with=runs/b")
    folders = [call.workdir, *others]
    names = names_of(folders)
    stored = [read_description(folder, None) for folder in folders]
    if jax.process_index() != 0:
        return
    records = [read_record(folder, name) for folder, name in zip(folders, names, strict=True)]
    changed = differing([facts(one) for one in stored])
    lines = [f"# {' and '.join(names)}", ""]
    lines += [table(["field", *names], changed) if changed else "The configs are the same.", ""]
    scores = [[name, *(record.numbers.get(name, NONE) for record in records)] for name in common(records)]
    lines += [table(["score", *names], scores) if scores else "No run has a score yet: --mode=evaluate.", ""]
    courses = {record.name: record.course for record in records if record.course}
    folder = call.workdir / "compare" / "_".join(names[1:])
    if courses:
        drawn = [name for name in METRICS if any(name in line for course in courses.values() for line in course)]
        draw_runs(folder / "compare.png", courses, drawn)
        lines += ["![courses](compare.png)", ""]
    with replacing(folder / "compare.md") as temporary:
        temporary.write_text("\n".join(lines))
    print("\n".join(lines))
    print(folder / "compare.md")


def names_of(folders: Sequence[Path]) -> list[str]:
    """Returns the shortest ends of paths that tell folders apart.

    Raises:
      RunError: two are the same.
    """
    parts = [folder.absolute().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise RunError(f"--mode=compare: {folders[0]} is compared with other runs, not with itself: name each once")
    count = next(n for n in range(1, 1 + max(map(len, parts))) if len({one[-n:] for one in parts}) == len(parts))
    return ["-".join(one[-count:]).strip("/-") for one in parts]


def facts(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a config, and what is known of the run beside it."""
    beside = flatten({name: stored[name] for name in ABOUT if name in stored})
    return flatten(stored["config"]) | {f"({name})": value for name, value in beside.items()}


def differing(runs: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a row for each fact in which runs differ: its name, and its value in each, "-" where it has none."""
    names = sorted(dict.fromkeys(name for run in runs for name in run), key=lambda name: (name.startswith("("), name))
    rows = [[name, *(str(run.get(name, NONE)) for run in runs)] for name in names]
    return [row for row in rows if len(set(row[1:])) > 1]
