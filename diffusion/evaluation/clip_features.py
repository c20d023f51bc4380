"""CLIP as a judge: embeddings of images and prompts, the CLIP score, features for CLIP-FID, zero-shot classes."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tokenizers import Tokenizer

from diffusion.data import text
from diffusion.data.batches import full_batches
from diffusion.data.images import check_uint8_images
from diffusion.data.pictures import Size, height_width
from diffusion.evaluation.features import Extracted, Extractor, check_finite_rows, network_extractor
from diffusion.networks.clip import CLIP
from diffusion.pretrained.clip import load_clip, load_normalisation

# What OpenAI's and OpenCLIP's weights were trained on: (x / 255 - mean) / std, by channel.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class Encoder(NamedTuple):
    """A trained CLIP, from images and prompts to embeddings, which are not normalised.

    Attributes:
      image: uint8[N, H, W, 3] -> float32[N, E].
      text: N prompts -> float32[N, E].
      scale: factor on cosines before a softmax.
      name: identifies the weights.
    """

    image: Callable[[np.ndarray], np.ndarray]
    text: Callable[[Sequence[str]], np.ndarray]
    scale: float
    name: str = "CLIP"


def make_encoder(
    clip: CLIP,
    params: Any,
    tokenizer: Tokenizer,
    mean: Sequence[float] = OPENAI_MEAN,
    std: Sequence[float] = OPENAI_STD,
    padding: int | None = None,
    batch_size: int = 64,
) -> Encoder:
    """Returns the encoder of a CLIP. Images of another size are cropped and resized as by `fit`.

    Args:
      clip: both towers.
      params: of `clip`.
      tokenizer: that the weights were trained with.
      mean: of each channel, subtracted from x / 255.
      std: of each channel.
      padding: id after the end of a text (`data.text.encode`).
      batch_size: images, or prompts, per call.

    Raises:
      ValueError: the tokenizer does not belong to the weights; by `image` and `text`, embeddings that are not finite.
    """
    text.check_vocabulary(tokenizer, clip.text.vocabulary_size, clip.text.end_of_text)

    def see(params: Any, pixels: jax.Array) -> jax.Array:
        x = (pixels / np.float32(255) - jnp.asarray(mean)) / jnp.asarray(std)
        features: Any = clip.apply(params, x, method="see")  # pyright: ignore[reportArgumentType]
        return features.embedding

    read: Any = jax.jit(lambda params, x: clip.apply(params, x, method="read").embedding)  # type: ignore[union-attr]
    extractor = network_extractor("CLIP's image embedding", see, params, batch_size)

    def prompts(texts: Sequence[str]) -> np.ndarray:
        ids = text.encode(tokenizer, texts, clip.text.length, padding)
        batches = full_batches(len(ids), min(batch_size, len(ids)))
        found = np.concatenate([np.asarray(read(params, ids[rows]), np.float32) for rows in batches])[: len(ids)]
        check_finite_rows(found, "embeddings of prompts")
        return found

    return Encoder(
        image=lambda pixels: extractor.extract(fit(pixels, clip.image.image_size)).features,
        text=prompts,
        scale=float(np.exp(params["params"]["logit_scale"])),
        name=extractor.name,
    )


def load_encoder(folder: str | os.PathLike) -> Encoder:
    """Returns the encoder of a published CLIP, with the tokenizer and the normalisation in its folder.

    Raises:
      ValueError: files are missing or damaged, or do not belong together.
    """
    folder = Path(folder).expanduser()
    clip, params = load_clip(folder)
    mean, std = load_normalisation(folder) or (OPENAI_MEAN, OPENAI_STD)
    return make_encoder(clip, params, text.read_tokenizer(folder), mean, std)


def fit(image: np.ndarray, size: Size) -> np.ndarray:
    """Returns images uint8[N, H, W, 3] of that size: resized (bicubic) until they just cover it, then cropped.

    Args:
      image: of any size.
      size: the side of a square, where they are resized to the shorter side, or (height, width).

    Raises:
      ValueError: images that are not uint8, or have no 3 channels.
    """
    check_uint8_images(image)
    if image.shape[-1] != 3:
        raise ValueError(f"CLIP reads RGB images, not {image.shape[-1]} channels: repeat grey ones three times")
    height, width = image.shape[1:3]
    rows, columns = height_width(size)
    if (height, width) == (rows, columns):
        return image
    from PIL import Image

    wide = width * rows > columns * height  # for that size: its height is the one to be met
    shape = (round(width * rows / height), rows) if wide else (columns, round(height * columns / width))
    left, top = (shape[0] - columns) // 2, (shape[1] - rows) // 2
    resized = [np.asarray(Image.fromarray(one).resize(shape, Image.Resampling.BICUBIC)) for one in image]
    return np.stack(resized)[:, top : top + rows, left : left + columns]


def clip_extractor(encoder: Encoder) -> Extractor:
    """Returns image embeddings as features, not normalised: with those of ViT-B/32 the Fréchet distance is CLIP-FID.

    Source: Kynkäänniemi et al. 2023, "The role of ImageNet classes in Fréchet Inception Distance".
    """
    return Extractor(encoder.name, lambda image: Extracted(encoder.image(image)), costly=True)


def clip_score(encoder: Encoder, image: np.ndarray, prompts: Sequence[str]) -> Float[np.ndarray, "N"]:
    """Returns 100 max(0, cosine) of each image with its own prompt.

    Args:
      encoder: the judge.
      image: uint8[N, H, W, 3].
      prompts: N of them.

    Source: Hessel et al. 2021, eq. 1, who multiply by 2.5 instead.

    Raises:
      ValueError: there is not one prompt per image, or an embedding is not finite.
    """
    if len(image) != len(prompts):
        raise ValueError(f"{len(image)} images and {len(prompts)} prompts: one prompt per image is needed")
    cosine = np.sum(normalised(encoder.image(image)) * normalised(encoder.text(prompts)), axis=-1)
    return 100 * np.maximum(cosine, 0)


def zero_shot(encoder: Encoder, image: np.ndarray, prompts: Sequence[Sequence[str]]) -> Int[np.ndarray, "N"]:
    """Returns the class of each image: that of the nearest mean direction of prompts.

    Args:
      encoder: the judge.
      image: uint8[N, H, W, 3].
      prompts: of each class, averaged as embeddings of length 1.

    Source: Radford et al. 2021, section 3.1.4.
    """
    classes = [normalised(normalised(encoder.text(own)).mean(axis=0)) for own in prompts]
    return np.argmax(normalised(encoder.image(image)) @ np.stack(classes).T, axis=1)


def recall(similarity: Float[np.ndarray, "N N"], k: int) -> float:
    """Returns the share of rows whose own column (of the same number) is among their k highest.

    Ties count against it.
    """
    own = np.diag(similarity)[:, None]
    return float(np.mean(np.sum(similarity >= own, axis=1) <= k))


def normalised(x: np.ndarray) -> np.ndarray:
    """Returns x / |x| over the last axis.

    Raises:
      ValueError: a vector is zero or not finite, and so has no direction.
    """
    length = np.linalg.norm(x, axis=-1, keepdims=True)
    if not (np.isfinite(length).all() and length.all()):
        raise ValueError("an embedding is zero, NaN or infinite and has no direction: use another copy of the weights")
    return x / length
