"""Published pipelines as models of ours: the config that describes one, and its weights streamed to the devices."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion.model import flux2_text, sd3_text
from diffusion.model.autoencoders import (
    Codec,
    decoder_of,
    of_published,
    open_autoencoder,
    params_of,
    with_preview,
)
from diffusion.model.choices import fields_of
from diffusion.model.config import Config, dtype_of
from diffusion.model.fields import choose
from diffusion.networks.flux2 import Flux2
from diffusion.networks.mmdit import MMDiT
from diffusion.pretrained import flux2, klein, mmdit, sd3
from diffusion.pretrained.folder import read_json, resolve
from diffusion.pretrained.vae import load_vae

PREVIEW = Path("preview")  # folder in a pipeline's, of a tiny autoencoder of its latents
KLEIN_SIDE = 1024  # pixels, of FLUX.2 [klein]'s pictures where no size is asked for
Put = Callable[[Any, np.ndarray], Any]  # (tree path, array) -> what is kept of it


class Pipeline(NamedTuple):
    """How a kind of published pipeline becomes a model.

    Attributes:
      describe: (folder, config, variant) -> what a checkpoint would store of the model beside its config, plain JSON,
        with its "image_shape"; changes `config` in place to that of the pipeline. Checks the files of weights, whose
        arrays it does not read.
      load: (folder, config, variant, put) -> the model's parameters {"network", "text", "space"}, each array read alone
        and handed to `put`.
    """

    describe: Callable[[Path, Config, str | None], dict[str, Any]]
    load: Callable[[Path, Config, str | None, Put], dict[str, Any]]


def kind_of(folder: Path) -> str | None:
    """Returns the class of the pipeline in a folder, one of `PIPELINES`; None where it is none of them."""
    index = resolve(folder) / "model_index.json"
    name = read_json(index).get("_class_name") if index.is_file() else None
    return name if name in PIPELINES else None


def describe_sd3(folder: Path, config: Config, variant: str | None = None) -> dict[str, Any]:
    """Describes a `StableDiffusion3Pipeline`; see `Pipeline`.

    Raises:
      ValueError: a part is missing, or is one that ours cannot be.
    """
    folder = resolve(folder)
    shift = sd3.read_shift(folder)
    network, _ = mmdit.load_mmdit(folder / "transformer", dtype_of(config), variant=variant, read=False)
    codec = of_published(load_vae(folder, variant)).codec
    text = config.condition
    encoder, _ = sd3_text.load_text(
        folder,
        dtype=text.dtype,
        variant=variant,
        leave_out=text.leave_out,
        length=text.length,
        clip_skip=text.clip_skip,
        widths={"t5": network.context_width},
        weights=False,
    )
    widths = encoder.context_width, encoder.pooled_width
    if widths != (network.context_width, network.pooled_width):
        raise ValueError(
            f"{folder}: the text encoders give widths {widths}, and the transformer reads "
            f"{network.context_width, network.pooled_width}: the parts are not of one pipeline"
        )
    own = {field: getattr(network, field) for field in fields_of(MMDiT)}
    own |= {"dtype": jnp.dtype(network.dtype).name, "remat": config.network.remat, "scan": config.network.scan}
    config.network = ConfigDict({"name": "mmdit", **own})
    choose(config, "sampling.grid", "released_flow")
    config.sampling.grid.shift = shift
    side = network.base_size * network.patch * codec.cell
    return {
        "image_shape": [side, side, 3],
        "num_classes": None,
        "condition": dict(encoder.description),
        "space": describe_space(folder, codec, config.space.get("preview", "")),
        "frozen": ["text", "space"],
    }


def load_sd3(folder: Path, config: Config, variant: str | None, put: Put) -> dict[str, Any]:
    """Returns the weights of a `StableDiffusion3Pipeline`; see `Pipeline`."""
    text, dtype = config.condition, dtype_of(config)
    params: dict[str, Any] = {}
    _, params["text"] = sd3_text.load_text(
        folder, dtype=text.dtype, variant=variant, leave_out=text.leave_out, length=text.length, put=put
    )
    path = folder / "transformer"
    _, params["network"] = mmdit.load_mmdit(path, dtype, weights_dtype=dtype, variant=variant, put=put)
    return params | {"space": load_space(folder, variant)}


def load_space(folder: Path, variant: str | None) -> dict[str, Any]:
    """Returns the parameters of `space.latents` of a pipeline's autoencoder, and of the tiny one in preview/."""
    params = params_of(of_published(load_vae(folder, variant)))
    if (folder / PREVIEW).is_dir():
        params["preview"] = decoder_of(params_of(open_autoencoder(folder / PREVIEW)))
    return params


