"""--mode=sample: pictures of a run as .npz and .png, with how they were made beside them."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion.data.images import image_grid, save_labelled_png, save_png
from diffusion.data.lines import read_lines
from diffusion.data.samples import load_samples, save_samples
from diffusion.files import replacing
from diffusion.model.config import plain
from diffusion.model.experiment import check_references
from diffusion.model.fields import change
from diffusion.runs.call import Call
from diffusion.runs.draw import draw, everywhere, remove_parts
from diffusion.runs.like import sample_like
from diffusion.runs.pictures import read_references
from diffusion.runs.plans import Plan
from diffusion.runs.provenance import made_of, pixels_digest, write_png
from diffusion.runs.run import Run, model_of

SHOWN = 100  # in the picture of many samples


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that say what to draw."""
    flags.DEFINE_multi_string("prompt", [], "what to draw; may be given several times", flag_values=values)
    flags.DEFINE_string("prompts", None, "a text file of prompts, one per line", flag_values=values)
    flags.DEFINE_string("lora", None, "adapters in diffusers' form, a file or its folder", flag_values=values)
    flags.DEFINE_string("negative_prompt", None, "what guidance leads away from", flag_values=values)
    flags.DEFINE_string("like", None, "a PNG of sample or the prompt page: that picture again", flag_values=values)
    flags.DEFINE_list("label", [], "classes to draw, as --label=3,3,7", flag_values=values)


def sample(call: Call) -> None:
    """Writes --num_samples images as .npz (`arr_0`, uint8 [N, H, W, C]) and as a picture beside it.

    With prompts it is so many of each, prompt by prompt. --images are pictures that FLUX.2 edits: the first gives the
    samples' size, unless config.sampling.size does. --like draws one picture again.
    """
    if call.flags.like:
        sample_like(call)
        return
    for name in ("strength", "mask"):
        if name in call.flags and call.flags[name].present:
            raise ValueError(f"--{name} is read by --mode=sample with --like=PICTURE.png alone: leave it out")
    call, references = with_references(call)
    run, asked, count = call.open(), call.flags, call.flags.num_samples
    if run.model.condition.kind == "prompts":
        prompts = read_prompts(call)
        count = count or 8
        requests, index = np.repeat(prompts, count).tolist(), np.tile(np.arange(count), len(prompts))
    else:
        labels = read_labels(call)
        count = count or (len(labels) if labels else 64)
        requests, index = run.requests(count, labels=labels), np.arange(count)
    draw_samples(run, requests, index, asked.seed, references=references, negative=asked.negative_prompt, out=asked.out)


