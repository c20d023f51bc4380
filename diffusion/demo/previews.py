"""Pictures of x_0_hat while it is drawn, made by NumPy: the device is busy, and what it runs waits for them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from diffusion.model.model import parts
from diffusion.model.space import Space
from diffusion.runs.run import Run

Shape = tuple[int, int, int]
Preview = Callable[[np.ndarray, Shape], np.ndarray]  # x_0_hat [N, ...], shape -> uint8[N, *shape]
FITTED, CELLS = 8, 16  # pictures that a preview of latents is fitted to, and their side in cells


def make_preview(run: Run) -> Preview:
    """Returns what makes pictures, uint8[N, H, W, C], of x_0_hat [N, ...] of a run."""
    space = run.model.space
    return of_pixels if space.init is None else make_linear(space, parts(run.model, run.params).space)


def of_pixels(x_0_hat: np.ndarray, shape: Shape) -> np.ndarray:
    """Returns pixels in [-1, 1] as levels."""
    del shape
    return levels(127.5 * (x_0_hat.astype(np.float32) + 1))


def levels(x: np.ndarray) -> np.ndarray:
    """Returns the nearest of the levels 0..255, 0 for what is no number."""
    return np.clip(np.round(np.nan_to_num(x)), 0, 255).astype(np.uint8)


def make_linear(space: Space, params: Any) -> Preview:
    """Returns the preview of latents by the linear map to colours that fits pictures of smooth colours best.

    An autoencoder's latents are so nearly linear in the colours beneath that the decoder, which is far dearer than a
    step of a small network, need not be run.

    Args:
      space: of latents, with an encoder.
      params: of the space.
    """
    cell = space.image_shape[0] // space.shape[0]
    parts_per_cell = max(1, cell // 8)  # a side: where a cell is large, its latents are a patch of smaller ones
    images = smooth_pictures(FITTED, CELLS * cell, space.image_shape[2])
    keys = jax.random.split(jax.random.key(0), FITTED)
    x_0 = np.asarray(jax.jit(space.encode)(params, images, keys), np.float64)
    side, count = cell // parts_per_cell, CELLS * parts_per_cell
    colours = images.reshape(FITTED, count, side, count, side, -1).mean((2, 4))
    grouped = colours.reshape(FITTED, CELLS, parts_per_cell, CELLS, parts_per_cell, -1).swapaxes(2, 3)
    wanted = grouped.reshape(FITTED * CELLS**2, -1)
    known = with_one(x_0.reshape(len(wanted), -1))
    # Latents that smooth colours hardly move are left out.
    weights = np.linalg.lstsq(known, wanted, rcond=1e-5)[0].astype(np.float32)

    def preview(x_0_hat: np.ndarray, shape: Shape) -> np.ndarray:
        number, height, width, _ = x_0_hat.shape
        found = levels(with_one(x_0_hat.astype(np.float32)) @ weights)
        blocks = found.reshape(number, height, width, parts_per_cell, parts_per_cell, shape[2]).swapaxes(2, 3)
        small = blocks.reshape(number, height * parts_per_cell, width * parts_per_cell, shape[2])
        return small.repeat(side, axis=1).repeat(side, axis=2)

    return preview


def with_one(x: np.ndarray) -> np.ndarray:
    """Returns [..., C + 1]: x and 1."""
    return np.concatenate([x, np.ones_like(x[..., :1])], axis=-1)


def smooth_pictures(count: int, side: int, channels: int) -> np.ndarray:
    """Returns uint8[count, side, side, channels], colours that change slowly: 8 random ones a side, blended."""
    from PIL import Image

    random = np.random.RandomState(0)
    coarse = random.randint(0, 256, (count, 8, 8, 3), np.uint8)
    fine = [Image.fromarray(one).resize((side, side), Image.Resampling.BICUBIC) for one in coarse]
    return np.stack([np.asarray(one)[..., :channels] for one in fine])
