"""What is stored beside a run's weights: plain JSON with the experiment's name, its config and the format of both."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffusion.training.errors import RunError

Description = dict[str, Any]
Migrate = Callable[[Description], Description]  # an older stored description -> one of the present FORMAT

FORMAT = 4  # raised when the meaning of a description changes; one without "format" is of format 1
TYPES = {"experiment": str, "config": dict}


def unchanged(description: Description) -> Description:
    """Returns `description`: the migration of descriptions that are all of the present format."""
    return description


def check_description(stored: Any, where: Path) -> Description:
    """Returns a stored description as it is; older formats too.

    Args:
      stored: what was read.
      where: from which file or checkpoint, for messages.

    Raises:
      RunError: it is of a newer format than this version knows, or not of this project.
    """
    if not isinstance(stored, dict) or not all(isinstance(stored.get(name), kind) for name, kind in TYPES.items()):
        raise RunError(f"{where} was not written by this project")
    number = stored.get("format", 1)
    if not isinstance(number, int) or number < 1:
        raise RunError(f"{where} was not written by this project")
    if number > FORMAT:
        raise RunError(f"{where} was written by a newer version of this project: update it")
    return stored
