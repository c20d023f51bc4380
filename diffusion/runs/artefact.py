"""A run's averaged weights as a folder to hand on: every model has this form, whether or not others publish it.

published.json                what a checkpoint stores beside its weights: experiment, config, vocabulary
pipeline/model.safetensors    every array, frozen ones too but for a student's teacher, under its place in the tree
README.md                     the model card: what it is, of which data, under which licences, its figures

`open_run` and every mode but training take the folder as a work folder; --mode=import makes one of it elsewhere.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

from diffusion.files import new_folder
from diffusion.model.config import Config, from_plain, plain
from diffusion.runs.published import ABOUT, FILES, OWN, WEIGHTS
from diffusion.runs.run import Run
from diffusion.training import workdir
from diffusion.training.checkpoints import provenance
from diffusion.training.description import FORMAT

# Fields of a config that name places of the machine.
PATHS = ("dir", "folder", "package", "weights", "judge", "teacher")


def write_artefact(folder: Path, run: Run, about: str = "") -> None:
    """Writes the artefact of a run.

    Args:
      folder: must not exist yet.
      run: its averaged weights are written, in the dtypes that they have.
      about: what the model card says of the data and of licences, Markdown.

    Raises:
      ValueError: the folder is there already.
    """
    run = without_teacher(run)
    params = jax.device_get(run.params)
    config = plain(portable(run.config))
    with new_folder(folder) as temporary:
        path = temporary / FILES / WEIGHTS
        path.parent.mkdir()
        save_file({name: np.array(leaf, order="C") for name, leaf in flatten_dict(params, sep="/").items()}, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        described = {
            **{name: run.stored[name] for name in ("image_shape", "num_classes", "condition", "space")},
            "frozen": list(run.model.frozen),
            "experiment": run.experiment,
            "config": config,
            "pipeline": OWN,
            "variant": None,
            "step": run.step,
            "average": run.average,
            "format": FORMAT,
            "provenance": provenance(),
            "weights": [{"file": WEIGHTS, "sha256": digest}],
        }
        workdir.claim(temporary, run.experiment, config)
        (temporary / ABOUT).write_text(json.dumps(described, indent=2) + "\n", "utf-8")
        (temporary / "README.md").write_text(card(run, params, about), "utf-8")


def without_teacher(run: Run) -> Run:
    """Returns a run as it draws: what a student has learned from is needed no more."""
    if run.model.teacher is None:
        return run
    frozen = tuple(name for name in run.model.frozen if name != "teacher")
    model = run.model._replace(teacher=None, frozen=frozen)
    params = {name: group for name, group in run.params.items() if name != "teacher"}
    return run._replace(model=model, params=params if model.grouped else params["network"])


def portable(config: Config) -> Config:
    """Returns a config without the places of this machine."""
    blocks = plain(config)
    for block in blocks.values():
        if isinstance(block, dict):
            block.update({field: "" for field in PATHS if isinstance(block.get(field), str)})
    return from_plain(blocks)


def card(run: Run, params: Any, about: str) -> str:
    """Returns the model card: YAML as hubs read it, then Markdown."""
    config, report = run.config, run.workdir / "report.md"
    groups = params if run.model.grouped else {"network": params}
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(group)) for name, group in groups.items()}
    height, width, _ = run.model.space.image_shape
    of_name = {name: config[name].name for name in ("process", "network", "condition", "space", "optimizer")}
    sampled = config.sampling
    facts = [
        f"pictures of {height}x{width}; x_0 has shape {'x'.join(map(str, run.model.space.shape))}",
        *(f"{name}: {value}" for name, value in of_name.items()),
        f"parameters: {', '.join(f'{name} {size:,}' for name, size in sizes.items())}",
        f"trained for {run.step} steps of {config.data.batch_size}; weights averaged: {run.average}",
        f"sampled with {sampled.sampler.name}, {sampled.num_steps} steps, guidance {sampled.guidance:g}",
    ]
    use = f'import diffusion\n\nrun = diffusion.open_run("THIS FOLDER")\nimages = run.sample({_request(run)})'
    kind = "text-to-image" if run.model.condition.kind == "prompts" else "unconditional-image-generation"
    figures = report.read_text("utf-8").partition("\n")[2].strip() if report.is_file() else ""
    sections = [
        f"---\npipeline_tag: {kind}\nlibrary_name: diffusion-jax\n---",
        f"# {run.experiment}, {run.step} steps",
        "\n".join(f"- {fact}" for fact in facts),
        f"```python\n{use}\n```",
        *([f"## Data and licences\n\n{about.strip()}"] if about else []),
        *([f"## Figures\n\nOf the newest evaluation in the run's folder.\n\n{figures}"] if figures else []),
    ]
    return "\n\n".join(sections) + "\n"


def _request(run: Run) -> str:
    """Returns what a model is asked for in the example."""
    return 'prompts=["..."]' if run.model.condition.kind == "prompts" else "16"
