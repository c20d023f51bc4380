"""Published pipelines, and artefacts of ours, as runs: the work folder keeps their files, and opening it reads them.

published.json   what a checkpoint stores beside its weights: experiment, config, and what the files are
pipeline/        the files: hard links to those that were imported, or copies where a link cannot be made; in
                 preview/, those of the tiny autoencoder that space.preview named
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from tqdm import tqdm

from diffusion.model import formats
from diffusion.model.config import Config, plain
from diffusion.model.experiment import rules_of
from diffusion.model.model import Model, init
from diffusion.model.pipelines import PIPELINES, PREVIEW
from diffusion.pretrained.folder import new_folder, read_file
from diffusion.pretrained.strict import check_keys
from diffusion.training import RunError, workdir
from diffusion.training.checkpoints import provenance
from diffusion.training.description import FORMAT, check_description
from diffusion.training.sharding import partition

ABOUT, FILES = "published.json", "pipeline"
OWN, WEIGHTS = "run", "model.safetensors"  # the kind, and the file of weights, of an artefact of ours


def is_published(folder: Path) -> bool:
    """Returns whether a work folder is that of a published pipeline."""
    return (folder / ABOUT).is_file()


def read_about(folder: Path) -> dict[str, Any]:
    """Returns what is stored of a published pipeline, in today's format.

    Raises:
      RunError: it cannot be read.
    """
    path = folder / ABOUT
    try:
        stored = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"cannot read {path} ({error}): import the pipeline again") from error
    return formats.current(check_description(stored, path))


def write_run(
    folder: Path, source: Path, name: str, config: Config, about: Mapping[str, Any], preview: Path | None = None
) -> None:
    """Makes `folder` the work folder of a published pipeline.

    Args:
      folder: must not exist yet.
      source: of the pipeline's files.
      name: of the experiment.
      config: of the pipeline.
      about: what else is stored of it, plain JSON.
      preview: folder of a published tiny autoencoder for previews, in place of the source's; None: that of the source.
    """
    if preview is not None and (preview / "checkpoints").is_dir():
        raise RunError(f"space.preview={preview} is a run's work folder: export it, or name a published one")
    with new_folder(folder) as temporary:
        taken = list(_take(source, temporary / FILES, leave_out=PREVIEW if preview else None))
        if preview is not None:
            taken += [(PREVIEW / path, digest) for path, digest in _take(preview, temporary / FILES / PREVIEW)]
        origin = [{"file": str(path), "sha256": digest} for path, digest in taken]
        described = {"experiment": name, "config": plain(config), **about, "format": FORMAT}
        described |= {"provenance": provenance(), "weights": origin}
        workdir.claim(temporary, name, plain(config))
        (temporary / ABOUT).write_text(json.dumps(described, indent=2) + "\n", "utf-8")


def _take(source: Path, target: Path, leave_out: Path | None = None) -> Iterator[tuple[Path, str]]:
    """Links every file of a pipeline, following links of a hub's cache; yields the names and digests of weights.

    What lies in its folder `leave_out` is left out.
    """
    files = [path for path in sorted(source.rglob("*")) if path.is_file() and not _hidden(path.relative_to(source))]
    if leave_out is not None:
        files = [path for path in files if leave_out not in path.relative_to(source).parents]
    for path in tqdm(files, desc="reading files", unit="file", delay=5):
        name = path.relative_to(source)
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        real = path.resolve()
        try:
            os.link(real, target / name)
        except OSError:  # another disk
            shutil.copy2(real, target / name)
        if path.suffix in (".safetensors", ".bin", ".pth"):
            with real.open("rb") as opened:
                yield name, hashlib.file_digest(opened, "sha256").hexdigest()


def _hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def load_params(folder: Path, stored: Mapping[str, Any], config: Config, model: Model, mesh: Mesh) -> dict[str, Any]:
    """Returns the parameters of a published pipeline: each array is read alone, straight into its place on the mesh.

    Args:
      folder: of the run.
      stored: of `read_about`.
      config: of the run.
      model: of the run.
      mesh: the devices.

    Raises:
      ValueError: a file is missing or damaged.
    """
    rules = rules_of(config, model)

    def put(path: Any, array: np.ndarray) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.device_put(array, NamedSharding(mesh, partition(name, array.shape, mesh.shape, rules)))

    if stored["pipeline"] == OWN:
        return load_own(folder / FILES / WEIGHTS, model, put)
    kind = PIPELINES[stored["pipeline"]]
    params = kind.load(folder / FILES, config, stored["variant"], put)
    return {**params, "space": jax.device_put(params["space"], NamedSharding(mesh, jax.sharding.PartitionSpec()))}


def load_own(path: Path, model: Model, put: Callable[[Any, np.ndarray], jax.Array]) -> dict[str, Any]:
    """Returns the parameters in the file of an artefact, see `artefact`; every array has to be there, and no other.

    Raises:
      ValueError: the file is missing or damaged, or holds another model's arrays.
    """
    like = jax.eval_shape(partial(init, model), jax.random.key(0))
    weights = read_file(path, None)
    leaves = jax.tree_util.tree_leaves_with_path(like)
    named = {jax.tree_util.keystr(place, simple=True, separator="/"): leaf.shape for place, leaf in leaves}
    check_keys(weights, named, "run")

    def take(place: Any, leaf: Any) -> jax.Array:
        del leaf
        return put(place, np.asarray(weights[jax.tree_util.keystr(place, simple=True, separator="/")]))

    return jax.tree_util.tree_map_with_path(take, like)


def digest_of(stored: Mapping[str, Any]) -> str:
    """Returns one digest over all files of weights."""
    text = json.dumps(stored["weights"], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
