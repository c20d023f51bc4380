"""Where pictures are kept: never over other pictures, and beside each file a .json of how it was made."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion.files import replacing
from diffusion.model.config import plain
from diffusion.runs.draw import everywhere
from diffusion.runs.run import Run

BLOCKS = ("network", "condition", "space", "process", "loss", "sampling")  # of a config, that a picture depends on


class Place(NamedTuple):
    """Where pictures are kept.

    Attributes:
      path: of the .npz.
      note: text of the .json beside it, all that the pictures depend on.
    """

    path: Path
    note: str

    @property
    def key(self) -> str:
        """A digest of how they are made."""
        return digest_of(self.note)

    @property
    def picture(self) -> Path:
        """Where they are for people."""
        return self.path.with_suffix(".png")

    @property
    def made_before(self) -> bool:
        """Whether they are there already, made in the same way of the same weights."""
        note = self.path.with_suffix(".json")
        return everywhere(self.path.exists() and note.exists() and note.read_text() == self.note)

    def write_note(self) -> None:
        """Writes the .json; the .npz comes last, for with it all are there."""
        if jax.process_index() == 0:
            with replacing(self.path.with_suffix(".json")) as temporary:
                temporary.write_text(self.note)


def place(run: Run, stem: str, made: Mapping[str, Any], out: str | Path | None = None) -> Place:
    """Returns where pictures of a run are kept.

    Args:
      run: that draws them.
      stem: folder and beginning of the name within the run's folder, which a digest of how they are made completes.
      made: what they depend on beside the run and its config: seed, requests and others, plain JSON.
      out: an .npz in place of that name.

    Raises:
      ValueError: `out` is no .npz, or holds other pictures.
    """
    config = plain(run.config)
    about = {
        "experiment": run.experiment,
        **{name: config[name] for name in BLOCKS},
        "step": run.step,
        "average": run.average,
        "weights": run.digest,
        **made,
    }
    note = json.dumps(about, indent=2) + "\n"
    path = Path(out or run.workdir / f"{stem}_{digest_of(note)[:8]}.npz").expanduser()
    if path.suffix != ".npz":
        raise ValueError(f"--out={out}: samples are written to an .npz file, with a picture of them beside it")
    found = Place(path, note)
    if everywhere(path.exists()) and not found.made_before:
        raise ValueError(f"{path} holds other pictures, as its .json says: name another --out, or move it away")
    return found


def requests_of(requests: Sequence[Any]) -> dict[str, Any]:
    """Returns {"requests": ...}, what each picture was to show; {} where that is nothing."""
    return {"requests": list(requests)} if any(one is not None for one in requests) else {}


def names_of(run: Run, requests: Sequence[Any]) -> list[str] | None:
    """Returns what pictures show, in words: prompts, or classes by name where they have names; None for nothing."""
    if run.model.condition.kind == "nothing" or all(one is None for one in requests):
        return None
    names = (run.stored.get("data") or {}).get("class_names") or ()
    words = {None: "", **dict(enumerate(names))}
    return [one if isinstance(one, str) else words.get(one, str(one)) for one in requests]


def labels_of(requests: Sequence[Any]) -> np.ndarray | None:
    """Returns int64[N], the class of each request; None where not all are classes."""
    return np.array(requests, np.int64) if all(isinstance(one, int | np.integer) for one in requests) else None


def digest_of(note: str) -> str:
    """Returns the sha256 of a note."""
    return hashlib.sha256(note.encode()).hexdigest()
