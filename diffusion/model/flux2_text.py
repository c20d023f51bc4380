"""Prompts as a condition of FLUX.2 [klein]: hidden states of a Qwen3, at places of text and of padding alike.

There is no pooled text: its width is 0.
"""

import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int
from tokenizers import Tokenizer

from diffusion.data import chat
from diffusion.model.condition import Condition, Facts
from diffusion.model.prompts import Text, TextEncoder, prompts
from diffusion.networks.qwen3 import RULES, Qwen3
from diffusion.pretrained import qwen3
from diffusion.pretrained.folder import resolve
from diffusion.pretrained.qwen3 import STATES, Put

LONGEST = 512  # tokens, of the published model


def flux2_text(
    facts: Facts,
    *,
    folder: str = "",
    states: tuple[int, ...] = STATES,
    length: int = LONGEST,
    dtype: str = "float32",
    precomputed: bool = False,
    dropout: float = 0.1,
) -> Condition:
    """Returns the condition of prompts read by the frozen text encoder of a published FLUX.2 [klein].

    Args:
      facts: the encoder's description where a checkpoint has it.
      folder: of the published pipeline, from which a run that starts takes the encoder.
      states: after how many layers its hidden states are read.
      length: tokens that are read; shorter prompts are padded to it.
      dtype: of the encoder's weights and products.
      precomputed: features of all captions are made once, before training: 15 MB of each.
      dropout: share of the training captions that are replaced by the empty one.
    """
    del precomputed  # read by the data's side
    if facts.stored:
        encoder = restore(facts.stored)
    elif folder:
        encoder, params = load_text(folder, dtype=dtype, states=states, length=length)
        encoder = encoder._replace(init=lambda key: params)
    else:
        raise ValueError(
            "condition.name=flux2 reads the text encoder of a published FLUX.2 [klein]: name its folder, "
            "--config.condition.folder=DIR"
        )
    return prompts(encoder, dropout)


def load_text(
    folder: str | os.PathLike,
    *,
    dtype: str = "float32",
    states: tuple[int, ...] = STATES,
    length: int = LONGEST,
    variant: str | None = None,
    put: Put | None = None,
    weights: bool = True,
) -> tuple[TextEncoder, dict[str, Any]]:
    """Returns the text encoder of the folder of a Flux2KleinPipeline, and its parameters.

    Args:
      folder: with text_encoder/ and tokenizer/.
      dtype: of weights and products, "float32" or "bfloat16".
      states, length: see `flux2_text`.
      variant, put: see `load_qwen3`.
      weights: whether they are read; else their files are checked, and the parameters are zeros that take no memory.

    Raises:
      ValueError: see `load_qwen3`, `chat.read_tokenizer` and `make_text_encoder`.
    """
    folder, kind = resolve(folder), jnp.dtype(dtype)
    words = chat.read_tokenizer(folder / "tokenizer")
    path = folder / "text_encoder"
    module = qwen3.network(path, kind, states=states)
    encoder = make_text_encoder(module, *words, length=length, weights_dtype=kind)
    _, params = qwen3.load_qwen3(path, kind, states=states, weights_dtype=kind, variant=variant, put=put, read=weights)
    return encoder, params


def make_text_encoder(
    module: Qwen3, tokenizer: Tokenizer, padding: int, *, length: int = LONGEST, weights_dtype: Any = np.float32
) -> TextEncoder:
    """Returns the encoder, whose parameters are the network's; its ids are `chat.UNREAD` at places of padding.

    Args:
      module: the network.
      tokenizer: of `chat`.
      padding: the token that is given to the network there.
      length: tokens that are read.
      weights_dtype: that `init` gives parameters.

    Raises:
      ValueError: a length that holds no prompt, or more tokens than the network has.
    """
    chat.check_vocabulary(tokenizer, module.vocab_size)
    least = len(tokenizer.encode(chat.BEFORE + chat.AFTER, add_special_tokens=False).ids) + 1
    if not least <= length <= LONGEST:
        raise ValueError(f"{length} tokens for Qwen3: it has to read {least}..{LONGEST}, its template among them")

    def init(key: jax.Array) -> Any:
        params = module.init(key, jnp.zeros((1, 2), jnp.int32))
        return jax.tree.map(lambda x: x.astype(weights_dtype), params)

    def encode(params: Any, ids: Int[Array, "B L"]) -> Text:
        real = ids >= 0
        context: Any = module.apply(params, jnp.where(real, ids, padding), real)
        return Text(context, jnp.zeros((len(ids), 0), context.dtype))

    fields = {name: getattr(module, name) for name in module.__dataclass_fields__ if name not in ("parent", "name")}
    fields |= {"states": list(module.states), "dtype": jnp.dtype(module.dtype).name}
    return TextEncoder(
        tokenize=lambda texts: chat.encode(tokenizer, texts, length),
        init=init,
        encode=encode,
        context_width=len(module.states) * module.width,
        pooled_width=0,
        frozen=True,
        description={
            "qwen3": fields,
            "tokenizer": tokenizer.to_str(),
            "padding": padding,
            "length": length,
            "weights_dtype": jnp.dtype(weights_dtype).name,
        },
        rules=RULES,
    )


def restore(description: Mapping[str, Any]) -> TextEncoder:
    """Returns the encoder that has this `TextEncoder.description`, as a checkpoint holds it; its weights are there too.

    Raises:
      ValueError: it is not one of this module's.
    """
    if "qwen3" not in description:
        raise ValueError("the stored text encoder is not of condition.name=flux2")
    return make_text_encoder(
        Qwen3(**restored_fields(description)),
        chat.from_json(description["tokenizer"]),
        description["padding"],
        length=description["length"],
        weights_dtype=jnp.dtype(description["weights_dtype"]),
    )


def published(
    description: Mapping[str, Any], params: Mapping[str, Any]
) -> tuple[Qwen3, dict[str, Any], Tokenizer, int]:
    """Returns the encoder of a run as it is published: network and parameters, `whole`, its tokenizer and padding.

    A run holds no layer beyond the last state that is read. One that adds nothing is put there, and a norm of ones, for
    transformers normalises what its last layer returns: it reads the same states, to the bit, and is no language model.

    Args:
      description: the encoder's.
      params: its parameters.
    """
    encoder = Qwen3(**restored_fields(description))
    last = encoder.states[-1]
    encoder = encoder.clone(depth=last + 1, whole=True, tied=True)
    own, like = params["params"], qwen3.shapes(encoder)
    dtype = own["token_embedding"].dtype
    layer = jax.tree.map(lambda leaf: np.zeros(leaf.shape, dtype), like[f"layer_{last}"])
    norm = jax.tree.map(lambda leaf: np.ones(leaf.shape, dtype), like["norm_out"])
    whole = {**own, f"layer_{last}": layer, "norm_out": norm}
    return encoder, {"params": whole}, chat.from_json(description["tokenizer"]), description["padding"]


def restored_fields(description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of the network that a description holds as plain JSON."""
    fields: dict[str, Any] = dict(description["qwen3"])
    return fields | {"states": tuple(fields["states"]), "dtype": jnp.dtype(fields["dtype"])}
