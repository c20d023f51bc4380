"""A published Stable Diffusion 3: the folder of its pipeline, or all of it in one file under its authors' names.

model_index.json, scheduler/, transformer/, vae/ and the text encoders of `sd3_text`
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.networks.mmdit import MMDiT
from diffusion.pretrained import mmdit, mmdit_original, sd3_text, vae
from diffusion.pretrained.flow_scheduler import SCHEDULER, read_flow_scheduler, write_flow_scheduler
from diffusion.pretrained.folder import new_folder, read_file, read_json, resolve, write_json
from diffusion.pretrained.identify import identify
from diffusion.pretrained.mmdit_original import PREFIX
from diffusion.pretrained.sd3_text import Tower
from diffusion.pretrained.vae import PublishedAutoencoder
from diffusion.pretrained.vae_original import load_original

CLASS = "StableDiffusion3Pipeline"
# Of every published Stable Diffusion 3; files without a config do not hold them.
SHIFT, SHIFT_FACTOR, SCALING_FACTOR = 3.0, 0.0609, 1.5305


class StableDiffusion3(NamedTuple):
    """A whole pipeline.

    Attributes:
      network: the MM-DiT.
      params: its parameters, {"params": ...}.
      autoencoder: of its latents.
      towers: its text encoders, by their names in `sd3_text.PARTS`.
      shift: of the times it is sampled at.
    """

    network: MMDiT
    params: dict[str, Any]
    autoencoder: PublishedAutoencoder
    towers: Mapping[str, Tower]
    shift: float


def is_pipeline(folder: str | os.PathLike) -> bool:
    """Returns whether a folder is that of a `StableDiffusion3Pipeline`."""
    path = resolve(folder) / "model_index.json"
    return path.is_file() and read_json(path).get("_class_name") == CLASS


def is_single_file(path: Path) -> bool:
    """Returns whether a path is that of a file with a Stable Diffusion 3 under its authors' names."""
    if not path.is_file() or path.suffix != ".safetensors":
        return False
    return any(name.startswith(f"{PREFIX}joint_blocks.") for name in read_file(path))


def read_shift(folder: str | os.PathLike) -> float:
    """Returns the shift of a pipeline's times.

    Raises:
      ValueError: the folder is not a pipeline's (what it is is named), or its scheduler is one that ours is not.
    """
    root = resolve(folder)
    if not is_pipeline(root):
        raise ValueError(f"{folder} is {identify(root)}; needed is the folder of a {CLASS}")
    return float(read_flow_scheduler(root, {"use_dynamic_shifting": (False,)})["shift"])


def save_pipeline(folder: str | os.PathLike, pipeline: StableDiffusion3) -> None:
    """Writes a folder that diffusers and ours read, in the dtypes of the parameters.

    Raises:
      ValueError: `folder` is there already.
    """
    with new_folder(folder) as temporary:
        index = {"_class_name": CLASS, **sd3_text.write_towers(temporary, pipeline.towers)}
        vae.save_vae(temporary / "vae", pipeline.autoencoder)
        (temporary / "transformer").mkdir()
        mmdit.write_mmdit(temporary / "transformer", pipeline.network, pipeline.params)
        write_flow_scheduler(temporary, shift=pipeline.shift)
        index |= {
            "transformer": ["diffusers", "SD3Transformer2DModel"],
            "vae": ["diffusers", "AutoencoderKL"],
            "scheduler": ["diffusers", SCHEDULER],
        }
        write_json(temporary / "model_index.json", index)


def read_single_file(path: Path, tokenizers: Path, dtype: Any = None) -> StableDiffusion3:
    """Returns the pipeline in one file under its authors' names.

    Args:
      path: safetensors with the MM-DiT, the autoencoder and text encoders.
      tokenizers: a folder with tokenizer, tokenizer_2 and tokenizer_3, as the published pipeline has them, for the
        text encoders that the file holds; it holds none.
      dtype: of the parameters; None: as they are stored.

    Raises:
      ValueError: the file is damaged or of another kind, or a tokenizer is missing.
    """
    weights = read_file(path, dtype)
    own = {name.removeprefix(PREFIX): weight for name, weight in weights.items() if name.startswith(PREFIX)}
    if not own:
        raise ValueError(f"{path} is {identify(path)}; needed is a Stable Diffusion 3 in one file")
    network = mmdit_original.network_of(own)
    names = {
        name: tokenizers / f"tokenizer{suffix}"
        for name, (suffix, _, prefix) in sd3_text.PARTS.items()
        if any(key.startswith(prefix) for key in weights)
    }
    words = {name: sd3_text.read_tokenizer(name, folder) for name, folder in names.items()}
    towers = sd3_text.towers_of_file(weights, words)
    autoencoder = load_original(path, SCALING_FACTOR, SHIFT_FACTOR, "first_stage_model.", dtype=dtype)
    params = mmdit.from_diffusers(network, mmdit_original.from_original(own))
    return StableDiffusion3(network, {"params": params}, autoencoder, towers, SHIFT)
