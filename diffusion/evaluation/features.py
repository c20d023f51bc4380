"""Features that images are compared by: an `Extractor` is any function from uint8[N, H, W, C] to features [N, D].

The pixels themselves, FID's Inception, or a Flax module of your own (`network_extractor`).
"""

import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Float64, Int
from tqdm import tqdm

from diffusion.data.batches import full_batches
from diffusion.data.images import check_uint8_images
from diffusion.extras import need
from diffusion.networks.inception import Inception
from diffusion.pretrained.inception import load_inception
from diffusion.training import digest

DIGITS = len("sha256:") + 16  # of the digest of weights, in the name of an extractor


LARGEST_PIXELS = 2**14  # numbers per image, whose covariance takes 2 GiB
REDUCED_PIXELS = 2**12  # to which larger images are reduced; theirs takes 128 MiB


class Extracted(NamedTuple):
    """Features of N images.

    Attributes:
      features: of each image.
      probability: p(y | x) of each, where the extractor is a classifier.
    """

    features: Float[np.ndarray, "N D"]
    probability: Float[np.ndarray, "N K"] | None = None


class Extractor(NamedTuple):
    """A way to make features of images.

    Attributes:
      name: for reports, and the key under which features are cached: it has to identify the weights, if there are any.
      extract: uint8[N, H, W, C] -> Extracted. A row depends on its image alone.
      costly: whether features are worth caching on disk.
      classifies: whether it returns probabilities.
    """

    name: str
    extract: Callable[[np.ndarray], Extracted]
    costly: bool = False
    classifies: bool = False


def pixel_features(image: np.ndarray) -> Float64[np.ndarray, "N D"]:
    """Returns the pixels scaled to [-1, 1], D = H * W * C: features of images so small that they need no network.

    Of images of more than `LARGEST_PIXELS` numbers it is the means of square blocks, the smallest that leave at most
    `REDUCED_PIXELS`; rows and columns after the last whole block are left out.
    """
    check_uint8_images(image)
    count, height, width, channels = image.shape
    side, most = 1, LARGEST_PIXELS if height * width * channels <= LARGEST_PIXELS else REDUCED_PIXELS
    while (height // side) * (width // side) * channels > most:
        side += 1
    rows, columns = height // side, width // side
    if not rows * columns:
        raise ValueError(f"features=pixels: images of {height}x{width} are too narrow, use inception")
    blocks = image[:, : rows * side, : columns * side].reshape(count, rows, side, columns, side, channels)
    return blocks.mean((2, 4)).reshape(count, -1) / 127.5 - 1.0


PIXELS = Extractor("pixels in [-1, 1], large images as means of blocks", lambda image: Extracted(pixel_features(image)))


def network_extractor(
    name: str,
    apply: Callable[[Any, jax.Array], Any],
    params: Any,
    batch_size: int = 64,
    classifies: bool = False,
    devices: Sequence[Any] | None = None,
) -> Extractor:
    """Returns the extractor of a network. Its name ends in the digest of the weights.

    Args:
      name: of the network.
      apply: (params, uint8[B, H, W, C]) -> features [B, D]; of a classifier (features, logits [B, K]).
      params: of the network.
      batch_size: images per call, rounded up to a multiple of the devices. The features do not depend on it beyond
        rounding.
      classifies: whether `apply` returns logits.
      devices: over which a batch is spread; None: those of this process.

    Raises:
      ValueError: by `extract`, if features are not finite.
    """
    mesh = Mesh(np.array(jax.local_devices() if devices is None else devices), ("data",))
    rows_of = NamedSharding(mesh, PartitionSpec("data"))
    placed = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    batch_size = -(-batch_size // mesh.size) * mesh.size
    name = f"{name}, weights {digest(params)[:DIGITS]}"

    @jax.jit
    def forward(params: Any, image: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        output = apply(params, image)
        features, logits = output if classifies else (output, None)
        return features, None if logits is None else jax.nn.softmax(logits)

    def extract(image: np.ndarray) -> Extracted:
        check_uint8_images(image)
        features, probability = [], []
        batches = list(full_batches(len(image), batch_size))
        for rows in tqdm(batches, desc="features", unit="batch", file=sys.stderr, delay=5):
            found, shares = forward(placed, jax.device_put(image[rows], rows_of))
            features.append(np.asarray(found, np.float32))
            probability += [] if shares is None else [np.asarray(shares, np.float32)]
        count = len(image)
        found = np.concatenate(features)[:count]
        check_finite_rows(found, f"features by {name}")
        return Extracted(found, np.concatenate(probability)[:count] if probability else None)

    return Extractor(name, extract, True, classifies)


def check_finite_rows(rows: np.ndarray, what: str) -> None:
    """Raises ValueError, with the number of the first bad row, unless all of `rows` [N, D] are finite."""
    finite = np.isfinite(rows).all(axis=-1)
    if not finite.all():
        raise ValueError(
            f"{np.sum(~finite)} of {len(rows)} {what} are not finite (NaN or infinity), the first is number "
            f"{int(finite.argmin())}: use another copy of the weights"
        )


def inception_extractor(path: str | os.PathLike | None = None, batch_size: int = 64) -> Extractor:
    """Returns FID's Inception: 2048 features of pool3, and the probabilities of its classes.

    - The probabilities are of the logits without their bias, as in the released code of the inception score.
    - Grey images are repeated to three equal channels.

    Args:
      path: of the published file; None: in the cache, fetched once.
      batch_size: images per call.

    Raises:
      ValueError: the weights are not at `path` and cannot be fetched, or are not the published ones; by `extract`,
        images of 4 channels.
    """
    network = Inception()

    def apply(params: Any, image: jax.Array) -> Any:
        channels = image.shape[-1]
        if channels not in (1, 3):
            raise ValueError(f"Inception reads grey or RGB images, not {channels} channels: composite transparent ones")
        pool3, logits = network.apply({"params": params}, image.repeat(3, axis=-1) if channels == 1 else image)
        return pool3, logits - params["fc"]["bias"]

    return network_extractor("Inception 2015-12-05, pool3", apply, load_inception(path), batch_size, classifies=True)


def fit_classifier(image: np.ndarray, label: Int[np.ndarray, "N"]) -> Callable[[np.ndarray], Int[np.ndarray, "M"]]:
    """Returns a support vector machine trained on pixels, a function uint8[M, H, W, C] -> labels [M].

    For small sets: on the digits it trains in 0.1 s and reads 99.2% of the held-out ones. Nothing in it is random.

    Args:
      image: uint8[N, H, W, C].
      label: of each image.

    Raises:
      ValueError: there is not one label for each image.
    """
    need("digits")
    from sklearn.svm import SVC  # takes a second

    if label.shape != (len(image),):
        raise ValueError(f"{len(image)} images and {len(label)} labels: one label for each is needed")
    machine = SVC(C=10.0).fit(pixel_features(image), label)
    return lambda image: machine.predict(pixel_features(image)).astype(label.dtype)


def class_shares(label: Int[np.ndarray, "N"], num_classes: int) -> Float64[np.ndarray, "num_classes"]:
    """Returns the share of each class among the labels."""
    return np.bincount(label, minlength=num_classes) / len(label)
