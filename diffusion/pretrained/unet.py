"""The U-Net <-> diffusers' `UNet2DModel`: its arrays by name, and its folder of config.json and weights.

`google/ddpm-cifar10-32` is such a folder (`unet/` of its pipeline, see `pretrained.pipeline`).
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.networks.unet import UNet
from diffusion.pretrained.folder import new_folder, read_json, read_weights, write_json, write_weights
from diffusion.pretrained.strict import check_keys

WEIGHTS = "diffusion_pytorch_model"
# The fields of a config.json and what holds where it is silent: the arguments of diffusers' class and their defaults.
_FIELDS = dict(
    sample_size=None,
    in_channels=3,
    out_channels=3,
    center_input_sample=False,
    time_embedding_type="positional",
    time_embedding_dim=None,
    freq_shift=0,
    flip_sin_to_cos=True,
    down_block_types=["DownBlock2D", *["AttnDownBlock2D"] * 3],
    mid_block_type="UNetMidBlock2D",
    up_block_types=[*["AttnUpBlock2D"] * 3, "UpBlock2D"],
    block_out_channels=[224, 448, 672, 896],
    layers_per_block=2,
    mid_block_scale_factor=1,
    downsample_padding=1,
    downsample_type="conv",
    upsample_type="conv",
    dropout=0.0,
    act_fn="silu",
    attention_head_dim=8,
    norm_num_groups=32,
    attn_norm_num_groups=None,
    norm_eps=1e-5,
    resnet_time_scale_shift="default",
    add_attention=True,
    class_embed_type=None,
    num_class_embeds=None,
    num_train_timesteps=None,  # of learned time embeddings only
)
# What our network computes whatever its settings: DDPM's sines, then cosines, from 1 down to 1 / 10,000; a stride that
# pads below and to the right only; ...
_OURS = dict(
    center_input_sample=False,
    time_embedding_type="positional",
    time_embedding_dim=None,
    freq_shift=1,
    flip_sin_to_cos=False,
    mid_block_type="UNetMidBlock2D",
    mid_block_scale_factor=1,
    downsample_padding=0,
    downsample_type="conv",
    upsample_type="conv",
    act_fn="silu",
    attn_norm_num_groups=None,
    norm_eps=1e-6,
    resnet_time_scale_shift="default",
    add_attention=True,
    class_embed_type=None,
)

# Our module names -> diffusers'. It counts the levels on the way up from the smallest image; `_name` turns them round.
_MODULES = [
    (r"time_(\d)", r"time_embedding.linear_\1"),
    (r"norm_out", r"conv_norm_out"),
    (r"(down|up)_(\d+)_block_(\d+)", r"\1_blocks.\2.resnets.\3"),
    (r"(down|up)_(\d+)_attention_(\d+)", r"\1_blocks.\2.attentions.\3"),
    (r"(down|up)_(\d+)_(down|up)sample", r"\1_blocks.\2.\3samplers.0.conv"),
    (r"middle_block_(\d)", r"mid_block.resnets.\1"),
    (r"middle_attention", r"mid_block.attentions.0"),
    (r"(conv_in|conv_out|class_embedding)", r"\1"),
]
_PARTS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "embedding": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "shortcut": "conv_shortcut",
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
# The names of attention layers in files written before diffusers 0.15, google/ddpm-cifar10-32 among them.
_OLD_PARTS = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def load_unet(folder: str | os.PathLike) -> tuple[UNet, dict[str, Any], dict[str, Any]]:
    """The network, its parameters (the tree under "params") and the config.json of a `UNet2DModel`'s folder.

    `folder` may also be that of the whole pipeline. Of a model with classes the last row of the table is taken for the
    null class.

    Raises:
      ValueError: a file that is missing or not whole, a setting that our network cannot honour, or weights that are
        missing, left over or misshapen (each named).
    """
    folder = Path(folder)
    folder = folder / "unet" if (folder / "unet").is_dir() else folder
    config = read_json(folder / "config.json")
    try:
        network, image_shape = network_of(config)
        shapes = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *image_shape)), jnp.zeros(1))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    return network, from_diffusers(read_weights(folder, WEIGHTS), shapes["params"]), config


def save_unet(
    folder: str | os.PathLike, network: UNet, params: Mapping[str, Any], image_size: int | tuple[int, int]
) -> None:
    """Writes network and parameters (the tree under "params") as the folder of a `UNet2DModel`.

    `image_size` (or height and width) says at which levels `attention_resolutions` are.

    Raises:
      ValueError: `folder` is there already, or a `UNet2DModel` cannot be what `network` is.
    """
    weights = to_diffusers(params)
    config = config_of(network, image_size, in_channels=weights["conv_in.weight"].shape[1])
    with new_folder(folder) as temporary:
        write_json(temporary / "config.json", config)
        write_weights(temporary / f"{WEIGHTS}.safetensors", weights)


def network_of(config: Mapping[str, Any]) -> tuple[UNet, tuple[int, int, int]]:
    """The network that a `UNet2DModel`'s config describes, and its images' (height, width, channels).

    Raises:
      ValueError: naming every field that our network cannot honour.
    """
    if config.get("_class_name", "UNet2DModel") != "UNet2DModel":
        raise ValueError(f"it describes a {config['_class_name']}, not a UNet2DModel")
    fields: dict[str, Any] = _FIELDS | {name: value for name, value in config.items() if not name.startswith("_")}
    if unknown := sorted(fields.keys() - _FIELDS):
        raise ValueError(f"a UNet2DModel has no field {', '.join(unknown)}")
    refused = [f"{name}={fields[name]!r} (only {ours!r})" for name, ours in _OURS.items() if fields[name] != ours]
    if refused:
        raise ValueError(f"our U-Net cannot honour {', '.join(refused)}")

    size, widths, down = fields["sample_size"], fields["block_out_channels"], fields["down_block_types"]
    height: Any
    width: Any
    height, width = size if isinstance(size, list | tuple) and len(size) == 2 else (size, size)
    counts = {name: fields[name] for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")}
    for name, count in {**counts, "sample_size": height, "sample_size's width": width}.items():
        if type(count) is not int or count < 1:
            raise ValueError(f"{name} is {count!r}, not a whole number of at least 1")
    if len(down) != len(widths) or any(channels % widths[0] for channels in widths):
        raise ValueError(
            f"block_out_channels {widths} are not one multiple of the first for each of {len(down)} levels"
        )
    attends = [kind == "AttnDownBlock2D" for kind in down]
    if _block_types(attends) != (list(down), list(fields["up_block_types"])):
        raise ValueError(
            f"down_block_types {down} and up_block_types {fields['up_block_types']} must be mirror images of "
            "DownBlock2D and AttnDownBlock2D, UpBlock2D and AttnUpBlock2D"
        )
    network = UNet(
        channels=widths[0],
        multipliers=tuple(channels // widths[0] for channels in widths),
        num_blocks=fields["layers_per_block"],
        attention_resolutions=tuple(height // 2**level for level, here in enumerate(attends) if here),
        dropout=fields["dropout"],
        head_channels=fields["attention_head_dim"],
        num_classes=None if fields["num_class_embeds"] is None else fields["num_class_embeds"] - 1,
        out_channels=fields["out_channels"],
        num_groups=fields["norm_num_groups"],
    )
    return network, (height, width, fields["in_channels"])


def config_of(network: UNet, image_size: int | tuple[int, int], in_channels: int) -> dict[str, Any]:
    """The config.json of a `UNet2DModel` that computes what `network` does; ValueError where there is none."""
    if network.time_scale != 1:
        raise ValueError(
            f"a UNet2DModel takes the time as it is, but this network multiplies it by {network.time_scale:g}: only "
            "networks of process.name=ddpm can be written"
        )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    widths = [network.channels * multiplier for multiplier in network.multipliers]
    attends = [height // 2**level in network.attention_resolutions for level in range(len(widths))]
    head_channels = network.head_channels
    if head_channels is None and network.num_heads > 1:
        heads = {channels // network.num_heads for channels, here in zip(widths, attends, strict=True) if here}
        if len(heads | {widths[-1] // network.num_heads}) > 1:
            raise ValueError("a UNet2DModel has heads of one width at all levels: set head_channels, not num_heads")
        head_channels = widths[-1] // network.num_heads
    down, up = _block_types(attends)
    return {
        **_FIELDS,
        **_OURS,
        "_class_name": "UNet2DModel",
        "sample_size": height if height == width else [height, width],
        "in_channels": in_channels,
        "out_channels": network.out_channels or in_channels,
        "down_block_types": down,
        "up_block_types": up,
        "block_out_channels": widths,
        "layers_per_block": network.num_blocks,
        "dropout": network.dropout,
        "attention_head_dim": head_channels,
        "norm_num_groups": network.num_groups,
        "num_class_embeds": None if network.num_classes is None else network.num_classes + 1,
    }


def _block_types(attends: list[bool]) -> tuple[list[str], list[str]]:
    """The names of the levels' blocks on the way down and on the way up."""
    names = ["Attn" * here for here in attends]
    return [f"{name}DownBlock2D" for name in names], [f"{name}UpBlock2D" for name in reversed(names)]


