"""Prompts as a condition of Stable Diffusion 3: read by two CLIPs and a T5, each of which may be absent or dropped."""

import os
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from diffusion.data import sentencepiece, text
from diffusion.model.condition import Condition, Facts, Told
from diffusion.model.joined_text import ENCODERS, Layout, join, keep
from diffusion.model.prompts import Text, TextEncoder, prompts
from diffusion.networks import clip, t5
from diffusion.networks.clip import TextTower
from diffusion.networks.t5 import T5Encoder
from diffusion.pretrained.sd3_text import Put, Tower, read_towers

WIDTHS = {"clip_l": 768, "clip_g": 1280, "t5": 4096}  # of the published encoders, for those that are absent
CLIP_LENGTH = 77
LONGEST = 512  # tokens, of T5's training
DROPOUT = 0.463  # of each encoder by itself: all three at once in a tenth of the examples
NULLS = ("zeros", "empty")
UNSAID = -1  # as ids: the encoder is given nothing, and its features are zeros


def sd3_text(
    facts: Facts,
    *,
    folder: str = "",
    leave_out: Sequence[str] = (),
    length: int = 256,
    clip_skip: int = 0,
    dtype: str = "float32",
    precomputed: bool = False,
    dropout: float = DROPOUT,
    null: str = "zeros",
) -> Condition:
    """Returns the condition of prompts read by the frozen text encoders of a published Stable Diffusion 3.

    Args:
      facts: the encoders' description where a checkpoint has it.
      folder: of the published pipeline, from which a run that starts takes the encoders.
      leave_out: of "clip_l", "clip_g", "t5", those that a run that starts does without.
      length: tokens that T5 reads.
      clip_skip: layers more that are left out at the end of both CLIPs.
      dtype: of the encoders' weights and products.
      precomputed: features of all captions are made once, before training.
      dropout: share of the training captions that are hidden, from each encoder by itself.
      null: what "no condition" is: see `joined_prompts`.
    """
    del precomputed  # read by the data's side
    if facts.stored:
        encoder = restore(facts.stored)
    elif folder:
        encoder, params = load_text(folder, dtype=dtype, leave_out=leave_out, length=length, clip_skip=clip_skip)
        encoder = encoder._replace(init=lambda key: params)
    else:
        raise ValueError(
            "condition.name=sd3 reads the text encoders of a published Stable Diffusion 3: name its folder, "
            "--config.condition.folder=DIR"
        )
    return joined_prompts(encoder, dropout, null)


def load_text(
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    weights_dtype: Any = None,
    variant: str | None = None,
    leave_out: Collection[str] = (),
    length: int = 256,
    clip_skip: int = 0,
    widths: Mapping[str, int] | None = None,
    put: Put | None = None,
    weights: bool = True,
) -> tuple[TextEncoder, dict[str, Any]]:
    """Returns the text encoder of the folder of a StableDiffusion3Pipeline, and its parameters by encoder.

    Args:
      folder: with model_index.json; encoders that are absent from it, or null, give zeros.
      dtype: what the networks compute in, "float32" or "bfloat16".
      weights_dtype: what weights are converted to; None: `dtype`.
      variant, leave_out, put, weights: see `read_towers`.
      length, clip_skip, widths: see `make_text_encoder`.

    Raises:
      ValueError: see `read_towers` and `make_text_encoder`.
    """
    kept = jnp.dtype(dtype if weights_dtype is None else weights_dtype)
    towers = read_towers(
        folder,
        jnp.dtype(dtype),
        weights_dtype=kept,
        variant=variant,
        leave_out=leave_out,
        put=put,
        weights=weights,
    )
    params = {name: tower.params for name, tower in towers.items()}
    return make_text_encoder(towers, length=length, clip_skip=clip_skip, widths=widths, weights_dtype=kept), params