def describe_space(folder: Path, codec: Codec, preview: str = "") -> dict[str, Any]:
    """Returns the description of the latents of a pipeline's autoencoder.

    Args:
      folder: of the pipeline.
      codec: of its autoencoder.
      preview: of a tiny autoencoder that decodes previews; "": that in preview/, if there is one.

    Raises:
      ValueError: the tiny one is of other latents.
    """
    preview = preview or (str(folder / PREVIEW) if (folder / PREVIEW).is_dir() else "")
    return with_preview(codec, open_autoencoder(preview).codec) if preview else codec.description


def describe_klein(folder: Path, config: Config, variant: str | None = None) -> dict[str, Any]:
    """Describes a `Flux2KleinPipeline`, sampled as it was distilled, or not; see `Pipeline`.

    Raises:
      ValueError: a part is missing, or is one that ours cannot be.
    """
    folder = resolve(folder)
    distilled = klein.read_index(folder)
    network, _ = flux2.load_flux2(folder / "transformer", dtype_of(config), variant=variant, read=False)
    codec = of_published(load_vae(folder, variant)).codec
    text = config.condition
    encoder, _ = flux2_text.load_text(
        folder, dtype=text.dtype, states=text.states, length=text.length, variant=variant, weights=False
    )
    widths, needed = (encoder.context_width, codec.channels), (network.context_width, network.out_channels)
    if widths != needed:
        raise ValueError(
            f"{folder}: text encoder and autoencoder give widths {widths}, and the transformer reads {needed}: the "
            "parts are not of one pipeline, or condition.states is not its own"
        )
    own = {field: getattr(network, field) for field in fields_of(Flux2)}
    own |= {"dtype": jnp.dtype(network.dtype).name, "remat": config.network.remat, "scan": config.network.scan}
    config.network = ConfigDict({"name": "flux2", **own})
    choose(config, "sampling.grid", "flux2")
    config.sampling.num_steps, config.sampling.guidance = (4, 1.0) if distilled else (50, 4.0)
    return {
        "distilled": distilled,  # to few steps without guidance
        "image_shape": [KLEIN_SIDE, KLEIN_SIDE, 3],
        "num_classes": None,
        "condition": dict(encoder.description),
        "space": describe_space(folder, codec, config.space.get("preview", "")),
        "frozen": ["text", "space"],
    }


def load_klein(folder: Path, config: Config, variant: str | None, put: Put) -> dict[str, Any]:
    """Returns the weights of a `Flux2KleinPipeline`; see `Pipeline`."""
    text, dtype = config.condition, dtype_of(config)
    _, of_text = flux2_text.load_text(
        folder, dtype=text.dtype, states=text.states, length=text.length, variant=variant, put=put
    )
    path = folder / "transformer"
    _, network = flux2.load_flux2(path, dtype, weights_dtype=dtype, variant=variant, put=put)
    return {"network": network, "text": of_text, "space": load_space(folder, variant)}


PIPELINES: Mapping[str, Pipeline] = {
    sd3.CLASS: Pipeline(describe_sd3, load_sd3),
    klein.CLASS: Pipeline(describe_klein, load_klein),
}
