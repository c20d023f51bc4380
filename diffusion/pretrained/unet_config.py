"""The settings of the U-Net <-> the config.json of diffusers' `UNet2DModel`; what cannot be honoured is refused."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.networks.unet import UNet
from diffusion.pretrained.config_fields import check_counts, read_fields
from diffusion.pretrained.strict import few

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
# What our network can be. Others have one value: skip blocks and Fourier features (NCSN++), for one, are not here.
_HONOURED: dict[str, tuple[Any, ...]] = dict(
    center_input_sample=(False, True),
    time_embedding_type=("positional",),
    time_embedding_dim=(None,),
    freq_shift=(0, 1),
    flip_sin_to_cos=(False, True),
    mid_block_type=("UNetMidBlock2D",),
    mid_block_scale_factor=(1,),
    downsample_padding=(0, 1),
    downsample_type=("conv", "resnet"),
    upsample_type=("conv", "resnet"),
    act_fn=("silu", "swish"),  # one function, two names
    resnet_time_scale_shift=("default", "scale_shift"),
    add_attention=(True, False),
    class_embed_type=(None,),
)
# A field of ours, which diffusers ignores: whether the last row of the table of classes is the null class.
_NULL_CLASS = "_null_class"


def network_of(
    config: Mapping[str, Any], null_class: bool | None = None, image_size: int | tuple[int, int] | None = None
) -> tuple[UNet, tuple[int, int, int]]:
    """Returns the network that a `UNet2DModel`'s config describes, and its images' (height, width, channels).

    Args:
      config: the content of config.json.
      null_class: whether the last row of a table of classes means "no class". None for what the config says, where our
        export wrote it, and else for no: diffusers' own models have no null class.
      image_size: or height and width, where the config has no sample_size.

    Raises:
      ValueError: naming every field that our network cannot honour.
    """
    fields = read_fields(config, "UNet2DModel", _FIELDS, _HONOURED)
    height, width = _size(fields["sample_size"] if image_size is None else image_size)
    widths, classes = fields["block_out_channels"], fields["num_class_embeds"]
    counts = {name: fields[name] for name in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")}
    counts |= {f"block_out_channels[{level}]": channels for level, channels in enumerate(widths)}
    groups = fields["attn_norm_num_groups"]
    counts |= {} if classes is None else {"num_class_embeds": classes}
    counts |= {} if groups is None else {"attn_norm_num_groups": groups}
    check_counts(counts)
    if type(fields["norm_eps"]) is not float or not 0 < fields["norm_eps"] < 1:
        raise ValueError(f"norm_eps is {reprlib.repr(fields['norm_eps'])}, not a small positive number")
    down, up, resblock_updown = _levels(fields)
    scale_shift = fields["resnet_time_scale_shift"] == "scale_shift"
    multiples = all(channels % widths[0] == 0 for channels in widths)
    null_class = bool(config.get(_NULL_CLASS, False)) if null_class is None else null_class
    network = UNet(
        channels=widths[0],
        multipliers=tuple(channels // widths[0] for channels in widths) if multiples else (),
        widths=None if multiples else tuple(widths),
        num_blocks=fields["layers_per_block"],
        attention_resolutions=tuple(height // 2**level for level, here in enumerate(down) if here),
        up_attention_resolutions=(
            None if up == down else tuple(height // 2**level for level, here in enumerate(up) if here)
        ),
        middle_attention=fields["add_attention"],
        # Diffusers has no normalisation there with scale_shift, unless its groups are named.
        middle_norm=not scale_shift or groups is not None,
        middle_groups=None if groups == fields["norm_num_groups"] else groups,
        dropout=fields["dropout"],
        head_channels=_head_channels(fields["attention_head_dim"], len(widths)),
        num_classes=None if classes is None else classes - null_class,
        null_class=classes is None or null_class,
        out_channels=fields["out_channels"],
        num_groups=fields["norm_num_groups"],
        norm_eps=fields["norm_eps"],
        freq_shift=int(fields["freq_shift"]),
        flip_sin_to_cos=fields["flip_sin_to_cos"],
        downsample_padding=int(fields["downsample_padding"]),
        scale_shift=scale_shift,
        resblock_updown=resblock_updown,
        center_input_sample=fields["center_input_sample"],
    )
    return network, (height, width, fields["in_channels"])


def config_of(network: UNet, image_size: int | tuple[int, int], in_channels: int) -> dict[str, Any]:
    """Returns the config.json of a `UNet2DModel` that computes what `network` does.

    Raises:
      ValueError: there is none.
    """
    if network.time_scale != 1:
        raise ValueError(
            f"a UNet2DModel takes the time as it is, but this network multiplies it by {network.time_scale:g}: only "
            "networks of process.name=ddpm can be written"
        )
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    widths = network.level_widths()
    if widths[0] != network.channels:
        raise ValueError(
            f"a UNet2DModel embeds the time in as many channels as its first level has, {widths[0]}, but this network "
            f"in {network.channels}"
        )
    down, up = (
        [height // 2**level in heights for level in range(len(widths))] for heights in network.attention_heights()
    )
    attends = [down[level] or up[level] for level in range(len(widths))]
    attends[-1] |= network.middle_attention
    if network.middle_attention and not network.scale_shift and not network.middle_norm:
        raise ValueError("a UNet2DModel normalises before the attention in its middle, but with scale_shift")
    sampler = "resnet" if network.resblock_updown else "conv"
    return {
        **_FIELDS,
        "_class_name": "UNet2DModel",
        **({} if network.num_classes is None else {_NULL_CLASS: network.null_class}),
        "sample_size": height if height == width else [height, width],
        "in_channels": in_channels,
        "out_channels": network.out_channels or in_channels,
        "center_input_sample": network.center_input_sample,
        "freq_shift": network.freq_shift,
        "flip_sin_to_cos": network.flip_sin_to_cos,
        "down_block_types": [_block_type("Down", here, network.resblock_updown) for here in down],
        "up_block_types": [_block_type("Up", here, network.resblock_updown) for here in reversed(up)],
        "block_out_channels": widths,
        "layers_per_block": network.num_blocks,
        "downsample_padding": network.downsample_padding,
        "downsample_type": sampler,
        "upsample_type": sampler,
        "dropout": network.dropout,
        "attention_head_dim": _head_dim(network, widths, attends),
        "norm_num_groups": network.num_groups,
        "attn_norm_num_groups": _norm_groups(network),
        "norm_eps": network.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if network.scale_shift else "default",
        "add_attention": network.middle_attention,
        "num_class_embeds": None if network.num_classes is None else network.num_classes + network.null_class,
    }


def _size(size: Any) -> tuple[int, int]:
    """Returns height and width."""
    if size is None:
        raise ValueError("sample_size is null, so that the size of the images is not known: name it")
    sizes = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sizes) != 2 or any(type(side) is not int or side < 1 for side in sizes):
        raise ValueError(f"sample_size is {reprlib.repr(size)}, not a whole number of at least 1, or two")
    return sizes[0], sizes[1]


def _levels(fields: Mapping[str, Any]) -> tuple[list[bool], list[bool], bool]:
    """Returns where there is attention on the way down and up, by level, and whether blocks change the resolution."""
    kinds = {}
    for way, reverse in (("down", False), ("up", True)):
        names, type_ = fields[f"{way}_block_types"], fields[f"{way}sample_type"]
        if len(names) != len(fields["block_out_channels"]):
            raise ValueError(f"{way}_block_types and block_out_channels have {len(names)} levels and others")
        suffix = f"{way.capitalize()}Block2D"
        known = {
            suffix: (False, False),
            f"Attn{suffix}": (True, type_ == "resnet"),
            f"Resnet{way.capitalize()}sampleBlock2D": (False, True),
        }
        # Files of the first months of diffusers prefix every name.
        plain = [str(name).removeprefix("UNetRes") for name in names]
        if unknown := sorted(set(plain) - known.keys()):
            raise ValueError(f"{way}_block_types has {few(unknown)}: our U-Net has only {', '.join(known)}")
        kinds[way] = [known[name] for name in (reversed(plain) if reverse else plain)]
    # The smallest level has no way down to change the resolution on, the largest no way up.
    samplers = {resample for _, resample in [*kinds["down"][:-1], *kinds["up"][1:]]}
    if len(samplers) > 1:
        raise ValueError(
            "down_block_types, up_block_types, downsample_type and upsample_type mix convolutions and residual blocks "
            "that change the resolution: our U-Net has one kind"
        )
    down, up = ([attends for attends, _ in kinds[way]] for way in ("down", "up"))
    return down, up, samplers == {True}


def _block_type(way: str, attends: bool, resblock_updown: bool) -> str:
    if attends:
        return f"Attn{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if resblock_updown else f"{way}Block2D"


def _norm_groups(network: UNet) -> int | None:
    """Returns the groups that a config has to name for the normalisation in the middle."""
    if not network.middle_norm:
        return None
    return network.middle_groups or (network.num_groups if network.scale_shift else None)


def _head_channels(width: Any, num_levels: int) -> int | tuple[int, ...] | None:
    per_level = width if isinstance(width, list | tuple) else [width]
    if any(type(channels) is not int or channels < 1 for channels in per_level) and width is not None:
        raise ValueError(f"attention_head_dim is {reprlib.repr(width)}, not a whole number of at least 1, or a list")
    if len(per_level) not in (1, num_levels):
        raise ValueError(f"attention_head_dim has {len(per_level)} widths for {num_levels} levels")
    return tuple(per_level) if isinstance(width, list | tuple) else width


def _head_dim(network: UNet, widths: Sequence[int], attends: Sequence[bool]) -> int | None:
    """Returns the width of a head, one for all levels that have attention."""
    if not network.head_channels and network.num_heads == 1:
        return None
    given = network.head_channels
    if given and isinstance(given, int):
        return given
    heads = given or [channels // network.num_heads for channels in widths]
    used = {channels for channels, here in zip(heads, attends, strict=True) if here}
    if len(used) > 1:
        raise ValueError("a UNet2DModel has heads of one width at all levels: set head_channels to one number")
    return used.pop() if used else None
