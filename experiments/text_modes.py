"""The modes of the text-to-image experiments: train, sample, and the uses that begin with images or two prompts."""

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffusion import editing, training
from diffusion.data.captions import CaptionedSource, with_text
from diffusion.data.images import save_labelled_png, to_float
from diffusion.data.samples import save_samples
from diffusion.training.checkpoints import open_existing
from experiments import image_diffusion, image_uses, text_to_image
from experiments.command_line import Mode, Run
from experiments.image_modes import Trained
from experiments.text_encoders import with_features
from experiments.text_to_image import Parts

MakeParts = Callable[[Run], Parts]
Captioned = Callable[[Run], CaptionedSource]


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of these modes."""
    flags.DEFINE_multi_string("prompt", [], "what to draw; may be given several times", flag_values=values)
    flags.DEFINE_string("prompts", None, "a text file of prompts, one a line", flag_values=values)
    flags.DEFINE_string("negative_prompt", "", "what guidance leads away from", flag_values=values)
    image_uses.define_flags(values)


def make_modes(make_parts: MakeParts, shapes: Captioned, images: Captioned, examples: Sequence[str]) -> dict[str, Mode]:
    """Returns the modes that use a trained model, by name.

    Args:
      make_parts: what the run's config stands for.
      shapes: any captioned images that batches can be made of: only shapes are asked for.
      images: what img2img and inpaint begin with where there are no --images.
      examples: prompts to draw where none is given; without any, one has to be.
    """

    def mode(use: Callable[..., None]) -> Mode:
        def call(run: Run) -> None:
            parts = make_parts(run)
            use(run, parts, load(run, parts, shapes(run)), images, examples)

        return call

    uses = {"sample": sample, "img2img": img2img, "inpaint": inpaint, "interpolate": interpolate}
    return {name: mode(use) for name, use in uses.items()}


def train(run: Run, parts: Parts, captioned: CaptionedSource, examples: Sequence[str]) -> Trained:
    """Trains, or goes on training, in the run's folder."""
    source = with_text(captioned, parts.encoder.tokenize)
    if run.config.text.precomputed:
        source = with_features(captioned, parts.encoder, frozen_text(run, parts, captioned))
    experiment = text_to_image.make_experiment(parts, source, examples, run.mesh)
    settings = image_diffusion.make_settings(run.config)
    description = {**run.description, "text": parts.encoder.description}
    state = training.train(experiment, settings, workdir=run.workdir, mesh=run.mesh, description=description)
    return Trained(state.ema, int(state.step), settings.ema_decay)


def stored_text(run: Run) -> dict[str, Any] | None:
    """Returns what the run's checkpoint says of its text encoder; None where there is none yet."""
    try:
        with open_existing(run.workdir) as checkpoints:
            return checkpoints.description()["text"]
    except training.RunError:
        return None


def frozen_text(run: Run, parts: Parts, captioned: CaptionedSource) -> Any:
    """Returns the weights of a frozen text encoder: those of the run's checkpoint, or where it starts its own.

    Raises:
      ValueError: it is not frozen.
    """
    if not parts.encoder.frozen:
        raise ValueError("text.precomputed=True is for an encoder that stays as it is: add --config.text.encoder=clip")
    if stored_text(run) is not None:
        return load(run, parts, captioned).ema["text"]
    return parts.encoder.init(training.run_key(run.config.seed, "init"))


def load(run: Run, parts: Parts, captioned: CaptionedSource) -> Trained:
    """Returns the newest weights in the run's folder, or those of --checkpoint.

    Of `captioned` only the shapes of its batches are used.
    """
    source = with_text(captioned, parts.encoder.tokenize)
    experiment = text_to_image.make_experiment(parts, source, ["", ""], run.mesh)
    settings = image_diffusion.make_settings(run.config)
    batches = experiment.batches(0)
    batch = next(batches)
    batches.close()
    abstract = training.abstract_train_state(experiment, settings, run.mesh, batch)
    with open_existing(run.workdir, run.flags.checkpoint) as checkpoints:
        state = checkpoints.restore(abstract)
    return Trained(state.ema, int(state.step), settings.ema_decay)