def make_text_encoder(
    towers: Mapping[str, Tower],
    *,
    length: int = 256,
    clip_skip: int = 0,
    widths: Mapping[str, int] | None = None,
    weights_dtype: Any = np.float32,
) -> TextEncoder:
    """Returns the joined encoder, whose parameters are {"clip_l": ..., "clip_g": ..., "t5": ...}, of those there are.

    Its ids are those of the encoders that there are, side by side: 77 + 77 + `length` of all three. `UNSAID` in the
    first place of an encoder's ids makes its features zeros.

    Args:
      towers: by name; their parameters are not read.
      length: tokens that T5 reads, at most `LONGEST`.
      clip_skip: layers more that are left out at the end of both CLIPs, for every prompt. (diffusers has it for
        prompts, not for negative ones: read those with an encoder without it where its very numbers are wanted.)
      widths: of encoders that are absent, where they are not `WIDTHS`: of the CLIPs' features and pooled vectors
        alike, and of the context as "t5".
      weights_dtype: that `init` gives parameters.

    Raises:
      ValueError: no encoder, an unknown one, CLIPs of different lengths or too wide for the context, and a length or
        clip_skip that the encoders do not have.
    """
    if not towers or towers.keys() - set(ENCODERS):
        raise ValueError(f"text encoders {list(towers)}: give at least one of {', '.join(ENCODERS)}")
    layout = _layout(towers, length, {**WIDTHS, **(widths or {})})
    clips = {name: towers[name] for name in ("clip_l", "clip_g") if name in towers}
    depth = min((tower.module.num_layers for tower in clips.values()), default=clip_skip + 1)
    if not 0 <= clip_skip < depth:
        raise ValueError(f"clip_skip is {clip_skip}: it has to lie in 0..{depth - 1}, for CLIPs of {depth} layers")
    names = [name for name in ENCODERS if name in towers]
    lengths = [layout.t5_length if name == "t5" else layout.clip_length for name in names]
    places = dict(zip(names, np.split(np.arange(sum(lengths)), np.cumsum(lengths)[:-1]), strict=True))

    def tokenize(texts: Sequence[str]) -> np.ndarray:
        ids = [
            (sentencepiece if name == "t5" else text).encode(
                towers[name].tokenizer, texts, len(places[name]), towers[name].padding
            )
            for name in names
        ]
        return np.concatenate(ids, axis=1)

    def init(key: jax.Array) -> dict[str, Any]:
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        params = {name: towers[name].module.init(keys[name], jnp.zeros((1, 2), jnp.int32)) for name in names}
        return jax.tree.map(lambda x: x.astype(weights_dtype), params)

    def read(params: Any, name: str, ids: Int[Array, "B L"]) -> tuple[jax.Array, jax.Array | None]:
        """Features of tokens and pooled, zeros where the ids are `UNSAID`."""
        said = ids[:, :1] >= 0
        found: Any = towers[name].module.apply(params[name], jnp.maximum(ids, 0))
        if name == "t5":
            return jnp.where(said[..., None], found, 0), None
        hidden = found.hidden[-(clip_skip + 2)]
        return jnp.where(said[..., None], hidden, 0), jnp.where(said, found.embedding, 0)

    def encode(params: Any, ids: Int[Array, "B L"]) -> Text:
        found = {name: read(params, name, ids[:, place[0] : place[-1] + 1]) for name, place in places.items()}
        return join(layout, len(ids), found)

    return TextEncoder(
        tokenize=tokenize,
        init=init,
        encode=encode,
        context_width=layout.context,
        pooled_width=layout.pooled_l + layout.pooled_g,
        frozen=True,
        description={
            "towers": {name: _describe(towers[name]) for name in names},
            "length": length,
            "clip_skip": clip_skip,
            "weights_dtype": jnp.dtype(weights_dtype).name,
            "layout": layout._asdict(),
        },
        rules=(*clip.RULES, *t5.RULES),
    )


def restore(description: Mapping[str, Any]) -> TextEncoder:
    """Returns the encoder that has this `TextEncoder.description`, as a checkpoint holds it; its weights are there too.

    Raises:
      ValueError: it is not one of this module's.
    """
    if "towers" not in description:
        raise ValueError("the stored text encoder is not of condition.name=sd3")
    layout = Layout(**description["layout"])
    return make_text_encoder(
        {name: _restore_tower(name, stored) for name, stored in description["towers"].items()},
        length=description["length"],
        clip_skip=description["clip_skip"],
        widths={"clip_l": layout.clip_l, "clip_g": layout.clip_g, "t5": layout.context},
        weights_dtype=jnp.dtype(description["weights_dtype"]),
    )


