"""A choice in a config: a name, and the fields of that name alone.

A choice is a function (or a Flax module) in a table; its keyword arguments with a default are its fields. `pick` passes
them and refuses all others. A new choice is a new function in its table.
"""

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

# What the house gives to a chosen function, and to a network; never a field of a config.
GIVEN = {"denoise", "x_T", "grid", "key", "trajectory"}
OF_NETWORKS = {"parent", "out_channels", "num_classes", "time_scale", "two_times", "context_width", "pooled_width"}


def fields_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the settings of a choice with their defaults: its keyword arguments, less those that are given."""
    parameters = inspect.signature(function).parameters.values()
    found = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    given = GIVEN | {"name"} | (OF_NETWORKS if inspect.isclass(function) else set())
    return {name: default for name, default in found.items() if name not in given}


def pick(table: Mapping[str, Callable[..., Any]], block: Any, where: str) -> Callable[..., Any]:
    """Returns the function that `block["name"]` names, with the other fields of the block as its arguments.

    Args:
      table: the functions by name.
      block: a config's block: "name" and the fields of that name.
      where: the block's place in the config, for messages.

    Raises:
      ValueError: an unknown name, or a field that the function does not have.
    """
    fields = dict(block)
    name = fields.pop("name")
    if name not in table:
        raise ValueError(f"{where}.name is {name!r}: choose from {', '.join(table)}")
    known = fields_of(table[name])
    if unknown := sorted(fields.keys() - known.keys()):
        has = f"it has {', '.join(known)}" if known else "it has no fields"
        raise ValueError(f"{where}.{unknown[0]} is not a field of {name}: {has}")
    # A field without a value is 0 in a config, and None to a function.
    given = {
        field: None if known[field] is None and value == 0 else value  # () is a value
        for field, value in fields.items()
    }
    return partial(table[name], **given)


def of_name(table: Mapping[str, Any], name: str, where: str) -> Any:
    """Returns `table[name]`. Raises ValueError, naming the choices, where there is none."""
    if name not in table:
        raise ValueError(f"{where} is {name!r}: choose from {', '.join(table)}")
    return table[name]
