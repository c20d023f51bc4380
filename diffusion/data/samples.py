"""Sets of images in one file, in ADM's convention (Dhariwal & Nichol 2021).

It is an .npz with arr_0, uint8 [N, H, W, C], and where they have classes arr_1, int64 [N].
"""

import os
import zipfile
from typing import Any

import numpy as np
from jaxtyping import UInt8

from diffusion.data.images import check_uint8_images
from diffusion.files import replacing


def save_samples(path: str | os.PathLike, image: np.ndarray, label: np.ndarray | None = None, /, **arrays: Any) -> None:
    """Writes images to an .npz file, atomically.

    Args:
      path: of the file.
      image: uint8[N, H, W, C], which becomes arr_0.
      label: integers [N], the class of each, which become arr_1; None: they have none.
      **arrays: what is stored beside them, by name.

    Raises:
      ValueError: the path does not end in .npz, the images are not uint8 of that shape, or there is not one label each.
    """
    if not os.fspath(path).endswith(".npz"):
        raise ValueError(f"samples are written to an .npz file, not to {path}")
    check_uint8_images(image, "samples")
    if label is not None and label.shape != (len(image),):
        raise ValueError(f"{len(image)} samples and labels of shape {list(label.shape)}: one for each is needed")
    labelled = {} if label is None else {"arr_1": label.astype(np.int64)}
    with replacing(path) as temporary:
        np.savez(temporary, allow_pickle=False, arr_0=image, **labelled, **arrays)


def load_samples(path: str | os.PathLike) -> UInt8[np.ndarray, "N H W C"]:
    """Returns the images of an .npz file of samples; nothing in the file is executed.

    Raises:
      ValueError: with one line that names the file, if it is missing, truncated, or holds something else.
    """
    try:
        if os.path.isfile(path) and not zipfile.is_zipfile(path):
            raise ValueError("cut off, or of another format")
        with np.load(path, allow_pickle=False) as arrays:
            image = arrays["arr_0"]
    except KeyError as error:
        raise ValueError(f"{path} has no array arr_0, which holds the images by the convention of ADM") from error
    except (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is not a whole .npz file of samples ({reason})") from error
    check_uint8_images(image, f"{path}: samples")
    return image