def towers_of(description: Mapping[str, Any], params: Mapping[str, Any]) -> dict[str, Tower]:
    """Returns the encoders of a `TextEncoder.description`, with the parameters of its `init`, to be written."""
    return {
        name: _restore_tower(name, stored)._replace(params=params[name])
        for name, stored in description["towers"].items()
    }


def joined_prompts(encoder: TextEncoder, dropout: float = DROPOUT, null: str = "zeros") -> Condition:
    """Returns the condition of prompts read by a joined encoder, each part of which is dropped by itself in training.

    A model so trained can be used with any of them left out. Training reads "text", ids, or "context" and "pooled".

    Args:
      encoder: of `make_text_encoder`.
      dropout: share of the training captions for which an encoder's features are replaced by zeros.
      null: what the request None, "no condition", is read as: "zeros", which training with dropout shows, or "empty",
        the empty prompt, which guidance leads away from in diffusers' pipeline.

    Raises:
      ValueError: `dropout` is outside [0, 1], or another `null`.

    Source: Esser et al. 2024, appendix B.3.
    """
    if null not in NULLS:
        raise ValueError(f"condition.null is {null!r}: choose {' or '.join(NULLS)}")
    plain = prompts(encoder, dropout)
    layout = Layout(**encoder.description["layout"])

    def read(requests: Sequence[str | None]) -> np.ndarray:
        ids = plain.read(requests)
        if null == "zeros":
            ids[[request is None for request in requests]] = UNSAID
        return ids

    def of_batch(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> Told:
        made = "text" not in batch
        joined = Text(batch["context"], batch["pooled"]) if made else encoder.encode(params, batch["text"])
        drop_key = jax.random.split(key, 4)[2]  # as `prompts`
        kept = jax.random.bernoulli(drop_key, 1 - dropout, (len(joined.pooled), len(ENCODERS)))
        return keep(layout, joined, kept)._asdict()

    return plain._replace(read=read, of_batch=of_batch)


def _layout(towers: Mapping[str, Tower], length: int, widths: Mapping[str, int]) -> Layout:
    modules: dict[str, Any] = {name: tower.module for name, tower in towers.items()}
    features = {name: modules[name].width if name in modules else widths[name] for name in ENCODERS}
    pooled = {name: width for name, width in features.items() if name != "t5"}
    pooled |= {name: modules[name].projection or modules[name].width for name in pooled if name in modules}
    lengths = {modules[name].length for name in pooled if name in modules} or {CLIP_LENGTH}
    if len(lengths) > 1:
        raise ValueError(f"the CLIPs read {' and '.join(map(str, sorted(lengths)))} tokens: they have to read as many")
    if features["clip_l"] + features["clip_g"] > features["t5"]:
        raise ValueError(
            f"the CLIPs' features, {features['clip_l']} and {features['clip_g']} wide, do not fit beside each other in "
            f"a context of {features['t5']}: use the encoders of one published model"
        )
    if not 1 <= length <= LONGEST:
        raise ValueError(f"{length} tokens for T5: it has to read 1..{LONGEST}")
    return Layout(
        clip_length=lengths.pop(),
        t5_length=length,
        clip_l=features["clip_l"],
        clip_g=features["clip_g"],
        context=features["t5"],
        pooled_l=pooled["clip_l"],
        pooled_g=pooled["clip_g"],
    )


def _describe(tower: Tower) -> dict[str, Any]:
    module = tower.module
    fields = {name: getattr(module, name) for name in module.__dataclass_fields__ if name not in ("parent", "name")}
    to_json = sentencepiece.to_json if isinstance(module, T5Encoder) else text.to_json
    fields["dtype"] = jnp.dtype(module.dtype).name
    return {"module": fields, "tokenizer": to_json(tower.tokenizer), "padding": tower.padding}


def _restore_tower(name: str, stored: Mapping[str, Any]) -> Tower:
    make, from_json = (T5Encoder, sentencepiece.from_json) if name == "t5" else (TextTower, text.from_json)
    fields = {**stored["module"], "dtype": jnp.dtype(stored["module"]["dtype"])}
    return Tower(make(**fields), None, from_json(stored["tokenizer"]), stored["padding"])
