"""--mode=sample: pictures of a run as .npz and .png, with how they were made beside them."""

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
from diffusion.data.sheets import save_classes
from diffusion.model.experiment import check_references
from diffusion.model.fields import change
from diffusion.runs.call import Call
from diffusion.runs.draw import draw, remove_parts
from diffusion.runs.keep import Place, labels_of, names_of, place, requests_of
from diffusion.runs.like import sample_like
from diffusion.runs.pictures import read_references, save_gif
from diffusion.runs.plans import Plan
from diffusion.runs.provenance import made_of, pixels_digest, write_png
from diffusion.runs.run import Run, model_of, show_trajectory

SHOWN = 100  # in the picture of many samples
FILMED = 16


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags that say what to draw."""
    flags.DEFINE_multi_string("prompt", [], "what to draw; may be given several times", flag_values=values)
    flags.DEFINE_string("prompts", None, "a text file of prompts, one per line", flag_values=values)
    flags.DEFINE_string("lora", None, "adapters in diffusers' form, a file or its folder", flag_values=values)
    flags.DEFINE_string("negative_prompt", None, "what guidance leads away from", flag_values=values)
    flags.DEFINE_string("like", None, "a PNG of sample or the prompt page: that picture again", flag_values=values)
    flags.DEFINE_bool("trajectory", False, f"also a GIF of {FILMED} samples as they form", flag_values=values)
    flags.DEFINE_list("label", [], "classes to draw, as --label=3,3,7", flag_values=values)


def sample(call: Call) -> None:
    """Writes --num_samples images as .npz (`arr_0`, uint8 [N, H, W, C]) and as a picture beside it.

    With prompts it is so many of each, prompt by prompt. --images are pictures that FLUX.2 edits: the first gives the
    samples' size, unless config.sampling.size does. --like draws one picture again.
    """
    if call.flags.like:
        if call.flags.trajectory:
            raise ValueError("--trajectory is not read with --like: leave it out")
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
    more: Any = {"references": references, "negative": asked.negative_prompt}
    draw_samples(run, requests, index, asked.seed, out=asked.out, film=asked.trajectory, **more)


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
    film: bool = False,
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
      film: also writes a GIF of the first as they form.

    Raises:
      ValueError: `out` holds other samples.
    """
    settings, prompts = run.config.sampling, run.model.condition.kind == "prompts"
    count = int(np.max(index)) + 1 if prompts else len(requests)
    made = {
        "seed": seed,
        "num_samples": len(requests),
        **requests_of(requests),
        **({"negative": negative} if negative is not None else {}),
        **({"references": [pixels_digest(picture) for picture in references]} if references else {}),
    }
    stem = f"samples/step{run.step}_{settings.sampler.name}{settings.num_steps}_seed{seed}_n{count}"
    kept = place(run, stem, made, out)
    more: Any = {"references": references, "negative": negative}
    if kept.made_before:
        images = load_samples(kept.path)
        say(f"{len(images)} samples made before: {kept.path}")
    else:
        images = draw_and_keep(run, requests, index, seed, kept, **more)
        say(f"{len(images)} samples: {kept.path}\na picture of them: {kept.picture}")
    if film:
        draw_film(run, kept, requests, index, seed, **more)
    return images


def draw_and_keep(
    run: Run,
    requests: Sequence[Any],
    index: np.ndarray,
    seed: int,
    kept: Place,
    *,
    references: Sequence[np.ndarray],
    negative: str | None,
) -> np.ndarray:
    """Returns samples; writes them where they are to be kept."""
    prompts = run.model.condition.kind == "prompts"
    parts = kept.path.with_name(f".{kept.path.stem}-{kept.key[:16]}")
    images = draw(run.painter, requests, index, seed, references=references, negative=negative, folder=parts)
    if jax.process_index() == 0:
        names = names_of(run, requests)
        kept.write_note()
        if len(images) == 1:
            plan = Plan(requests[0], negative, seed, int(index[0]), references=tuple(references))
            write_png(images[0], made_of(run, plan, watched=False), kept.picture, smallest_side=720)
        elif prompts:
            count = int(np.max(index)) + 1
            rows = images.reshape(-1, count, *images.shape[1:])
            save_labelled_png(kept.picture, rows[:SHOWN], list(requests[::count])[:SHOWN])
        elif names:
            save_classes(kept.picture, images[:SHOWN], names[:SHOWN])
        else:
            save_png(kept.picture, image_grid(images[:SHOWN]), smallest_side=720)
        save_samples(kept.path, images, labels_of(requests))  # last: with it all are there
        remove_parts(parts)
    return images


def draw_film(run: Run, kept: Place, requests: Sequence[Any], index: np.ndarray, seed: int, **asked: Any) -> None:
    """Writes x_0_hat at every step on the way to the first samples as a GIF beside them.

    Args:
      run: that drew them.
      kept: where they are.
      requests: of the samples.
      index: of the samples.
      seed: of the samples.
      **asked: `references` and `negative` of the samples.
    """
    shown = slice(0, FILMED)
    films = draw(run.painter, requests[shown], index[shown], seed, use=show_trajectory, progress="filming", **asked)
    if jax.process_index() == 0:
        save_gif(kept.path.with_suffix(".gif"), films)
    say(f"a film of {'them' if len(requests) <= FILMED else f'{FILMED} of them'}: {kept.path.with_suffix('.gif')}")


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
