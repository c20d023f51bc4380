"""The fields of a network's config.json, as diffusers writes it: what is not known or cannot be honoured is refused."""

import reprlib
from collections.abc import Collection, Mapping
from typing import Any

from diffusion.pretrained.strict import few


def read_fields(
    config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], honoured: Mapping[str, Collection[Any]]
) -> dict[str, Any]:
    """Returns the values of all fields of diffusers' class `name`; those that begin with _ are none.

    Args:
      config: the content of config.json.
      name: of the class.
      defaults: its fields, and what holds where the config is silent.
      honoured: the values that ours can be, of fields that have few.

    Raises:
      ValueError: another class, or a field that is unknown or cannot be honoured, each named.
    """
    if config.get("_class_name", name) != name:
        raise ValueError(f"it describes a {config['_class_name']}, not a {name}")
    fields = {**defaults} | {field: value for field, value in config.items() if not field.startswith("_")}
    if unknown := sorted(fields.keys() - defaults.keys()):
        raise ValueError(f"diffusers' {name} has no field {few(unknown)}")
    if refused := [
        f"{field}={reprlib.repr(fields[field])} (only {' or '.join(map(repr, ours))})"
        for field, ours in honoured.items()
        if fields[field] not in ours
    ]:
        raise ValueError(f"our {name} cannot honour {few(refused, most=5)}")
    return fields


def check_counts(counts: Mapping[str, Any]) -> None:
    """Raises ValueError, naming the field, unless all are whole numbers of at least 1."""
    for name, count in counts.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {reprlib.repr(count)}, not a whole number of at least 1")
