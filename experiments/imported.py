"""Published weights as the beginning of a run: where it would have drawn its own, it has these."""

import hashlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.pretrained import folder
from diffusion.training import Checkpoints, Experiment, init_state, workdir
from diffusion.training.checkpoints import provenance
from experiments.command_line import Config, plain
from experiments.image_diffusion import make_settings


def write_run(
    run_folder: Path,
    name: str,
    config: Config,
    experiment: Experiment,
    batch: dict[str, Any],
    params: Any,
    file: Path,
    **description: Any,
) -> None:
    """Makes `run_folder` a work folder of experiment `name` at step 0, its raw and averaged weights both `params`.

    Args:
      run_folder: must not be there yet.
      name: of the experiment.
      config: of the run; it describes the network of `params`.
      experiment: all but its first parameters is taken from it.
      batch: the shapes of one.
      params: {"params": ...}, arrays.
      file: where they are from; its name and checksum are kept in the checkpoint.
      **description: what else the experiment keeps there, plain JSON.
    """
    params = jax.tree.map(jnp.asarray, params)
    begun = experiment._replace(init=lambda key: params)
    state = init_state(begun, config.seed, batch, make_settings(config).ema_profiles)
    with file.open("rb") as opened:
        origin = {"file": file.name, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
    description |= {"experiment": name, "config": plain(config), "provenance": provenance(), "weights": origin}
    with folder.new_folder(run_folder) as temporary:
        workdir.claim(temporary, name, plain(config))
        (temporary / "metrics.jsonl").touch()
        with Checkpoints(temporary / "checkpoints") as checkpoints:
            checkpoints.save(0, state, description)
    print(f"{run_folder} is now a run of experiments.{name} with the weights of {file} (sha256 {origin['sha256']})")
