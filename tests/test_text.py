"""Texts as ids: CLIP's encoding against recorded ids of transformers, and vocabularies of one's own."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from diffusion.data import text
from diffusion.data.scenes import scene
from diffusion.data.text import (
    check_vocabulary,
    clip_tokenizer,
    encode,
    end_of_text,
    from_json,
    read_tokenizer,
    to_json,
    train_tokenizer,
)

GOLDEN = Path(__file__).parent / "golden" / "clip_text.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as arrays:
        return {name: json.loads(str(arrays[name])) for name in ("texts", "ids", "merges", "vocabulary")}


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """A folder as it is published, with those of OpenAI's merges that the recorded texts need, at their own ids."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps(golden["vocabulary"]), "utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in golden["merges"])]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="module")
def own():
    return train_tokenizer([scene(0, "train", i).caption for i in range(400)])


def test_a_thousand_odd_texts_get_transformers_ids(golden, published):
    tokenizer = read_tokenizer(published)
    found = [encoding.ids for encoding in tokenizer.encode_batch(golden["texts"], add_special_tokens=False)]
    assert len(found) == 1000 and sum(len(ids) > 5 for ids in golden["ids"]) > 500
    assert [t for t, a, b in zip(golden["texts"], found, golden["ids"], strict=True) if a != b] == []


def test_the_vocabulary_is_made_of_the_merges_in_openais_order(golden, tmp_path):
    path = tmp_path / "bpe.txt.gz"
    lines = ['"bpe_simple_vocab_16e6.txt#version: 0.2', *(" ".join(merge) for merge in golden["merges"])]
    path.write_bytes(gzip.compress("\n".join([*lines, ""]).encode()))
    tokenizer = clip_tokenizer(path)
    vocabulary = tokenizer.get_vocab()
    bytes_of = {word: number for word, number in golden["vocabulary"].items() if number < 512}
    assert len(bytes_of) == 512 and all(vocabulary[word] == number for word, number in bytes_of.items())
    merged = ["".join(merge) for merge in golden["merges"]]
    assert [vocabulary[word] for word in merged] == list(range(512, 512 + len(merged)))
    assert (vocabulary[text.START], vocabulary[text.END]) == (512 + len(merged), 513 + len(merged))
    (ids,) = encode(tokenizer, ["the dog"], 6)
    names = {number: word for word, number in vocabulary.items()}
    assert [names[i] for i in ids] == [text.START, "the</w>", "dog</w>", text.END, text.END, text.END]


def test_start_end_and_padding(published):
    tokenizer = read_tokenizer(published)
    ids = encode(tokenizer, ["a photo", ""], 5)
    assert ids.dtype == np.int32 and ids.shape == (2, 5)
    assert ids[:, 0].tolist() == [49406] * 2 and ids[1, 1:].tolist() == [49407] * 4
    assert encode(tokenizer, [""], 4, padding=0).tolist() == [[49406, 49407, 0, 0]]
    assert encode(tokenizer, [], 4).shape == (0, 4)
    with pytest.raises(ValueError, match="a start and an end need 2"):
        encode(tokenizer, ["a"], 1)


def test_accents_are_the_same_composed_or_not(own, published):
    for tokenizer in (own, read_tokenizer(published)):
        composed, decomposed = encode(tokenizer, ["caf\u00e9 \uac00", "cafe\u0301 \u1100\u1161"], 30)
        assert (composed == decomposed).all() and len(set(composed.tolist())) > 4


def test_long_texts_are_truncated_with_one_warning(own):
    with pytest.warns(UserWarning, match=r"text of 7 tokens is truncated to 4; not read: ' a blue two'") as caught:
        ids = encode(own, ["a red one", "a red one above a blue two"], 6)
    assert len(caught) == 1 and "more" not in str(caught[0].message)
    assert ids[1, -1] == end_of_text(own)
    assert ids[1, :-1].tolist() == encode(own, ["a red one above"], 6)[0, :-1].tolist()
    with pytest.warns(UserWarning, match=r"not read: ' a blue two' \(and 8 more of 10 texts\)") as caught:
        encode(own, ["a red one", *["a red one above a blue two"] * 9], 6)
    assert len(caught) == 1  # whole data sets come here


def test_own_vocabulary_reads_its_captions_by_words_and_anything_by_bytes(own):
    assert own.encode("a red three to the left of a blue seven").tokens == [
        f"Ġ{word}" for word in ["a", "red", "three", "to", "the", "left", "of", "a", "blue", "seven"]
    ]
    assert end_of_text(own) == 1 and own.get_vocab_size() <= 512
    strange = ["", "Ünïcödé", "日本語", "👩‍👩‍👧", "\x00\x7f", "an  astronaut\triding"]
    for one in strange:
        ids = encode(own, [one], 60)[0]
        assert ids[0] == 0 and (ids == 1).argmax() >= 1 + bool(one)
    assert len({tuple(ids) for ids in encode(own, strange, 60)}) == len(strange)
    assert (encode(own, ["A RED\n three"], 8) == encode(own, ["a red three"], 8)).all()
    # The same captions make the same vocabulary, and as text it survives.
    again = train_tokenizer([scene(0, "train", i).caption for i in range(400)])
    assert again.get_vocab() == own.get_vocab()
    assert (encode(from_json(to_json(own)), strange, 60) == encode(own, strange, 60)).all()
    others = from_json(to_json(own)).encode("a red three")  # who does not call our encode
    assert others.ids == encode(own, ["a red three"], 5)[0].tolist()
    with pytest.raises(ValueError, match="at least 258"):
        train_tokenizer(["a"], size=100)


def test_what_does_not_belong_together(own, published, tmp_path):
    check_vocabulary(own, own.get_vocab_size(), 1)
    with pytest.raises(ValueError, match="tokenizer files that were published with these weights"):
        check_vocabulary(read_tokenizer(published), 512, 1)
    with pytest.raises(ValueError, match=r"ends texts with 1, the weights have 49408 and end with 49407"):
        check_vocabulary(own, 49408, 49407)
    with pytest.raises(ValueError, match=r"holds no tokenizer .* copy vocab\.json"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="are damaged"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(to_json(own))
    assert read_tokenizer(tmp_path).get_vocab() == own.get_vocab()
    with pytest.raises(ValueError, match="cannot read merges"):
        clip_tokenizer(tmp_path / "none.gz")
    (tmp_path / "merges.txt").write_text("version\na b c\n")
    with pytest.raises(ValueError, match="two symbols a line"):
        clip_tokenizer(tmp_path / "merges.txt")
