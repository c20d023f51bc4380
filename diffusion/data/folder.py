"""A folder of pictures as a source."""

import hashlib
import os
import unicodedata
from pathlib import Path

import numpy as np

from diffusion.data.decoded import decoded_files
from diffusion.data.pictures import SUFFIXES, Size, picture_files
from diffusion.data.sources import Source


def image_folder(
    folder: str | os.PathLike,
    split: str = "all",
    *,
    image_size: Size | None = None,
    channels: int | None = None,
    classes: bool = False,
    held_out: float = 0.0,
    skip_broken: bool = False,
    in_memory: bool | None = None,
) -> Source:
    """Returns the pictures under `folder`, in natural order of their paths (`pictures.picture_files`).

    Args:
      folder: of pictures, in folders at any depth.
      split: "train", "test" or "all". To which a picture belongs depends on its path within the folder alone: more
        pictures do not move the others.
      image_size: side, or (H, W), to which every picture is cropped and resized. Without it all must have one size.
      channels: 1, 3 or 4. None makes all grey if all are grey, else RGB.
      classes: the sub-folders of `folder` are the classes, numbered in natural order, whatever the split.
      held_out: share of the pictures that is "test".
      skip_broken: skip pictures that cannot be read, with one warning, instead of raising.
      in_memory: None holds at most 2 GiB of pixels in memory, and maps more from a file under `cache_folder()`.

    Raises:
      ValueError: in one line, if there are no pictures, none in the split, one cannot be read, sizes differ, or one
        is in no class.
    """
    folder = Path(folder).expanduser()
    if split not in ("train", "test", "all"):
        raise ValueError(f"a folder of pictures has the splits 'train', 'test' and 'all', not '{split}'")
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}: choose a share of the pictures in [0, 1)")
    files = picture_files(folder)
    if not files:
        raise ValueError(f"{folder} holds no pictures ({', '.join(suffix[1:] for suffix in SUFFIXES)})")
    paths = [file.relative_to(folder).as_posix() for file in files]
    label, class_names = None, ()
    if classes:
        if loose := [path for path in paths if "/" not in path]:
            raise ValueError(
                f"{folder / loose[0]} has no class, because it is in no sub-folder: move it into one, or set "
                "--config.data.classes=False"
            )
        own = [path.partition("/")[0] for path in paths]
        class_names = tuple(dict.fromkeys(own))
        number = {class_name: i for i, class_name in enumerate(class_names)}
        label = np.array([number[class_name] for class_name in own], np.int32)
    chosen = [i for i, path in enumerate(paths) if split == "all" or (place(path) < held_out) == (split == "test")]
    if not chosen:
        raise ValueError(
            f"{folder}: none of its {len(files)} pictures is in the split '{split}' with held_out={held_out}: add "
            "pictures, or choose another share, as in --config.data.held_out=0.1"
        )
    source, _ = decoded_files(
        [files[i] for i in chosen],
        None if label is None else label[chosen],
        folder.resolve().name,
        split,
        len(class_names) or None,
        size=image_size,
        channels=channels,
        skip_broken=skip_broken,
        in_memory=in_memory,
    )
    return source._replace(class_names=class_names)


def place(path: str) -> float:
    """Returns where a relative path falls in [0, 1), evenly and by the path alone, for splits that never move."""
    text = unicodedata.normalize("NFC", path)  # some file systems store names decomposed
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
