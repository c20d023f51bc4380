"""The one strict check of imports: weights by name fit a network exactly, in their keys and in their shapes."""

from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import flax.linen as nn
import jax
import numpy as np

_LONGEST = 100  # characters of a name in an error message


def check_keys(
    weights: Mapping[str, Any],
    expected: Mapping[str, tuple[int, ...]],
    what: str,
    optional: Mapping[str, tuple[int, ...]] | None = None,
) -> None:
    """Raises ValueError unless every expected key is there once, no other is, and all shapes are equal.

    Args:
      weights: arrays, or anything with a `shape`, by the names of their file.
      expected: the shapes by the same names, in the file's layout.
      what: the network, as an error message calls it.
      optional: shapes of keys that may be there or not.
    """
    optional = optional or {}
    missing = sorted(expected.keys() - weights.keys())
    left_over = sorted(weights.keys() - expected.keys() - optional.keys())
    if missing or left_over:
        raise ValueError(f"weights do not fit this {what}: missing {few(missing)}, left over {few(left_over)}")
    for name, weight in weights.items():
        shape = expected[name] if name in expected else optional[name]
        if tuple(weight.shape) != tuple(shape):
            raise ValueError(f"{name} has shape {list(weight.shape)}, but this {what} needs {list(shape)}")


def shapes_of(module: nn.Module, *inputs: Any, **named: Any) -> dict[str, Any]:
    """Returns a network's tree of parameters as shapes (the one under "params"), nothing allocated.

    Args:
      module: the network, of Linen.
      *inputs: of its call, as `jax.ShapeDtypeStruct`.
      **named: the same.
    """
    return jax.tree.map(lambda x: x, _traced(module, inputs, tuple(named.items())))  # a tree of the caller's own


@lru_cache(maxsize=32)
def _traced(module: nn.Module, inputs: tuple[Any, ...], named: tuple[tuple[str, Any], ...]) -> Any:
    # A network is traced for its settings' check, and again for its weights': half a second, of a U-Net.
    return jax.eval_shape(module.init, jax.random.key(0), *inputs, **dict(named))["params"]


def few(names: Iterable[str], most: int = 3) -> str:
    """Returns the first names, shortened, and how many more there are: error messages stay one line."""
    names = [name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..." for name in names]
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{rest}" if names else "none"


def without_memory(shapes: Any) -> Any:
    """Returns a tree of shapes as arrays that take no memory: to be renamed and transposed for their shapes alone."""
    return jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), shapes)
