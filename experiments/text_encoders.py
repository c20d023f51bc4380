"""From prompts to what a network is given of them. One interface: learned words, or the text tower of a CLIP."""

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from diffusion.data import text
from diffusion.data.captions import CaptionedSource
from diffusion.data.sources import Source
from diffusion.files import cache_folder, replacing
from diffusion.networks.words import PADDING, Words
from diffusion.training.checkpoints import open_existing
from experiments import image_text
from experiments.command_line import Config, from_plain

MAX_WARNINGS = 5  # of one call: whole data sets are read


class Text(NamedTuple):
    """What a network is given of prompts: features of their tokens, and of the whole."""

    context: Float[Array, "B L D"]
    pooled: Float[Array, "B P"]


class TextEncoder(NamedTuple):
    """From prompts to `Text`.

    Attributes:
      tokenize: prompts -> int32[N, L]; warns of what it leaves out. The empty prompt is "no condition".
      init: key -> params.
      encode: (params, ids int32[B, L]) -> `Text`.
      context_width, pooled_width: D and P.
      frozen: whether the parameters stay as `init` made them.
      description: all that makes it again but its parameters, plain JSON, for the checkpoint.
    """

    tokenize: Callable[[Sequence[str]], np.ndarray]
    init: Callable[[jax.Array], Any]
    encode: Callable[[Any, Int[Array, "B L"]], Text]
    context_width: int
    pooled_width: int
    frozen: bool
    description: dict[str, Any]


def encode(encoder: TextEncoder, params: Any, ids: Any) -> Text:
    """The text of token ids [B, L], from params["text"]; no gradient reaches a frozen encoder."""
    of_text = jax.lax.stop_gradient(params["text"]) if encoder.frozen else params["text"]
    return encoder.encode(of_text, jnp.asarray(ids))


def with_features(captioned: CaptionedSource, encoder: TextEncoder, of_text: Any, batch_size: int = 256) -> Source:
    """The same images, read with "context" and "pooled": what a frozen encoder of these weights makes of the captions.

    Computed once and kept in `cache_folder()/text`, under what the captions, the encoder and its weights are.
    """
    captions = captioned.captions
    digest = hashlib.sha256(json.dumps([captions, encoder.description]).encode())
    for leaf in jax.tree.leaves(of_text):
        digest.update(np.ascontiguousarray(leaf).tobytes())
    paths = [cache_folder() / "text" / f"{digest.hexdigest()[:32]}_{name}.npy" for name in Text._fields]
    if not all(path.exists() for path in paths):
        apply = jax.jit(encoder.encode)
        parts: list[Text] = []
        for first in tqdm(range(0, len(captions), batch_size), desc="encoding captions", unit="batch", delay=5):
            # The last batch is full too, and cut afterwards: one program is compiled for all.
            rows = np.minimum(np.arange(first, first + batch_size), len(captions) - 1)
            parts.append(jax.device_get(apply(of_text, encoder.tokenize([captions[row] for row in rows]))))
        for path, arrays in zip(paths, zip(*parts, strict=True), strict=True):
            with replacing(path) as temporary:
                np.save(temporary, np.concatenate(arrays)[: len(captions)])
    # Mapped, not read: features of many captions are larger than memory.
    context, pooled = (np.load(path, mmap_mode="r") for path in paths)
    source = captioned.source

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = source.read(indices)
        return {**batch, "context": context[batch["label"]], "pooled": pooled[batch["label"]]}

    return source._replace(read=read)


def make_text_encoder(config: Config, vocabulary: Sequence[str], stored: Mapping[str, Any] | None) -> TextEncoder:
    """Returns the encoder that `config.text.encoder` names.

    Args:
      config: of the run.
      vocabulary: all words that are to be known, for "words" in a run that starts.
      stored: `description` of the encoder in the run's checkpoint; None where it starts.

    Raises:
      ValueError: an unknown name, or no folder of a CLIP.
    """
    match config.text.encoder:
        case "words":
            known = stored["vocabulary"] if stored else vocabulary
            return make_words(known, config.text.width, config.text.length)
        case "clip":
            return make_clip_text(config, stored)
        case name:
            raise ValueError(f"text.encoder is {name!r}: choose words or clip")


