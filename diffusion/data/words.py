"""Prompts as words: the vocabulary of captions, phrases that are read as one word, and ids."""

import itertools
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Container, Iterable, Sequence

import numpy as np
from jaxtyping import Int

UNKNOWN, FIRST = 1, 2  # ids of a word that is not known, and of the vocabulary's first; 0 is "no word here"
LONGEST = 8  # words of a phrase
MAX_WARNINGS = 5  # per call: whole data sets are read


def make_vocabulary(captions: Iterable[str], size: int = 0, phrases: int = 0) -> list[str]:
    """Returns the `size` words (0: all) that most captions have, and `phrases`, in the order of the alphabet.

    A phrase is what is read as one word: the most frequent pair of neighbours, of words or phrases found before it.
    So "dark skin" and "medium dark skin" share nothing that a network would have to tell apart. A word that captions
    have in phrases alone is not in the vocabulary, as nothing would be learned of it.

    Source: Mikolov et al. (2013), "Distributed Representations of Words and Phrases", section 4; pairs are joined one
      after the other as in Sennrich et al. (2016), "Neural Machine Translation of Rare Words with Subword Units".

    Example:
      >>> make_vocabulary(["red hot tea", "hot tea", "tea"], phrases=1)
      ['hot tea', 'red', 'tea']
    """
    split = whole = [split_words(caption) for caption in captions]
    counted = Counter(word for words in split for word in set(words))
    most = sorted(counted, key=lambda word: (-counted[word], word))
    vocabulary = set(most[:size] if size else most)
    for _ in range(phrases):
        pairs = Counter(pair for words in split for pair in itertools.pairwise(words) if vocabulary.issuperset(pair))
        short = [pair for pair in pairs if len(" ".join(pair).split()) <= LONGEST]
        if not short:
            break
        vocabulary.add(" ".join(max(short, key=lambda pair: (pairs[pair], pair))))
        split = [join(words, vocabulary) for words in split]
    read = {word for words in whole for word in join(words, vocabulary)}
    return sorted(vocabulary & read)


def join(words: Sequence[str], vocabulary: Container[str]) -> list[str]:
    """Returns words with those joined that are a phrase of the vocabulary, the longest from the left.

    Example:
      >>> join(["red", "hot", "tea"], {"red", "hot", "tea", "hot tea"})
      ['red', 'hot tea']
    """
    joined, begin = [], 0
    while begin < len(words):
        ends = range(min(begin + LONGEST, len(words)), begin, -1)
        end = next((end for end in ends if " ".join(words[begin:end]) in vocabulary), begin + 1)
        joined.append(" ".join(words[begin:end]))
        begin = end
    return joined


def split_words(prompt: str) -> list[str]:
    """Returns the words of a prompt, in small letters."""
    return re.findall(r"\w+", unicodedata.normalize("NFC", prompt).lower())


def word_ids(prompts: Sequence[str], vocabulary: Sequence[str], length: int) -> Int[np.ndarray, "N L"]:
    """Returns the words' places in the vocabulary plus 2, whatever their case; 1 is unknown, 0 fills up to `length`.

    Warns of unknown words, and of prompts that are longer, which are cut; of a data set's, only of the first few.
    """
    known = {word: index for index, word in enumerate(vocabulary, FIRST)}
    distinct = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    ids = np.zeros((len(distinct), length), np.int32)
    not_read = []
    for prompt, row in zip(distinct, ids, strict=True):
        words = join(split_words(prompt), known)
        if unknown := [word for word in words if word not in known]:
            not_read.append(f"unknown to the text encoder in {prompt!r}: {', '.join(unknown)}")
        if len(words) > length:
            not_read.append(f"{prompt!r} is longer than {length} words: what follows {words[length - 1]!r} is left out")
        found = [known.get(word, UNKNOWN) for word in words[:length]]
        row[: len(found)] = found
    for line in not_read[:MAX_WARNINGS]:
        logging.warning(line)
    if more := not_read[MAX_WARNINGS:]:
        logging.warning("and %d more like these, in %d different prompts", len(more), len(distinct))
    return ids[[distinct[prompt] for prompt in prompts]]
