"""Pictures that people give and are given: files to begin with or to edit, masks, rows of images, films."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion.data.images import check_uint8_images, image_grid
from diffusion.data.pictures import decode
from diffusion.data.samples import save_samples
from diffusion.data.sheets import Heads, save_sheet
from diffusion.files import replacing

SMALLEST, LARGEST, LONGEST = 64, 1024**2, 8  # of a reference: side, pixels (larger ones are reduced), aspect ratio
MASKS = ("left", "right", "top", "bottom", "center")


def read_pictures(paths: Sequence[str], shape: tuple[int, int, int]) -> np.ndarray:
    """Returns picture files as uint8[N, H, W, C] of this shape, cropped and resized where theirs differ.

    Raises:
      ValueError: one is missing, or not a picture.
    """
    height, width, channels = shape
    if not all(paths):
        raise ValueError(f"--images={','.join(paths)}: a name is empty")
    return np.stack([decode(Path(path).expanduser(), channels=channels, size=(height, width)) for path in paths])


def read_references(paths: Sequence[str], cell: int) -> list[np.ndarray]:
    """Returns picture files to edit as uint8[h, w, 3], see `fit_reference`.

    Raises:
      ValueError: one is missing, not a picture, or one that FLUX.2 does not take, which is named.
    """
    found = []
    for path in paths:
        try:
            found.append(fit_reference(decode(Path(path).expanduser(), channels=3), cell))
        except ValueError as error:
            raise ValueError(f"--images={path}: {error}") from error
    return found


def fit_reference(picture: np.ndarray, cell: int) -> np.ndarray:
    """Returns a picture to edit as FLUX.2's pipelines fit it: at most 1024^2 pixels, then the centre, in whole cells.

    Args:
      picture: uint8[H, W, 3].
      cell: side in pixels of a position of the latents.

    Raises:
      ValueError: it is no such array, smaller than 64 pixels, or more than 8 times as long as wide.

    Source: diffusers 0.42, Flux2ImageProcessor.
    """
    from PIL import Image

    check_uint8_images(picture[None] if picture.ndim == 3 else picture, "a picture to edit")
    height, width, channels = picture.shape
    if channels != 3 or min(height, width) < SMALLEST or max(height, width) > LONGEST * min(height, width):
        raise ValueError(
            f"a picture to edit has {height}x{width} pixels of {channels} channels: it has to be RGB, at least "
            f"{SMALLEST} pixels wide and high, and at most {LONGEST} times as long as wide"
        )
    if height * width > LARGEST:
        scale = math.sqrt(LARGEST / (height * width))
        size = int(width * scale), int(height * scale)
        picture = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS))
    rows, columns = (side // cell * cell for side in picture.shape[:2])
    top, left = (picture.shape[0] - rows) // 2, (picture.shape[1] - columns) // 2
    return picture[top : top + rows, left : left + columns]


def read_mask(name: str, shape: tuple[int, int, int]) -> np.ndarray:
    """Returns bool[H, W, 1], True where an image is to be filled in.

    Args:
      name: one of MASKS, or a picture file, white there.
      shape: (height, width, channels) of the image.

    Raises:
      ValueError: it is neither, or there is nothing to fill in.
    """
    height, width, _ = shape
    hidden = np.zeros((height, width, 1), bool)
    parts = {
        "left": np.s_[:, : width // 2],
        "right": np.s_[:, width // 2 :],
        "top": np.s_[: height // 2],
        "bottom": np.s_[height // 2 :],
        "center": np.s_[height // 4 : -(height // 4), width // 4 : -(width // 4)],
    }
    if name in parts:
        hidden[parts[name]] = True
    elif Path(name).expanduser().is_file():
        hidden = read_pictures([name], (height, width, 1))[0] > 127
    else:
        raise ValueError(f"--mask={name} is no file: choose {', '.join(MASKS)} or a PNG")
    if not hidden.any():
        raise ValueError(f"--mask={name} leaves nothing to fill in: paint that white, and the rest black")
    return hidden


def write_rows(
    path: Path,
    blocks: Sequence[np.ndarray],
    heads: Heads,
    labels: Sequence[str] | None,
    rows: np.ndarray,
    classes: np.ndarray | None = None,
    **arrays: Any,
) -> None:
    """Writes rows of images as samples with `arrays` beside them, and blocks with heads and labels as a picture.

    Args:
      path: an .npz.
      blocks: uint8 [R, K_i, H, W, C] each.
      heads: of the blocks, see `sheet`.
      labels: of the rows; None for none.
      rows: the images to store [R, K, H, W, C].
      classes: integers [R], of the rows; None where they have none.
      **arrays: what is stored beside them.
    """
    if jax.process_index() != 0:
        return
    label = None if classes is None else np.repeat(classes, rows.shape[1])
    picture = path.with_suffix(".png")
    save_sheet(picture, blocks, heads, labels)
    save_samples(path, rows.reshape(-1, *rows.shape[2:]), label, **arrays)
    print(f"images: {path}\na picture of them: {picture}")


def save_gif(path: str | Path, films: np.ndarray, *, seconds: float = 3.0, smallest_side: int = 240) -> None:
    """Writes films as one GIF, in a grid; it rests on the last frame.

    Args:
      path: of the file.
      films: uint8[N, num_frames, H, W, C], as `Run.sample(trajectory=True)` returns them.
      seconds: that the film takes before it rests for as long.
      smallest_side: in pixels, to which small pictures are enlarged by a whole factor.

    Example:
      save_gif("digits.gif", run.sample(16, trajectory=True))
    """
    from PIL import Image

    frames = []
    for frame in range(films.shape[1]):
        grid = image_grid(films[:, frame])
        factor = -(-smallest_side // min(grid.shape[:2]))
        grid = grid.repeat(factor, axis=0).repeat(factor, axis=1)
        frames.append(Image.fromarray(grid[..., 0] if grid.shape[-1] == 1 else grid))
    each = int(1000 * seconds / len(frames))
    durations = [each] * (len(frames) - 1) + [int(1000 * seconds)]
    with replacing(path) as temporary:
        frames[0].save(temporary, "gif", save_all=True, append_images=frames[1:], duration=durations, loop=0)
