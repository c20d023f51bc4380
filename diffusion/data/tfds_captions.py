"""Image sets with captions prepared by TensorFlow Datasets, coco_captions among them, read without TensorFlow."""

import json
import os
from typing import Any

import numpy as np
from tqdm import tqdm

from diffusion.data.captions import with_captions
from diffusion.data.pictures import Size
from diffusion.data.sources import Source
from diffusion.data.tfds import PreparedSet, made_once, open_set, tfds_source, unreadable

# Names of the feature of captions, the most likely first.
NAMES = ("caption", "captions", "text", "texts", "title")


def tfds_captions(
    name: str, split: str, data_dir: str | os.PathLike | None = None, image_size: Size | None = None
) -> Source:
    """Returns the captioned images of a prepared TFDS set, as RGB.

    The captions are the first of the features `NAMES` that holds texts: one, a sequence, or records with such a feature
    of their own (coco_captions: captions/text). Each caption of an image is a pair; an image without one is left out.

    Args:
      name: as of `tfds_source`, for example "coco_captions".
      split: as of `tfds_source`.
      data_dir: as of `tfds_source`.
      image_size: as of `tfds_source`.

    Raises:
      ValueError: as `tfds_source`, or if there is no feature of captions (the line lists the features), or not one
        caption.
    """
    prepared = open_set(name, split, data_dir)
    path = caption_path(prepared.features)
    if path is None:
        raise ValueError(
            f"{prepared.folder} has no captions: none of its features {', '.join(sorted(prepared.features))} is one of "
            f"{', '.join(NAMES)} and holds texts"
        )
    images = tfds_source(name, split, data_dir, image_size=image_size, channels=3)
    key = f"{name} {split} {'/'.join(path)}"
    stored = made_once(name, key, prepared.folder, lambda: {"captions": _as_array(_read_captions(prepared, path, key))})
    return with_captions(images, json.loads(stored["captions"].tobytes()))


def caption_path(features: Any) -> tuple[str, ...] | None:
    """Returns the path of the captions in a mapping of TFDS features, a name per level; None if there are none."""
    import tensorflow_datasets as tfds

    for name in NAMES:
        if name not in features:
            continue
        feature = features[name]
        inner: Any = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
        if isinstance(inner, tfds.features.FeaturesDict):
            if within := caption_path(inner):
                return (name, *within)
        elif np.dtype(inner.np_dtype) == np.dtype(object):  # so TFDS holds texts
            return (name,)
    return None


def _read_captions(prepared: PreparedSet, path: tuple[str, ...], title: str) -> list[list[str]]:
    """Returns the captions of every example."""
    found = []
    for start in tqdm(range(0, len(prepared.records), 256), desc=f"reading {title}, once", delay=2):
        indices = range(start, min(start + 256, len(prepared.records)))
        try:
            examples = prepared.records.__getitems__(list(indices))
        except (OSError, RuntimeError) as error:
            raise unreadable(prepared.folder, error) from error
        for value in examples:
            for name in path:
                value = value[name]
            found.append([text.decode() if isinstance(text, bytes) else text for text in np.ravel(value)])
    return found


def _as_array(captions: list[list[str]]) -> np.ndarray:
    """Returns bytes of JSON; in an array of texts every row would take the room of the longest."""
    return np.frombuffer(json.dumps(captions).encode(), np.uint8)
