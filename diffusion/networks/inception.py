"""The Inception-v3 by which FID, KID and IS are measured: the TensorFlow graph `inception-2015-12-05`."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

Resize = Literal["pytorch", "tensorflow"]

# A block: for each branch its layers, and how the block pools. A layer: channels and the kernel; with two kernels both
# look at the same input and their outputs are joined. Names are those of torchvision's module.
_1, _3, _5, _WIDE, _TALL = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def _block_a(pooled: int):
    double = [(64, _1), (96, _3), (96, _3)]
    branches = {"branch1x1": [(64, _1)], "branch5x5": [(48, _1), (64, _5)], "branch3x3dbl": double}
    return branches | {"branch_pool": [(pooled, _1)]}, "average"


def _block_c(width: int):
    single = [(width, _1), (width, _WIDE), (192, _TALL)]
    double = [(width, _1), (width, _TALL), (width, _WIDE), (width, _TALL), (192, _WIDE)]
    branches = {"branch1x1": [(192, _1)], "branch7x7": single, "branch7x7dbl": double}
    return branches | {"branch_pool": [(192, _1)]}, "average"


def _block_e(pool: str):
    fork = (384, (1, 3), (3, 1))
    branches = {"branch1x1": [(320, _1)], "branch3x3": [(384, _1), fork], "branch3x3dbl": [(448, _1), (384, _3), fork]}
    return branches | {"branch_pool": [(192, _1)]}, pool


_BLOCKS: dict[str, tuple[dict[str, list], str]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": ({"branch3x3": [(384, _3)], "branch3x3dbl": [(64, _1), (96, _3), (96, _3)]}, "halve"),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": (
        {"branch3x3": [(192, _1), (320, _3)], "branch7x7x3": [(192, _1), (192, _WIDE), (192, _TALL), (192, _3)]},
        "halve",
    ),
    "Mixed_7b": _block_e("average"),
    # Not the paper's average pool: an accident of this graph, without which no published FID is met.
    "Mixed_7c": _block_e("max"),
}


class Inception(nn.Module):
    """Images -> the 2048 features before the last layer (pool3), and its 1008 logits.

    Batch normalisation stands in its inference form, folded into kernel and bias (`pretrained.inception.from_torch`).
    The two public protocols differ in how an image becomes the network's 299x299 pixels:

    - `resize="pytorch"`, pytorch-fid's: bilinear between pixel centres, then x / 127.5 - 1;
    - `resize="tensorflow"`, torch-fidelity's and the graph's own: bilinear between the pixels' upper left corners, as
      TensorFlow 1 had it, then (x - 128) / 128.

    Neither smooths before it makes an image smaller. All arithmetic is float32 at `precision`: the default keeps
    accelerators from rounding the factors, so that a score does not depend on the device.

    Source: Szegedy et al. 2015, Rethinking the Inception Architecture; in the form of pytorch-fid's FIDInceptionV3.
    The Inception Score of Salimans et al. 2016 leaves the bias out: logits - params["fc"]["bias"].
    """

    resize: Resize = "pytorch"
    precision: Any = jax.lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, image: Num[Array, "B H W 3"]) -> tuple[Float[Array, "B 2048"], Float[Array, "B 1008"]]:
        """`image` has values in 0..255, whole numbers or not."""

        def conv(x, name: str, channels: int, kernel=_3, stride=1, padding="SAME"):
            return nn.relu(nn.Conv(channels, kernel, stride, padding, precision=self.precision, name=name)(x))

        def branch(x, name: str, layers: list, halve: bool):
            for i, (channels, *kernels) in enumerate(layers, 1):
                number = f"_{i}" if len(layers) > 1 else ""
                how = (2, "VALID") if halve and i == len(layers) else (1, "SAME")
                letters = "ab" if len(kernels) > 1 else [""]
                outputs = [
                    conv(x, name + number + letter, channels, kernel, *how)
                    for letter, kernel in zip(letters, kernels, strict=True)
                ]
                x = jnp.concatenate(outputs, axis=-1)
            return x

        pixels = resize_bilinear(image.astype(jnp.float32), (299, 299), self.resize)
        x = pixels / 127.5 - 1.0 if self.resize == "pytorch" else (pixels - 128.0) / 128.0
        x = conv(x, "Conv2d_1a_3x3", 32, stride=2, padding="VALID")
        x = conv(x, "Conv2d_2a_3x3", 32, padding="VALID")
        x = conv(x, "Conv2d_2b_3x3", 64)
        x = _POOLS["halve"](x)
        x = conv(x, "Conv2d_3b_1x1", 80, _1)
        x = conv(x, "Conv2d_4a_3x3", 192, padding="VALID")
        x = _POOLS["halve"](x)
        for block, (branches, pool) in _BLOCKS.items():
            pooled = _POOLS[pool](x)
            outputs = [
                branch(pooled if name == "branch_pool" else x, f"{block}.{name}", layers, halve=pool == "halve")
                for name, layers in branches.items()
            ]
            x = jnp.concatenate([*outputs, pooled] if pool == "halve" else outputs, axis=-1)
        pool3 = x.mean(axis=(1, 2))
        return pool3, nn.Dense(1008, precision=self.precision, name="fc")(pool3)


_POOLS = {
    "average": lambda x: nn.avg_pool(x, _3, padding="SAME", count_include_pad=False),
    "max": lambda x: nn.max_pool(x, _3, padding="SAME"),
    "halve": lambda x: nn.max_pool(x, _3, strides=(2, 2)),
}


def resize_bilinear(
    image: Float[Array, "B H W C"], size: tuple[int, int], kind: Resize = "pytorch"
) -> Float[Array, "B h w C"]:
    """Bilinear, without smoothing; "pytorch" measures places from pixel centres, "tensorflow" from upper left corners.

    Source: torch's `interpolate(mode="bilinear", align_corners=False)`; TensorFlow 1's `ResizeBilinear`.
    Raises ValueError if `kind` is neither.
    """
    if kind not in ("pytorch", "tensorflow"):
        raise ValueError(f"resize is 'pytorch' or 'tensorflow', not '{kind}'")
    centre = np.float32(0.5 if kind == "pytorch" else 0.0)
    for axis, length in zip((1, 2), size, strict=True):
        scale = np.float32(image.shape[axis] / length)
        place = np.maximum((np.arange(length, dtype=np.float32) + centre) * scale - centre, 0)
        low = place.astype(np.int32)
        high = np.minimum(low + 1, image.shape[axis] - 1)
        share = np.expand_dims(place - low, tuple({0, 1, 2, 3} - {axis}))
        start = jnp.take(image, low, axis)
        image = start + (jnp.take(image, high, axis) - start) * share
    return image
