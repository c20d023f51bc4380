"""Texts as token ids: CLIP's byte-pair encoding from its public files, and small vocabularies trained from captions.

Both encode any Unicode, and put every text between a start and an end token. Texts are normalised as by transformers
(Unicode NFC, white space to one space, lower case); OpenAI's code also repairs mojibake and HTML entities (ftfy,
html.unescape) first.
"""

import gzip
import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int32
from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

START, END = "<|startoftext|>", "<|endoftext|>"
NUM_MERGES = 49152 - 256 - 2  # of OpenAI's vocabulary, whose file holds more
# Contractions, letters, single digits, anything else: Radford et al.'s released code.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def clip_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Returns CLIP's tokenizer from its merges: OpenAI's bpe_simple_vocab_16e6.txt.gz, or a merges.txt of 48,894.

    Raises:
      ValueError: if the file cannot be read or holds no merges.
    """
    path = Path(path).expanduser()
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        lines = content.decode("utf-8").split("\n")[1:]  # the first names the version
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read merges from {path} ({error}): name bpe_simple_vocab_16e6.txt.gz") from error
    merges = [tuple(line.split()) for line in lines if line.strip()][:NUM_MERGES]
    if not merges or any(len(merge) != 2 for merge in merges):
        raise ValueError(f"{path} does not hold two symbols a line: name bpe_simple_vocab_16e6.txt.gz")
    symbols = _byte_symbols()
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), *("".join(merge) for merge in merges), START, END]
    return _clip({word: number for number, word in enumerate(words)}, merges)


def read_tokenizer(folder: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer of a published CLIP, from vocab.json and merges.txt, or tokenizer.json, in its folder.

    Raises:
      ValueError: if neither is there, or they are damaged.
    """
    folder = Path(folder).expanduser()
    try:
        if (folder / "vocab.json").is_file():
            vocabulary = json.loads((folder / "vocab.json").read_text("utf-8"))
            lines = (folder / "merges.txt").read_text("utf-8").split("\n")
            merges = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
            return _clip(vocabulary, merges)
        tokenizer = from_json((folder / "tokenizer.json").read_text("utf-8"))
    except OSError as error:
        raise ValueError(
            f"{folder} holds no tokenizer ({error}): copy vocab.json and merges.txt, or tokenizer.json, there"
        ) from error
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"the tokenizer files in {folder} are damaged ({error}): copy them again") from error
    return tokenizer


