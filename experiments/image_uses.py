"""Modes that use a trained model of images: interpolation, inpainting, img2img and progressive generation.

They begin with real images, or with --images of one's own, follow the run's sampler and grid as --mode=sample does, and
each write a picture for people with the images in it beside, as .npz.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from diffusion import editing
from diffusion.data.images import image_grid, save_png, to_float, to_uint8
from diffusion.data.sources import Source
from diffusion.files import replacing
from diffusion.training import run_key
from experiments import image_diffusion, image_modes
from experiments.command_line import Mode, Run

DRAWS = 6  # samples an image, where they differ in nothing but their noise


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of these modes."""
    flags.DEFINE_list("images", [], "pictures to begin with, in place of real images", flag_values=values)
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


def make_modes(source: Callable[[Run], Source]) -> dict[str, Mode]:
    """Returns the modes by name; `source(run)` gives the real images that they begin with."""
    uses = {"interpolate": interpolate, "inpaint": inpaint, "img2img": img2img, "progressive": progressive}

    def mode(use: Callable[[Run, Source], None]) -> Mode:
        return lambda run: use(run, source(run))

    return {name: mode(use) for name, use in uses.items()}


def interpolate(run: Run, source: Source) -> None:
    """Goes from one image to another, a row a pair; with several --strength, a row each (DDPM's figures 8 and 9)."""
    out = make_path(run, "interpolate")
    strengths = read_strengths(run, [0.25])
    num_pairs = run.flags.num_samples or max(1, 8 // len(strengths))
    image, _ = read_images(run, source, 2 * num_pairs)
    if len(image) % 2:
        raise ValueError(f"--images are {len(image)}: give pairs, to go from the 1st to the 2nd, ...")
    first, second = image[0::2], image[1::2]
    shares = jnp.linspace(0, 1, 9)

    def use(sampler: Any, denoise: Any, grid: Any, keys: jax.Array, x_0: jax.Array, other: jax.Array) -> jax.Array:
        mixtures = [editing.interpolate(sampler, denoise, x_0, other, grid, keys, s, shares) for s in strengths]
        return jnp.moveaxis(jnp.stack(mixtures), 2, 0)  # [pair, strength, share, ...]

    keys = make_keys(run, "interpolate", len(first))
    rows = apply(run, source, use, None, keys, to_float(first), to_float(second))
    rows = rows.reshape(-1, len(shares), *source.image_shape)
    left, right = (np.repeat(end, len(strengths), axis=0)[:, None] for end in (first, second))
    write(out, rows, [left, rows, right], "an image, mixtures that go over to the other, the other", image=image)


def inpaint(run: Run, source: Source) -> None:
    """Hides a part of each image and fills it in, in several ways (RePaint)."""
    out = make_path(run, f"inpaint_{Path(run.flags.mask).stem}")
    known = ~read_mask(run.flags.mask, source.image_shape)
    image, label = read_images(run, source, run.flags.num_samples or 8, DRAWS)

    def use(sampler: Any, denoise: Any, grid: Any, keys: jax.Array, x_0: jax.Array) -> jax.Array:
        return editing.inpaint(sampler, denoise, x_0, jnp.asarray(known), grid, keys, run.flags.resample)

    rows = apply(run, source, use, label, make_keys(run, "inpaint", len(image)), to_float(image))
    rows = rows.reshape(-1, DRAWS, *source.image_shape)
    image = image[::DRAWS, None]
    hidden = np.where(known, image, np.uint8(128))
    columns = f"an image, what is known of it, {DRAWS} samples"
    write(out, rows, [image, hidden, rows], columns, image=image[:, 0], known=known)


def img2img(run: Run, source: Source) -> None:
    """Adds noise to images and samples from there (SDEdit): a column a strength, or several samples of one strength."""
    out = make_path(run, "img2img")
    strengths = read_strengths(run, [0.1, 0.2, 0.3, 0.4, 0.6, 1.0])
    draws = DRAWS if len(strengths) == 1 else 1
    image, label = read_images(run, source, run.flags.num_samples or 8, draws)

    def use(sampler: Any, denoise: Any, grid: Any, keys: jax.Array, x_0: jax.Array) -> jax.Array:
        return jnp.stack([editing.img2img(sampler, denoise, x_0, grid, keys, s) for s in strengths], axis=1)

    rows = apply(run, source, use, label, make_keys(run, "img2img", len(image)), to_float(image))
    rows = rows.reshape(-1, draws * len(strengths), *source.image_shape)
    image = image[::draws, None]
    columns = f"an image, samples at strength {', '.join(f'{s:g}' for s in strengths)}"
    write(out, rows, [image, rows], columns, image=image[:, 0])


def progressive(run: Run, source: Source) -> None:
    """Shows x_0_hat on the way to the images of --mode=sample (DDPM's figure 6)."""
    out = make_path(run, "progressive")
    index = np.arange(run.flags.num_samples or 8)
    label = None if source.num_classes is None else (index % source.num_classes).astype(np.int32)
    num_steps = run.config.sampling.num_steps
    shown = np.unique(np.linspace(0, num_steps - 1, 11).astype(int)[:-1])

    def use(sampler: Any, denoise: Any, grid: Any, keys: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.split)(keys)
        eps = jax.vmap(lambda key: jax.random.normal(key, source.image_shape))(keys[:, 0])
        x_0, x_0_hats = sampler(denoise, grid.noise[0] * eps, grid, keys[:, 1], trajectory=True)
        return jnp.moveaxis(jnp.concatenate([x_0_hats[shown], x_0[None]]), 0, 1)

    rows = apply(run, source, use, label, make_keys(run, "sample", len(index)))
    columns = f"x_0_hat at step {', '.join(str(i + 1) for i in shown)} of {num_steps}, the sample"
    write(out, rows, [rows[:, :-1], rows[:, -1:]], columns, step=shown + 1)


def apply(
    run: Run, source: Source, use: Callable[..., jax.Array], label: np.ndarray | None, keys: jax.Array, *x: jax.Array
) -> np.ndarray:
    """Returns use(sampler, denoise, grid, keys [B], *x) as uint8, with the run's newest weights and its sampler.

    `label` [B] is of the images where there are classes; None is no class.
    """
    trained = image_modes.load(run, source)
    diffusion = image_diffusion.make_diffusion(run.config)
    network = image_diffusion.make_network(run.config, source, diffusion)
    sampler = image_diffusion.make_sampler(run.config)
    grid = diffusion.grid(run.config.sampling.num_steps)

    def generate(params: Any, label: jax.Array | None, keys: jax.Array, *x: jax.Array) -> jax.Array:
        denoise = image_diffusion.make_denoise(run.config, network, diffusion, params, label)
        return to_uint8(use(sampler, denoise, grid, keys, *x))

    whole = NamedSharding(run.mesh, PartitionSpec())
    label = None if network.num_classes is None else label
    return np.asarray(jax.jit(generate, out_shardings=whole)(trained.ema, label, keys, *x))


def make_keys(run: Run, purpose: str, count: int) -> jax.Array:
    """Returns the keys of images 0, 1, ... for a purpose."""
    return jax.vmap(partial(run_key, run.flags.seed, purpose))(jnp.arange(count))


def read_images(run: Run, source: Source, count: int, repeats: int = 1) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns uint8[B, H, W, C] and int32[B], each image `repeats` times: --images, else `count` of the source's.

    Which of the source's depends on --seed. Labels are None where they are not known.
    """
    if run.flags.images:
        image = np.stack([read_picture(path, source.image_shape) for path in run.flags.images])
        return np.repeat(image, repeats, axis=0), None
    if count > source.num_examples:
        raise ValueError(f"{count} images were asked for, {source.name} ({source.split}) has {source.num_examples}")
    indices = np.random.RandomState(run.flags.seed).permutation(source.num_examples)[:count]
    batch = source.read(np.repeat(indices, repeats))
    return batch["image"], batch["label"]


def read_picture(path: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns a picture file as uint8[H, W, C] of this shape: its size and colours are changed where they differ.

    Raises:
      OSError: it is missing, or not a picture.
    """
    from PIL import Image

    height, width, channels = shape
    with Image.open(path) as picture:
        picture = picture.convert({1: "L", 3: "RGB", 4: "RGBA"}[channels])
        return np.asarray(picture.resize((width, height), Image.Resampling.BOX)).reshape(shape)


def read_mask(name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns bool[H, W, 1], True where an image is to be filled in.

    Raises:
      ValueError: it is neither the name of a part nor a file, or there is nothing to fill in.
    """
    height, width, _ = shape
    hidden = np.zeros((height, width, 1), bool)
    match name:
        case "left":
            hidden[:, : width // 2] = True
        case "right":
            hidden[:, width // 2 :] = True
        case "top":
            hidden[: height // 2] = True
        case "bottom":
            hidden[height // 2 :] = True
        case "center":
            hidden[height // 4 : -(height // 4), width // 4 : -(width // 4)] = True
        case _ if Path(name).is_file():
            hidden = read_picture(name, (height, width, 1)) > 127
        case _:
            raise ValueError(f"--mask={name} is no file: choose left, right, top, bottom, center or a PNG")
    if not hidden.any():
        raise ValueError(f"--mask={name} leaves nothing to fill in: paint that white, and the rest black")
    return hidden


def read_strengths(run: Run, default: list[float]) -> list[float]:
    """Returns --strength as numbers. Raises ValueError where one is outside (0, 1]."""
    try:
        strengths = [float(text) for text in run.flags.strength] or default
    except ValueError:
        strengths = []
    if not strengths or not all(0 < strength <= 1 for strength in strengths):
        raise ValueError(f"--strength={','.join(run.flags.strength)}: give numbers in (0, 1], as in --strength=0.3,0.6")
    return strengths


def make_path(run: Run, name: str) -> Path:
    """Returns --out, or a name in the work folder. Raises ValueError where --out is not .npz."""
    settings = run.config.sampling
    name = f"{name}_{settings.sampler}{settings.num_steps}_seed{run.flags.seed}.npz"
    out = Path(run.flags.out or run.workdir / "uses" / name)
    if out.suffix != ".npz":
        raise ValueError(f"--out={out}: images are written to an .npz file, with a picture of them beside it")
    return out


def write(out: Path, rows: np.ndarray, blocks: list[np.ndarray], columns: str, **arrays: np.ndarray) -> None:
    """Writes rows [R, K, H, W, C] as `arr_0` [R * K, H, W, C] with `arrays`, and `blocks` side by side as a picture."""
    if jax.process_index() != 0:
        return
    with replacing(out) as temporary:
        np.savez(temporary, allow_pickle=False, arr_0=rows.reshape(-1, *rows.shape[2:]), **arrays)
    save_png(out.with_suffix(".png"), side_by_side(blocks), smallest_side=1)
    print(f"columns: {columns}\npicture: {out.with_suffix('.png')}\nimages:  {out}")


def side_by_side(blocks: list[np.ndarray], smallest_side: int = 64) -> np.ndarray:
    """Lays blocks [R, K, H, W, C] out in R rows, white between blocks; images are enlarged to see their pixels."""
    factor = -(-smallest_side // min(blocks[0].shape[2:4]))
    parts = []
    for block in blocks:
        image = block.reshape(-1, *block.shape[2:]).repeat(factor, axis=1).repeat(factor, axis=2)
        table = image_grid(image, columns=block.shape[1], separator=4)
        parts += [table, np.full((table.shape[0], 12, table.shape[2]), 255, np.uint8)]
    return np.concatenate(parts[:-1], axis=1)
