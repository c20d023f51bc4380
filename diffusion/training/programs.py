"""Compiled programs of the train step, one for each shape of a batch.

The first one may come from disk, see `kept`: the program of the run's last start, where no source has changed since.
The first step need not wait for Python then, which makes the text of today's program, in a thread, while the next steps
are computed. Until both are seen to be the same nothing of the run is to be logged, drawn or saved: see `confirm`.
"""

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any

import jax

from diffusion.training.errors import RunError
from diffusion.training.experiment import Batch
from diffusion.training.kept import Kept
from diffusion.training.threads import in_thread


class StaleProgramError(Exception):
    """The steps so far were computed by a program of other code."""


class Programs:
    """Compiled programs of a jitted function, by the shapes of a batch.

    Args:
      function: jitted.
      arguments: batch -> what the function is called with, or its shapes.
      kept: what is kept of the first program, if anything.
    """

    def __init__(self, function: Any, arguments: Callable[[Batch], tuple[Any, ...]], kept: Kept | None = None):
        self._function = function
        self._arguments = arguments
        self._kept = kept
        self._made: dict[Any, Future[Callable[..., Any]]] = {}
        self._unconfirmed: tuple[Any, ...] | None = None  # the arguments of a program from disk
        self._confirming: Future[bool] | None = None

    def begin(self, batch: Batch) -> None:
        """Lowers the program for a batch, and lets a thread compile it; does nothing while that is read from disk."""
        if self._made or self._kept is None or not self._kept.trusted:
            self._compile(batch)

    def of(self, batch: Batch, most: int) -> Callable[..., Any]:
        """Returns the program for a batch.

        Raises:
          RunError: it is of another shape than those of `most` before: a fault in the data, not to be compiled away.
        """
        shapes = shapes_by_name(batch)
        if shapes not in self._made:
            if len(self._made) == most:
                found = ", ".join(f"{name} {list(shape)}" for name, shape, _ in shapes)
                raise RunError(f"a batch has other shapes than those before: {found}")
            self._take_kept(batch)
        if shapes not in self._made:
            self._compile(batch)
        return self._made[shapes].result()

    def begin_to_confirm(self) -> None:
        """Lets a thread find out whether the program from disk, if there is one, is that of this code."""
        if self._unconfirmed is not None:
            self._confirming = in_thread(partial(self._is_kept, self._unconfirmed))

    def confirm(self) -> None:
        """Waits until it is known that the program from disk, if there is one, is that of this code.

        Raises:
          StaleProgramError: it is not.
        """
        if self._unconfirmed is None:
            return
        # What a `with` around the run sets, as `jax.enable_x64` does, is not set in a thread: it may see a difference.
        same = self._confirming is not None and self._confirming.exception() is None and self._confirming.result()
        assert self._kept is not None
        if not same and not self._is_kept(self._unconfirmed):
            raise StaleProgramError
        self._unconfirmed, self._kept.unconfirmed = None, False

    def _is_kept(self, arguments: tuple[Any, ...]) -> bool:
        assert self._kept is not None
        return self._kept.is_of(self._function.lower(*arguments))

    def _compile(self, batch: Batch) -> None:
        lowered = self._function.lower(*self._arguments(batch))
        kept = None if self._made else self._kept
        self._made[shapes_by_name(batch)] = in_thread(partial(kept.compile, lowered) if kept else lowered.compile)

    def _take_kept(self, batch: Batch) -> None:
        """Takes the program from disk if it is to be trusted, the first one, and for such a batch."""
        if self._made or self._kept is None or not self._kept.trusted:
            return
        program, arguments = self._kept.program(), self._arguments(batch)
        if program is not None and signature(program.args_info) == signature((arguments, {})):
            self._made[shapes_by_name(batch)] = loaded = Future()
            loaded.set_result(program)
            self._unconfirmed, self._kept.unconfirmed = arguments, True


def signature(arguments: Any) -> Any:
    """Returns the structure, shapes and dtypes of arguments."""
    leaves, structure = jax.tree.flatten(arguments)
    return structure, [(leaf.shape, leaf.dtype) for leaf in leaves]


def shapes_by_name(batch: Batch) -> tuple[tuple[str, tuple[int, ...], Any], ...]:
    """Returns the name, shape and dtype of every array of a batch."""
    return tuple((name, x.shape, x.dtype) for name, x in sorted(batch.items()))
