"""Checkpoints of whole experiments, through orbax. Only this file knows orbax: its v1 interface still moves.

A checkpoint is written to `.saving-STEP`, sealed with checksums (`integrity`), and only then gets its name, STEP. So
whatever has a number for a name was whole once, and whether it still is can be told.
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from diffusion.training import integrity
from diffusion.training.errors import RunError, one_line
from diffusion.training.experiment import TrainState

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
MIN_SLICE_BYTES = 2**20
UNFINISHED = (".saving-*", ".deleting-*", "*.orbax-checkpoint-tmp*")


def provenance() -> dict[str, Any]:
    """Returns what made this checkpoint: versions, devices and, in a git checkout, the revision ("+" when dirty)."""
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}
    devices = jax.devices()
    device = {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()}
    return {"versions": versions, "device": device, "git": git_revision()}


def git_revision() -> str | None:
    """Returns the checkout's commit, with "+" when files differ from it; None outside git."""

    def git(*args: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


class Checkpoints:
    """The checkpoints of one run, in `folder`: saved in the background, each with the whole experiment in it.

    Opening them finds the newest sound one, or the one of step `only`. A newer one that is damaged is named in a line
    and, unless `read_only`, moved to STEP.bad, so that the run can save that step again; it is never deleted.

    Keeps the newest `keep_newest` and every multiple of `keep_every` steps. A context manager: leaving it waits for the
    save under way, whose error, if any, is raised there or at the next save.

    Raises:
      RunError: there are checkpoints, and none is sound.
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
        """The step of the newest sound checkpoint (or of `only`), that of a save under way included; None without."""
        return self._newest

    def save(self, step: int, state: TrainState, description: dict[str, Any]) -> None:
        """Starts saving `state` after `step` updates; `description` is JSON (name, config, provenance).

        The arrays are copied before this returns: they may be donated to the next step.

        Raises:
          RunError: this save cannot start, or the one before failed. Earlier checkpoints are as they were.
        """
        self.wait()
        temporary = self._folder / f".saving-{step}"
        with failing_at(step, self._folder):
            if jax.process_index() == 0:
                # Orbax, where it may not make a folder, raises but leaves threads for which the interpreter's end waits
                # minutes: whether it may is tried before.
                (trial := self._folder / f".saving-{step}.trial").mkdir(parents=True)
                trial.rmdir()
            with _context():
                response = ocp.save_async(str(temporary), state, custom_metadata=description, overwrite=True)
        self._saving = step, self._worker.submit(self._finish, response, temporary, step)

    def wait(self) -> None:
        """Waits for the save under way, if any.

        Raises:
          RunError: it failed; the line says why.
        """
        if self._saving is not None:
            (step, done), self._saving = self._saving, None
            with failing_at(step, self._folder):
                done.result()
            self._newest = step

    def restore(self, abstract_state: TrainState) -> TrainState:
        """Returns the newest state, laid out as `abstract_state`'s shardings say.

        The saved devices do not matter: any number of devices reads what any other number wrote.

        Raises:
          RunError: it does not fit `abstract_state`.
        """
        path = self._folder / str(self._newest)
        try:
            return ocp.load(str(path), abstract_state=abstract_state)
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is not of this experiment's state: {one_line(error)}") from error

    def description(self) -> dict[str, Any]:
        """Returns what was given to `save` beside the newest state."""
        return read_description(self._folder / str(self._newest))

    def _finish(self, response: Any, temporary: Path, step: int) -> None:
        try:
            response.result()  # on process 0: every process has written its part
            if jax.process_index() == 0:
                integrity.seal(temporary)
                os.rename(temporary, self._folder / str(step))
                self._delete_old()
        except BaseException:
            # The room is given back; what cannot be removed now is when the run goes on.
            for path in self._folder.glob(f".saving-{step}*"):
                shutil.rmtree(path, ignore_errors=True)
            raise

    def _delete_old(self) -> None:
        newest, every = self._keep
        for step in sorted(steps_in(self._folder))[:-newest]:
            if not (every and step % every == 0):
                # A deletion cut short must not look like a damaged checkpoint.
                doomed = self._folder / f".deleting-{step}"
                os.rename(self._folder / str(step), doomed)
                shutil.rmtree(doomed)


def steps_in(folder: Path) -> list[int]:
    """Returns the steps of the checkpoints in `folder`, sound or not."""
    return [int(path.name) for path in (folder.iterdir() if folder.is_dir() else []) if path.name.isdecimal()]


def find_newest(folder: Path, *, read_only: bool, only: int | None = None) -> int | None:
    """Returns the step of the newest sound checkpoint, None when there is none at all; damaged ones are named.

    With `only`, no other step than this one is looked at.

    Unless `read_only`, moves damaged ones aside and removes what a killed run left half-written.

    Raises:
      RunError: there are checkpoints, and none is sound.
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
            f"no checkpoint in {folder} is sound ({reasons}). They are left as they are: put a good copy there, "
            "or name another --workdir to start anew"
        )
    for bad, flaw in damaged.items():
        kept = "" if read_only else f"; kept as {move_aside(folder / str(bad)).name}"
        print(f"checkpoint {folder / str(bad)} is damaged: {flaw}{kept}. Using that of step {step}", file=sys.stderr)
    return step


