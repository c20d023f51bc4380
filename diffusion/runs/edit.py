"""Modes that use a trained model: interpolation, inpainting, img2img and progressive generation.

They begin with real images, or with --images of one's own, follow the run's sampler and grid as --mode=sample does, and
each write a picture for people with the images in it beside, as .npz.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from diffusion import editing
from diffusion.model.condition import rows_away
from diffusion.model.model import draw_noise, parts, steered
from diffusion.model.sampling import make_sampling
from diffusion.runs.call import TEST, Call
from diffusion.runs.draw import draw, refuse_not_finite, warn_of_negative
from diffusion.runs.keep import Place, labels_of, names_of, place, requests_of
from diffusion.runs.likelihood import own_requests
from diffusion.runs.pictures import read_mask, read_pictures, write_rows
from diffusion.runs.provenance import pixels_digest
from diffusion.runs.run import Run, show_trajectory
from diffusion.runs.sample import read_labels, read_prompts

DRAWS = 6  # samples per image, where they differ in nothing but their noise
SHARES = np.linspace(0, 1, 9)  # of the second image, or prompt, in a mixture


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of these modes."""
    flags.DEFINE_list(
        "images",
        [],
        "pictures to begin with, in place of real images; sample: to edit, with FLUX.2",
        flag_values=values,
    )
    flags.DEFINE_list(
        "strength",
        [],
        "interpolate, img2img: share of the steps that are run, in (0, 1]; or several",
        flag_values=values,
    )
    flags.DEFINE_string(
        "mask",
        "right",
        "inpaint: what to fill in: left, right, top, bottom, center, or a PNG, white there",
        flag_values=values,
    )
    flags.DEFINE_integer("resample", 10, "inpaint: how often a step is taken", lower_bound=1, flag_values=values)


def interpolate(call: Call) -> None:
    """Goes from one image to another, a row per pair and --strength (DDPM's figures 8 and 9).

    A run that reads prompts goes from the first prompt to the second, unless it is given --images.
    """
    run = call.open()
    if run.model.condition.kind == "prompts" and not call.flags.images:
        interpolate_prompts(call, run)
        return
    strengths = read_strengths(call, [0.25])
    num_pairs = call.flags.num_samples or max(1, 8 // len(strengths))
    image, requests = read_images(call, run, 2 * num_pairs)
    if len(image) % 2:
        raise ValueError(f"--images are {len(image)}: give pairs, to go from the 1st to the 2nd, ...")
    first, second = image[0::2], image[1::2]
    # A mixture of two images is of no class; under a prompt, it is of the first's.
    requests = requests[0::2] if run.model.condition.kind == "prompts" else [None] * len(first)
    kept = make_place(call, run, "interpolate", requests, image, strengths=strengths)

    def use(sampler: Any, denoise: Any, grid: Any, keys: Any, eps: Any, x_0: jax.Array, other: jax.Array) -> jax.Array:
        shares = jnp.asarray(SHARES, x_0.dtype)
        mixtures = [editing.interpolate(sampler, denoise, x_0, other, grid, keys, s, shares) for s in strengths]
        return jnp.moveaxis(jnp.stack(mixtures), 2, 0)  # [pair, strength, share, ...]

    made = apply(call, run, use, requests, [first, second])
    rows = made.reshape(-1, len(SHARES), *image.shape[1:])
    left, right = (np.repeat(end, len(strengths), axis=0)[:, None] for end in (first, second))
    heads = ["an image", [f"{share:.3g}" for share in SHARES], "the other"]
    names = [f"strength {strength:g}" for strength in strengths] * num_pairs if len(strengths) > 1 else None
    kept.write_note()
    write_rows(kept.path, [left, rows, right], heads, names, rows, image=image)


def interpolate_prompts(call: Call, run: Run) -> None:
    """Goes from the 1st prompt to the 2nd: their features are mixed, each row keeps its noise."""
    prompts = read_prompts(call, list(call.task.examples(call.config))[:2])
    if len(prompts) != 2:
        raise ValueError(f"interpolation goes from one prompt to another, and {len(prompts)} were given: give two")
    model, count = run.model, call.flags.num_samples or 4
    kept = make_place(call, run, "interpolate", prompts, num_rows=count)
    sampling = make_sampling(run.config, model.process)
    rows = model.condition.read(prompts)
    ids = np.concatenate([rows, rows_away(model.condition, rows, call.flags.negative_prompt)])
    warn_of_negative(run.config, call.flags.negative_prompt)

    @jax.jit
    def mix(params: Any, ids: jax.Array, seed: Any, index: jax.Array) -> jax.Array:
        keys, eps = draw_noise(model, seed, index)
        ends = model.condition.of_request(parts(model, params).text, ids)
        first, last, *away = (jax.tree.map(lambda x, i=i: x[i], ends) for i in range(4))

        def all_of(told: Any) -> Any:
            return jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), told)

        def decode(share: jax.Array) -> jax.Array:
            told = jax.tree.map(lambda a, b: (1 - share) * a + share * b, first, last)
            fro = jax.tree.map(lambda a, b: a + share * (b - a), *away)  # of two that are equal, these bits
            denoise = steered(model, sampling, params, all_of(told), all_of(fro))
            return sampling.sampler(denoise, sampling.grid.noise[0] * eps, sampling.grid, keys)

        return jax.lax.map(decode, jnp.asarray(SHARES, eps.dtype)).swapaxes(0, 1)

    x_0 = mix(run.params, ids, np.uint32(call.flags.seed), np.arange(count))
    refuse_not_finite(np.isfinite(x_0).all(axis=tuple(range(1, x_0.ndim))))
    rows = np.asarray(jax.jit(model.space.decode)(parts(model, run.params).space, x_0))
    heads = [[f"{share:.3g}" for share in SHARES]]
    kept.write_note()
    write_rows(kept.path, [rows], heads, [f"{prompts[0]} -> {prompts[1]}"] * count, rows)


