"""Weights by name fit a network exactly: no key too few, none too many."""

from collections.abc import Collection


def check_keys(found: Collection[str], expected: Collection[str], what: str) -> None:
    """Raises ValueError, naming them, when keys of the weights of `what` are missing or left over."""
    missing, left_over = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or left_over:
        raise ValueError(
            f"weights do not fit this {what}: missing {missing or 'none'}, left over {left_over or 'none'}"
        )
