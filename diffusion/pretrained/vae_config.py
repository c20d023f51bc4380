"""The settings of the autoencoder <-> the config.json of diffusers' `AutoencoderKL` and `AutoencoderKLFlux2`."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion.networks.vae import Autoencoder
from diffusion.pretrained.config_fields import check_counts, read_fields

KL, FLUX2 = "AutoencoderKL", "AutoencoderKLFlux2"
_DOWN, _UP = "DownEncoderBlock2D", "UpDecoderBlock2D"
# The fields of a config.json and what holds where it is silent: the arguments of diffusers' classes and their defaults.
_SHARED = dict(
    in_channels=3,
    out_channels=3,
    act_fn="silu",
    norm_num_groups=32,
    sample_size=None,  # of tiles alone, as diffusers makes them
    force_upcast=True,  # of half precision, which our dtype decides
    use_quant_conv=True,
    use_post_quant_conv=True,
    mid_block_add_attention=True,
)
_FIELDS: dict[str, dict[str, Any]] = {
    KL: _SHARED
    | dict(
        down_block_types=[_DOWN],
        up_block_types=[_UP],
        block_out_channels=[64],
        layers_per_block=1,
        latent_channels=4,
        scaling_factor=0.18215,
        shift_factor=None,
        latents_mean=None,
        latents_std=None,
    ),
    FLUX2: _SHARED
    | dict(
        down_block_types=[_DOWN] * 4,
        up_block_types=[_UP] * 4,
        block_out_channels=[128, 256, 512, 512],
        decoder_block_out_channels=None,
        layers_per_block=2,
        latent_channels=32,
        batch_norm_eps=1e-4,
        batch_norm_momentum=0.1,  # of its training
        patch_size=[2, 2],
    ),
}
_HONOURED: dict[str, tuple[Any, ...]] = dict(
    act_fn=("silu", "swish"),  # one function, two names
    use_quant_conv=(False, True),
    use_post_quant_conv=(False, True),
    mid_block_add_attention=(False, True),
)
BATCH_NORM_EPS = 1e-4  # FLUX.2's


class Settings(NamedTuple):
    """What a config says.

    Attributes:
      module: the network.
      patch: side of the patches that FLUX.2 makes one pixel of.
      shift: of latents, float32[c]; None where the weights hold it.
      scale: the same.
      batch_norm_eps: of the variance that the weights hold.
    """

    module: Autoencoder
    patch: int
    shift: np.ndarray | None
    scale: np.ndarray | None
    batch_norm_eps: float


def settings_of(config: Mapping[str, Any]) -> Settings:
    """Returns what the config.json of an `AutoencoderKL` or `AutoencoderKLFlux2` describes.

    Raises:
      ValueError: naming every field that our network cannot honour.
    """
    name = config.get("_class_name", KL)
    if name not in _FIELDS:
        raise ValueError(f"it describes a {reprlib.repr(name)}, not an {' or an '.join(_FIELDS)}")
    fields = read_fields(config, name, _FIELDS[name], _HONOURED)
    channels = _widths(fields, "block_out_channels")
    counts = ("in_channels", "latent_channels", "layers_per_block", "norm_num_groups")
    check_counts({count: fields[count] for count in counts})
    if fields["out_channels"] != fields["in_channels"]:
        raise ValueError(
            f"it maps images of {fields['in_channels']} channels to {reprlib.repr(fields['out_channels'])}: ours has "
            "one number of them"
        )
    for field, known in (("down_block_types", _DOWN), ("up_block_types", _UP)):
        if list(fields[field]) != [known] * len(channels):
            raise ValueError(
                f"{field} is {reprlib.repr(fields[field])}: ours has {known} at all {len(channels)} levels"
            )
    decoder = fields.get("decoder_block_out_channels")
    module = Autoencoder(
        image_channels=fields["in_channels"],
        latent_channels=fields["latent_channels"],
        channels=channels,
        decoder_channels=None if decoder is None else _widths(fields, "decoder_block_out_channels", len(channels)),
        blocks_per_level=fields["layers_per_block"],
        groups=fields["norm_num_groups"],
        middle_attention=fields["mid_block_add_attention"],
        quant_conv=fields["use_quant_conv"],
        post_quant_conv=fields["use_post_quant_conv"],
    )
    if name == KL:
        return Settings(module, 1, *_normalisation(fields), BATCH_NORM_EPS)
    patch = fields["patch_size"]
    if list(patch) != [patch[0]] * 2:
        raise ValueError(f"patch_size is {reprlib.repr(patch)}: ours has square patches")
    check_counts({"patch_size": patch[0]})
    return Settings(module, patch[0], None, None, _number(fields, "batch_norm_eps"))


def config_of(settings: Settings) -> dict[str, Any]:
    """Returns the config.json of an `AutoencoderKL`, or with patches or a narrower decoder of an `AutoencoderKLFlux2`.

    Raises:
      ValueError: a narrower decoder without patches.
    """
    module = settings.module
    name = KL if settings.shift is not None else FLUX2
    levels = len(module.channels)
    config = {
        **_FIELDS[name],
        "_class_name": name,
        "in_channels": module.image_channels,
        "out_channels": module.image_channels,
        "down_block_types": [_DOWN] * levels,
        "up_block_types": [_UP] * levels,
        "block_out_channels": list(module.channels),
        "layers_per_block": module.blocks_per_level,
        "latent_channels": module.latent_channels,
        "norm_num_groups": module.groups,
        "sample_size": 1024,
        "use_quant_conv": module.quant_conv,
        "use_post_quant_conv": module.post_quant_conv,
        "mid_block_add_attention": module.middle_attention,
    }
    if settings.shift is None or settings.scale is None:
        decoder = module.decoder_channels
        del config["force_upcast"]
        return config | {
            "decoder_block_out_channels": None if decoder is None else list(decoder),
            "batch_norm_eps": settings.batch_norm_eps,
            "patch_size": [settings.patch] * 2,
        }
    if module.decoder_channels not in (None, module.channels):
        raise ValueError(
            "an AutoencoderKL has a decoder as wide as its encoder, but this one has other decoder_channels"
        )
    shift, scale = (
        [float(str(number)) for number in np.asarray(numbers, np.float32)]  # 1.5305, not 1.5304999...
        for numbers in (settings.shift, settings.scale)
    )
    if len({*shift}) == len({*scale}) == 1:
        return config | {"shift_factor": shift[0], "scaling_factor": scale[0]}
    return config | {"scaling_factor": 1.0, "latents_mean": shift, "latents_std": [1 / number for number in scale]}


def _normalisation(fields: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Returns shift and scale per channel: one number for all, or diffusers' latents_mean and latents_std."""
    channels, scale = fields["latent_channels"], _number(fields, "scaling_factor")
    mean, std = fields["latents_mean"], fields["latents_std"]
    if (mean is None) != (std is None):
        raise ValueError("latents_mean and latents_std belong together: one of them is null")
    if mean is None:
        shift = 0.0 if fields["shift_factor"] is None else _number(fields, "shift_factor")
        return np.full(channels, shift, np.float32), np.full(channels, scale, np.float32)
    if fields["shift_factor"] is not None:
        raise ValueError("it has both a shift_factor and latents_mean: ours has one shift")
    found = {}
    for name in ("latents_mean", "latents_std"):
        numbers = fields[name]
        if not isinstance(numbers, Sequence) or len(numbers) != channels:
            raise ValueError(f"{name} is {reprlib.repr(numbers)}, not one number for each of {channels} channels")
        each = dict(enumerate(numbers))
        found[name] = np.array([_number(each, channel, name) for channel in each])
    return found["latents_mean"].astype(np.float32), (scale / found["latents_std"]).astype(np.float32)


def _number(fields: Mapping[Any, Any], field: Any, name: str | None = None) -> float:
    """Returns a finite number, which only a shift or a mean may have at 0."""
    value, name = fields[field], name or field
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{name} holds {reprlib.repr(value)}, not a number")
    if value <= 0 and name not in ("shift_factor", "latents_mean"):
        raise ValueError(f"{name} holds {reprlib.repr(value)}, not a number above 0")
    return float(value)


def _widths(fields: Mapping[str, Any], field: str, levels: int | None = None) -> tuple[int, ...]:
    widths = fields[field]
    if not isinstance(widths, Sequence) or not widths or isinstance(widths, str):
        raise ValueError(f"{field} is {reprlib.repr(widths)}, not a list of channels")
    check_counts({f"{field}[{level}]": width for level, width in enumerate(widths)})
    if levels is not None and len(widths) != levels:
        raise ValueError(f"{field} has {len(widths)} levels, block_out_channels {levels}")
    return tuple(widths)
