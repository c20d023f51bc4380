"""The autoencoder in a folder, whichever of those that are known here it is."""

import os
from typing import Any

import numpy as np

from diffusion.pretrained.folder import read_json, resolve
from diffusion.pretrained.tiny_vae import TINY, find_pair, load_tiny
from diffusion.pretrained.vae import PublishedAutoencoder, load_vae, vae_folder
from diffusion.pretrained.vae_config import FLUX2, KL


def load_autoencoder(
    folder: str | os.PathLike, variant: str | None = None, dtype: Any = np.float32
) -> PublishedAutoencoder:
    """Returns the autoencoder in a folder: see `vae.load_vae` and `tiny_vae.load_tiny` for folders and errors."""
    if find_pair(resolve(folder)) is not None:
        return load_tiny(folder, variant, dtype)
    path = vae_folder(folder, (KL, FLUX2, TINY))
    load = load_tiny if read_json(path / "config.json").get("_class_name") == TINY else load_vae
    return load(path, variant, dtype)