def inpaint(call: Call) -> None:
    """Hides a part of each image and fills it in, in several ways (RePaint)."""
    run = call.open()
    known = ~read_mask(call.flags.mask, run.model.space.image_shape)
    image, requests = read_images(call, run, call.flags.num_samples or 8, DRAWS)
    hidden, resample = jnp.asarray(run.model.space.mask(known)), call.flags.resample
    stem = f"inpaint_{Path(call.flags.mask).stem}"
    kept = make_place(call, run, stem, requests, image, mask=pixels_digest(~known), resample=resample)

    def use(sampler: Any, denoise: Any, grid: Any, keys: Any, eps: Any, x_0: jax.Array) -> Any:
        return editing.inpaint(sampler, denoise, x_0, hidden, grid, keys, resample)

    rows = apply(call, run, use, requests, [image]).reshape(-1, DRAWS, *image.shape[1:])
    image = image[::DRAWS, None]
    shown = [image, np.where(known, image, np.uint8(128)), rows]
    of_rows = requests[::DRAWS]
    names, classes = names_of(run, of_rows), labels_of(of_rows)
    kept.write_note()
    write_rows(kept.path, shown, ["an image", "known", "samples"], names, rows, classes, image=image[:, 0], known=known)


def img2img(call: Call) -> None:
    """Adds noise to images and samples from there (SDEdit): a column a strength, or several samples of one strength."""
    run = call.open()
    strengths = read_strengths(call, [0.1, 0.2, 0.3, 0.4, 0.6, 1.0])
    draws = DRAWS if len(strengths) == 1 else 1
    image, requests = read_images(call, run, call.flags.num_samples or 8, draws)
    kept = make_place(call, run, "img2img", requests, image, strengths=strengths)

    def use(sampler: Any, denoise: Any, grid: Any, keys: Any, eps: Any, x_0: jax.Array) -> jax.Array:
        return jnp.stack([editing.img2img(sampler, denoise, x_0, grid, keys, s) for s in strengths], axis=1)

    rows = apply(call, run, use, requests, [image]).reshape(-1, draws * len(strengths), *image.shape[1:])
    image = image[::draws, None]
    texts = [f"strength {strength:g}" for strength in strengths]
    heads = ["an image", texts[0] if draws > 1 else texts]
    of_rows = requests[::draws]
    names, classes = names_of(run, of_rows), labels_of(of_rows)
    kept.write_note()
    write_rows(kept.path, [image, rows], heads, names, rows, classes, image=image[:, 0])


