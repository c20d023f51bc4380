"""Where images come from: a `Source` reads them by index. Sources of arrays, and of the digits of scikit-learn."""

import hashlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from diffusion.data.images import check_uint8_images
from diffusion.extras import need

LARGEST_IN_MEMORY = 2 * 2**30  # bytes of decoded images


class Unfit(ValueError):
    """Images that cannot be used as they are. The message is that of a run, whose config can mend it.

    Attributes:
      elsewhere: the message where there is no config.
    """

    def __init__(self, fact: str, in_run: str, elsewhere: str):
        super().__init__(f"{fact}: {in_run}")
        self.elsewhere = f"{fact}: {elsewhere}"


class Source(NamedTuple):
    """Labelled images that can be read in any order.

    Attributes:
      name: of the data set.
      split: of the data set.
      num_examples: N.
      image_shape: (H, W, C).
      num_classes: of the labels; None for a set without labels, whose label is 0 everywhere.
      read: indices int64[B] -> {"image": uint8[B, H, W, C], "label": int32[B]}, new arrays; may be called from several
        threads.
      fingerprint: which data this is, for reports. "sha256:..." covers all pixels and labels, "files-sha256:..." the
        names, sizes and descriptions of files that are decoded as they are read; captions are covered by both.
      captions: of a captioned set, whose label is the row of the image's caption here.
      class_names: of the labels, where they have names.
      parts: of pictures of several shapes, a source of each shape; batches then are of one of them (`data.buckets`),
        and `read` is not to be called.
    """

    name: str
    split: str
    num_examples: int
    image_shape: tuple[int, int, int]
    num_classes: int | None
    read: Callable[[np.ndarray], dict[str, np.ndarray]]
    fingerprint: str
    captions: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    parts: "tuple[Source, ...]" = ()


def facts_of(source: Source) -> dict[str, Any]:
    """Returns which data a source is, plain JSON, as a run stores it."""
    named = {"class_names": list(source.class_names)} if source.class_names else {}
    facts = {"name": source.name, "split": source.split, "num_examples": source.num_examples}
    return {**facts, "fingerprint": source.fingerprint, **named}


def check_apart(held_out: Source, train: str) -> None:
    """Raises ValueError where held-out images are those of training, whose fingerprint is `train`."""
    if held_out.fingerprint == train:
        raise ValueError(
            f"the held-out images ({held_out.name} {held_out.split}, {held_out.num_examples}) are the training images "
            f"themselves ({train[:20]}...): name others, that training never sees"
        )


def each_part(source: Source, change: Callable[[Source], Source]) -> Source:
    """Returns `change(source)`, or, of pictures of several shapes, the source of changed parts."""
    if not source.parts:
        return change(source)
    return source._replace(parts=tuple(map(change, source.parts)))


def array_source(
    image: np.ndarray,
    label: np.ndarray | None,
    name: str,
    split: str,
    num_classes: int | None,
    fingerprint: str | None = None,
) -> Source:
    """Returns a source over arrays in memory.

    Args:
      image: uint8[N, H, W, C] with C = 1, 3 or 4.
      label: integers [N], or None.
      name: of the source.
      split: of the source.
      num_classes: of the labels, or None.
      fingerprint: where it is known. None computes it, which reads all pixels.

    Raises:
      ValueError: naming the first bad example, if the images are not uint8 (NaN is reported as such) or of another
        shape, or if the labels do not fit the images or `num_classes`.
    """
    what = f"{name} ({split}): images"
    check_uint8_images(image, what)
    if label is None:
        label, num_classes = np.zeros(len(image), np.int32), None
    if label.shape != (len(image),) or not np.issubdtype(label.dtype, np.integer):
        raise ValueError(
            f"{what} are {len(image)} but labels {label.dtype}{list(label.shape)}: one whole number for each"
        )
    outside = (label < 0) | (label >= (np.iinfo(np.int32).max if num_classes is None else num_classes))
    if outside.any():
        first = int(outside.argmax())
        raise ValueError(f"{name} ({split}): label {label[first]} of example {first} is not in 0..{num_classes} - 1")
    image, label = np.ascontiguousarray(image), label.astype(np.int32)
    if fingerprint is None:
        digest = hashlib.sha256(repr((image.shape, num_classes)).encode())
        digest.update(image.data)
        digest.update(label.astype("<i4").tobytes())
        fingerprint = f"sha256:{digest.hexdigest()}"

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"image": image[indices], "label": label[indices]}

    height, width, channels = image.shape[1:]
    return Source(name, split, len(image), (height, width, channels), num_classes, read, fingerprint)


def digits(split: str) -> Source:
    """Returns a split of the 1,797 handwritten digits in scikit-learn (8x8x1, 16 grey levels), without a download.

    "test" is a fixed hold-out of 500, 50 of every class; "train" is the other 1,297.

    Source: Alpaydin and Kaynak, Optical recognition of handwritten digits, UCI Machine Learning Repository, 1998.

    Raises:
      ValueError: if `split` is neither.
    """
    need("digits")
    from sklearn.datasets import load_digits  # takes a second

    data: Any = load_digits()
    image, label = np.round(data["images"] * (255 / 16)).astype(np.uint8)[..., None], data["target"].astype(np.int32)
    order = np.random.RandomState(0).permutation(len(label))
    test = np.sort(np.concatenate([order[label[order] == digit][:50] for digit in range(10)]))
    if split not in ("train", "test"):
        raise ValueError(f"digits has the splits 'train' and 'test', not '{split}'")
    indices = test if split == "test" else np.setdiff1d(order, test)
    return array_source(image[indices], label[indices], "digits", split, 10)
