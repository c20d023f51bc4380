"""DDPM pipelines of diffusers: a folder with the network in `unet/` and its chain in `scheduler/`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from diffusion.networks.unet import UNet
from diffusion.pretrained.folder import new_folder, read_json, write_json
from diffusion.pretrained.unet import save_unet


class Chain(NamedTuple):
    """A DDPM chain, what its network predicts and how it is sampled, in the words of our configs.

    Attributes:
      num_steps, beta, first, last: of `config.process`; `first` and `last` are those of "linear".
      prediction: of `config.loss`.
      variance: "small", "large" or "learned".
      clip: whether x_0_hat is clipped to [-1, 1] at every step.
    """

    num_steps: int = 1000
    beta: str = "linear"
    first: float = 1e-4
    last: float = 0.02
    prediction: str = "eps"
    variance: str = "large"
    clip: bool = True


# Our words -> diffusers'.
_BETA = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
_PREDICTION = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
_VARIANCE = {"small": "fixed_small", "large": "fixed_large", "learned": "learned_range"}
# The other fields of a DDPMScheduler with the value they must have, or None where any will do: the spacing of fewer
# steps is ours to choose, and `dynamic_...`, `sample_max_value` count only with thresholding.
_OTHERS = dict(
    trained_betas=[None],
    thresholding=[False],
    clip_sample_range=[1.0],
    steps_offset=[0],
    rescale_betas_zero_snr=[False],
    timestep_values=[None],  # this and the next in files written before diffusers 0.4
    tensor_format=None,
    timestep_spacing=None,
    dynamic_thresholding_ratio=None,
    sample_max_value=None,
)


def load_chain(folder: str | os.PathLike) -> Chain | None:
    """The chain of a pipeline's folder; None where there is no scheduler/ (a network's own folder).

    Raises:
      ValueError: naming the setting that is not a DDPM chain's as ours are.
    """
    path = Path(folder) / "scheduler" / "scheduler_config.json"
    if not path.parent.is_dir():
        return None
    fields = {name: value for name, value in read_json(path).items() if name != "_diffusers_version"}
    if (name := fields.pop("_class_name", "DDPMScheduler")) != "DDPMScheduler":
        raise ValueError(f"{path} is of a {name}: only a DDPMScheduler says how the model was trained and sampled")

    def take(field: str, default: Any, ours: Mapping[str, Any] | None = None) -> Any:
        value = fields.pop(field, default)
        if ours is None:
            if type(value) is not type(default):
                raise ValueError(f"{path}: {field} is {value!r}: it must be like {default!r}")
            return value
        for word, theirs in ours.items():
            if theirs == value:
                return word
        raise ValueError(f"{path}: {field} is {value!r}, and we have only {', '.join(ours.values())}")

    chain = Chain(
        num_steps=take("num_train_timesteps", take("timesteps", 1000)),
        beta=take("beta_schedule", "linear", _BETA),
        first=take("beta_start", 1e-4),
        last=take("beta_end", 0.02),
        prediction=take("prediction_type", "epsilon", _PREDICTION),
        variance=take("variance_type", "fixed_small", _VARIANCE),
        clip=take("clip_sample", True),
    )
    for field, value in fields.items():
        if field not in _OTHERS or (_OTHERS[field] is not None and value not in _OTHERS[field]):
            raise ValueError(f"{path}: {field}={value!r} cannot be honoured")
    return chain


def save_pipeline(
    folder: str | os.PathLike,
    network: UNet,
    params: Mapping[str, Any],
    image_size: int | tuple[int, int],
    chain: Chain,
) -> None:
    """Writes what `DDPMPipeline.from_pretrained(folder)` reads: see `save_unet`; the network's time must be t - 1.

    Raises:
      ValueError: as `save_unet`, or a chain that a DDPMScheduler cannot be.
    """
    for field, words in (("beta", _BETA), ("prediction", _PREDICTION), ("variance", _VARIANCE)):
        if getattr(chain, field) not in words:
            raise ValueError(
                f"diffusers' DDPMScheduler has no {field} {getattr(chain, field)!r}, only {', '.join(words)}"
            )
    scheduler = {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": chain.num_steps,
        "beta_schedule": _BETA[chain.beta],
        "beta_start": chain.first,
        "beta_end": chain.last,
        "trained_betas": None,
        "prediction_type": _PREDICTION[chain.prediction],
        "variance_type": _VARIANCE[chain.variance],
        "clip_sample": chain.clip,
    }
    index = {
        "_class_name": "DDPMPipeline",
        "scheduler": ["diffusers", "DDPMScheduler"],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with new_folder(folder) as temporary:
        save_unet(temporary / "unet", network, params, image_size)
        (temporary / "scheduler").mkdir()
        write_json(temporary / "scheduler" / "scheduler_config.json", scheduler)
        write_json(temporary / "model_index.json", index)
