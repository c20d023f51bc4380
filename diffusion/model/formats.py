"""What older versions of this project stored with a run, in today's form.

format 1   one config for images and another for text; the shape of images was read from the data
format 2   one config; `image_shape`, `num_classes` and `condition` stand beside it
format 3   `space` and `frozen` too: groups of parameters that are not trained have no averages and no moments
format 4   config.loss has a name: what all had before is "denoising"
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from diffusion.model.choices import fields_of, pick
from diffusion.model.config import from_plain, plain
from diffusion.model.fields import complete
from diffusion.model.optimizers import OPTIMIZERS, SHARED
from diffusion.model.processes import PROCESSES
from diffusion.model.sampling import SAMPLERS
from diffusion.training import RunError

# Shapes and numbers of classes of the data sets whose runs did not store them.
KNOWN_SETS: dict[str, tuple[tuple[int, int, int], int | None]] = {
    "digits": ((8, 8, 1), 10),
    "cifar10": ((32, 32, 3), 10),
    "cifar100": ((32, 32, 3), 100),
    "svhn_cropped": ((32, 32, 3), 10),
    "mnist": ((28, 28, 1), 10),
    "fashion_mnist": ((28, 28, 1), 10),
}


def current(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's description in today's format.

    Args:
      description: as it was stored: "experiment", "config" and more; "format" is absent in format 1.

    Raises:
      RunError: format 1 of a data set whose image shape was not stored.
    """
    stored = dict(description)
    stored["config"] = with_mesh(stored["config"])
    if "image" in stored["config"].get("network", {}):  # a CLIP, whose fields alone have grown
        return stored | {"config": plain(complete(from_plain(stored["config"])))}
    if stored.get("format", 1) == 1:
        stored = from_format_1(stored)
    before = {"frozen": []} if stored.get("format", 1) < 3 else {}  # a frozen text encoder was averaged with the rest
    if "teacher" in stored:
        stored["teacher"] = current(stored["teacher"])
    return before | stored | {"config": plain(complete(from_plain(stored["config"])))}


def with_mesh(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with training.mesh: those of the first versions, which spread batches alone, have none."""
    return {**config, "training": {"mesh": "", **config["training"]}}


def from_format_1(stored: dict[str, Any]) -> dict[str, Any]:
    """Returns a description of format 1 in format 2."""
    config = stored["config"]
    data = config["data"]
    if "text" in config:
        size = data.get("canvas", data.get("image_size"))
        shape, num_classes = (size, size, 3), None
    else:
        name, size = data["name"].partition("/")[0].partition(":")[0], data.get("image_size")
        if name not in KNOWN_SETS:
            raise RunError(
                f"this run of data set {data['name']} was stored by an early version without its image shape: "
                "open it with the version that trained it"
            )
        shape, num_classes = KNOWN_SETS[name]
        shape = (size, size, shape[2]) if size else shape
    kept = {name: value for name, value in stored.items() if name != "text"}
    return kept | {
        "format": 2,
        "config": config_from_1(stored["experiment"], config),
        "image_shape": list(shape),
        "num_classes": num_classes,
        "condition": stored.get("text", {}),
    }


def config_from_1(experiment: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config of format 1 in format 2."""
    new = {name: dict(block) if isinstance(block, Mapping) else block for name, block in config.items()}
    network, loss, sampling = new["network"], new["loss"], new["sampling"]
    text = new.pop("text", None)
    if text is None:
        labels = loss.pop("label_dropout", 0.1)
        with_classes = network.pop("class_conditional", False)
        new["condition"] = {"name": "classes", "dropout": labels} if with_classes else {"name": "nothing"}
        network.setdefault("name", "unet")
    else:
        dropout = loss.pop("caption_dropout")
        words = {"name": "words", "width": text.get("width", 96), "length": text.get("length", 12)}
        clip = {"name": "clip", "folder": text.get("clip", ""), "precomputed": text.get("precomputed", False)}
        chosen = clip if text["encoder"] == "clip" else words | {"size": text.get("size", 0)}
        new["condition"] = chosen | {"dropout": dropout}
        new["data"].setdefault("name", experiment)
        if "canvas" in new["data"]:
            new["data"]["image_size"] = new["data"].pop("canvas")
    new["data"] = {"image_size": 0, "flip": False, **new["data"]}
    if network["name"] == "unet":
        network.setdefault("head_channels", 0)
    times = loss.pop("times", None)
    if new["process"]["name"] == "flow":
        new["process"]["times"] = times
    new["loss"] = {"name": "denoising", "learned_variance": False, "vlb_weight": 1e-3, **loss}
    new["optimizer"] = own(OPTIMIZERS, {"name": "adam", "cooldown_steps": 0, **new["optimizer"]}, SHARED)
    given = {name: sampling.pop(name) for name in ("order", "eta", "churn", "variance") if name in sampling}
    given["s_churn"] = given.pop("churn", 0.0)
    sampling["sampler"] = own(SAMPLERS, {"name": sampling["sampler"], **given})
    sampling["threshold"] = {"name": sampling["threshold"]}
    sampling["grid"] = {"name": sampling["grid"]}
    if sampling["grid"]["name"] == "uniform":
        sampling["grid"]["shift"] = sampling.get("shift", 1.0)
    sampling.pop("shift", None)
    new["process"] = own(PROCESSES, new["process"])
    if interval := sampling.get("guidance_interval"):  # in units of the network's time; noise / signal now
        signal, noise = pick(PROCESSES, new["process"], "process")().at(np.asarray(interval, np.float32))
        with np.errstate(divide="ignore"):
            sampling["guidance_interval"] = [float(sigma) for sigma in np.asarray(noise) / np.asarray(signal)]
    unset = {"ema_profiles": [], "snapshot_every": 0, "skip_bad_steps": False, "spike_factor": 0.0}
    new["training"] = unset | new["training"]
    return new


def own(table: Mapping[str, Any], block: Mapping[str, Any], shared: tuple[str, ...] = ()) -> dict[str, Any]:
    """Returns a choice's block with the fields of its name alone."""
    fields = {"name", *shared, *fields_of(table[block["name"]])}
    return {name: value for name, value in block.items() if name in fields}