def progressive(call: Call) -> None:
    """Shows x_0_hat on the way to the images of --mode=sample (DDPM's figure 6)."""
    run = call.open()
    count, num_steps = call.flags.num_samples or 8, run.config.sampling.num_steps
    shown = np.unique(np.linspace(0, num_steps - 1, 11).astype(int)[:-1])
    prompts = run.model.condition.kind == "prompts"
    requests = run.requests(count, read_prompts(call) if prompts else None, None if prompts else read_labels(call))
    negative = call.flags.negative_prompt
    kept = make_place(call, run, "progressive", requests)
    films = draw(run.painter, requests, np.arange(count), call.flags.seed, negative=negative, use=show_trajectory)
    rows = films[:, [*shown, num_steps]]
    heads = [[f"step {i + 1}" for i in shown], "sample"]
    names, classes = names_of(run, requests), labels_of(requests)
    kept.write_note()
    write_rows(kept.path, [rows[:, :-1], rows[:, -1:]], heads, names, rows, classes, step=shown + 1)


def apply(call: Call, run: Run, use: Callable[..., Any], requests: list[Any], images: list[np.ndarray]) -> np.ndarray:
    """Returns what `use` makes of images [B], each with its request, uint8[B, ...]."""
    index, negative = np.arange(len(requests)), call.flags.negative_prompt
    return draw(run.painter, requests, index, call.flags.seed, images=images, negative=negative, use=use)


def read_images(call: Call, run: Run, count: int, repeats: int = 1) -> tuple[np.ndarray, list[Any]]:
    """Returns uint8[B, H, W, C], each image `repeats` times, and what is asked of each: --images, or test images.

    Which test images depends on --seed. A request is a prompt that was given, in turn, else the caption or class of a
    test image; None where it is not known.
    """
    prompts = run.model.condition.kind == "prompts"
    if call.flags.images:
        image = read_pictures(call.flags.images, run.model.space.image_shape)
        asked: list[Any] = read_prompts(call, []) if prompts else read_labels(call) or [None]
    else:
        source = call.task.read(call.config, TEST)
        if count > source.num_examples:
            raise ValueError(f"{count} images were asked for, {source.name} ({source.split}) has {source.num_examples}")
        batch = source.read(np.random.RandomState(call.flags.seed).permutation(source.num_examples)[:count])
        image = batch["image"]
        given = prompts and (call.flags.prompt or call.flags.prompts)
        asked = read_prompts(call) if given else own_requests(run, source, batch)
    requests = [asked[i % len(asked)] for i in range(len(image))]
    return np.repeat(image, repeats, axis=0), [one for one in requests for _ in range(repeats)]


def read_strengths(call: Call, default: list[float]) -> list[float]:
    """Returns --strength as numbers. Raises ValueError where one is outside (0, 1]."""
    given = call.flags.strength
    try:
        strengths = [float(text) for text in given] or default
    except ValueError:
        strengths = []
    if not strengths or not all(0 < strength <= 1 for strength in strengths):
        raise ValueError(f"--strength={','.join(given)}: give numbers in (0, 1], as in --strength=0.3,0.6")
    return strengths


def make_place(
    call: Call, run: Run, name: str, requests: list[Any], image: np.ndarray | None = None, **more: Any
) -> Place:
    """Returns where the pictures of a mode are kept: --out, or a name in the run's folder.

    Args:
      call: with the flags.
      run: that draws.
      name: that theirs begins with.
      requests: of the pictures.
      image: that they are made of, uint8[B, H, W, C]; None: none.
      **more: what else they depend on.

    Raises:
      ValueError: --out holds other pictures.
    """
    settings, seed, negative = run.config.sampling, call.flags.seed, call.flags.negative_prompt
    made = {
        "mode": call.flags.mode,
        "seed": seed,
        **requests_of(requests),
        **({"negative": negative} if negative is not None else {}),
        **({"images": pixels_digest(image)} if image is not None else {}),
        **more,
    }
    return place(run, f"uses/{name}_{settings.sampler.name}{settings.num_steps}_seed{seed}", made, call.flags.out)