def to_diffusers(params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The parameters of `UNet` (the tree under "params") under diffusers' names and in its layouts."""
    num_levels = _num_levels(params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {_name(path, num_levels): _transpose(path, np.asarray(leaf), "OIHW") for path, leaf in leaves}


def from_diffusers(weights: Mapping[str, np.ndarray], like: Mapping[str, Any]) -> dict[str, Any]:
    """Diffusers' weights as parameters of `UNet`; `like` is its tree of parameters, or of their shapes.

    Raises ValueError when a key is missing, left over or given under its old name too, or when a shape differs.
    """
    modern = {_modern(name): weight for name, weight in weights.items()}
    if len(modern) < len(weights):
        raise ValueError("weights name the same attention layer twice, in the old way (query) and the new (to_q)")
    num_levels = _num_levels(like)
    names = {_name(path, num_levels) for path, _ in jax.tree_util.tree_leaves_with_path(like)}
    check_keys(modern, names, "U-Net")

    def take(path, leaf):
        name = _name(path, num_levels)
        weight = _transpose(path, np.asarray(modern[name]), "HWIO")
        if weight.shape != leaf.shape:
            raise ValueError(f"{name} becomes {weight.shape} in our layout, but this U-Net needs {leaf.shape}")
        return weight

    return jax.tree_util.tree_map_with_path(take, like)


def _modern(name: str) -> str:
    """The name that diffusers gives now to an attention layer of an old file."""
    return re.sub(r"(attentions\.\d+\.)(query|key|value|proj_attn)\.", lambda m: f"{m[1]}{_OLD_PARTS[m[2]]}.", name)


def _num_levels(params: Mapping[str, Any]) -> int:
    return sum(re.fullmatch(r"down_\d+_block_0", name) is not None for name in params)


def _name(path, num_levels: int) -> str:
    """Diffusers' name of the parameter at `path`."""
    module, *parts, leaf = (key.key for key in path)
    pattern, replacement = next(rule for rule in _MODULES if re.fullmatch(rule[0], module))
    name = re.sub(pattern, replacement, module)
    name = re.sub(r"(?<=^up_blocks\.)\d+", lambda level: str(num_levels - 1 - int(level[0])), name)
    return ".".join([name, *(_PARTS[part] for part in parts), "bias" if leaf == "bias" else "weight"])


def _transpose(path, weight: np.ndarray, layout: str) -> np.ndarray:
    """Kernels between HWIO (dense: IO) and OIHW (dense: OI); everything else as it is."""
    if path[-1].key != "kernel":
        return weight
    if weight.ndim == 2:
        return weight.T
    return weight.transpose((3, 2, 0, 1) if layout == "OIHW" else (2, 3, 1, 0))