def move_aside(path: Path) -> Path:
    """Renames a folder to NAME.bad (NAME.bad2, ... where that is taken) and returns the new path."""
    for number in ["", *range(2, 1000)]:
        aside = path.with_name(f"{path.name}.bad{number}")
        if not aside.exists():
            path.rename(aside)
            return aside
    raise RunError(f"{path} is damaged, and there are 999 such already: remove some of {path}.bad*")


def read_description(checkpoint: Path) -> dict[str, Any]:
    """Returns the JSON that was saved with a checkpoint.

    Raises:
      RunError: the checkpoint was not written by this project.
    """
    try:
        saved = json.loads((checkpoint / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"{checkpoint} cannot be read as a checkpoint: {one_line(error)}") from error
    if not isinstance(saved, dict) or not all(isinstance(saved.get(k), t) for k, t in DESCRIPTION.items()):
        raise RunError(f"{checkpoint}: the checkpoint was not written by this project")
    return saved


DESCRIPTION = {"experiment": str, "config": dict}


def open_existing(workdir: Path, step: int | None = None) -> Checkpoints:
    """Opens the checkpoints of a work folder to read the newest, or that of `step`.

    Raises:
      RunError: there is none, or none is sound.
    """
    folder = workdir / "checkpoints"
    there = sorted(steps_in(folder))
    if not there:
        raise RunError(f"no checkpoint in {workdir}: train first (--mode=train), or name another --workdir")
    if step is not None and step not in there:
        raise RunError(f"no checkpoint of step {step} in {workdir}: there are {', '.join(map(str, there))}")
    return Checkpoints(folder, read_only=True, only=step)


def agreed(find: Any) -> int | None:
    """Returns process 0's `find()` (a step, or None) in every process of a run."""
    # Before jax.distributed is up, asking JAX who is who would start it alone.
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
        raise error or RunError("process 0 found no sound checkpoint; its message says more")
    return None if found == none else found


@contextlib.contextmanager
def failing_at(step: int, folder: Path) -> Any:
    """Turns whatever a save raises into one line."""
    try:
        yield
    except Exception as error:
        raise RunError(
            f"the checkpoint of step {step} could not be saved in {folder}: {one_line(error)}. Stopped; "
            "the earlier ones are untouched, and the same command goes on from the newest"
        ) from error


def _context() -> ocp.Context:
    """Orbax's options. Devices that hold the same array share the work of saving it, where that is worth it.

    To cut an array for that compiles a program for each shape: with small ones the first save would take 20 s of a run.
    """
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = MIN_SLICE_BYTES
    return context
