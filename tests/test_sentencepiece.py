"""T5's tokenizer: recorded ids of transformers and of SentencePiece, from both kinds of files; what it refuses."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from diffusion.data import text
from diffusion.data.sentencepiece import check_vocabulary, encode, from_json, from_model, read_tokenizer, to_json

GOLDEN = np.load(Path(__file__).parent / "golden" / "t5_text.npz")
MODEL = GOLDEN["model"].tobytes()
TEXTS, IDS = (json.loads(str(GOLDEN[name])) for name in ("texts", "ids"))


def varint(value):
    head, rest = value & 0x7F, value >> 7
    return bytes([head | 0x80]) + varint(rest) if rest else bytes([head])


def field(number, value):
    """A field of a protobuf message: bytes, a float or a number."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(word, score=0.0, kind=1):
    return field(1, field(1, word.encode()) + field(2, score) + field(3, kind))


START = piece("<pad>", kind=3) + piece("</s>", kind=3) + piece("<unk>", kind=2)


@pytest.fixture(scope="module")
def tokenizer():
    return from_model(MODEL)


def test_a_thousand_odd_texts_get_the_ids_of_transformers(tokenizer):
    found = [encoding.ids for encoding in tokenizer.encode_batch(TEXTS, add_special_tokens=False)]
    assert len(found) == 1000 and sum(len(ids) > 6 for ids in IDS) > 500 and sum(2 in ids for ids in IDS) > 100
    assert [t for t, a, b in zip(TEXTS, found, IDS, strict=True) if [*a, 1] != b] == []
    # All those that hold no special token are read alike by SentencePiece itself.
    assert len(GOLDEN["same_as_sentencepiece"]) == sum("<" not in one for one in TEXTS) > 800


@pytest.mark.filterwarnings("ignore:a text of .* tokens is truncated")
def test_rows_are_padded_and_truncated_with_the_end_kept(tokenizer):
    ids = encode(tokenizer, TEXTS[:50], 9)
    assert ids.dtype == np.int32
    np.testing.assert_array_equal(ids, GOLDEN["padded"])
    assert (ids[:, -1] == 1).any() and (ids[:, -1] == 0).any()
    assert encode(tokenizer, [""], 4).tolist() == [[1, 0, 0, 0]]
    assert encode(tokenizer, [""], 3, padding=7).tolist() == [[1, 7, 7]]
    assert encode(tokenizer, ["a"], 1).tolist() == [[1]]
    with pytest.raises(ValueError, match="0 tokens is too short"):
        encode(tokenizer, ["a"], 0)


def test_long_texts_are_truncated_with_one_warning(tokenizer):
    with pytest.warns(UserWarning, match=r"text of \d+ tokens is truncated to 4; not read: .*dog'") as caught:
        encode(tokenizer, ["the quick brown fox jumps over the lazy dog"], 5)
    assert len(caught) == 1


def test_as_json_it_is_the_same_and_ends_texts_for_other_readers(tokenizer, tmp_path):
    (tmp_path / "tokenizer.json").write_text(to_json(tokenizer), "utf-8")
    (tmp_path / "spiece.model").write_bytes(b"not read where tokenizer.json is")
    again = read_tokenizer(tmp_path)
    assert [encoding.ids for encoding in again.encode_batch(TEXTS)] == IDS
    np.testing.assert_array_equal(encode(again, TEXTS[:50], 200), encode(tokenizer, TEXTS[:50], 200))
    assert to_json(again) == to_json(tokenizer)


def test_a_folder_with_the_protobuf_alone(tokenizer, tmp_path):
    (tmp_path / "spiece.model").write_bytes(MODEL)
    assert to_json(read_tokenizer(tmp_path)) == to_json(tokenizer)


def test_defaults_of_fields_that_are_absent():
    """A model of three pieces without settings is unigram, with a dummy prefix; unknown fields are passed over."""
    other = field(7, b"later") + field(8, 300) + varint(9 << 3 | 1) + bytes(8)
    tokenizer = from_model(START + piece("▁a", -1.0) + piece("▁", -2.0) + other)
    assert tokenizer.encode("a  a b", add_special_tokens=False).ids == [3, 3, 4, 2]
    assert tokenizer.get_vocab_size() == 5 + 100
    assert tokenizer.token_to_id("<extra_id_99>") == 5 and tokenizer.token_to_id("<extra_id_0>") == 104


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (MODEL[:-1], "not an intact model of SentencePiece .a field is cut off.: copy it again"),
        (START + b"\xff", "a number is cut off"),
        (START + varint(3 << 3 | 3), "no field is of type 3"),
        (START + field(1, field(2, 1.0)), "not an intact model"),
        (START + field(1, 5), "not an intact model"),
        (START + field(1, field(1, b"\xff\xff")), "not an intact model"),
        (b"version https://git-lfs.github.com/spec/v1", "not an intact model"),
        (b"", "not T5's kind"),
        (START + field(2, field(3, 2)), "not T5's kind: needed is a unigram model"),  # byte-pair encoding
        (START + field(2, field(35, 1)), "no fallback to bytes"),
        (START + field(3, field(3, 0)), "a dummy prefix"),
        (START + piece("<0x00>", kind=6), "with unused pieces, or some of its user or of bytes"),
        (piece("<pad>", kind=3) + piece("<unk>", kind=2), "has no token </s>: it is not one of T5's"),
    ],
)
def test_models_of_others_are_refused_in_one_line(data, message):
    with pytest.raises(ValueError, match=message) as error:
        from_model(data)
    assert "\n" not in str(error.value)


def test_folders_without_a_tokenizer_of_t5(tokenizer, tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer of T5: copy tokenizer\.json or spiece\.model there"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json: not a tokenizer's JSON"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*decode"):
        read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text.to_json(text.train_tokenizer(["a cat"], 258)))
    with pytest.raises(ValueError, match=r"tokenizer\.json: a tokenizer of type BPE: T5's is Unigram"):
        read_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer has 500 tokens, the T5 a vocabulary of 499"):
        check_vocabulary(tokenizer, 499)
    check_vocabulary(tokenizer, 500)


def test_truncation_and_padding_of_a_file_are_turned_off(tokenizer):
    other = from_json(to_json(tokenizer))
    other.enable_truncation(2)
    other.enable_padding(length=9)
    assert from_json(other.to_str()).encode(TEXTS[0]).ids == IDS[0]


def test_padding_is_read_beside_the_tokenizer(tokenizer, tmp_path):
    assert text.read_padding(tmp_path, tokenizer) is None
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "</s>", "lstrip": False}}))
    assert text.read_padding(tmp_path, tokenizer) == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<unk>"}))
    assert text.read_padding(tmp_path, tokenizer) == 2
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": None}))
    assert text.read_padding(tmp_path, tokenizer) == 1
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    with pytest.raises(ValueError, match=r"pads with '<\|endoftext\|>', which is no token of the tokenizer beside it"):
        text.read_padding(tmp_path, tokenizer)
    for damaged in ("[]", "{"):
        (tmp_path / "tokenizer_config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"tokenizer_config\.json is damaged"):
            text.read_padding(tmp_path, tokenizer)
