"""Texts as token ids: CLIP's byte-pair encoding from its public files, and small vocabularies trained from captions.

Both turn any Unicode into tokens, and every text stands between a start and an end token. CLIP's cleans texts as
transformers does (Unicode NFC, white space to one space, lower case); OpenAI's own code also mends mojibake and HTML
entities (ftfy, html.unescape) first.
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
    """CLIP's tokenizer from its merges: OpenAI's bpe_simple_vocab_16e6.txt.gz, or a merges.txt of 48,894 merges.

    Raises:
      ValueError: if the file cannot be read or holds no merges.
    """
    path = Path(path)
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
    """The tokenizer of a published CLIP: from vocab.json and merges.txt, or tokenizer.json, of its folder.

    Raises:
      ValueError: if neither is there, or they are not whole.
    """
    folder = Path(folder)
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
        raise ValueError(f"the tokenizer files in {folder} are not whole ({error}): copy them again") from error
    return tokenizer


def train_tokenizer(captions: Iterable[str], size: int = 512) -> Tokenizer:
    """A byte-pair encoding of at most `size` tokens of these captions: all bytes, then what is merged most often.

    No text is unknown to it: what the captions never said falls into bytes. Its start is token 0, its end 1.

    Raises:
      ValueError: if `size` has no room for the bytes.
    """
    if size < 258:
        raise ValueError(f"a vocabulary of {size}: 256 bytes, a start and an end need at least 258")
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
    """The whole tokenizer as text, to be kept beside weights that were trained with it.

    Start and end, which `encode` sets itself, are told in it to other readers.
    """
    whole = Tokenizer.from_str(tokenizer.to_str())
    if whole.post_processor is None:
        both = [(word, _id_of(whole, word)) for word in (START, END)]
        whole.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=both)
    return whole.to_str()


def from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` wrote, or a tokenizer.json; its own truncation and padding are turned off.

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
    """The id that ends every text. Raises ValueError if the tokenizer has none."""
    return _id_of(tokenizer, END)


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], length: int = 77, padding: int | None = None
) -> Int32[np.ndarray, "N length"]:
    """Token ids, each text between start and end, then `padding`: by default the end, as OpenAI's in transformers.

    OpenCLIP's towers are padded with 0. A text that is too long loses its last tokens, not its end, and one warning
    says of the first such text from where on, and how many there are.

    Raises:
      ValueError: if `length` has no room for a start and an end.
    """
    if length < 2:
        raise ValueError(f"texts of {length} tokens: a start and an end need 2")
    end = end_of_text(tokenizer)
    ids = np.full((len(texts), length), end if padding is None else padding, np.int32)
    ids[:, 0] = _id_of(tokenizer, START)
    room = length - 2
    encodings = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    for row, encoding in zip(ids, encodings, strict=True):
        kept = encoding.ids[:room]
        row[1 : len(kept) + 1] = kept
        row[len(kept) + 1] = end
    if cut := [i for i, encoding in enumerate(encodings) if len(encoding.ids) > room]:
        text, encoding = texts[cut[0]], encodings[cut[0]]
        start = encoding.offsets[room][0]
        warnings.warn(
            f"a text of {len(encoding.ids)} tokens is cut to the {room} there is room for; not read: "
            f"{text[start : start + 80]!r}" + (f" (and {len(cut) - 1} more of {len(texts)} texts)" if cut[1:] else ""),
            stacklevel=2,
        )
    return ids


def check_vocabulary(tokenizer: Tokenizer, vocabulary_size: int, end: int) -> None:
    """Raises ValueError unless the tokenizer and a text tower belong together: no id too large, the same end."""
    size = tokenizer.get_vocab_size()
    if size > vocabulary_size or end_of_text(tokenizer) != end:
        raise ValueError(
            f"the tokenizer has {size} tokens and ends texts with {end_of_text(tokenizer)}, the weights have room for "
            f"{vocabulary_size} and look for {end}: take the tokenizer files that came with these weights"
        )


def _id_of(tokenizer: Tokenizer, word: str) -> int:
    number = tokenizer.token_to_id(word)
    if number is None:
        raise ValueError(f"a tokenizer without {word}: it is not one of CLIP's")
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
    # Written in a text they are not words but the tokens themselves, as in transformers.
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in (START, END)])
    _id_of(tokenizer, START)
    _id_of(tokenizer, END)
    return tokenizer


def _byte_symbols() -> list[str]:
    """A visible character for each byte, in the order of GPT-2's released code: those that are visible come first."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, visible), *(chr(256 + i) for i in range(256 - len(visible)))]
