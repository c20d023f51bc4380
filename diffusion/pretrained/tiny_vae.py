"""The tiny autoencoder <-> diffusers' `AutoencoderTiny`, and TAESD's own pairs of files, as taef2_encoder.pth.

Both name layers by their places in a sequence. TAEF2, for the latents of FLUX.2, exists as a pair alone: diffusers has
not the normalisation of its blocks.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion.networks.tiny_vae import TinyAutoencoder
from diffusion.pretrained.blocks import from_torch, to_torch
from diffusion.pretrained.config_fields import check_counts, read_fields
from diffusion.pretrained.folder import (
    new_folder,
    read_file,
    read_json,
    read_weights,
    resolve,
    write_json,
    write_weights,
)
from diffusion.pretrained.identify import identify
from diffusion.pretrained.strict import check_keys, few, without_memory
from diffusion.pretrained.vae import WEIGHTS, PublishedAutoencoder, shapes, vae_folder

TINY = "AutoencoderTiny"
# The fields of a config.json and what holds where it is silent: the arguments of diffusers' class and their defaults.
_FIELDS: dict[str, Any] = dict(
    in_channels=3,
    out_channels=3,
    encoder_block_out_channels=[64] * 4,
    decoder_block_out_channels=[64] * 4,
    block_out_channels=None,  # the decoder's, once more
    act_fn="relu",
    upsample_fn="nearest",
    latent_channels=4,
    upsampling_scaling_factor=2,
    num_encoder_blocks=[1, 3, 3, 3],
    num_decoder_blocks=[3, 3, 3, 1],
    latent_magnitude=3,  # these two are of latents as images of 8 bits alone
    latent_shift=0.5,
    force_upcast=False,
    scaling_factor=1.0,
    shift_factor=0.0,
)
_HONOURED: dict[str, tuple[Any, ...]] = dict(
    act_fn=("relu",),
    upsample_fn=("nearest",),
    upsampling_scaling_factor=(2,),
    scaling_factor=(1.0,),
    shift_factor=(0.0,),
)
_PARTS = {
    "conv_1": "conv.0",
    "conv_2": "conv.2",
    "conv_3": "conv.4",
    "norm_in": "pool.0",
    "norm": "pool.1",
    "norm_out": "pool.3",
}


def load_tiny(folder: str | os.PathLike, variant: str | None = None, dtype: Any = np.float32) -> PublishedAutoencoder:
    """Returns the tiny autoencoder in a folder. Its latents are x_0 as it is: shift 0 and scale 1.

    Those of TAEF2 are FLUX.2's after its batch normalisation, where a model sees patches of 2x2 of them as channels.

    Args:
      folder: of an `AutoencoderTiny`, or of a pair of files NAME_encoder.pth and NAME_decoder.pth (or .safetensors).
      variant: of the weights' file, as "fp16", of an `AutoencoderTiny`.
      dtype: of the parameters.

    Raises:
      ValueError: as `vae.load_vae`.
    """
    root = resolve(folder)
    pair = find_pair(root)
    if pair is None:
        path = vae_folder(folder, (TINY,))
        try:
            module = module_of(read_json(path / "config.json"))
            like = shapes(module)
        except ValueError as error:
            raise ValueError(f"{path / 'config.json'}: {error}") from error
        weights: Mapping[str, Any] = read_weights(path, WEIGHTS, variant, dtype)
    else:
        weights = _from_pair(read_file(pair[0], dtype), read_file(pair[1], dtype))
        module = _module_of_weights(weights, pair[0])
        like = shapes(module)
    patch = 2 if module.smallest_norm else 1
    shift, scale = (np.full(module.latent_channels * patch**2, number, np.float32) for number in (0, 1))
    params = {"params": from_diffusers(module, weights, like)}
    return PublishedAutoencoder(module, params, shift, scale, patch, sampled=False)


def find_pair(folder: Path) -> tuple[Path, Path] | None:
    """Returns encoder and decoder in a folder without settings; None where there are none.

    Raises:
      ValueError: there are several pairs, or one file of a pair.
    """
    if not folder.is_dir() or (folder / "config.json").exists() or (folder / "model_index.json").exists():
        return None
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".pth", ".safetensors")]
    encoders = [path for path in files if path.stem.endswith("_encoder")]
    decoders = [path for path in files if path.stem.endswith("_decoder")]
    if not encoders and not decoders:
        return None
    stems = [[path.stem.rpartition("_")[0] for path in paths] for paths in (encoders, decoders)]
    if len(encoders) != 1 or stems[0] != stems[1]:
        found = few([path.name for path in encoders + decoders])
        raise ValueError(f"{folder} holds {found}: needed is one pair, NAME_encoder.pth and NAME_decoder.pth")
    return encoders[0], decoders[0]


def save_tiny(folder: str | os.PathLike, published: PublishedAutoencoder) -> None:
    """Writes a folder that diffusers and `load_tiny` read.

    Raises:
      ValueError: `folder` is there already, or diffusers has no such autoencoder.
    """
    module = published.module
    if module.smallest_norm or published.patch != 1:
        raise ValueError("diffusers' AutoencoderTiny has neither the normalisation of TAEF2's blocks nor patches")
    if (np.asarray(published.shift) != 0).any() or (np.asarray(published.scale) != 1).any():
        raise ValueError("the latents of diffusers' AutoencoderTiny have shift 0 and scale 1, but these have others")
    levels = len(module.encoder_blocks)
    config = _FIELDS | {
        "_class_name": TINY,
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        "encoder_block_out_channels": [module.width] * levels,
        "decoder_block_out_channels": [module.width] * levels,
        "latent_channels": module.latent_channels,
        "num_encoder_blocks": list(module.encoder_blocks),
        "num_decoder_blocks": list(module.decoder_blocks)[::-1],
    }
    del config["block_out_channels"]  # diffusers writes it, but takes it for unknown
    weights = to_diffusers(module, published.params)
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        write_weights(temporary / f"{WEIGHTS}.safetensors", weights)


def module_of(config: Mapping[str, Any]) -> TinyAutoencoder:
    """Returns the network that the config.json of an `AutoencoderTiny` describes.

    Raises:
      ValueError: naming every field that our network cannot honour.
    """
    fields = read_fields(config, TINY, _FIELDS, _HONOURED)
    check_counts({name: fields[name] for name in ("in_channels", "latent_channels")})
    if fields["out_channels"] != fields["in_channels"]:
        raise ValueError("in_channels and out_channels differ: ours has one number of them")
    widths = {name: list(fields[f"{name}_block_out_channels"]) for name in ("encoder", "decoder")}
    blocks = {name: list(fields[f"num_{name}_blocks"]) for name in ("encoder", "decoder")}
    for name, counts in blocks.items():
        check_counts({f"num_{name}_blocks[{level}]": count for level, count in enumerate(counts)})
    different = sorted({*widths["encoder"], *widths["decoder"]})
    if len(different) != 1 or len({len(part) for part in (*widths.values(), *blocks.values())}) != 1:
        raise ValueError(
            f"its levels have {few(map(str, different))} channels, {blocks['encoder']} and {blocks['decoder']} blocks: "
            "ours has levels of one width, as many in the encoder as in the decoder"
        )
    check_counts({"encoder_block_out_channels": different[0]})
    return TinyAutoencoder(
        image_channels=fields["in_channels"],
        latent_channels=fields["latent_channels"],
        width=different[0],
        encoder_blocks=tuple(blocks["encoder"]),
        decoder_blocks=tuple(blocks["decoder"][::-1]),
    )


def to_diffusers(module: TinyAutoencoder, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the parameters (under "params") under diffusers' names and in its layouts."""
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    return {_name(module, path): to_torch(path, np.asarray(leaf)) for path, leaf in leaves}


