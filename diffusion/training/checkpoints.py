"""Checkpoints of whole experiments, through orbax. Only this file knows orbax: its v1 interface still changes.

A checkpoint is written to `.saving-STEP`, sealed with checksums (`integrity`) and only then renamed to STEP. So a
folder named by a number was complete once, and whether it still is can be checked.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from diffusion.training import integrity
from diffusion.training.description import FORMAT, Description, check_description
from diffusion.training.errors import RunError, one_line
from diffusion.training.experiment import TrainState

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
MIN_SLICE_BYTES = 2**20
UNFINISHED = (".saving-*", ".deleting-*", "*.orbax-checkpoint-tmp*")


def provenance() -> dict[str, Any]:
    """Returns what makes a checkpoint now: package versions, devices and, in a git checkout, the revision."""
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    devices = jax.devices()
    device = {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()}
    return {"versions": versions, "device": device, "git": git_revision()}


def git_revision() -> str | None:
    """Returns the checkout's commit, followed by "+" where files differ from it; None outside git."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Checkpoints:
    """The checkpoints of one run, saved in the background, each with the whole experiment in it.

    Opening them finds the newest intact one. Newer ones that are damaged are reported, one line each, and moved to
    STEP.bad so that the run can save that step again; none is deleted. A context manager: leaving it waits for the
    save in progress and raises its error, if any.

    Args:
      folder: of the checkpoints.
      keep_newest: how many of the newest are kept, at least 1.
      keep_every: every multiple of so many steps is kept as well; 0: none.
      read_only: nothing is moved or removed.
      only: open the checkpoint of this step, not the newest.

    Raises:
      RunError: there are checkpoints, and none is intact.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_newest: int = 3,
        keep_every: int = 0,
        read_only: bool = False,
        only: int | None = None,
    ):
        self._folder = folder.absolute()
        self._keep = keep_newest, keep_every
        self._worker = ThreadPoolExecutor(max_workers=1)
        self._saving: tuple[int, Future] | None = None
        self._newest = agreed(lambda: find_newest(self._folder, read_only=read_only, only=only))

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.wait()
        finally:
            self._worker.shutdown()

    @property
    def newest(self) -> int | None:
        """The step of the newest intact checkpoint (or `only`), or of the save in progress; None without any."""
        return self._newest

    def save(self, step: int, state: TrainState, description: Description) -> None:
        """Starts saving the state after `step` updates. The arrays are copied first: they may be donated afterwards.

        Args:
          step: names the checkpoint.
          state: of the run.
          description: plain JSON with at least "experiment" (its name) and "config"; "format" is added.

        Raises:
          RunError: this save cannot start, or the one before failed. Earlier checkpoints are unchanged.
        """
        self.wait()
        temporary = self._folder / f".saving-{step}"
        with failing_at(step, self._folder):
            if jax.process_index() == 0:
                # Where orbax cannot make its folder it raises, but leaves threads for which the interpreter waits
                # minutes at its exit: making one is tried first.
                (trial := self._folder / f".saving-{step}.trial").mkdir(parents=True)
                trial.rmdir()
            described = {**description, "format": FORMAT}
            with _context():
                response = ocp.save_async(str(temporary), state, custom_metadata=described, overwrite=True)
        self._saving = step, self._worker.submit(self._finish, response, temporary, step)

    def wait(self) -> None:
        """Waits for the save in progress, if any.

        Raises:
          RunError: it failed; the line has the reason.
        """
        if self._saving is not None:
            (step, done), self._saving = self._saving, None
            with failing_at(step, self._folder):
                done.result()
            self._newest = step

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Returns the newest state with the shapes, dtypes and shardings of `abstract_state`.

        Any number of devices reads what any other number wrote. Parts that are None are not read.

        Raises:
          RunError: it does not fit `abstract_state`.
        """
        path = self._folder / str(self._newest)
        wanted = {name: part for name, part in abstract_state._asdict().items() if part is not None}
        partial = len(wanted) < len(abstract_state)
        try:
            with _context(partial):
                found = ocp.load(str(path), abstract_state=wanted if partial else abstract_state)
            state = abstract_state._replace(**found) if partial else found
            if missing := [x for x in jax.tree.leaves(state) if isinstance(x, jax.ShapeDtypeStruct)]:
                raise ValueError(f"{len(missing)} arrays are not there, as one of shape {missing[0].shape}")
            return state
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} does not hold the state of this experiment: {one_line(error)}") from error

    def description(self) -> Description:
        """Returns what was stored beside the newest state, see `read_description`."""
        return read_description(self._folder / str(self._newest))

    def _finish(self, response: Any, temporary: Path, step: int) -> None:
        try:
            response.result()  # on process 0: every process has written its part
            if jax.process_index() == 0:
                integrity.seal(temporary)
                os.rename(temporary, self._folder / str(step))
                self._delete_old()
        except BaseException:
            # Frees the disk; what cannot be removed now is removed when the run resumes.
            for path in self._folder.glob(f".saving-{step}*"):
                shutil.rmtree(path, ignore_errors=True)
            raise

    def _delete_old(self) -> None:
        newest, every = self._keep
        for step in sorted(steps_in(self._folder))[:-newest]:
            if not (every and step % every == 0):
                # A deletion that is interrupted must not look like a damaged checkpoint.
                doomed = self._folder / f".deleting-{step}"
                os.rename(self._folder / str(step), doomed)
                shutil.rmtree(doomed)


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in `folder`, intact or not."""
    return [int(path.name) for path in (folder.iterdir() if folder.is_dir() else []) if path.name.isdecimal()]


def find_newest(folder: Path, *, read_only: bool, only: int | None = None) -> int | None:
    """Returns the step of the newest intact checkpoint; None when there is no checkpoint. Reports damaged ones.

    Args:
      folder: of the checkpoints.
      read_only: otherwise moves damaged ones aside and removes what a killed run left unfinished.
      only: the one step to look at.

    Raises:
      RunError: there are checkpoints, and none is intact.
    """
    if not read_only:
        for path in [path for pattern in UNFINISHED for path in folder.glob(pattern)]:
            shutil.rmtree(path, ignore_errors=True)
    damaged = {}
    for step in sorted(steps_in(folder), reverse=True) if only is None else [only]:
        flaw = integrity.flaw(folder / str(step))
        if flaw is None:
            break
        damaged[step] = flaw
    else:
        if not damaged:
            return None
        reasons = "; ".join(f"{step}: {flaw}" for step, flaw in damaged.items())
        raise RunError(
            f"no checkpoint in {folder} is intact ({reasons}). They are left as they are: restore a copy of one, "
            "or name another --workdir to start from step 0"
        )
    for bad, flaw in damaged.items():
        kept = "" if read_only else f"; kept as {move_aside(folder / str(bad)).name}"
        print(f"checkpoint {folder / str(bad)} is damaged: {flaw}{kept}. Using step {step}", file=sys.stderr)
    return step


def move_aside(path: Path) -> Path:
    """Renames a folder to NAME.bad (NAME.bad2, ... where that is taken) and returns the new path."""
    for number in ["", *range(2, 1000)]:
        aside = path.with_name(f"{path.name}.bad{number}")
        if not aside.exists():
            path.rename(aside)
            return aside
    raise RunError(f"{path} is damaged, and 999 like it are kept already: remove some of {path}.bad*")


def read_description(checkpoint: Path) -> Description:
    """Returns the JSON that was stored with a checkpoint, as it was stored: "format" is absent before format 2.

    Raises:
      RunError: it cannot be read, or was not written by this project, or by a newer version of it.
    """
    try:
        stored = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{checkpoint} cannot be read as a checkpoint: {one_line(error)}") from error
    return check_description(stored, checkpoint)


def open_existing(workdir: Path, step: int | None = None) -> Checkpoints:
    """Opens the checkpoints of a work folder to read the newest, or that of `step`.

    Raises:
      RunError: there is none, or none is intact.
    """
    folder = workdir / "checkpoints"
    there = sorted(steps_in(folder))
    if not there:
        raise RunError(f"no checkpoint in {workdir}: train first (--mode=train), or name another --workdir")
    if step is not None and step not in there:
        raise RunError(f"no checkpoint of step {step} in {workdir}: choose from {', '.join(map(str, there))}")
    return Checkpoints(folder, read_only=True, only=step)


def agreed(find: Callable[[], int | None]) -> int | None:
    """Returns process 0's `find()` (a step, or None) in every process of a run; its error is raised in all."""
    # Before jax.distributed is started, `jax.process_count` would start JAX as a single process.
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return find()
    none, failed = -1, -2
    found, error = none, None
    if jax.process_index() == 0:
        try:
            step = find()
            found = none if step is None else step
        except Exception as caught:
            found, error = failed, caught
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == failed:
        raise error or RunError("process 0 found no intact checkpoint; its message has the reason")
    return None if found == none else found


@contextlib.contextmanager
def failing_at(step: int, folder: Path) -> Iterator[None]:
    """Turns what a save raises into a RunError of one line."""
    try:
        yield
    except Exception as error:
        raise RunError(
            f"the checkpoint of step {step} could not be saved in {folder}: {one_line(error)}. Stopped; "
            "earlier ones are unchanged, and the same command resumes from the newest"
        ) from error


def _context(partial: bool = False) -> ocp.Context:
    """Returns orbax's options: devices that hold the same array share the work of saving it only if it is large.

    Slicing an array for that compiles a program for each shape: with small ones the first save would take 20 s. With
    `partial`, what a checkpoint holds beside what is asked for is left out; what it lacks remains abstract.
    """
    context = ocp.Context()
    context.pytree.loading.partial_load = partial
    context.array.saving.min_slice_bytes_for_replica_parallel = MIN_SLICE_BYTES
    return context
