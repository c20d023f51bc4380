"""What a visitor asks for, and whether a run can draw it."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data.images import check_uint8_images
from diffusion.data.pictures import decode, refit, shape_of
from diffusion.model.experiment import READ_REFERENCES
from diffusion.model.sampling import SAMPLERS, make_sampling
from diffusion.runs.pictures import fit_reference
from diffusion.runs.plans import Plan, fit_mask
from diffusion.runs.run import Run
from diffusion.training import check_seed

MOST_GUIDANCE = 100.0
MOST_PIXELS = 50_000_000  # of an upload


class TooLarge(ValueError):
    """An upload of more bytes or pixels than may be sent."""


class Request(NamedTuple):
    """Pictures that a visitor asks for; "", 0, () and None are the run's own.

    Attributes:
      run: name of one of the engine's runs; "" names the only one.
      prompt: of a run that reads prompts.
      negative_prompt: what guidance leads away from.
      label: class, of a run that reads classes; None: no class, or the first where one is needed.
      seed: of the noise.
      num_pictures: images number 0 .. num_pictures - 1 of the seed.
      sampler: one of `SAMPLERS`.
      num_steps: of the grid.
      guidance: scale; 1 is none.
      size: (height, width).
      image: to begin with, uint8[h, w, C].
      strength: share of the steps that are run from `image`, in (0, 1]; not read with a mask.
      mask: bool[h, w], True where `image` is to be filled in, or uint8[h, w], white there.
      references: pictures to edit, uint8[h, w, C] each.
    """

    run: str = ""
    prompt: str = ""
    negative_prompt: str = ""
    label: int | None = None
    seed: int = 0
    num_pictures: int = 1
    sampler: str = ""
    num_steps: int = 0
    guidance: float | None = None
    size: tuple[int, int] | tuple[()] = ()
    image: np.ndarray | None = None
    strength: float = 0.6
    mask: np.ndarray | None = None
    references: tuple[np.ndarray, ...] = ()


class Limits(NamedTuple):
    """What a visitor may ask for.

    Attributes:
      num_pictures: of a request.
      prompt_length: characters.
      side: of a picture that is drawn.
      upload_bytes: of all pictures of a request.
      num_steps: of the grid.
      queue: requests that wait.
      batch: pictures that are drawn at once.
      references: of a request.
    """

    num_pictures: int = 16
    prompt_length: int = 2000
    side: int = 2048
    upload_bytes: int = 20_000_000
    num_steps: int = 200
    queue: int = 200
    batch: int = 8
    references: int = 4


DEFAULT_LIMITS = Limits()


def find(request: Request, runs: Mapping[str, Run]) -> Request:
    """Returns the request with its run named. Raises ValueError, in one sentence, where there is no such run."""
    if not request.run and len(runs) == 1:
        return request._replace(run=next(iter(runs)))
    if request.run not in runs:
        raise ValueError(f"There is no run {str(request.run)[:80]!r}: choose from {', '.join(runs)}.")
    return request


def check(request: Request, run: Run, limits: Limits = DEFAULT_LIMITS) -> Request:
    """Returns a request with every field explicit, its pictures as large as they are used.

    Raises:
      ValueError: in one sentence, what is asked for that cannot be drawn.
    """
    request = check_numbers(request, run, limits)
    request = check_condition(request, run, limits)
    request = check_pictures(request, run, limits)
    changed = run_of(request, run)
    sampling, x = make_sampling(changed.config, changed.model.process), jnp.zeros((1, *changed.model.space.shape))
    # Samplers refuse grids and variances when they are traced: here, not when it is the visitor's turn.
    given = (lambda x_t, *_: x_t[:, None]) if sampling.asks == "policy" else (lambda x_t, *_: (x_t, x_t))
    jax.eval_shape(lambda key: sampling.sampler(given, x, sampling.grid, key), jax.random.key(0))
    return request


def run_of(request: Request, run: Run) -> Run:
    """Returns the run with a checked request's sampling in place of its own.

    Raises:
      ValueError: in one sentence, a size that the run's network cannot draw.
    """
    sampling, (height, width, _) = run.config.sampling, run.model.space.image_shape
    assert request.guidance is not None
    changes: dict[str, Any] = {"sampling.num_steps": request.num_steps, "sampling.guidance": float(request.guidance)}
    if request.sampler != sampling.sampler.name:
        changes["sampling.sampler"] = request.sampler
    if tuple(request.size) != (height, width):
        changes["sampling.size"] = tuple(request.size)
    return run.change(changes)


def plan_of(request: Request, run: Run, index: int) -> Plan:
    """Returns the plan of picture number `index` of a checked request."""
    asked = {"prompts": request.prompt, "classes": request.label}.get(run.model.condition.kind)
    return Plan(
        asked=asked,
        negative=request.negative_prompt or None,
        seed=request.seed,
        index=index,
        image=request.image,
        strength=float(request.strength) if request.image is not None and request.mask is None else 1.0,
        mask=request.mask,
        references=request.references,
    )


def check_numbers(request: Request, run: Run, limits: Limits) -> Request:
    """Returns the request with its numbers explicit. Raises ValueError where one is out of its range."""
    sampling = run.config.sampling
    whole("The seed", request.seed, 0, 2**32 - 1)
    check_seed(request.seed)
    whole("The number of pictures", request.num_pictures, 1, limits.num_pictures)
    num_steps = request.num_steps or sampling.num_steps
    whole("The number of steps", num_steps, 1, max(limits.num_steps, sampling.num_steps))
    sampler = request.sampler or sampling.sampler.name
    if sampler not in SAMPLERS:
        raise ValueError(f"There is no sampler {str(sampler)[:80]!r}: choose from {', '.join(SAMPLERS)}.")
    guidance = sampling.guidance if request.guidance is None else request.guidance
    number("The guidance", guidance, -MOST_GUIDANCE, MOST_GUIDANCE)
    if guidance != 1 and run.model.condition.kind == "nothing":
        raise ValueError("This run reads no prompt and no class, to which guidance could lead: leave guidance at 1.")
    number("The strength", request.strength, 0, 1)
    if request.strength == 0:
        raise ValueError("The strength is 0: give a share of the steps greater than 0, at most 1.")
    # As --mode=sample has it: pictures are as large as the first that is edited, unless the run says how large.
    own = () if request.references and not sampling.get("size") else run.model.space.image_shape[:2]
    size = tuple(request.size) or own
    if size:
        if len(size) != 2:
            raise ValueError("The size is a height and a width.")
        for side, name in zip(size, ("height", "width"), strict=True):
            whole(f"The {name}", side, 1, max(limits.side, *run.model.space.image_shape[:2]))
    return request._replace(num_steps=num_steps, sampler=sampler, guidance=float(guidance), size=size)


def check_condition(request: Request, run: Run, limits: Limits) -> Request:
    """Returns the request with what the run is told explicit. Raises ValueError where it cannot be told that."""
    condition = run.model.condition
    for name, text in (("prompt", request.prompt), ("negative prompt", request.negative_prompt)):
        if not isinstance(text, str):
            raise ValueError(f"The {name} is no text.")
        if len(text) > limits.prompt_length:
            raise ValueError(f"The {name} has {len(text)} characters: use at most {limits.prompt_length}.")
        if text.strip() and condition.kind != "prompts":
            raise ValueError(f"This run reads no prompts: leave the {name} empty.")
    if condition.kind == "prompts" and not request.prompt.strip():
        raise ValueError("The prompt is empty: describe the picture.")
    label = request.label
    if label is not None and condition.kind != "classes":
        raise ValueError("This run reads no classes: leave the class out.")
    if condition.kind == "classes":
        label = 0 if label is None and not condition.optional else label
        if label is not None:
            assert condition.num_classes is not None
            whole("The class", label, 0, condition.num_classes - 1)
    return request._replace(prompt=request.prompt.strip(), negative_prompt=request.negative_prompt.strip(), label=label)


def check_pictures(request: Request, run: Run, limits: Limits) -> Request:
    """Returns the request with its pictures as large as they are used. Raises ValueError where one cannot be used."""
    space = run.model.space
    channels, cell = space.image_shape[2], space.image_shape[0] // space.shape[0]
    if request.references:
        if run.config.network.name not in READ_REFERENCES:
            raise ValueError("This run's network is not told of pictures to edit: begin with a picture instead.")
        if request.image is not None or request.mask is not None:
            raise ValueError("Give either pictures to edit or a picture to begin with, not both.")
        if len(request.references) > limits.references:
            raise ValueError(f"There are {len(request.references)} pictures to edit: give at most {limits.references}.")
        seen = tuple(fit_reference(as_picture(picture, 3), cell) for picture in request.references)
        return request._replace(references=seen, size=request.size or seen[0].shape[:2])
    if request.image is None:
        if request.mask is not None:
            raise ValueError("A mask needs the picture that it is of: give one to begin with.")
        return request
    shape = run_of(request, run).model.space.image_shape
    image, mask = as_picture(request.image, channels), request.mask
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype not in (bool, np.uint8):
            raise ValueError("The mask is neither of bool nor of uint8.")
        if mask.shape[:2] != image.shape[:2] or mask.ndim > 3 or mask.size != image[..., 0].size:
            raise ValueError("The mask is not as large as the picture that it is of.")
        mask = fit_mask(mask.reshape(image.shape[:2]), shape[:2])
    return request._replace(image=refit(image, channels=channels, size=shape[:2]), mask=mask)


def as_picture(picture: Any, channels: int) -> np.ndarray:
    """Returns uint8[h, w, channels] of a picture of other channels. Raises ValueError where it is none."""
    picture = np.asarray(picture)
    picture = picture[..., None] if picture.ndim == 2 else picture
    check_uint8_images(picture[None], "The picture")
    return refit(picture, channels=channels)


def read_upload(data: bytes, limits: Limits = DEFAULT_LIMITS) -> np.ndarray:
    """Returns the pixels of an uploaded picture, uint8[h, w, 1 or 3].

    Raises:
      ValueError: in one sentence, before it is decoded, where it is too large or no picture.
    """
    if len(data) > limits.upload_bytes:
        raise TooLarge(f"The upload has {len(data)} bytes: send at most {limits.upload_bytes}.")
    height, width, _ = shape_of(data)
    if height * width > MOST_PIXELS:
        raise TooLarge(f"The picture has {width}x{height} pixels: send at most {MOST_PIXELS}.")
    return decode(data)


def whole(what: str, value: Any, least: int, most: int) -> None:
    """Raises ValueError unless a value is a whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not least <= value <= most:
        raise ValueError(f"{what} is {str(value)[:40]}: give a whole number from {least} to {most}.")


def number(what: str, value: Any, least: float, most: float) -> None:
    """Raises ValueError unless a value is a number in a range."""
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or not least <= value <= most:
        raise ValueError(f"{what} is {str(value)[:40]}: give a number from {least:g} to {most:g}.")
