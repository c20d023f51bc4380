"""What a visitor is shown of a request on its way: previews, pictures with their provenance, lines of text."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion.demo.requests import Request
from diffusion.demo.tickets import Update
from diffusion.runs import provenance
from diffusion.runs.run import Run

SMALL = 128  # pixels: up to here a picture is enlarged by whole factors, its pixels kept square
SIDES = ((1, 400), (4, 256), (9, 176), (10**9, 128))  # up to so many pictures: how wide each is shown
Shown = dict[str, Any]  # what result.js reads


def show_update(update: Update, request: Request, run: Run) -> Shown:
    """Returns what the page shows of an update."""
    if update.error:
        return show_line("error", update.error)
    if update.cancelled:
        return show_line("stopped", f"Stopped after {update.seconds:.1f} s.")
    if update.pictures is not None:
        return show_pictures(update, request, run)
    if update.position:
        return show_line("waiting", f"In the queue: number {update.position} in line · {update.seconds:.0f} s")
    line = f"Step {update.step} of {update.num_steps} · {update.seconds:.1f} s"
    if not update.step:
        line = f"Getting ready (settings that are new are compiled first) · {update.seconds:.0f} s"
    previews = () if update.previews is None else update.previews
    return {
        **show_line("drawing", line),
        **show_size(previews),
        "share": update.step / max(1, update.num_steps),
        "pictures": [{"src": data_url(preview, draft=True)} for preview in previews],
    }


def show_line(state: str, line: str) -> Shown:
    """Returns what the page shows of one sentence."""
    return {"state": state, "line": line, "pictures": []}


def show_size(pictures: Sequence[np.ndarray] | np.ndarray) -> Shown:
    """Returns how wide pictures are shown, and whether their pixels are kept square."""
    if not len(pictures):
        return {}
    height, width = pictures[0].shape[:2]
    side = next(side for count, side in SIDES if len(pictures) <= count)
    crisp = max(height, width) <= SMALL
    return {"side": max(1, side // width) * width if crisp else side, "crisp": crisp}


def show_pictures(update: Update, request: Request, run: Run) -> Shown:
    """Returns finished pictures as PNGs that hold their provenance, and how to make each of them again."""
    assert update.pictures is not None and update.provenance is not None
    shown = []
    for index, (picture, made) in enumerate(zip(update.pictures, update.provenance, strict=True)):
        buffer = io.BytesIO()
        provenance.write_png(picture, made, buffer)
        name = f"{request.run}_seed{request.seed}_{index}.png"
        shown.append(
            {
                "src": png_url(buffer.getvalue()),
                "name": name,
                "short": f"seed {request.seed} · {index}" if len(update.pictures) > 1 else f"seed {request.seed}",
                "caption": caption(request, index),
                "command": provenance.command(made, run.workdir).replace("PICTURE.png", name),
            }
        )
    count = f"{len(shown)} pictures" if len(shown) > 1 else "1 picture"
    return {
        **show_line("done", f"{count} in {update.seconds:.1f} s · seed {request.seed}"),
        **show_size(update.pictures),
        "pictures": shown,
    }


def caption(request: Request, index: int) -> str:
    """Returns how a picture was asked for, in one line."""
    parts = [
        f"“{request.prompt}”" if request.prompt else "",
        f"class {request.label}" if request.label is not None else "",
        f"without “{request.negative_prompt}”" if request.negative_prompt else "",
        f"seed {request.seed}, picture {index}",
        f"{request.sampler}, {request.num_steps} steps",
        f"guidance {request.guidance:g}" if request.guidance not in (None, 1) else "",
        begun(request),
    ]
    return " · ".join(part for part in parts if part)


def begun(request: Request) -> str:
    """Returns which pictures of the visitor's went into a request."""
    if request.mask is not None:
        return "a part of a picture filled in"
    if request.image is not None:
        return f"begun with a picture, strength {request.strength:g}"
    count = len(request.references)
    return f"{count} picture{'s' if count > 1 else ''} edited" if count else ""


def data_url(picture: np.ndarray, *, draft: bool) -> str:
    """Returns uint8[h, w, C] as a data URL; a large draft as JPEG."""
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    small = max(image.size) <= SMALL
    buffer = io.BytesIO()
    image.save(buffer, "jpeg" if draft and not small else "png", quality=80)
    if draft and not small:
        return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return png_url(buffer.getvalue())


def png_url(data: bytes) -> str:
    """Returns a PNG file as a data URL."""
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"
