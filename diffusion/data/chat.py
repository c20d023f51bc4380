"""Prompts as Qwen3 reads them: one turn of a chat, whose answer begins without thoughts, as byte-pair tokens.

The tokenizer is the published tokenizer.json. The template is written here, as FLUX.2 [klein] fills it; a template in
the published folder is a program, and is not run.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import Tokenizer

from diffusion.data.text import read_padding, warn_of_truncation

BEFORE, AFTER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
WHOLE = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")  # of the template, a token each
PADDING = "<|endoftext|>"  # where a folder does not say
UNREAD = -1  # at places of padding: a prompt may hold the token that the encoder is given there


def read_tokenizer(folder: str | os.PathLike) -> tuple[Tokenizer, int]:
    """Returns the tokenizer of a published Qwen3, from tokenizer.json in its folder, and the id that it pads with.

    Raises:
      ValueError: a file is missing or damaged, it is another tokenizer, or one that pads before the text.
    """
    folder = Path(folder).expanduser()
    try:
        tokenizer = from_json((folder / "tokenizer.json").read_text("utf-8"))
    except OSError as error:
        raise ValueError(f"{folder} holds no tokenizer ({error}): copy tokenizer.json there") from error
    except ValueError as error:
        raise ValueError(f"{folder / 'tokenizer.json'}: {error}") from error
    padding = read_padding(folder, tokenizer)
    if padding is None and (padding := tokenizer.token_to_id(PADDING)) is None:
        raise ValueError(f"{folder} does not say what it pads with: copy tokenizer_config.json there too")
    path = folder / "tokenizer_config.json"
    side = json.loads(path.read_text("utf-8")).get("padding_side", "right") if path.is_file() else "right"
    if side != "right":
        raise ValueError(f"{path} has padding_side={side}: ours pads behind the text, as FLUX.2 [klein] does")
    return tokenizer, padding


def from_json(text: str) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json, with its own truncation and padding turned off.

    Raises:
      ValueError: it is not one, or the parts of the template are not tokens of it.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"not a tokenizer's JSON ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if missing := [token for token in WHOLE if tokenizer.token_to_id(token) is None]:
        raise ValueError(f"the tokenizer has no token {missing[0]}: it is not Qwen3's")
    return tokenizer


def encode(tokenizer: Tokenizer, prompts: Sequence[str], length: int = 512) -> Int32[np.ndarray, "N length"]:
    """Returns token ids of prompts within the template, then `UNREAD` up to `length`.

    What is too long loses its end, the template's first. One warning counts such prompts, and quotes what is lost of
    the first.

    Args:
      tokenizer: of this module.
      prompts: N of them.
      length: of every row.
    """
    ids = np.full((len(prompts), length), UNREAD, np.int32)
    chats = [f"{BEFORE}{prompt}{AFTER}" for prompt in prompts]
    encodings = tokenizer.encode_batch(chats, add_special_tokens=False)
    for row, encoding in zip(ids, encodings, strict=True):
        kept = encoding.ids[:length]
        row[: len(kept)] = kept
    warn_of_truncation(chats, [encoding.offsets for encoding in encodings], length)
    return ids


def check_vocabulary(tokenizer: Tokenizer, size: int) -> None:
    """Raises ValueError unless an encoder with a table of `size` tokens has all of the tokenizer's."""
    if (own := tokenizer.get_vocab_size()) > size:
        raise ValueError(
            f"the tokenizer has {own} tokens, the weights {size}: use the tokenizer that was published with them"
        )
