"""CLIP as a judge: its embeddings of pictures and prompts, CLIP score, features for CLIP-FID, zero-shot classes."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int
from tokenizers import Tokenizer

from diffusion.data import text
from diffusion.data.images import check_uint8_images
from diffusion.evaluation.features import Extracted, Extractor, network_extractor
from diffusion.networks.clip import CLIP
from diffusion.pretrained.clip import load_clip, load_normalisation

# What OpenAI's and OpenCLIP's weights were trained on: (x / 255 - mean) / std, by channel.
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


class Encoder(NamedTuple):
    """A trained CLIP: `image` is uint8[N, H, W, 3] -> float32[N, E], `text` is N prompts -> float32[N, E].

    Neither is of length 1 yet. `scale` is what cosines are multiplied by before a softmax; `name` says which weights.
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
    """The encoder of these weights; images of another size are resized and cropped as `fit` does.

    Raises:
      ValueError: if the tokenizer does not belong to the weights.
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
        return _in_batches(lambda part: read(params, part), ids, batch_size)

    return Encoder(
        image=lambda pixels: extractor.extract(fit(pixels, clip.image.image_size)).features,
        text=prompts,
        scale=float(np.exp(params["params"]["logit_scale"])),
        name=extractor.name,
    )


def load_encoder(folder: str | os.PathLike) -> Encoder:
    """The encoder of a published CLIP's folder, with its own tokenizer and normalisation.

    Raises:
      ValueError: the folder is not whole, or its parts do not belong together.
    """
    clip, params = load_clip(folder)
    mean, std = load_normalisation(folder) or (OPENAI_MEAN, OPENAI_STD)
    return make_encoder(clip, params, text.read_tokenizer(folder), mean, std)


def fit(image: np.ndarray, size: int) -> np.ndarray:
    """uint8[N, H, W, 3] resized (bicubic) until the shorter side is `size`, its middle [N, size, size, 3]."""
    check_uint8_images(image)
    if image.shape[-1] != 3:
        raise ValueError(f"CLIP sees colour images, not {image.shape[-1]} channels: repeat grey ones three times")
    height, width = image.shape[1:3]
    if (height, width) == (size, size):
        return image
    from PIL import Image

    shorter = min(height, width)
    shape = (round(width * size / shorter), round(height * size / shorter))
    left, top = (shape[0] - size) // 2, (shape[1] - size) // 2
    resized = [np.asarray(Image.fromarray(one).resize(shape, Image.Resampling.BICUBIC)) for one in image]
    return np.stack(resized)[:, top : top + size, left : left + size]


def clip_extractor(encoder: Encoder) -> Extractor:
    """Image embeddings, not normalised: with those of ViT-B/32 the Fréchet distance is CLIP-FID (Kynkäänniemi 2023)."""
    return Extractor(encoder.name, lambda image: Extracted(encoder.image(image)), costly=True)


def clip_score(encoder: Encoder, image: np.ndarray, prompts: Sequence[str]) -> Float[np.ndarray, "N"]:
    """100 max(0, cosine) of each image and its own prompt (Hessel et al. 2021 multiply by 2.5 instead).

    Raises:
      ValueError: if there is not one prompt for each image.
    """
    if len(image) != len(prompts):
        raise ValueError(f"{len(image)} images and {len(prompts)} prompts: one for each is needed")
    cosine = np.sum(normalised(encoder.image(image)) * normalised(encoder.text(prompts)), axis=-1)
    return 100 * np.maximum(cosine, 0)


def zero_shot(encoder: Encoder, image: np.ndarray, prompts: Sequence[Sequence[str]]) -> Int[np.ndarray, "N"]:
    """The class of each image: the nearest mean direction of `prompts[c]`, all that may be said of class c.

    Radford et al. 2021, section 3.1.4: prompts of a class are averaged as embeddings of length 1.
    """
    classes = [normalised(normalised(encoder.text(said)).mean(axis=0)) for said in prompts]
    return np.argmax(normalised(encoder.image(image)) @ np.stack(classes).T, axis=1)


def recall(similarity: Float[np.ndarray, "N N"], k: int) -> float:
    """The share of rows whose own column (the same number) is among their k highest; ties count against it."""
    own = np.diag(similarity)[:, None]
    return float(np.mean(np.sum(similarity >= own, axis=1) <= k))


def normalised(x: np.ndarray) -> np.ndarray:
    """x / |x| over the last axis."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _in_batches(function: Callable[[Any], Any], x: np.ndarray, batch_size: int) -> np.ndarray:
    """Of one shape, so that one program is compiled: the last is filled up with its last row, and cut."""
    parts = []
    for start in range(0, len(x), batch_size):
        part = x[start : start + batch_size]
        full = part if len(x) <= batch_size else np.concatenate([part, np.repeat(part[-1:], batch_size - len(part), 0)])
        parts.append(np.asarray(function(jnp.asarray(full)), np.float32)[: len(part)])
    return np.concatenate(parts)
