"""The autoencoder <-> diffusers' `AutoencoderKL` (Stable Diffusion, FLUX.1) and `AutoencoderKLFlux2`.

A published folder holds config.json and diffusion_pytorch_model.safetensors, as vae/ of a pipeline does.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.pretrained.blocks import block_name, count_levels, from_torch, to_torch, with_modern_names
from diffusion.pretrained.folder import (
    new_folder,
    read_json,
    read_weights,
    resolve,
    write_json,
    write_weights,
)
from diffusion.pretrained.identify import identify
from diffusion.pretrained.strict import check_keys, shapes_of, without_memory
from diffusion.pretrained.vae_config import BATCH_NORM_EPS, FLUX2, KL, Settings, config_of, settings_of

WEIGHTS = "diffusion_pytorch_model"
# The batch normalisation of FLUX.2's latents: ours in the collection "batch_stats", and theirs.
STATISTICS = {"mean": "bn.running_mean", "variance": "bn.running_var"}
_COUNT = "bn.num_batches_tracked"


class PublishedAutoencoder(NamedTuple):
    """An autoencoder as it was published, and how its latents become what a diffusion model works in.

    With patches folded into channels (`networks.vae.fold`), x_0 = (z - shift) * scale.

    Attributes:
      module: called as `networks.vae.Autoencoder` is.
      params: its variables, {"params": ...}; of FLUX.2 "batch_stats" too, which no module reads.
      shift: float32[c], one for each channel of x_0.
      scale: the same.
      patch: side of the patches; 1 for none.
      sampled: whether the model was trained on samples of the posterior, not on its mode.
    """

    module: Any
    params: dict[str, Any]
    shift: np.ndarray
    scale: np.ndarray
    patch: int
    sampled: bool


def load_vae(folder: str | os.PathLike, variant: str | None = None, dtype: Any = np.float32) -> PublishedAutoencoder:
    """Returns the autoencoder in a folder.

    Args:
      folder: of the autoencoder, of a whole pipeline, or a hub's cache directory of one.
      variant: of the weights' file, as "fp16"; see `folder.read_weights`.
      dtype: of the parameters.

    Raises:
      ValueError: another kind of model, which is named; a file that is missing or damaged; a setting that our network
        cannot honour; weights that are missing, left over, misshapen or not finite (each named).
    """
    settings = read_settings(folder)
    return published_of(settings, read_weights(vae_folder(folder), WEIGHTS, variant, dtype))


def read_settings(folder: str | os.PathLike) -> Settings:
    """Returns the settings of the autoencoder in a folder; raises ValueError as `load_vae` does, of its config."""
    path = vae_folder(folder) / "config.json"
    try:
        settings = settings_of(read_json(path))
        shapes(settings.module)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return settings


def vae_folder(folder: str | os.PathLike, classes: tuple[str, ...] = (KL, FLUX2)) -> Path:
    """Returns the folder with the autoencoder's config.json: `folder`, or vae/ in it.

    Raises:
      ValueError: it is not one of these classes of diffusers; what it is instead is named.
    """
    root = resolve(folder)
    path = root / "vae" if (root / "vae").is_dir() else root
    needed = f"needed is the folder of an {' or '.join(classes)}, or of a pipeline with one in vae/"
    if not (path / "config.json").exists():
        raise ValueError(f"cannot read {path / 'config.json'}: {folder} is {identify(root)}; {needed}")
    if read_json(path / "config.json").get("_class_name", classes[0]) not in classes:
        raise ValueError(f"{folder} is {identify(path)}: {needed}")
    return path


def save_vae(folder: str | os.PathLike, published: PublishedAutoencoder) -> None:
    """Writes a folder that diffusers and `load_vae` read: an `AutoencoderKLFlux2` where there are patches.

    Raises:
      ValueError: `folder` is there already, or diffusers has no such autoencoder.
    """
    weights = to_diffusers(published.params)
    shift, scale, epsilon = published.shift, published.scale, BATCH_NORM_EPS
    if published.patch > 1:
        statistics = _statistics(published)
        weights |= statistics_to_diffusers(statistics)
        shift, scale, epsilon = None, None, float(str(np.float32(statistics["epsilon"])))
    config = config_of(Settings(published.module, published.patch, shift, scale, epsilon))
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        write_weights(temporary / f"{WEIGHTS}.safetensors", weights)


def shapes(module: Any) -> dict[str, Any]:
    """Returns an autoencoder's tree of parameters as shapes (the one under "params"), nothing allocated."""
    side = module.factor
    images = jax.ShapeDtypeStruct((1, side, side, module.image_channels), jnp.float32)
    return shapes_of(module, images)


