"""A folder of pictures as a source."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from diffusion.data.pictures import SUFFIXES, decode, picture_files
from diffusion.data.sources import Source, array_source


def image_folder(folder: str | os.PathLike, split: str = "all") -> Source:
    """All pictures under `folder`, in the order of their paths, held in memory; one size, no labels.

    Grey pictures have one channel if all are grey, else every picture has three.

    Raises:
      ValueError: there are none, one cannot be read, or sizes differ: the file is named.
    """
    folder = Path(folder)
    files = picture_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        images = list(pool.map(decode, files))
    if any(image.shape[-1] == 3 for image in images):
        images = [image.repeat(3, axis=-1) if image.shape[-1] == 1 else image for image in images]
    for path, image in zip(files, images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{path} is {image.shape[1]}x{image.shape[0]} but {files[0]} is "
                f"{images[0].shape[1]}x{images[0].shape[0]}: pictures of one size are needed"
            )
    return array_source(np.stack(images), None, folder.resolve().name, split, None)