def generate(
    run: Run, parts: Parts, trained: Trained, prompts: Sequence[str], index: np.ndarray, negative: str = ""
) -> np.ndarray:
    """Returns uint8[N, H, W, C]: a picture of each prompt from noise number `index` of --seed, whatever the batches."""
    make = text_to_image.make_generate(parts, run.mesh)
    batch_size = image_diffusion.round_up(min(parts.config.sampling.batch_size, len(prompts)), run.mesh.size)
    ids, other = parts.encoder.tokenize(prompts), parts.encoder.tokenize([negative])
    images = []
    for first in tqdm(range(0, len(prompts), batch_size), desc="sampling", unit="batch", file=sys.stderr):
        # The last batch is full too, and cut afterwards: one program is compiled for all.
        rows = np.arange(first, first + batch_size) % len(prompts)
        keys, noise = text_to_image.draw_noise(run.flags.seed, index[rows], parts.image_shape)
        batch = make(trained.ema, ids[rows], np.repeat(other, batch_size, axis=0), keys, noise)
        images.append(multihost_utils.process_allgather(batch, tiled=True))
    return np.concatenate(images)[: len(prompts)]


def sample(run: Run, parts: Parts, trained: Trained, _: Captioned, examples: Sequence[str]) -> None:
    """Draws --num_samples pictures of every prompt, as .npz (prompt by prompt) and as a labelled .png beside it."""
    prompts = read_prompts(run, examples)
    count = run.flags.num_samples or 8
    settings = run.config.sampling
    name = f"step{trained.step}_{settings.sampler}{settings.num_steps}_seed{run.flags.seed}_n{count}.npz"
    out = Path(run.flags.out or run.workdir / "samples" / name)
    index = np.tile(np.arange(count), len(prompts))
    images = generate(run, parts, trained, np.repeat(prompts, count).tolist(), index, run.flags.negative_prompt)
    if jax.process_index() == 0:
        save_samples(out, images)
        rows = images.reshape(len(prompts), count, *parts.image_shape)
        save_labelled_png(out.with_suffix(".png"), rows, prompts)
        print(f"{len(images)} samples: {out}\na picture of them: {out.with_suffix('.png')}")


def img2img(run: Run, parts: Parts, trained: Trained, images: Captioned, _: Sequence[str]) -> None:
    """Adds noise to images and samples from there with the prompt: a column a strength."""
    out = image_uses.make_path(run, "img2img")
    strengths = image_uses.read_strengths(run, [0.3, 0.5, 0.7, 0.8, 0.9, 1.0])
    image, prompts = read_images(run, images)

    def use(sampler: Any, denoise: Any, grid: Any, keys: jax.Array, x_0: jax.Array) -> jax.Array:
        return jnp.stack([editing.img2img(sampler, denoise, x_0, grid, keys, s) for s in strengths], axis=1)

    rows = apply(run, parts, trained, use, prompts, image)
    columns = f"an image, samples at strength {', '.join(f'{s:g}' for s in strengths)}"
    write(run, out, image[:, None], rows, prompts, columns)


def inpaint(run: Run, parts: Parts, trained: Trained, images: Captioned, _: Sequence[str]) -> None:
    """Hides the part of each image that --mask names and fills it in as the prompt says."""
    out = image_uses.make_path(run, f"inpaint_{Path(run.flags.mask).stem}")
    known = ~image_uses.read_mask(run.flags.mask, parts.image_shape)
    image, prompts = read_images(run, images)

    def use(sampler: Any, denoise: Any, grid: Any, keys: jax.Array, x_0: jax.Array) -> jax.Array:
        return editing.inpaint(sampler, denoise, x_0, jnp.asarray(known), grid, keys, run.flags.resample)[:, None]

    rows = apply(run, parts, trained, use, prompts, image)
    hidden = np.where(known, image, np.uint8(128))
    write(run, out, np.stack([image, hidden], axis=1), rows, prompts, "an image, what is known of it, a sample")