def to_diffusers(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters of `Autoencoder` (under "params") under diffusers' names and in its layouts."""
    params = variables["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_name(path, params): to_torch(path, np.asarray(leaf)) for path, leaf in leaves}


def from_diffusers(weights: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns diffusers' weights as parameters; `like` is the tree of parameters (under "params"), or of their shapes.

    Raises:
      ValueError: a key is missing, left over or given under its old name too, or a shape differs.
    """
    modern = with_modern_names(weights)
    expected = to_diffusers({"params": without_memory(like)})
    check_keys(modern, {name: weight.shape for name, weight in expected.items()}, "autoencoder")

    def take(path: Any, leaf: Any) -> np.ndarray:
        return from_torch(path, np.asarray(modern[_name(path, like)]))

    return jax.tree_util.tree_map_with_path(take, like)


def statistics_to_diffusers(statistics: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the "batch_stats" under diffusers' names."""
    weights = {theirs: np.asarray(statistics[ours], np.float32) for ours, theirs in STATISTICS.items()}
    return weights | {_COUNT: np.asarray(statistics.get("count", 0), np.int64)}


def published_of(settings: Settings, weights: Mapping[str, Any]) -> PublishedAutoencoder:
    """Returns the autoencoder of settings and of weights in diffusers' names."""
    module, patch = settings.module, settings.patch
    like = shapes(module)
    if settings.shift is not None and settings.scale is not None:
        params = {"params": from_diffusers(weights, like)}
        return PublishedAutoencoder(module, params, settings.shift, settings.scale, patch, sampled=True)
    channels = (module.latent_channels * patch**2,)
    ours = {name: weight for name, weight in weights.items() if name.startswith("bn.")}
    check_keys(ours, dict.fromkeys(STATISTICS.values(), channels), "autoencoder's latents", {_COUNT: ()})
    statistics: dict[str, Any] = {name: np.asarray(weights[theirs], np.float32) for name, theirs in STATISTICS.items()}
    statistics["epsilon"] = np.float32(settings.batch_norm_eps)
    if _COUNT in weights:
        statistics["count"] = np.asarray(weights[_COUNT], np.int64)
    rest = {name: weight for name, weight in weights.items() if name not in ours}
    params = {"params": from_diffusers(rest, like), "batch_stats": statistics}
    return PublishedAutoencoder(module, params, *_normalisation(statistics), patch, sampled=False)


def _normalisation(statistics: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns shift and scale of a batch normalisation, rounded once."""
    variance = np.asarray(statistics["variance"], np.float64) + np.float64(statistics["epsilon"])
    return np.asarray(statistics["mean"], np.float32), (variance**-0.5).astype(np.float32)


def _statistics(published: PublishedAutoencoder) -> dict[str, Any]:
    """Returns the statistics that give the shift and scale: those that were published, unless others were set since."""
    stored = published.params.get("batch_stats")
    given = np.asarray(published.shift, np.float32), np.asarray(published.scale, np.float32)
    if stored is not None and all(map(np.array_equal, _normalisation(stored), given)):
        return dict(stored)
    variance = given[1].astype(np.float64) ** -2 - BATCH_NORM_EPS
    if (variance < 0).any():
        raise ValueError(
            f"scales above {BATCH_NORM_EPS**-0.5:g} have no batch normalisation as FLUX.2's: scale is "
            f"{given[1].max():g}"
        )
    return {"mean": given[0], "variance": variance.astype(np.float32), "epsilon": np.float32(BATCH_NORM_EPS)}


def _name(path: Any, params: Mapping[str, Any]) -> str:
    """Returns diffusers' name of the parameter at `path`."""
    part, *rest = (key.key for key in path)
    if part in ("quant", "post_quant"):
        return f"{part}_conv.{'bias' if rest[-1] == 'bias' else 'weight'}"
    name = block_name(rest, count_levels(params[part], "down" if part == "encoder" else "up"))
    if name is None:
        raise ValueError(f"diffusers' AutoencoderKL has no {part} with {rest[0]}")
    return f"{part}.{name}"