def with_references(call: Call) -> tuple[Call, list[np.ndarray]]:
    """Returns the pictures that --images has to be edited, and the call, its samples as large as the first of them.

    Raises:
      ValueError: a picture that cannot be read, or a network that is not told of pictures.
    """
    if not call.flags.images:
        return call, []
    check_references(call.config)
    assert call.stored is not None
    space = model_of(call.config, call.stored).space
    references = read_references(call.flags.images, space.image_shape[0] // space.shape[0])
    if not call.config.sampling.size:
        height, width, _ = references[0].shape
        call = call._replace(config=change(call.config, {"sampling.size": (height, width)}))
    return call, references


def draw_samples(
    run: Run,
    requests: Sequence[Any],
    index: np.ndarray,
    seed: int,
    *,
    references: Sequence[np.ndarray] = (),
    negative: str | None = None,
    out: str | Path | None = None,
) -> np.ndarray:
    """Returns samples; writes them to `out`, the first as a picture to the .png and how they were made to .json.

    A call that was interrupted resumes, and samples that exist already, made in the same way of the same weights, are
    read.

    Args:
      run: what draws.
      requests: N prompts, class numbers or None.
      index: int[N], which noise of the seed each is made from.
      seed: of the noise.
      references: pictures to edit, of `fit_reference`.
      negative: prompt that guidance leads away from.
      out: an .npz; None: a name in the run's folder that says how they were made.
    """
    settings, config = run.config.sampling, plain(run.config)
    prompts = run.model.condition.kind == "prompts"
    count = int(np.max(index)) + 1 if prompts else len(requests)
    made = {  # what a sample depends on; not, for one, what is to be measured of it
        "experiment": run.experiment,
        **{name: config[name] for name in ("network", "condition", "space", "process", "loss", "sampling")},
        "step": run.step,
        "average": run.average,
        "weights": run.digest,
        "seed": seed,
        "num_samples": len(requests),
        **({"requests": list(requests)} if any(one is not None for one in requests) else {}),
        **({"negative": negative} if negative is not None else {}),
        **({"references": [pixels_digest(picture) for picture in references]} if references else {}),
    }
    text = json.dumps(made, indent=2) + "\n"
    key = hashlib.sha256(text.encode()).hexdigest()
    name = f"step{run.step}_{settings.sampler.name}{settings.num_steps}_seed{seed}_n{count}.npz"
    out = Path(out or run.workdir / "samples" / name).expanduser()
    if out.suffix != ".npz":
        raise ValueError(f"--out={out}: samples are written to an .npz file, with a picture of them beside it")
    note = out.with_suffix(".json")
    if everywhere(out.exists() and note.exists() and note.read_text() == text):
        images = load_samples(out)
        say(f"{len(images)} samples made before: {out}")
        return images
    parts = out.with_name(f".{out.stem}-{key[:16]}")
    images = draw(run.painter, requests, index, seed, references=references, negative=negative, folder=parts)
    if jax.process_index() == 0:
        save_samples(out, images)
        if len(images) == 1:
            plan = Plan(requests[0], negative, seed, int(index[0]), references=tuple(references))
            write_png(images[0], made_of(run, plan, watched=False), out.with_suffix(".png"), smallest_side=720)
        elif prompts:
            rows = images.reshape(-1, count, *images.shape[1:])
            save_labelled_png(out.with_suffix(".png"), rows[:SHOWN], list(requests[::count])[:SHOWN])
        else:
            save_png(out.with_suffix(".png"), image_grid(images[:SHOWN]), smallest_side=720)
        with replacing(note) as temporary:
            temporary.write_text(text)
        remove_parts(parts)
    say(f"{len(images)} samples: {out}\na picture of them: {out.with_suffix('.png')}")
    return images


def say(line: str) -> None:
    """Prints, once for all processes."""
    if jax.process_index() == 0:
        print(line)


def read_prompts(call: Call, examples: Sequence[str] | None = None) -> list[str]:
    """Returns --prompt and the lines of --prompts, or else the examples. Warns of an empty one.

    Args:
      call: with the flags.
      examples: in place of the experiment's.

    Raises:
      ValueError: a file without any prompt, or none is given and there are no examples.
    """
    if call.flags.label:
        raise ValueError(f"--label={','.join(call.flags.label)}: this run draws from prompts, not from classes")
    prompts = list(call.flags.prompt)
    if call.flags.prompts:
        lines = [line.strip() for _, line in read_lines(Path(call.flags.prompts).expanduser())]
        if not any(lines):
            raise ValueError(f"--prompts={call.flags.prompts} holds no prompt: write one per line")
        prompts += [line for line in lines if line]
    if any(not prompt.strip() for prompt in prompts):
        logging.warning("an empty prompt is no condition: the picture may show anything")
    examples = list(call.task.examples(call.config)) if examples is None else list(examples)
    if not prompts and not examples:
        raise ValueError("nothing to draw: give --prompt=... (several times for several), or --prompts=FILE")
    return prompts or examples


def read_labels(call: Call) -> list[int] | None:
    """Returns --label as numbers; None where there are none. Raises ValueError where one is no number."""
    try:
        return [int(label) for label in call.flags.label] or None
    except ValueError as error:
        raise ValueError(f"--label={','.join(call.flags.label)}: give class numbers, as in --label=3,3,7") from error