def interpolate(run: Run, parts: Parts, trained: Trained, _: Captioned, examples: Sequence[str]) -> None:
    """Goes from the 1st prompt to the 2nd: their features are mixed, each row keeps its noise."""
    out = image_uses.make_path(run, "interpolate")
    prompts = read_prompts(run, examples[:2])
    if len(prompts) != 2:
        raise ValueError(f"interpolation goes from one prompt to another, and {len(prompts)} were given: give two")
    count, shares = run.flags.num_samples or 4, jnp.linspace(0, 1, 9)
    config, image_shape, encoder, diffusion, network = parts
    sampler = image_diffusion.make_sampler(config)
    grid = diffusion.grid(config.sampling.num_steps)

    @jax.jit
    def mix(params: Any, ids: jax.Array, keys: jax.Array, eps: jax.Array) -> jax.Array:
        ends = text_to_image.encode(encoder, params, ids)
        first, last, negative = (jax.tree.map(lambda x, i=i: x[i], ends) for i in range(3))
        every = lambda text: jax.tree.map(lambda x: jnp.broadcast_to(x, (count, *x.shape)), text)  # noqa: E731

        def decode(share: jax.Array) -> jax.Array:
            text = jax.tree.map(lambda a, b: (1 - share) * a + share * b, first, last)
            denoise = text_to_image.make_denoise(config, network, diffusion, params, every(text), every(negative))
            return sampler(denoise, grid.noise[0] * eps, grid, keys)

        return jax.lax.map(decode, shares).swapaxes(0, 1)

    keys, eps = text_to_image.draw_noise(run.flags.seed, np.arange(count), image_shape)
    rows = mix(trained.ema, encoder.tokenize([*prompts, run.flags.negative_prompt]), keys, eps)
    rows = np.asarray(text_to_image.to_uint8(rows))
    write(run, out, rows[:, :0], rows, [f"{prompts[0]} -> {prompts[1]}"] * count, "shares 0 to 1 of the second prompt")


def apply(
    run: Run, parts: Parts, trained: Trained, use: text_to_image.Use, prompts: Sequence[str], image: np.ndarray
) -> np.ndarray:
    """Returns what `use` makes of images [B], each with its prompt, as uint8[B, K, H, W, C]."""
    count = len(image)
    rows = np.arange(image_diffusion.round_up(count, run.mesh.size)) % count
    generate = text_to_image.make_generate(parts, run.mesh, use)
    ids, other = parts.encoder.tokenize(prompts), parts.encoder.tokenize([run.flags.negative_prompt])
    keys = image_uses.make_keys(run, "use", len(rows))
    made = generate(trained.ema, ids[rows], np.repeat(other, len(rows), axis=0), keys, to_float(image[rows]))
    return np.asarray(multihost_utils.process_allgather(made, tiled=True))[:count]


def read_prompts(run: Run, examples: Sequence[str]) -> list[str]:
    """Returns --prompt and the lines of --prompts, or else the examples. Warns of an empty one.

    Raises:
      ValueError: a file without any prompt, or none is given and there are no examples.
    """
    prompts = list(run.flags.prompt)
    if run.flags.prompts:
        lines = [line.strip() for line in Path(run.flags.prompts).read_text(encoding="utf-8").splitlines()]
        if not any(lines):
            raise ValueError(f"--prompts={run.flags.prompts} holds no prompt: write one a line")
        prompts += [line for line in lines if line]
    if any(not prompt.strip() for prompt in prompts):
        logging.warning("an empty prompt is no condition: the picture may show anything")
    if not prompts and not examples:
        raise ValueError("nothing to draw: give --prompt=... (several times for several), or --prompts=FILE")
    return prompts or list(examples)


def read_images(run: Run, images: Captioned) -> tuple[np.ndarray, list[str]]:
    """Returns uint8[B, H, W, C] (--images, else --num_samples of the source's) and a prompt for each.

    The prompts are those given, in turn, else the captions of the source's images.
    """
    source, captions = images(run)
    image, label = image_uses.read_images(run, source, run.flags.num_samples or 8)
    prompts = read_prompts(run, [] if label is None else [captions[i] for i in label])
    return image, [prompts[i % len(prompts)] for i in range(len(image))]


def write(run: Run, out: Path, before: np.ndarray, rows: np.ndarray, prompts: Sequence[str], columns: str) -> None:
    """Writes `rows` [B, K, H, W, C] as .npz and a labelled picture of them, after what stood `before`."""
    if jax.process_index() == 0:
        save_samples(out, rows.reshape(-1, *rows.shape[2:]))
        save_labelled_png(out.with_suffix(".png"), np.concatenate([before, rows], axis=1), prompts)
        print(f"columns: {columns}\npicture: {out.with_suffix('.png')}\nimages:  {out}")
