"""How a picture was made, inside its PNG file, and a command that makes it again."""

import hashlib
import io
import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion import __version__
from diffusion.data.images import check_uint8_images
from diffusion.files import replacing
from diffusion.model.config import plain
from diffusion.runs.plans import Plan
from diffusion.runs.run import Run

FORMAT = 1
CHUNK, READABLE = "diffusion", "parameters"  # keys of the PNG's text: ours, as JSON, and the field's habit


def made_of(run: Run, plan: Plan, row: int = 0, batch: int = 1, *, watched: bool = True) -> dict[str, Any]:
    """Returns how a picture was made, plain JSON without paths.

    Args:
      run: that drew it, with the sampling that it was drawn with.
      plan: of the picture.
      row: of the batch, where it was.
      batch: number of rows that were drawn at once; programs of other sizes may round otherwise.
      watched: whether by a program that shows each step, see `runs.watch`.
    """
    kind = run.model.condition.kind
    sampling = {name: value for name, value in plain(run.config)["sampling"].items() if name != "batch_size"}
    made: dict[str, Any] = {
        "format": FORMAT,
        "experiment": run.experiment,
        "run": run.workdir.resolve().name,
        "weights": run.digest,
        "step": run.step,
        "average": run.average,
        "kind": plan.kind,
        **({"prompt": plan.asked, "negative_prompt": plan.negative} if kind == "prompts" else {}),
        **({"label": plan.asked} if kind == "classes" else {}),
        "seed": int(plan.seed),
        "index": int(plan.index),
        "sampling": sampling,
        "size": list(run.model.space.image_shape[:2]),
        **({"strength": plan.strength} if plan.kind == "img2img" else {}),
        **({"image": pixels_digest(plan.image)} if plan.image is not None else {}),
        **({"mask": pixels_digest(plan.mask)} if plan.mask is not None else {}),
        **({"references": [pixels_digest(picture) for picture in plan.references]} if plan.references else {}),
        "batch": [row, batch],
        "watched": watched,
        "devices": [run.mesh.size, jax.devices()[0].device_kind],
        "versions": {"diffusion": __version__, "jax": jax.__version__},
    }
    return json.loads(json.dumps(made))  # tuples are lists, as they are when it is read back


def write_png(
    picture: np.ndarray, made: Mapping[str, Any] | None, to: str | os.PathLike | io.BytesIO, *, smallest_side: int = 1
) -> None:
    """Writes a picture as PNG with how it was made.

    Args:
      picture: uint8[H, W, C].
      made: of `made_of`; None: nothing is said of it.
      to: a path, or a buffer.
      smallest_side: small pictures are enlarged by a whole factor to it.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    check_uint8_images(picture[None], "the picture")
    factor = -(-smallest_side // min(picture.shape[:2]))
    picture = picture.repeat(factor, axis=0).repeat(factor, axis=1)
    info = PngInfo()
    if made is not None:
        info.add_itxt(CHUNK, json.dumps(made))
        info.add_itxt(READABLE, readable(made))
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    if isinstance(to, str | os.PathLike):
        with replacing(to) as temporary:
            image.save(temporary, "png", pnginfo=info)
    else:
        image.save(to, "png", pnginfo=info)


def read_png(source: str | os.PathLike | io.BytesIO) -> dict[str, Any]:
    """Returns how the picture in a PNG file was made.

    Raises:
      ValueError: in one line, it cannot be read, or does not hold that.
    """
    from PIL import Image

    name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the picture"
    try:
        with Image.open(source) as image:
            text = getattr(image, "text", {}).get(CHUNK)  # decodes the pixels, before or after which it may be
    except Exception as error:  # on damaged files Pillow's parsers raise errors of any kind
        raise ValueError(f"{name} cannot be read ({error})") from error
    if text is None:
        raise ValueError(f"{name} does not hold how it was made: name a PNG that this project wrote")
    try:
        made = json.loads(text)
        version = made["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{name} holds a damaged account of how it was made") from error
    if version != FORMAT:
        raise ValueError(f"{name} holds format {version!r} of how it was made, and this program reads {FORMAT}")
    return made


def readable(made: Mapping[str, Any]) -> str:
    """Returns how a picture was made as other programs write it: prompt, negative prompt, then fields."""
    sampling = made["sampling"]
    height, width = made["size"]
    fields = {
        "Steps": sampling["num_steps"],
        "Sampler": sampling["sampler"]["name"],
        "CFG scale": sampling["guidance"],
        "Seed": made["seed"],
        "Size": f"{width}x{height}",
        "Model": made["run"],
        "Model hash": made["weights"].removeprefix("sha256:")[:10],
        **({"Class": made["label"]} if made.get("label") is not None else {}),
        **({"Image number": made["index"]} if made["index"] else {}),
        **({"Denoising strength": made["strength"]} if "strength" in made else {}),
        "Version": f"diffusion {made['versions']['diffusion']}",
    }
    lines = [made["prompt"]] if made.get("prompt") else []
    lines += [f"Negative prompt: {made['negative_prompt']}"] if made.get("negative_prompt") else []
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in fields.items())])


def command(made: Mapping[str, Any], workdir: str | os.PathLike | None = None) -> str:
    """Returns the command line that draws a picture again, and it alone.

    What flags do not say is repeated from the picture's own file, PICTURE.png: one that began with other pictures,
    beside them, one with another number than 0, and one of no class or prompt, for without one all are drawn in turn.

    Args:
      made: of `made_of`.
      workdir: of the run; None: runs/NAME.
    """
    folder = os.fspath(workdir) if workdir is not None else f"runs/{made['run']}"
    flags = [f"--workdir={folder}", "--mode=sample"]
    begun = made["kind"] != "sample" or bool(made.get("references"))
    if begun or made["index"] or any(made.get(name, "none") in (None, "") for name in ("label", "prompt")):
        pictures = ["FILE.png"] * len(made.get("references", "1"))
        flags += ["--like=PICTURE.png", *(["--images=" + ",".join(pictures)] if begun else [])]
        flags += ["--mask=MASK.png"] if made["kind"] == "inpaint" else []
    else:
        sampling = made["sampling"]
        for name in ("prompt", "negative_prompt", "label"):
            flags += [f"--{name}={made[name]}"] if made.get(name) not in (None, "") else []
        flags += [f"--seed={made['seed']}", "--num_samples=1"]
        flags += [f"--sampler={sampling['sampler']['name']}", f"--steps={sampling['num_steps']}"]
        flags += [f"--config.sampling.guidance={sampling['guidance']}"]
        flags += [f"--config.sampling.size={tuple(sampling['size'])}"] if sampling.get("size") else []
    return shlex.join(["python", "-m", f"experiments.{Path(made['experiment']).name}", *flags])


def pixels_digest(picture: np.ndarray) -> str:
    """Returns the sha256 of a picture's shape and pixels."""
    return f"sha256:{hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()}"
