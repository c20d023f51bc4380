"""One scheme of names for images, with and without captions, and for sets of images to be scored."""

import os
import zipfile
from pathlib import Path

from diffusion.data.captions import caption_folder
from diffusion.data.folder import image_folder
from diffusion.data.pictures import OTHER_SUFFIXES, SUFFIXES, Size
from diffusion.data.samples import load_samples
from diffusion.data.sources import Source, Unfit, array_source, digits
from diffusion.data.tfds import UnknownSet, tfds_source
from diffusion.data.tfds_captions import tfds_captions


def named_images(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike = "",
    image_size: Size | None = None,
    channels: int | None = None,
    classes: bool = False,
    held_out: float = 0.0,
    skip_broken: bool = False,
    in_memory: bool | None = None,
) -> Source:
    """Returns a split of the images of that name.

    Args:
      name: "digits" (of scikit-learn), "folder" (of pictures), or "tfds:NAME", also plain NAME, a set prepared by
        TensorFlow Datasets.
      split: "train" or "test"; of a TFDS set any that it has.
      data_dir: folder: where the pictures are. TFDS: where prepared sets are; empty for its own default.
      image_size: side, or (H, W), to which folders and TFDS sets are cropped and resized; None or 0: as stored.
      channels: 1, 3 or 4, of folders and TFDS sets; None or 0: as stored.
      classes: folder: the sub-folders are classes.
      held_out: folder: the share of the pictures that is "test".
      skip_broken: folder: skip pictures that cannot be read.
      in_memory: of folders and TFDS sets; None decides by size.

    Raises:
      ValueError: in one line, an unknown name, a missing folder, or data that cannot be read.
    """
    size, channels = image_size or None, channels or None
    if channels not in (None, 1, 3, 4):
        raise ValueError(f"data.channels is {channels}: choose 1, 3 or 4, or 0 for what the pictures have")
    kind, _, rest = name.partition(":")
    if name == "digits":
        if size not in (None, 8, (8, 8)) or channels not in (None, 1):
            raise ValueError("digits are 8x8 with 1 channel: image_size and channels are for other data")
        return digits(split)
    if name == "folder":
        if not data_dir:
            raise ValueError("no folder of pictures: name one by --config.data.dir=DIR")
        return image_folder(
            data_dir,
            split,
            image_size=size,
            channels=channels,
            classes=classes,
            held_out=held_out,
            skip_broken=skip_broken,
            in_memory=in_memory,
        )
    if kind == "tfds":
        return tfds_source(rest, split, data_dir or None, in_memory, size, channels)
    try:
        return tfds_source(name, split, data_dir or None, in_memory, size, channels)
    except UnknownSet as error:
        raise ValueError(f"data.name is {name!r}: choose digits, folder or tfds:NAME (as the last: {error})") from error


def named_captions(
    name: str,
    split: str,
    *,
    data_dir: str | os.PathLike = "",
    held_out_dir: str | os.PathLike = "",
    train_split: str = "train",
    held_out_split: str = "val",
    image_size: Size | None = None,
    skip_broken: bool = False,
    buckets: int = 0,
    references: int = 0,
) -> Source:
    """Returns a split of the captioned images of that name.

    Args:
      name: "folder" (of pictures and captions.jsonl), or "tfds:NAME", a set prepared by TensorFlow Datasets.
      split: "train", or "test" for the held-out pairs.
      data_dir: folder: of the training pairs. TFDS: where prepared sets are; empty for its own default.
      held_out_dir: folder: of the held-out pairs.
      train_split: TFDS: what "train" is called there.
      held_out_split: TFDS: what "test" is called there.
      image_size: side, or (H, W), to which pictures are cropped and resized; None or 0: as stored.
      skip_broken: folder: skip pictures that cannot be read.
      buckets: folder: of the training pairs; see `captions.caption_folder`.
      references: folder: of every pair; see there.

    Raises:
      ValueError: in one line, an unknown name or split, a missing folder, or data that cannot be read.
    """
    if split not in ("train", "test"):
        raise ValueError(f"captioned images have the splits 'train' and 'test', not '{split}'")
    kind, _, rest = name.partition(":")
    if name == "folder":
        folder, field = (data_dir, "data") if split == "train" else (held_out_dir, "evaluation")
        if not folder:
            raise ValueError(f"no folder of pictures and captions: name one by --config.{field}.dir=DIR")
        buckets = buckets if split == "train" else 0
        return caption_folder(folder, image_size or None, split, skip_broken, buckets, references)
    if references:
        raise ValueError(f"data.references={references} are of a folder of captions: {name} has none, set it to 0")
    if kind == "tfds" and buckets:
        raise ValueError(
            f"data.buckets={buckets} are of a folder of captions: {name} is read at one shape, set it to 0"
        )
    if kind == "tfds":
        return tfds_captions(
            rest, train_split if split == "train" else held_out_split, data_dir or None, image_size or None
        )
    raise ValueError(f"data.name is {name!r}: choose folder or tfds:NAME")


def open_images(spec: str | os.PathLike, data_dir: str | os.PathLike = "") -> Source | None:
    """Returns a set of images to be scored; None for a file of statistics (mu and sigma), which holds no images.

    Args:
      spec: "tfds:NAME/SPLIT", "digits:SPLIT" (both SPLITs default to train), a folder of pictures, or an .npz of
        samples.
      data_dir: where prepared TFDS sets are; empty for the default of TFDS.

    Raises:
      ValueError: in one line, if there are no images.
    """
    kind, _, rest = os.fspath(spec).partition(":")
    path = Path(spec)
    try:
        if kind == "tfds" and rest:
            name, _, split = rest.rpartition("/")
            return tfds_source(name or split, split if name else "train", data_dir or None)
        if kind == "digits":
            return digits(rest or "train")
        if path.is_dir():
            return image_folder(path)
    except Unfit as error:
        raise ValueError(error.elsewhere) from error
    if path.suffix.lower() in (*SUFFIXES, *OTHER_SUFFIXES):
        raise ValueError(f"{path} is one picture: give a folder of pictures, or an .npz of samples")
    if is_statistics(path):
        return None
    return array_source(load_samples(path), None, path.name, "all", None)


def is_statistics(path: str | os.PathLike) -> bool:
    """Returns whether an .npz holds mu and sigma, and no images."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False
    return "arr_0.npy" not in names and {"mu.npy", "sigma.npy"} <= set(names)
