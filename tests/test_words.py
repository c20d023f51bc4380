"""Prompts as words: vocabularies, phrases, ids, and what is reported of words that are not read."""

import unicodedata

import numpy as np

from diffusion.data import scenes
from diffusion.data.words import join, make_vocabulary, word_ids
from diffusion.networks.words import PADDING
from experiments.scenes import VOCABULARY


def test_every_caption_is_read_whole(caplog):
    for split in ("train", "held_out"):
        for index in range(150):
            caption = scenes.scene(0, split, index).caption
            (ids,) = word_ids([caption], VOCABULARY, 12)
            assert " ".join(VOCABULARY[i - 2] for i in ids[ids > 0]) == caption
    assert not caplog.records


def test_words_that_cannot_be_read_are_named(caplog):
    ids = word_ids(["A Red dog", "", "a red two " * 5, "A Red dog"], VOCABULARY, 12)
    assert [record.getMessage() for record in caplog.records] == [
        "unknown to the text encoder in 'A Red dog': dog",
        f"{'a red two ' * 5!r} is longer than 12 words: what follows 'two' is left out",
    ]
    assert ids[0, 2] == 1 and ids[0, 1] == ids[2, 1] > 1 and not ids[1].any() and ids[2].all()
    np.testing.assert_array_equal(ids[0], ids[3])
    caplog.clear()
    word_ids([f"a dog{i}" for i in range(99)], VOCABULARY, 12)
    assert len(caplog.records) == 6
    assert caplog.records[-1].getMessage() == "and 94 more like these, in 99 different prompts"


def test_accents_are_the_same_word_in_both_forms_of_unicode(caplog):
    composed, decomposed = (unicodedata.normalize(form, "ein Vögelchen") for form in ("NFC", "NFD"))
    assert composed != decomposed
    vocabulary = make_vocabulary([decomposed], 0)
    assert vocabulary == ["ein", "vögelchen"]
    ids = word_ids([composed, decomposed], vocabulary, 3)
    assert ids.tolist() == [[2, 3, 0]] * 2 and not caplog.records


def test_words_are_the_most_frequent():
    captions = ["A dog, a dog and a cat", "a cat", "a bird's nest"]
    assert make_vocabulary(captions, 3) == ["a", "and", "cat"]  # of those in one caption, by the alphabet
    assert make_vocabulary(captions, 100) == ["a", "and", "bird", "cat", "dog", "nest", "s"]


def test_phrases_are_pairs_joined_one_after_the_other():
    captions = [f"{who}, {tone} skin" for who in ("man", "wizard") for tone in ("light", "dark", "medium dark")]
    words = make_vocabulary(captions)
    # "dark skin" is in four captions, more than any other pair; of those in two the last by the alphabet is next.
    assert set(make_vocabulary(captions, phrases=1)) - set(words) == {"dark skin"}
    two = make_vocabulary(captions, phrases=2)
    assert set(two) - set(words) == {"dark skin", "medium dark skin"}
    # Nothing is learned of words that captions have in phrases alone: they are reported as unknown, not read.
    assert set(words) - set(two) == {"dark", "medium"}
    assert make_vocabulary(["a", "b"], phrases=3) == ["a", "b"]  # no neighbours
    assert make_vocabulary(["a b", "a b", "b", "c d"], size=2, phrases=9) == ["a b", "b"]  # of words that are read
    letters = list("abcdefghijkl")
    assert make_vocabulary([" ".join(letters)], phrases=99) == ["a b c d", "e f g h i j k l"]  # of 8 words at most


def test_the_longest_phrase_is_read_as_one_word():
    vocabulary = ["dark", "dark skin", "man", "medium", "medium dark skin", "skin"]
    assert join(["man", "medium", "dark", "skin"], vocabulary) == ["man", "medium dark skin"]
    assert join(["medium", "dark", "man"], vocabulary) == ["medium", "dark", "man"]
    ids = word_ids(["Man, medium-dark skin", "man, dark skin", "a skin"], vocabulary, 3)
    assert PADDING == 0
    assert ids.tolist() == [[4, 6, 0], [4, 3, 0], [1, 7, 0]]