def make_words(vocabulary: Sequence[str], width: int, length: int) -> TextEncoder:
    """Returns word embeddings that are learned with the network."""
    module = Words(len(vocabulary) + 2, width)

    def apply(params: Any, ids: jax.Array) -> Text:
        output: Any = module.apply(params, ids)
        return Text(*output)

    return TextEncoder(
        tokenize=partial(word_ids, vocabulary=vocabulary, length=length),
        init=lambda key: module.init(key, jnp.zeros((1, length), jnp.int32)),
        encode=apply,
        context_width=width,
        pooled_width=width,
        frozen=False,
        description={"vocabulary": list(vocabulary)},
    )


def frequent_words(captions: Iterable[str], size: int) -> list[str]:
    """Returns the `size` words that stand in most captions, in the order of the alphabet."""
    counted = Counter(word for caption in captions for word in set(split_words(caption)))
    return sorted(sorted(counted, key=lambda word: (-counted[word], word))[:size])


def split_words(prompt: str) -> list[str]:
    """Returns the words of a prompt, in small letters."""
    return re.findall(r"\w+", prompt.lower())


def word_ids(prompts: Sequence[str], vocabulary: Sequence[str], length: int) -> Int[np.ndarray, "N L"]:
    """The words' places in the vocabulary plus 2, whatever their case; 1 is an unknown word, 0 fills up to `length`.

    Warns of unknown words, and of prompts that are longer, which are cut; of a data set's, only of the first few.
    """
    known = {word: index for index, word in enumerate(vocabulary, 2)}
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    ids = np.full((len(distinct), length), PADDING, np.int32)
    not_read = []
    for prompt, row in zip(distinct, ids, strict=True):
        words = split_words(prompt)
        if unknown := [word for word in words if word not in known]:
            not_read.append(f"unknown to the text encoder in {prompt!r}: {', '.join(unknown)}")
        if len(words) > length:
            not_read.append(f"{prompt!r} is longer than {length} words: what follows {words[length - 1]!r} is left out")
        found = [known.get(word, 1) for word in words[:length]]
        row[: len(found)] = found
    for line in not_read[:MAX_WARNINGS]:
        logging.warning(line)
    if more := not_read[MAX_WARNINGS:]:
        logging.warning("and %d more like these, in %d different prompts", len(more), len(distinct))
    return ids[[distinct[prompt] for prompt in prompts]]


def make_clip_text(config: Config, stored: Mapping[str, Any] | None) -> TextEncoder:
    """Returns the frozen text tower of the CLIP in the work folder config.text.clip, or of the checkpoint's.

    As Stable Diffusion 3 does, it gives the last hidden states but one, and the embedding of the whole.
    """
    trained = None
    if stored is None:
        if not config.text.clip:
            raise ValueError("text.encoder=clip reads a trained CLIP: name its work folder by --config.text.clip=DIR")
        trained = image_text.load(Path(config.text.clip))
        with open_existing(Path(config.text.clip)) as checkpoints:
            stored = {name: checkpoints.description()[name] for name in ("config", "vocabulary")}
    clip_config = from_plain(stored["config"])
    tokenizer = text.from_json(stored["vocabulary"])
    tower = image_text.make_clip(clip_config, tokenizer).text
    length = clip_config.text.length

    def init(key: jax.Array) -> Any:
        if trained is None:  # a checkpoint's: only shapes are asked for
            return tower.init(key, jnp.zeros((1, length), jnp.int32))
        return {"params": trained.params["params"]["text"]}

    def apply(params: Any, ids: jax.Array) -> Text:
        features: Any = tower.apply(params, ids)
        return Text(features.hidden[-2], features.embedding)

    return TextEncoder(
        tokenize=lambda prompts: text.encode(tokenizer, prompts, length),
        init=init,
        encode=apply,
        context_width=tower.width,
        pooled_width=tower.projection or tower.width,
        frozen=True,
        description=dict(stored),
    )