def train_tokenizer(captions: Iterable[str], size: int = 512) -> Tokenizer:
    """Returns a byte-pair encoding of at most `size` tokens for captions: all bytes, then the most frequent merges.

    It encodes any text, words that are not in the captions as bytes. Its start is token 0, its end 1.

    Raises:
      ValueError: if `size` is too small for the bytes.
    """
    if size < 258:
        raise ValueError(f"a vocabulary of {size} is too small: 256 bytes, a start and an end need at least 258")
    tokenizer = Tokenizer(BPE())
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = BpeTrainer(
        vocab_size=size,
        special_tokens=[START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    return tokenizer


def to_json(tokenizer: Tokenizer) -> str:
    """Returns the tokenizer as JSON, to be stored with weights that were trained with it.

    The start and the end, which `encode` adds itself, are in it for other readers.
    """
    whole = Tokenizer.from_str(tokenizer.to_str())
    if whole.post_processor is None:
        both = [(word, _id_of(whole, word)) for word in (START, END)]
        whole.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=both)
    return whole.to_str()


def from_json(text: str) -> Tokenizer:
    """Returns the tokenizer of `to_json`, or of a tokenizer.json, with its own truncation and padding turned off.

    Raises:
      ValueError: if it is not one, or has no start and end of text.
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"not a tokenizer's JSON ({error})") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _id_of(tokenizer, START)
    _id_of(tokenizer, END)
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """Returns the id that ends every text. Raises ValueError if the tokenizer has none."""
    return _id_of(tokenizer, END)


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], length: int = 77, padding: int | None = None
) -> Int32[np.ndarray, "N length"]:
    """Returns token ids, each text between start and end, then padding.

    Texts that are too long are truncated before their end token. One warning counts them, and quotes what is lost of
    the first.

    Args:
      tokenizer: of this module.
      texts: N of them.
      length: of every row.
      padding: id after the end of a text; None: the end, as for OpenAI's weights in transformers. OpenCLIP pads with 0.

    Raises:
      ValueError: if `length` is too small for a start and an end.
    """
    if length < 2:
        raise ValueError(f"a length of {length} tokens is too short: a start and an end need 2")
    end = end_of_text(tokenizer)
    start = [_id_of(tokenizer, START)]
    return fill(tokenizer, texts, length, start=start, end=end, padding=end if padding is None else padding)


def fill(
    tokenizer: Tokenizer, texts: Sequence[str], length: int, *, start: Sequence[int], end: int, padding: int
) -> Int32[np.ndarray, "N length"]:
    """Returns token ids in rows of `length`: the start, a text, truncated where it has to be, the end, then padding.

    One warning counts the truncated texts, and quotes what is lost of the first.
    """
    ids = np.full((len(texts), length), padding, np.int32)
    ids[:, : len(start)] = start
    room = length - len(start) - 1
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    for row, encoding in zip(ids, encodings, strict=True):
        kept = encoding.ids[:room]
        row[len(start) : len(start) + len(kept)] = kept
        row[len(start) + len(kept)] = end
    warn_of_truncation(texts, [encoding.offsets for encoding in encodings], room)
    return ids


def warn_of_truncation(texts: Sequence[str], offsets: Sequence[Sequence[tuple[int, int]]], room: int) -> None:
    """Warns, once, of texts with more than `room` tokens: how many there are, and what is lost of the first.

    Args:
      texts: N of them.
      offsets: of each, where in the text each of its tokens begins and ends.
      room: tokens that are read.
    """
    if cut := [i for i, places in enumerate(offsets) if len(places) > room]:
        text, places = texts[cut[0]], offsets[cut[0]]
        lost = places[room][0]
        warnings.warn(
            f"a text of {len(places)} tokens is truncated to {room}; not read: "
            f"{text[lost : lost + 80]!r}" + (f" (and {len(cut) - 1} more of {len(texts)} texts)" if cut[1:] else ""),
            stacklevel=4,
        )


def read_padding(folder: str | os.PathLike, tokenizer: Tokenizer) -> int | None:
    """Returns the id that a published tokenizer pads with; None where its folder does not say.

    Read from tokenizer_config.json, else from special_tokens_map.json.

    Raises:
      ValueError: a file is damaged, or the tokenizer does not have the token.
    """
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = Path(folder).expanduser() / name
        if not path.is_file():
            continue
        try:
            token = json.loads(path.read_text("utf-8")).get("pad_token")
        except (OSError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} is damaged ({error}): copy the published folder whole") from error
        content = token.get("content") if isinstance(token, dict) else token
        if content is None:
            continue
        number = tokenizer.token_to_id(content) if isinstance(content, str) else None
        if number is None:
            raise ValueError(f"{path} pads with {content!r}, which is no token of the tokenizer beside it: copy both")
        return number
    return None


def check_vocabulary(tokenizer: Tokenizer, vocabulary_size: int, end: int) -> None:
    """Raises ValueError unless a tokenizer fits a text tower: no id is too large, and both have the same end."""
    size = tokenizer.get_vocab_size()
    if size > vocabulary_size or end_of_text(tokenizer) != end:
        raise ValueError(
            f"the tokenizer has {size} tokens and ends texts with {end_of_text(tokenizer)}, the weights have "
            f"{vocabulary_size} and end with {end}: use the tokenizer files that were published with these weights"
        )


def _id_of(tokenizer: Tokenizer, word: str) -> int:
    number = tokenizer.token_to_id(word)
    if number is None:
        raise ValueError(f"the tokenizer has no token {word}: it is not one of CLIP's")
    return number


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])


def _clip(vocabulary: Mapping[str, int], merges: list[tuple[str, ...]]) -> Tokenizer:
    model = BPE(dict(vocabulary), merges, end_of_word_suffix="</w>", unk_token=END)  # type: ignore[arg-type]
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = _normalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    # Written in a text they are the tokens themselves, as in transformers.
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (START, END)])
    _id_of(tokenizer, START)
    _id_of(tokenizer, END)
    return tokenizer


def _byte_symbols() -> list[str]:
    """Returns a visible character per byte, in the order of GPT-2's released code: bytes that are visible first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
