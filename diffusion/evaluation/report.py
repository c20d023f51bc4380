"""Reports: no `Measurement` without its reference, counts, seeds, sampler and features."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from diffusion.data.sources import Source
from diffusion.files import replacing


class Reference(NamedTuple):
    """The images that a measurement compares with.

    Attributes:
      name: of the data.
      split: of it.
      count: of images; None where only published statistics are known.
      fingerprint: of the images, or of the file of statistics.
    """

    name: str
    split: str
    count: int | None
    fingerprint: str


class Measurement(NamedTuple):
    """A measured value, and all that it depends on.

    Attributes:
      name: what was measured.
      value: a number, or several by name (parts, classes, "mean" and "standard error").
      num_samples: over which it was taken.
      features: what was compared.
      reference: what it was compared with; None for nothing.
      sampler: what made the images, as "ddim", or "real images".
      num_steps: of the sampler; None where there is none.
      seeds: of the samples.
      ema: average of the weights: a decay, "power 0.1", or None for no average.
      note: what a reader has to know.
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
    """Returns the whole of a source as a reference."""
    return Reference(source.name, source.split, source.num_examples, source.fingerprint)


def write_report(
    folder: str | os.PathLike, title: str, measurements: Sequence[Measurement], about: Mapping[str, str | int | float]
) -> None:
    """Writes report.json and report.md, each completely or not at all.

    Args:
      folder: of both files; it is made.
      title: of the report.
      measurements: in their order.
      about: facts about the run, by name.

    Raises:
      ValueError: a measurement is not finite; it is named.
    """
    content = _content(title, measurements, about)
    for name, text in (("report.json", json.dumps(content, indent=2) + "\n"), ("report.md", _markdown(content))):
        with replacing(Path(folder) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _content(title: str, measurements: Sequence[Measurement], about: Mapping[str, str | int | float]) -> dict:
    for measurement in measurements:
        for part, value in parts_of(measurement).items():
            if not math.isfinite(value):
                where = measurement.name + (f", {part}" if part else "")
                raise ValueError(f"no report is written, because {where} is {value}")
    return {"title": title, "about": dict(about), "measurements": [_as_json(one) for one in measurements]}


def parts_of(measurement: Measurement) -> dict[str, float]:
    """Returns the numbers of a measurement by name, that of a single one by ""."""
    value = measurement.value
    parts = value if isinstance(value, Mapping) else {"": value}
    return {str(part): float(number) for part, number in parts.items()}


def _as_json(measurement: Measurement) -> dict:
    parts = parts_of(measurement)
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