def from_diffusers(module: TinyAutoencoder, weights: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Returns diffusers' weights as parameters; `like` is the tree of parameters (under "params"), or of their shapes.

    Raises:
      ValueError: a key is missing or left over, or a shape differs.
    """
    expected = to_diffusers(module, {"params": without_memory(like)})
    check_keys(weights, {name: weight.shape for name, weight in expected.items()}, "tiny autoencoder")

    def take(path: Any, leaf: Any) -> np.ndarray:
        return from_torch(path, np.asarray(weights[_name(module, path)]))

    return jax.tree_util.tree_map_with_path(take, like)


def _sequence(module: TinyAutoencoder, part: str) -> list[str]:
    """Returns our modules in diffusers' order; layers without parameters have none: "" in their place."""
    down = part == "encoder"
    levels = list(enumerate(module.encoder_blocks if down else module.decoder_blocks))
    sequence = ["conv_in"] if down else ["conv_in", ""]
    for level, count in levels if down else levels[::-1]:
        if down and level > 0:
            sequence += [f"down_{level - 1}_downsample"]
        sequence += [f"{'down' if down else 'up'}_{level}_block_{i}" for i in range(count)]
        if not down and level > 0:
            sequence += ["", f"up_{level}_upsample"]
    return [*sequence, "conv_out"]


def _name(module: TinyAutoencoder, path: Any) -> str:
    """Returns diffusers' name of the parameter at `path`."""
    part, layer, *parts, leaf = (key.key for key in path)
    place = str(_sequence(module, part).index(layer))
    suffix = "bias" if leaf == "bias" else "weight"
    return ".".join([part, "layers", place, *(_PARTS[name] for name in parts), suffix])


def _from_pair(encoder: Mapping[str, Any], decoder: Mapping[str, Any]) -> dict[str, Any]:
    """Returns weights of TAESD's own files under diffusers' names: the decoder's clamp is its layer 0 there."""

    def earlier(name: str) -> str:
        place, _, rest = name.partition(".")
        return f"{int(place) - 1}.{rest}" if place.isdigit() else name

    renamed = {f"encoder.layers.{name}": weight for name, weight in encoder.items()}
    return renamed | {f"decoder.layers.{earlier(name)}": weight for name, weight in decoder.items()}


def _module_of_weights(weights: Mapping[str, Any], path: Path) -> TinyAutoencoder:
    """Returns the network that has such weights, in diffusers' names."""
    blocks, places = {}, {}
    for part in ("encoder", "decoder"):
        names = [match for name in weights if (match := re.fullmatch(rf"{part}\.layers\.(\d+)\.(.*)", name))]
        is_block = {int(match[1]): False for match in names}
        is_block |= {int(match[1]): True for match in names if match[2].startswith("conv.")}
        places[part] = sorted(is_block)
        kinds = "".join("b" if is_block[place] else "c" for place in places[part])
        blocks[part] = tuple(len(run) for run in kinds.split("c")[1:-1])
    try:
        width, image, _, _ = weights["encoder.layers.0.weight"].shape
        latent = weights[f"encoder.layers.{places['encoder'][-1]}.weight"].shape[0]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(f"{path} is {identify(path)}: needed is an encoder of TAESD") from error
    if len(blocks["encoder"]) != len(blocks["decoder"]):
        raise ValueError(
            f"{path} and the decoder beside it do not fit together: convolutions make {len(blocks['encoder'])} levels "
            f"of one, {len(blocks['decoder'])} of the other"
        )
    return TinyAutoencoder(
        image_channels=image,
        latent_channels=latent,
        width=width,
        encoder_blocks=blocks["encoder"],
        decoder_blocks=blocks["decoder"][::-1],
        smallest_norm=any(".pool." in name for name in weights),
    )
