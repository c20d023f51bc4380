"""T5's tokenizer: SentencePiece's unigram model, from tokenizer.json or from the protobuf spiece.model.

Texts are ids, then the end of text; there is no start. As in transformers, "<extra_id_0>" and other special tokens that
stand in a text are those tokens.
"""

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram

from diffusion.data.text import fill

END = "</s>"
PADDING = "<pad>"
NUM_EXTRA = 100  # sentinels of T5's training, behind the vocabulary of the file
# Types of pieces and of models in sentencepiece_model.proto.
_NORMAL, _UNKNOWN, _CONTROL = 1, 2, 3
_UNIGRAM = 1


def read_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer of a published T5, from tokenizer.json or else spiece.model in its folder.

    Raises:
      ValueError: neither is there, one is damaged, or it is not T5's kind of tokenizer.
    """
    folder = Path(folder).expanduser()
    for name, read in (("tokenizer.json", lambda data: from_json(data.decode("utf-8"))), ("spiece.model", from_model)):
        path = folder / name
        if path.is_file():
            try:
                return read(path.read_bytes())
            except (OSError, ValueError) as error:
                raise ValueError(f"{path}: {error}") from error
    raise ValueError(f"{folder} holds no tokenizer of T5: copy tokenizer.json or spiece.model there")


def from_json(text: str) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json, with its own truncation and padding turned off.

    Raises:
      ValueError: it is none, or another kind than T5's.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"not a tokenizer's JSON ({error}): copy it again") from error
    if not isinstance(tokenizer.model, Unigram):
        raise ValueError(f"a tokenizer of type {type(tokenizer.model).__name__}: T5's is Unigram, copy that one")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _id_of(tokenizer, END)
    return tokenizer


def from_model(data: bytes) -> Tokenizer:
    """Returns the tokenizer of a spiece.model, normalised and split as transformers does, with T5's extra tokens.

    Raises:
      ValueError: the bytes are not a unigram model of SentencePiece, or one that falls back to bytes, which T5's does
        not.
    """
    pieces: list[tuple[str, float]] = []
    types: list[int] = []
    trainer: dict[int, Any] = {}
    normaliser: dict[int, Any] = {}
    try:
        for number, value in _fields(data):
            if number == 1:
                piece = _message(value)
                pieces.append((piece[1].decode("utf-8"), struct.unpack("<f", piece.get(2, bytes(4)))[0]))
                types.append(piece.get(3, _NORMAL))
            elif number == 2:
                trainer |= _message(value)
            elif number == 3:
                normaliser |= _message(value)
        settings = (trainer.get(3, _UNIGRAM), trainer.get(35, 0), trainer.get(24, 0))
        # Dummy prefix, no extra white space, spaces as "▁".
        flags = [normaliser.get(number, 1) for number in (3, 4, 5)]
        charsmap = bytes(normaliser.get(2, b""))
    except (KeyError, TypeError, UnicodeDecodeError, struct.error, ValueError) as error:
        raise ValueError(f"not an intact model of SentencePiece ({error}): copy it again") from error
    unknown = [i for i, kind in enumerate(types) if kind == _UNKNOWN]
    if settings != (_UNIGRAM, 0, 0) or flags != [1, 1, 1] or len(unknown) != 1:
        raise ValueError(
            "a SentencePiece model that is not T5's kind: needed is a unigram model with a dummy prefix, escaped and "
            "single spaces, one unknown piece and no fallback to bytes"
        )
    if set(types) - {_NORMAL, _UNKNOWN, _CONTROL}:
        raise ValueError("a SentencePiece model with unused pieces, or some of its user or of bytes: T5's has none")
    extra = [f"<extra_id_{i}>" for i in range(NUM_EXTRA)]
    tokenizer = Tokenizer(Unigram([*pieces, *((word, 0.0) for word in extra[::-1])], unknown[0], byte_fallback=False))
    if charsmap:
        tokenizer.normalizer = normalizers.Precompiled(charsmap)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    special = [*(word for (word, _), kind in zip(pieces, types, strict=True) if kind in (_UNKNOWN, _CONTROL)), *extra]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
    _id_of(tokenizer, END)
    return tokenizer


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], length: int = 256, padding: int | None = None
) -> Int32[np.ndarray, "N length"]:
    """Returns token ids: each text, its end, then padding. Texts that are too long are truncated before their end.

    Args:
      tokenizer: of this module.
      texts: N of them.
      length: of every row.
      padding: id after the end of a text; None: that of "<pad>".

    Raises:
      ValueError: `length` has no room for an end.
    """
    if length < 1:
        raise ValueError(f"a length of {length} tokens is too short: an end needs 1")
    padding = padding_of(tokenizer) if padding is None else padding
    return fill(tokenizer, texts, length, start=(), end=_id_of(tokenizer, END), padding=padding)


def padding_of(tokenizer: Tokenizer) -> int:
    """Returns the id of "<pad>". Raises ValueError if the tokenizer has none."""
    return _id_of(tokenizer, PADDING)


def to_json(tokenizer: Tokenizer) -> str:
    """Returns the tokenizer as a tokenizer.json, with the end, which `encode` adds itself, in it for other readers."""
    whole = Tokenizer.from_str(tokenizer.to_str())
    if whole.post_processor is None:
        whole.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", pair=f"$A {END} $B {END}", special_tokens=[(END, _id_of(whole, END))]
        )
    return whole.to_str()


def check_vocabulary(tokenizer: Tokenizer, vocabulary_size: int) -> None:
    """Raises ValueError unless every id of the tokenizer is in a vocabulary of this size."""
    size = tokenizer.get_vocab_size()
    if size > vocabulary_size:
        raise ValueError(
            f"the tokenizer has {size} tokens, the T5 a vocabulary of {vocabulary_size}: use the tokenizer files that "
            "were published with these weights"
        )


def _id_of(tokenizer: Tokenizer, word: str) -> int:
    number = tokenizer.token_to_id(word)
    if number is None:
        raise ValueError(f"the tokenizer has no token {word}: it is not one of T5's")
    return number


def _message(data: Any) -> dict[int, Any]:
    """Returns the fields of a message inside another; the last of several of one number counts."""
    if not isinstance(data, bytes):
        raise ValueError("a number stands where a message should")
    return dict(_fields(data))


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yields (number, value) of a protobuf message: an int, or the bytes of a fixed or a delimited field."""
    place = 0

    def varint() -> int:
        nonlocal place
        value = 0
        for shift in range(0, 70, 7):
            if place == len(data):
                break
            byte = data[place]
            place += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
        raise ValueError("a number is cut off")

    while place < len(data):
        key = varint()
        number, kind = key >> 3, key & 7
        if kind == 0:
            yield number, varint()
            continue
        if kind not in (1, 2, 5) or number == 0:
            raise ValueError(f"no field is of type {kind}")
        size = varint() if kind == 2 else 8 if kind == 1 else 4
        if place + size > len(data):
            raise ValueError("a field is cut off")
        place += size
        yield number, data[place - size : place]
