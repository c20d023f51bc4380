"""Sheets of images: heads above their columns, labels beside or beneath their rows, every pixel where it belongs."""

import numpy as np
import pytest
from PIL import Image

from diffusion.data.sheets import APART, BETWEEN, LARGE, MARGIN, WIDEST_LABEL, save_classes, sheet

rng = np.random.RandomState(0)
STEP = 16 + BETWEEN


def blocks(*columns, rows=2):
    """Blocks of grey images of 16x16 with no black in them, which is what letters are."""
    return [rng.randint(160, 220, (rows, count, 16, 16, 1), np.uint8) for count in columns]


def dark(picture):
    """Whether anything is written there."""
    return bool((picture < 100).any())


def test_without_heads_and_labels_images_are_side_by_side():
    first, second = blocks(1, 3)
    found = sheet([first, second], smallest_side=16)
    assert found.shape == (2 * 16 + BETWEEN, 16 + APART + 3 * STEP - BETWEEN, 3)
    np.testing.assert_array_equal(found[STEP:, :16], np.repeat(first[1, 0], 3, -1))
    left = 16 + APART + 2 * STEP
    np.testing.assert_array_equal(found[:16, left : left + 16], np.repeat(second[0, 2], 3, -1))
    assert (found[16:STEP] == 255).all() and (found[:, 16 : 16 + APART] == 255).all()
    larger = sheet([first], smallest_side=40)  # by a whole factor
    np.testing.assert_array_equal(larger[:48:3, ::3], np.repeat(first[0, 0], 3, -1))


def test_heads_are_above_their_own_columns():
    whole = blocks(1, 3)
    plain = sheet(whole, smallest_side=16)
    found = sheet(whole, ["", ["", "x", ""]], smallest_side=16)
    strip = found[: len(found) - len(plain)]
    np.testing.assert_array_equal(found[len(strip) :], plain)
    written = np.flatnonzero((strip < 100).any(axis=(0, 2)))
    left = 16 + APART + STEP
    assert left <= written.min() and written.max() < left + 16
    spanning = sheet(whole, ["", "one for three"], smallest_side=16)
    assert dark(spanning[: len(spanning) - len(plain), 16 + APART :])


def test_short_labels_are_at_the_left_and_long_ones_beneath():
    (images,) = blocks(2)
    plain = sheet([images], smallest_side=16)
    short = sheet([images], labels=["3", "17"], smallest_side=16)
    left = short.shape[1] - plain.shape[1]
    assert 0 < left <= WIDEST_LABEL and len(short) == len(plain)
    np.testing.assert_array_equal(short[:, left:], plain)
    assert dark(short[:16, :left]) and dark(short[STEP:, :left]) and not dark(short[16:STEP, :left])
    long = sheet([images], labels=["a red three above a blue seven", ""], smallest_side=64)
    assert long.shape[1] == 2 * 64 + BETWEEN and dark(long[64:80])


def test_what_does_not_fit_is_refused():
    whole = blocks(1, 3)
    for heads, line in ((["a"], "2 blocks and 1 heads"), (["a", ["b", "c"]], "3 columns and 2 heads")):
        with pytest.raises(ValueError, match=line):
            sheet(whole, heads)
    with pytest.raises(ValueError, match="2 rows and 1 labels"):
        sheet(whole, labels=["a"])
    with pytest.raises(ValueError, match="not uint8"):
        sheet([whole[0] / 255])


def test_classes_in_turn_are_columns_and_others_have_each_its_own(tmp_path):
    image = rng.randint(160, 220, (5, 16, 16, 3), np.uint8)
    save_classes(tmp_path / "turn.png", image, ["a", "b", "a", "b", "a"])
    turn = np.asarray(Image.open(tmp_path / "turn.png"))
    side = LARGE // 16 * 16
    assert turn.shape[1] == 2 * side + BETWEEN + 2 * MARGIN
    below = turn[-MARGIN - side : -MARGIN, MARGIN:]
    np.testing.assert_array_equal(below[:: side // 16, : side : side // 16], image[4])
    assert (below[:, side:] == 255).all()  # there is no sixth
    save_classes(tmp_path / "mixed.png", image, ["a", "a", "b", "b", "a"])
    mixed = np.asarray(Image.open(tmp_path / "mixed.png"))
    assert mixed.shape[1] > turn.shape[1]  # four in a row
    rows = np.flatnonzero((mixed < 100).any(axis=(1, 2)))
    assert rows.max() - rows.min() > 100  # heads of two rows
