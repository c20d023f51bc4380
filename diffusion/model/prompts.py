"""Prompts as a condition: a text encoder, learned words or the text tower of a CLIP, read by the network."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from diffusion.data import text
from diffusion.data.batches import full_batches
from diffusion.data.sources import Source
from diffusion.data.words import FIRST, UNKNOWN, word_ids
from diffusion.files import cache_folder, replacing
from diffusion.model import clip
from diffusion.model.condition import Condition, Facts, Told
from diffusion.model.config import from_plain
from diffusion.networks.clip import RULES
from diffusion.networks.words import Words
from diffusion.training import Rules, digest
from diffusion.training.checkpoints import open_existing


class Text(NamedTuple):
    """What a network is told of prompts: features of their tokens, and of the whole."""

    context: Float[Array, "B L D"]
    pooled: Float[Array, "B P"]


class TextEncoder(NamedTuple):
    """From prompts to `Text`.

    Attributes:
      tokenize: prompts -> int32[N, L]; warns of what it leaves out. The empty prompt is "no condition".
      init: key -> params.
      encode: (params, ids int32[B, L]) -> `Text`.
      context_width, pooled_width: D and P.
      frozen: whether the parameters keep the values of `init`.
      description: all that makes it again but its parameters, plain JSON, for the checkpoint.
      rules: how a mesh cuts its parameters.
      unknown: of an encoder of words, the id of one that is not known.
      phrases: the ids of phrases that are read as one word.
    """

    tokenize: Callable[[Sequence[str]], np.ndarray]
    init: Callable[[jax.Array], Any]
    encode: Callable[[Any, Int[Array, "B L"]], Text]
    context_width: int
    pooled_width: int
    frozen: bool
    description: dict[str, Any]
    rules: Rules = ()
    unknown: int = 0
    phrases: tuple[int, ...] = ()


def words(
    facts: Facts,
    *,
    width: int = 96,
    length: int = 12,
    size: int = 0,
    phrases: int = 0,
    dropout: float = 0.1,
    word_dropout: float = 0.0,
    phrase_dropout: float = 0.0,
) -> Condition:
    """Returns the condition of prompts read by word embeddings that are learned with the network.

    Args:
      facts: the vocabulary, or the checkpoint's.
      width: of an embedding.
      length: words that are read of a prompt.
      size: of the vocabulary, the most frequent words; 0: all. Applied to `facts.vocabulary` where a run starts.
      phrases: that are read as one word each, the most frequent pairs of neighbours; applied there too.
      dropout: share of the training captions that are hidden.
      word_dropout: share of the words of the others that are, each, read as unknown.
      phrase_dropout: share of their phrases that are, each, read as unknown. So the network learns what a caption
        without them leaves open, and guidance leads away from that: of "man, dark skin" from a man of any tone of skin.

    Source: of phrase_dropout, Brooks et al. 2023 (InstructPix2Pix), section 3.2.1: two conditions, of which each is
      hidden alone; eq. 3 with s_I = 1.
    """
    del size, phrases  # the vocabulary was made with them
    encoder = make_words(facts.stored.get("vocabulary", facts.vocabulary), width, length)
    return prompts(encoder, dropout, word_dropout, phrase_dropout)


def clip_text(facts: Facts, *, folder: str = "", precomputed: bool = False, dropout: float = 0.1) -> Condition:
    """Returns the condition of prompts read by the frozen text tower of a trained CLIP.

    Args:
      facts: the tower's description where a checkpoint has it.
      folder: work folder of experiments.clip, from which a run that starts takes the tower.
      precomputed: features of all captions are made once, before training.
      dropout: share of the training captions that are hidden.
    """
    del precomputed  # read by the data's side
    return prompts(make_clip_text(folder, facts.stored or None), dropout)


def prompts(encoder: TextEncoder, dropout: float, word_dropout: float = 0.0, phrase_dropout: float = 0.0) -> Condition:
    """Returns the condition of prompts.

    Training reads "text", token ids int32[B, L], or the features "context" and "pooled" of `with_features`.

    Args:
      encoder: reads them; its parameters are params["text"].
      dropout: share of the training captions that are replaced by the empty one.
      word_dropout: share of the words of "text" that are, each, replaced by the unknown one; of an encoder of words.
      phrase_dropout: the same of its phrases; guidance then leads away from the prompt with all of them unknown.

    Raises:
      ValueError: a share is outside [0, 1], or the encoder has no unknown word, or no phrases.
    """
    shares = {"dropout": dropout, "word_dropout": word_dropout, "phrase_dropout": phrase_dropout}
    for name, share in shares.items():
        if not 0 <= share <= 1:
            raise ValueError(f"condition.{name} is {share}: it has to lie in [0, 1]")
    if phrase_dropout and not encoder.phrases:
        raise ValueError(
            f"condition.phrase_dropout={phrase_dropout} hides phrases, and the words have none: set condition.phrases"
        )
    (empty,) = encoder.tokenize([""])

    def read(requests: Sequence[str | None]) -> np.ndarray:
        return encoder.tokenize(["" if prompt is None else prompt for prompt in requests])

    def of_request(params: Any, ids: Any) -> Told:
        return encoder.encode(params, jnp.asarray(ids))._asdict()

    def hide(batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        drop_key = jax.random.split(key, 4)[2]  # dropout's too, which Flax folds by module
        return jax.random.bernoulli(drop_key, dropout, (len(batch["label"]), 1))[:, 0]

    def known(batch: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        """Returns the ids of "text", some words unknown, and some captions empty."""
        ids, drop_key = batch["text"], jax.random.split(key, 4)[2]
        for number, (share, which) in enumerate(((word_dropout, ids != empty), (phrase_dropout, is_phrase(ids))), 1):
            if share:
                drawn = jax.random.bernoulli(jax.random.fold_in(drop_key, number), share, ids.shape)
                ids = jnp.where(drawn & which, encoder.unknown, ids)
        return jnp.where(hide(batch, key)[:, None], empty, ids)

    def is_phrase(ids: Any) -> jax.Array:
        return jnp.isin(ids, jnp.asarray(encoder.phrases, jnp.int32))

    def without_phrases(ids: Any) -> jax.Array:
        return jnp.where(is_phrase(ids), encoder.unknown, ids)

    def of_batch(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Told:
        if "text" in batch:
            return of_request(params, known(batch, key))
        hidden = hide(batch, key)[:, None]
        none = encoder.encode(params, jnp.asarray(empty[None]))
        return {
            "context": jnp.where(hidden[..., None], none.context, batch["context"]),
            "pooled": jnp.where(hidden, none.pooled, batch["pooled"]),
        }

    return Condition(
        kind="prompts",
        read=read,
        of_request=of_request,
        of_batch=of_batch,
        widths={"context_width": encoder.context_width, "pooled_width": encoder.pooled_width},
        init=encoder.init,
        frozen=encoder.frozen,
        description=encoder.description,
        hidden=hide,
        rules=encoder.rules,
        away=without_phrases if phrase_dropout else None,
        rows_of_batch=known,
    )


def with_features(source: Source, condition: Condition, params: Any, batch_size: int = 256) -> Source:
    """Returns the same images, read with "context" and "pooled": features of their captions by a frozen encoder.

    Computed once and kept in `cache_folder()/text`, keyed by captions, encoder and weights.

    Args:
      source: of captioned images.
      condition: of prompts, frozen.
      params: of its encoder.
      batch_size: captions per call of the encoder.

    Raises:
      ValueError: the encoder is learned.
    """
    if not condition.frozen:
        raise ValueError("condition.precomputed=True is for a frozen encoder: set condition.name=clip")
    captions = source.captions
    key = json.dumps([captions, condition.description, digest(params)])
    stem = hashlib.sha256(key.encode()).hexdigest()[:32]
    paths = [cache_folder() / "text" / f"{stem}_{name}.npy" for name in Text._fields]
    if not all(path.exists() for path in paths):
        encode = jax.jit(condition.of_request)
        batches = list(full_batches(len(captions), batch_size))
        found = [
            jax.device_get(encode(params, condition.read([captions[row] for row in rows])))
            for rows in tqdm(batches, desc="encoding captions", unit="batch", delay=5)
        ]
        for path, name in zip(paths, Text._fields, strict=True):
            with replacing(path) as temporary:
                np.save(temporary, np.concatenate([told[name] for told in found])[: len(captions)])
    # Mapped, not read: features of many captions are larger than memory.
    context, pooled = (np.load(path, mmap_mode="r") for path in paths)

    def read(indices: np.ndarray) -> dict[str, np.ndarray]:
        batch = source.read(indices)
        return {**batch, "context": context[batch["label"]], "pooled": pooled[batch["label"]]}

    return source._replace(read=read)


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
        unknown=UNKNOWN,
        phrases=tuple(i for i, word in enumerate(vocabulary, FIRST) if " " in word),
    )


def make_clip_text(folder: str, stored: Mapping[str, Any] | None) -> TextEncoder:
    """Returns the frozen text tower of a CLIP: as Stable Diffusion 3 does, its last hidden states but one, and pooled.

    Args:
      folder: work folder of a run of experiments.clip.
      stored: `description` of the encoder in a checkpoint, which then has its weights too; None where a run starts.

    Raises:
      ValueError: a run starts, and no folder is named.
    """
    trained = None
    if stored is None:
        if not folder:
            raise ValueError(
                "condition.name=clip reads a trained CLIP: name its work folder, --config.condition.folder=DIR"
            )
        path = Path(folder).expanduser()
        trained = clip.open_clip(path)
        with open_existing(path) as checkpoints:
            stored = {name: checkpoints.description()[name] for name in ("config", "vocabulary")}
    config = from_plain(stored["config"])
    tokenizer = text.from_json(stored["vocabulary"])
    tower = clip.make_clip(config, tokenizer).text
    length = config.text.length

    def init(key: jax.Array) -> Any:
        if trained is None:  # a checkpoint's: only shapes are needed
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
        rules=RULES,
    )
