"""What --help prints: the modes, the flags and every field of the config, in aligned columns."""

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from absl import flags

from diffusion.model.config import Config, plain
from diffusion.model.field_comments import choices_of, comments_of
from diffusion.model.fields import find_file, load
from diffusion.training import RunError
from diffusion.training.workdir import flatten

WIDEST = 100  # columns
LONGEST = 34  # of what is beside an explanation: longer names and values have a line of their own
KINDS = {
    "int": "N",
    "float": "X",
    "comma separated list of strings": "A,B",
    "multi string": "TEXT",
    "string": "TEXT",
    "string enum": "NAME",
}


def help_text(
    doc: str,
    modes: Mapping[str, Callable[..., Any]],
    values: flags.FlagValues,
    readers: Mapping[str, Sequence[str]],
    config: Config,
    spec: str,
    configs: Path,
) -> str:
    """Returns the text of --help.

    Args:
      doc: the docstring of the experiment.
      modes: the functions of --mode.
      values: the flags.
      readers: the modes that read a flag, of those that not all do.
      config: whose fields are listed.
      spec: its name, as `load` takes it.
      configs: folder of config files.
    """
    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    paragraphs = doc.strip().split("\n\n")
    parts = [text if text.startswith(" ") else textwrap.fill(text, width) for text in paragraphs]
    parts += ["Modes, --mode=MODE:", columns([(name, first_line(mode)) for name, mode in modes.items()], width)]
    read_by = {name: tuple(mode for mode in readers.get(name, ()) if mode in modes) for name in shown(values)}
    for readers_of, group in groupby(sorted(read_by, key=read_by.__getitem__), key=read_by.__getitem__):
        rows = [explain(values[name], modes) for name in group]
        parts += [textwrap.fill(f"Flags of {', '.join(readers_of) or 'every mode'}:", width), columns(rows, width)]
    title = f"Config {spec}, changed by --config.FIELD=VALUE, a choice of its names by --config.PLACE=NAME:"
    parts.append(textwrap.fill(title, width))
    if methods := methods_of(spec, configs):
        parts.append(textwrap.fill(f"Methods, as --config={spec.partition(':')[0]}:METHOD,METHOD: {methods}.", width))
    fields, choices = flatten(plain(config)), choices_of(config)
    comments = comments_of(config, find_file(spec, configs)[0], configs / "_base.py")
    for _, block in groupby(sorted(fields, key=order), key=lambda field: field.partition(".")[0]):
        rows = []
        for field in block:
            others = [choice for choice in choices.get(field, ()) if choice != fields[field]]
            words = f"or {', '.join(others)}" if others else comments.get(field, "")
            rows.append((f"{field} = {value_of(fields[field])}", words))
        parts.append(columns(rows, width))
    return "\n\n".join(parts)


def methods_of(spec: str, configs: Path) -> str:
    """Returns the methods that a config file takes, from what it reports of one that it has not; "" for none."""
    try:
        load(f"{spec.partition(':')[0]}:?", configs)
    except RunError as error:
        return str(error).partition("choose from ")[2]
    return ""


def columns(rows: Iterable[tuple[str, str]], width: int) -> str:
    """Returns rows of (name, words) with the words in a column of their own, within `width` columns."""
    rows = list(rows)
    left = min(max((len(name) for name, _ in rows), default=0), LONGEST) + 4
    lines = []
    for name, words in rows:
        beside = textwrap.wrap(words, width - left, break_on_hyphens=False) or [""]
        if len(name) > LONGEST and words:
            lines.append(f"  {name}")
        else:
            lines.append(f"  {name:<{left - 2}}{beside.pop(0)}".rstrip())
        lines += [" " * left + line for line in beside]
    return "\n".join(lines)


def explain(flag: flags.Flag, modes: Container[str]) -> tuple[str, str]:
    """Returns --NAME=KIND of a flag, and its help, without the modes that it begins with, with the default."""
    kind = flag.flag_type()
    name = f"--[no]{flag.name}" if kind == "bool" else f"--{flag.name}={KINDS.get(kind, 'VALUE')}"
    words = re.sub(r";?\s*repeat this option to specify a list of values", "", " ".join(flag.help.split()))
    before, colon, after = words.partition(": ")
    words = after if colon and all(mode in modes for mode in before.split(", ")) else words
    default = ",".join(flag.default) if isinstance(flag.default, list) else flag.default
    return name, words if default in (None, "", False) else f"{words} (default {default})"


def shown(values: flags.FlagValues) -> list[str]:
    """Returns the names of the flags of ours: not absl's own, --mode, nor the old names of others."""
    aliases = [name for name in values if values[name].help.startswith("Alias for --")]
    return [name for name in sorted(values) if name not in ("mode", "flagfile", "undefok", *aliases)]


def first_line(function: Callable[..., Any]) -> str:
    """Returns the first sentence of a function's docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0].rstrip(".")


def order(field: str) -> tuple[str, str, bool, str]:
    """Returns what fields are sorted by: blocks, and in them the name of a choice first."""
    top, _, _ = field.partition(".")
    place, _, last = field.rpartition(".")
    return top, place, last != "name", last


def value_of(value: Any) -> str:
    """Returns a value as the command line takes it, shortened where it is long."""
    text = str(tuple(value)) if isinstance(value, list) else str(value)
    return (
        textwrap.shorten(text.replace(", ", ","), 60, placeholder="...") if len(text) > 60 else text.replace(", ", ",")
    )
