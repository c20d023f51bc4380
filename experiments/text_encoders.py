"""From prompts to what a network is given of them. One interface: learned words, or the text tower of a CLIP."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from diffusion.data import text
from diffusion.networks.words import PADDING, Words
from diffusion.training.checkpoints import open_existing
from experiments import image_text
from experiments.command_line import Config, from_plain


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


def make_text_encoder(config: Config, vocabulary: Sequence[str], stored: Mapping[str, Any] | None) -> TextEncoder:
    """Returns the encoder that `config.text.encoder` names.

    Args:
      config: of the run.
      vocabulary: all words that captions can hold, for "words".
      stored: `description` of the encoder in the run's checkpoint; None where it starts.

    Raises:
      ValueError: an unknown name, or no folder of a CLIP.
    """
    match config.text.encoder:
        case "words":
            return make_words(vocabulary, config.text.width, config.text.length)
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
        description={},
    )


def word_ids(prompts: Sequence[str], vocabulary: Sequence[str], length: int) -> Int[np.ndarray, "N L"]:
    """The words' places in the vocabulary plus 2, whatever their case; 1 is an unknown word, 0 fills up to `length`.

    Warns of unknown words, and of prompts that are longer, which are cut.
    """
    known = {word: index for index, word in enumerate(vocabulary, 2)}
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    ids = np.full((len(distinct), length), PADDING, np.int32)
    for prompt, row in zip(distinct, ids, strict=True):
        words = re.findall(r"\w+", prompt.lower())
        if unknown := [word for word in words if word not in known]:
            logging.warning("unknown to the text encoder in %r: %s", prompt, ", ".join(unknown))
        if len(words) > length:
            last = words[length - 1]
            logging.warning("%r is longer than %d words: what follows %r is left out", prompt, length, last)
        found = [known.get(word, 1) for word in words[:length]]
        row[: len(found)] = found
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
