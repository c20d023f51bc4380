"""Checkpoints of whole experiments, through orbax. Only this file knows orbax: its v1 interface still moves."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from diffusion.training.errors import RunError
from diffusion.training.experiment import TrainState

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


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

    Keeps the newest `keep_newest` and every multiple of `keep_every` steps. A context manager: leaving it waits for the
    save under way, whose error, if any, is raised there or at the next save.
    """

    def __init__(self, folder: Path, *, keep_newest: int = 3, keep_every: int = 0, read_only: bool = False):
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_newest), *([policies.EveryNSteps(keep_every)] if keep_every else [])]
        self._checkpointer = ocp.training.Checkpointer(
            str(folder.absolute()),
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),  # type: ignore[arg-type]
            preservation_policy=policies.AnyPreservationPolicy(keep),  # type: ignore[arg-type]
            # What a killed run left half-written goes; but a reader must not touch what a run is just writing.
            cleanup_tmp_directories=not read_only,
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._checkpointer.close()

    @property
    def newest(self) -> int | None:
        """The step of the newest checkpoint, None when there is none."""
        latest = self._checkpointer.latest
        return None if latest is None else latest.step

    def save(self, step: int, state: TrainState, description: dict[str, Any]) -> None:
        """Starts saving `state` after `step` updates; `description` is JSON (name, config, provenance)."""
        self._checkpointer.save_async(step, state, custom_metadata=description)

    def restore(self, abstract_state: TrainState, step: int | None = None) -> TrainState:
        """Returns the newest state (or that of `step`), laid out as `abstract_state`'s shardings say.

        The saved devices do not matter: any number of devices reads what any other number wrote.
        """
        return self._checkpointer.load(step, abstract_state=abstract_state)

    def description(self, step: int | None = None) -> dict[str, Any]:
        """Returns what was given to `save` beside the newest state (or that of `step`)."""
        saved = self._checkpointer.checkpointables_metadata(step).custom_metadata
        if not isinstance(saved, dict) or not {"experiment", "config"} <= saved.keys():
            raise RunError(f"{self._checkpointer.directory}: the checkpoint was not written by this project")
        return saved


def open_existing(workdir: Path) -> Checkpoints:
    """Opens the checkpoints of a work folder to read them.

    Raises:
      RunError: there is none.
    """
    folder = workdir / "checkpoints"
    if not any(child.name.isdigit() for child in (folder.iterdir() if folder.is_dir() else [])):
        raise RunError(f"no checkpoint in {workdir}: train first (--mode=train), or name another --workdir")
    return Checkpoints(folder, read_only=True)
