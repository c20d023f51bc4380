"""Numbers with how each was made: no `Measurement` without its reference, counts, seeds, sampler and features."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion.data.sources import Source
from diffusion.files import replacing


class Reference(NamedTuple):
    """The images a measurement compares with; `count` is None where only published statistics are known."""

    name: str
    split: str
    count: int | None
    fingerprint: str


class Measurement(NamedTuple):
    """A number, or a few by name (parts, classes, "mean" and "standard error"), and all that it depends on.

    `sampler` says what made the images ("ddim", or "real images" with `num_steps` None and no seeds); `ema` says how
    the weights were averaged: a decay, "power 0.1", or None for the last ones; `reference` is None where nothing is
    compared with.
    """

    name: str
    value: float | Mapping[str, float]
    num_samples: int
    features: str
    reference: Reference | None
    sampler: str
    num_steps: int | None
    seeds: Sequence[int]
    ema: float | str | None
    note: str = ""


def reference_of(source: Source) -> Reference:
    """The whole of a source as a reference."""
    return Reference(source.name, source.split, source.num_examples, source.fingerprint)


def write_report(
    folder: str | os.PathLike, title: str, measurements: Sequence[Measurement], about: Mapping[str, str | int | float]
) -> None:
    """Writes report.json and report.md into `folder`, each whole or not at all; `about` describes the run.

    Raises:
      ValueError: naming the measurement that is not a finite number.
    """
    content = _content(title, measurements, about)
    for name, text in (("report.json", json.dumps(content, indent=2) + "\n"), ("report.md", _markdown(content))):
        with replacing(Path(folder) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def render_report(title: str, measurements: Sequence[Measurement], about: Mapping[str, str | int | float]) -> str:
    """Returns what `write_report` writes into report.md."""
    return _markdown(_content(title, measurements, about))


def _content(title: str, measurements: Sequence[Measurement], about: Mapping[str, str | int | float]) -> dict:
    for measurement in measurements:
        for part, value in _parts(measurement).items():
            if not math.isfinite(value):
                where = measurement.name + (f", {part}" if part else "")
                raise ValueError(f"there is no report: {where} is {value}, which is no result")
    return {"title": title, "about": dict(about), "measurements": [_as_json(one) for one in measurements]}


def _parts(measurement: Measurement) -> dict[str, float]:
    value = measurement.value
    parts = value if isinstance(value, Mapping) else {"": value}
    return {str(part): float(number) for part, number in parts.items()}


def _as_json(measurement: Measurement) -> dict:
    parts = _parts(measurement)
    fields = measurement._asdict() | {"value": parts.get("", parts), "seeds": [int(seed) for seed in measurement.seeds]}
    return fields | {"reference": measurement.reference._asdict() if measurement.reference else None}


def _markdown(content: dict) -> str:
    lines = [f"# {content['title']}", ""]
    lines += [f"- {name}: {value}" for name, value in content["about"].items()]
    lines += ["", "| what | value | images | made by | seeds | EMA | features | compared with |", "|" + " --- |" * 8]
    notes, references = [], {}
    for one in content["measurements"]:
        value = one["value"] if isinstance(one["value"], dict) else {"": one["value"]}
        reference = one["reference"]
        count = reference and reference["count"]
        if reference:
            references[f"{reference['name']} {reference['split']}"] = reference["fingerprint"]
        row = [
            one["name"] + ("" if not one["note"] else f" [{len(notes) + 1}]"),
            ", ".join(f"{part} {number:.5g}".strip() for part, number in value.items()),
            one["num_samples"],
            one["sampler"] + (f", {one['num_steps']} steps" if one["num_steps"] else ""),
            ", ".join(map(str, one["seeds"])) or "-",
            "-" if one["ema"] is None else one["ema"],
            one["features"],
            f"{reference['name']} {reference['split']}" + (f", {count} images" if count else "") if reference else "-",
        ]
        lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")
        notes += [one["note"]] if one["note"] else []
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    lines += ["", *(f"- {name}: {fingerprint}" for name, fingerprint in references.items())]
    return "\n".join(lines).rstrip() + "\n"
