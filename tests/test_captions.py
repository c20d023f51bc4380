"""Files of pictures and captions, and which pairs they make."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from diffusion.data import scenes
from diffusion.data.captions import caption_folder, with_captions
from diffusion.data.lines import read_lines
from diffusion.data.named import named_captions
from diffusion.data.sources import array_source


def test_lines_end_at_newlines_alone(tmp_path):
    path = tmp_path / "lines.txt"
    text = "one\u2028still one\r\n\n  \ntwo\x85two\ftwo\vtwo\rtwo\ncafe\u0301"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    wanted = [(1, "one\u2028still one"), (4, "two\x85two\ftwo\vtwo\rtwo"), (5, "cafe\u0301")]
    assert read_lines(path) == wanted
    path.write_bytes(text.encode() + b"\n")
    assert read_lines(path) == wanted


@pytest.mark.parametrize("bad", [b"caf\xe9", b"\xed\xa0\x80", b"\xff\xfe"])  # Latin-1, a surrogate, UTF-16
def test_what_is_not_utf_8_is_refused_with_its_line(tmp_path, bad):
    (tmp_path / "lines.txt").write_bytes(b"one\n\n" + bad + b"\n")
    with pytest.raises(ValueError, match=r"lines\.txt, line 3: not UTF-8 \(.*save the file as UTF-8"):
        read_lines(tmp_path / "lines.txt")
    with pytest.raises(ValueError, match=r"cannot read .*nowhere \(No such file"):
        read_lines(tmp_path / "nowhere")


@pytest.fixture
def pairs(tmp_path):
    """(folder of 0.png, 1.png and 2.png; their pixels; write(*lines) of its captions.jsonl)."""
    pixels = np.random.RandomState(0).randint(0, 256, (3, 8, 8, 3), np.uint8)
    for i in range(3):
        Image.fromarray(pixels[i]).save(tmp_path / f"{i}.png")

    def write(*lines):
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        (tmp_path / "captions.jsonl").write_text("\n".join(texts), "utf-8")

    return tmp_path, pixels, write


GOOD = (
    {"image": "0.png", "caption": "one"},
    {"image": "1.png", "caption": ["two", "one"]},
    {"image": "2.png", "caption": "three"},
)


def test_a_folder_of_captions(pairs):
    folder, pixels, write = pairs
    write(*GOOD, "", {"image": "0.png", "caption": "four"})  # more of an image may come later
    source = caption_folder(folder, None)
    captions = source.captions
    read = source.read(np.arange(5))
    found = sorted((image.tobytes(), captions[row]) for image, row in zip(read["image"], read["label"], strict=True))
    wanted = [(0, "one"), (0, "four"), (1, "two"), (1, "one"), (2, "three")]
    assert found == sorted((pixels[i].tobytes(), caption) for i, caption in wanted)
    assert len(set(captions)) == source.num_classes == 4
    assert caption_folder(folder, 4).image_shape == (4, 4, 3)
    assert caption_folder(folder, (4, 6)).image_shape == (4, 6, 3)


def test_pictures_of_captions_that_are_broken_or_of_other_shapes(pairs, caplog):
    folder, pixels, write = pairs
    Image.fromarray(pixels[0, :6]).save(folder / "wide.png")
    write(*GOOD, {"image": "wide.png", "caption": "wide"})
    with pytest.raises(ValueError, match=r"line 4: .*wide.png is 8x6 but .*0.png is 8x8: .*data\.image_size=N"):
        caption_folder(folder, None)
    write({"image": "wide.png", "caption": "wide"})
    assert caption_folder(folder, None).image_shape == (6, 8, 3)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:60])
    write(*GOOD)
    with pytest.raises(ValueError, match=r"line 2: .*1.png cannot be read"):
        caption_folder(folder, 8)
    with caplog.at_level(logging.WARNING):
        source = caption_folder(folder, 8, skip_broken=True)
    assert "1 of 3 pictures cannot be read" in caplog.text
    read = source.read(np.arange(2))
    assert [source.captions[row] for row in read["label"]] == ["one", "three"] and (
        read["image"] == pixels[[0, 2]]
    ).all()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "none.png", "caption": "x"}, r"line 4: a caption without an image, there is no .*none\.png"),
        ({"image": "0.png"}, r'line 4: not \{"image": "name\.png", "caption"'),
        ({"image": "0.png", "caption": []}, "line 4: not"),
        ({"image": "0.png", "caption": ["x", 1]}, "line 4: not"),
        ("{", "line 4: not JSON"),
        ("[]", "line 4: not"),
        ('{"image": "0.png", "caption": "\\ud83d"}', "line 4: a lone surrogate"),
    ],
)
def test_bad_lines_are_named(pairs, line, message):
    folder, _, write = pairs
    write(*GOOD, line)
    with pytest.raises(ValueError, match=message) as error:
        caption_folder(folder, 8)
    assert "\n" not in str(error.value)


def test_a_folder_without_captions(tmp_path):
    with pytest.raises(ValueError, match=r"there is no .*captions\.jsonl: write a line"):
        caption_folder(tmp_path, 8)
    (tmp_path / "captions.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match=r"captions\.jsonl holds no pair"):
        caption_folder(tmp_path, 8)


def test_folders_by_name(pairs, tmp_path_factory):
    folder, _, write = pairs
    write(*GOOD)
    other = tmp_path_factory.mktemp("held_out")
    (other / "captions.jsonl").write_text(json.dumps({"image": f"{folder}/0.png", "caption": "held out"}))
    both = {"data_dir": folder, "held_out_dir": other, "image_size": 4}
    train, test = (named_captions("folder", split, **both) for split in ("train", "test"))
    assert (train.split, train.captions) == ("train", ("one", "two", "three")) and train.image_shape == (4, 4, 3)
    assert (test.split, test.captions) == ("test", ("held out",))
    with pytest.raises(ValueError, match=r"name one by --config\.evaluation\.dir=DIR"):
        named_captions("folder", "test", data_dir=folder)
    with pytest.raises(ValueError, match=r"name one by --config\.data\.dir=DIR"):
        named_captions("folder", "train", held_out_dir=other)


def test_separators_of_unicode_stay_within_a_caption(pairs):
    folder, _, _ = pairs
    caption = "a\u2028b\x85c"
    line = json.dumps({"image": "0.png", "caption": caption}, ensure_ascii=False)
    (folder / "captions.jsonl").write_text("\ufeff" + line + "\r\n", "utf-8", newline="")
    assert caption_folder(folder, 8).captions == (caption,)


def test_the_fingerprint_covers_captions_and_pixels(pairs):
    folder, pixels, write = pairs
    found = []
    for lines in (GOOD, GOOD[:2], (*GOOD[:2], {"image": "2.png", "caption": "threes"}), GOOD):
        write(*lines)
        found.append(caption_folder(folder, 8).fingerprint)
    Image.fromarray(pixels[0]).save(folder / "1.png")
    found.append(caption_folder(folder, 8).fingerprint)
    assert found[0] == found[3] and len(set(found)) == 4
    # Pairs that are swapped hold the same pixels and the same set of captions.
    images = array_source(pixels[:2], None, "two", "train", None)
    assert with_captions(images, [["a"], ["b"]]).fingerprint != (with_captions(images, [["b"], ["a"]]).fingerprint)
    assert (
        scenes.scenes("train", 16, 3).fingerprint
        != array_source(
            scenes.scenes("train", 16, 3).read(np.arange(3))["image"], None, "scenes", "train", None
        ).fingerprint
    )


def test_captions_are_one_list_for_each_image():
    images = array_source(np.zeros((2, 4, 4, 3), np.uint8), None, "two", "train", None)
    with pytest.raises(ValueError, match="2 images but captions of 1"):
        with_captions(images, [["a"]])
    with pytest.raises(ValueError, match="two: its 2 examples of train have no caption"):
        with_captions(images, [[], []])
