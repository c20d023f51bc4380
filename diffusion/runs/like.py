"""--mode=sample --like=PICTURE.png: a picture drawn again as its file says, with what other flags change."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion.data.images import image_grid, save_png
from diffusion.data.pictures import decode, refit
from diffusion.data.samples import save_samples
from diffusion.model.config import Config
from diffusion.model.fields import change
from diffusion.runs.call import Call
from diffusion.runs.keep import labels_of, place
from diffusion.runs.pictures import read_mask, read_references
from diffusion.runs.plans import Plan, draw_plans
from diffusion.runs.provenance import made_of, pixels_digest, read_png, write_png
from diffusion.runs.run import Run
from diffusion.runs.watch import Watch
from diffusion.training import RunError
from diffusion.training.workdir import flatten

NEEDED = ("experiment", "weights", "kind", "seed", "index", "sampling", "batch", "devices", "watched")


def sample_like(call: Call) -> None:
    """Draws the picture of --like again, bit for bit on the same kind of device, and writes .npz and .png.

    Flags that are given take the place of what the file says; --num_samples=N draws N, from the picture's number on.

    Raises:
      ValueError: the file does not say how it was made, or a picture that it began with is missing or another one.
      RunError: it was drawn by another experiment or with other weights.
    """
    asked = call.flags
    made = read_png(Path(asked.like).expanduser())
    if missing := [name for name in NEEDED if name not in made]:
        raise ValueError(f"--like={asked.like} does not say how it was made: {missing[0]} is missing")
    if made["experiment"] != call.task.name:
        raise RunError(f"--like={asked.like} was drawn by experiments.{made['experiment']}, not {call.task.name}")
    average = str(made.get("average"))
    own_length = float(average.removeprefix("power ")) if average.startswith("power ") else None
    run = call._replace(config=as_drawn(call, made["sampling"])).open(own_length)
    if run.digest != made["weights"]:
        raise RunError(
            f"--like={asked.like} was drawn with other weights ({made['weights'][:15]}, run {made.get('run')}, step "
            f"{made.get('step')}) than those of {call.workdir} ({run.digest[:15]}, step {run.step}): name its "
            "--workdir or --checkpoint"
        )
    if made["devices"] != [run.mesh.size, jax.devices()[0].device_kind]:
        logging.warning("--like=%s was drawn on other devices, %s: it may differ", asked.like, made["devices"])
    plan = plan_of(call, run, made)
    count, (row, batch) = asked.num_samples or 1, made["batch"]
    plans = [plan] * batch if count == 1 else [plan._replace(index=plan.index + i) for i in range(count)]
    account = made_of(run, plan, row, batch, watched=made["watched"])
    stem = f"samples/like_{Path(asked.like).stem}"
    kept = place(run, stem, {"like": account, "num_samples": count}, asked.out)
    images = draw_plans(run, plans, Watch() if made["watched"] else None)
    images = images[row : row + 1] if count == 1 else images
    if jax.process_index() == 0:
        kept.write_note()
        if count == 1:
            write_png(images[0], account, kept.picture)
        else:
            save_png(kept.picture, image_grid(images), smallest_side=720)
        save_samples(kept.path, images, labels_of([plan.asked] * count))
        print(f"{count} samples: {kept.path}\na picture of them: {kept.picture}")


def as_drawn(call: Call, sampling: Mapping[str, Any]) -> Config:
    """Returns the call's config with the sampling of a picture, but for what flags say.

    Raises:
      RunError: fields of sampling that do not exist.
    """
    given = list(call.asked)
    given += ["sampling.sampler"] if call.flags.sampler is not None else []
    given += ["sampling.num_steps"] if call.flags.steps is not None else []
    given = [name.removesuffix(".name") for name in given]
    fields = {
        name: tuple(value) if isinstance(value, list) else value for name, value in flatten(dict(sampling)).items()
    }
    changes = {f"sampling.{name}": value for name, value in fields.items()}
    kept = {
        name: x for name, x in changes.items() if not any(name == one or name.startswith(f"{one}.") for one in given)
    }
    return change(call.config, kept)


def plan_of(call: Call, run: Run, made: Mapping[str, Any]) -> Plan:
    """Returns the plan of a picture, changed by flags.

    Raises:
      ValueError: more than one prompt or label, a strength that is none, or pictures that are not those it began with.
    """
    asked, kind = call.flags, run.model.condition.kind
    if len(asked.prompt) > 1 or len(asked.label) > 1 or asked.prompts:
        raise ValueError("--like draws one picture again: give at most one --prompt or --label")
    if asked.label and kind != "classes":
        raise ValueError(f"--label={asked.label[0]}: {call.workdir} reads no classes, leave it out")
    shown = {"prompts": made.get("prompt"), "classes": made.get("label")}.get(kind)
    if asked.prompt or asked.label:
        shown = asked.prompt[0] if asked.prompt else int(asked.label[0])
    negative = made.get("negative_prompt") if asked.negative_prompt is None else asked.negative_prompt
    seed = asked.seed if asked["seed"].present else made["seed"]
    plan = Plan(shown, negative, seed, made["index"])
    if made["kind"] != "img2img" and asked.strength:
        raise ValueError(f"--strength: --like={asked.like} was not begun with a picture and a strength, leave it out")
    if made["kind"] != "inpaint" and asked["mask"].present:
        raise ValueError(f"--mask: --like={asked.like} was not filled in, leave it out")
    if made.get("references"):
        cell = run.model.space.image_shape[0] // run.model.space.shape[0]
        references = read_references(asked.images, cell)
        check_same(asked.like, made["references"], references)
        return plan._replace(references=tuple(references))
    if made["kind"] == "sample":
        if asked.images:
            raise ValueError(f"--images: --like={asked.like} was begun with no picture, leave it out")
        return plan
    height, width, channels = run.model.space.image_shape
    images = [refit(decode(Path(path).expanduser()), channels=channels, size=(height, width)) for path in asked.images]
    check_same(asked.like, [made["image"]], images)
    if made["kind"] == "img2img":
        if len(asked.strength) > 1:
            raise ValueError(f"--strength={','.join(asked.strength)}: --like takes one")
        strength = float(asked.strength[0]) if asked.strength else made["strength"]
        if not 0 < strength <= 1:
            raise ValueError(f"--strength={strength}: give a number in (0, 1]")
        return plan._replace(image=images[0], strength=strength)
    mask = read_mask(asked.mask, (height, width, channels))[..., 0]
    check_same(asked.like, [made["mask"]], [mask], "mask")
    return plan._replace(image=images[0], mask=mask)


def check_same(like: str, wanted: Sequence[str], pictures: Sequence[np.ndarray], flag: str = "images") -> None:
    """Raises ValueError unless these are the pictures that one was begun with, by their digests."""
    if len(wanted) != len(pictures):
        raise ValueError(
            f"--like={like} was begun with {len(wanted)} pictures, and {len(pictures)} are given: name them, as "
            f"--{flag}={','.join(['FILE.png'] * len(wanted))}"
        )
    for number, (digest, picture) in enumerate(zip(wanted, pictures, strict=True)):
        if pixels_digest(picture) != digest:
            raise ValueError(f"--{flag}: number {number + 1} is not the picture that --like={like} was begun with")
