"""Autoencoders as a space is made of them: published ones, and those of experiments.autoencoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.model import vae
from diffusion.model.choices import fields_of
from diffusion.networks.tiny_vae import TinyAutoencoder
from diffusion.networks.vae import Autoencoder, fold, unfold
from diffusion.pretrained import taef2
from diffusion.pretrained.autoencoders import load_autoencoder
from diffusion.pretrained.vae import PublishedAutoencoder

NETWORKS = {"vae": Autoencoder, "tiny": TinyAutoencoder}


class Codec(NamedTuple):
    """Between images in [-1, 1] and latents, patches of which are channels.

    Attributes:
      module: the network.
      patch: side of the patches.
      description: what makes it again, plain JSON.
    """

    module: Any
    patch: int
    description: dict[str, Any]

    @property
    def cell(self) -> int:
        """Side in pixels of what one position of the latents stands for."""
        return self.module.factor * self.patch

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return self.module.latent_channels * self.patch**2

    def encode(self, params: Any, image: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns mean and standard deviation of the latents [B, h, w, channels], float32."""
        posterior = self.module.apply(params, image, method="encode")
        return fold(posterior.mean, self.patch), fold(jnp.exp(posterior.log_variance / 2), self.patch)

    def decode(self, params: Any, z: jax.Array) -> jax.Array:
        """Returns images in [-1, 1], not clipped."""
        return self.module.apply(params, unfold(z, self.patch), method="decode")

    def init(self, key: jax.Array) -> Any:
        """Returns parameters that `key` draws."""
        side = self.cell
        return self.module.init(key, jnp.zeros((1, side, side, 3)))


class Trained(NamedTuple):
    """A codec with weights.

    Attributes:
      codec: see `Codec`.
      params: of its module.
      shift: float32[channels]; x_0 = (z - shift) * scale.
      scale: float32[channels].
    """

    codec: Codec
    params: Any
    shift: np.ndarray
    scale: np.ndarray


def params_of(trained: Trained) -> dict[str, Any]:
    """Returns the parameters of a space of its latents."""
    return {"autoencoder": trained.params, "shift": jnp.asarray(trained.shift), "scale": jnp.asarray(trained.scale)}


def decoder_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same parameters without those that only encode."""
    kept = {name: part for name, part in params["autoencoder"]["params"].items() if name not in ("encoder", "quant")}
    return {**params, "autoencoder": {"params": kept}}


def with_preview(codec: Codec, tiny: Codec) -> dict[str, Any]:
    """Returns the description of a codec whose latents a tiny one decodes too, for previews.

    Raises:
      ValueError: their latents are of other shapes.
    """
    own, others = (codec.cell, codec.channels), (tiny.cell, tiny.channels)
    if own != others:
        raise ValueError(
            f"space.preview has {others[1]} channels for each {others[0]} pixels, and the latents {own[1]} for each "
            f"{own[0]}: use the tiny autoencoder of these latents, as TAEF2 of FLUX.2"
        )
    return {**codec.description, "preview": tiny.description}


def restore(description: Mapping[str, Any]) -> Codec:
    """Returns the codec that a description was made of."""
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in description["fields"].items()}
    return Codec(NETWORKS[description["name"]](**fields), description["patch"], dict(description))


def describe(module: Any, patch: int) -> Codec:
    """Returns the codec of a network, with its description."""
    name = next(name for name, kind in NETWORKS.items() if type(module) is kind)
    fields = {field: getattr(module, field) for field in fields_of(type(module))}
    fields = {field: list(value) if isinstance(value, tuple) else value for field, value in fields.items()}
    fields["dtype"] = jnp.dtype(module.dtype).name
    return Codec(module, patch, {"name": name, "fields": fields, "patch": patch})


def open_autoencoder(folder: str | Path, patch: int = 0) -> Trained:
    """Returns the autoencoder in a folder: a published one's, a pipeline's, a work folder of experiments.autoencoder.

    Of a work folder it is the newest checkpoint's, with averaged weights.

    Args:
      folder: of one of those; "taef2", where no folder has that name: FLUX.2's tiny one, fetched once.
      patch: side of the patches that become channels; 0: the published one.

    Raises:
      ValueError: there is none, it cannot be read, or its shift and scale differ within a patch.
      RunError: a work folder of another experiment, or one whose latents have not been fitted yet.
    """
    folder = find_folder(folder)
    if (folder / "checkpoints").is_dir():
        return of_published(vae.open_published(folder), patch)
    return of_published(load_autoencoder(folder), patch)


def find_folder(folder: str | Path) -> Path:
    """Returns the folder of an autoencoder; that of "taef2", where no folder has that name, is fetched once."""
    named = str(folder) == taef2.NAME and not Path(folder).exists()
    return taef2.fetch_taef2() if named else Path(folder).expanduser()


def of_published(found: PublishedAutoencoder, patch: int = 0) -> Trained:
    """Returns a published autoencoder as `open_autoencoder` does."""
    shift, scale = found.shift, found.scale
    if patch and patch != found.patch:
        channels = found.module.latent_channels
        for numbers in (shift, scale):
            if not (numbers.reshape(channels, -1) == numbers.reshape(channels, -1)[:, :1]).all():
                raise ValueError(
                    f"space.patch={patch}: these latents are normalised in patches of {found.patch}: use 0"
                )
        shift, scale = (np.repeat(x.reshape(channels, -1)[:, 0], patch**2) for x in (shift, scale))
    params = {"params": found.params["params"]}
    return Trained(describe(found.module, patch or found.patch), params, shift, scale)
