"""Data: which images make a batch, where they come from, and how they are shown."""

import threading
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.data import array_source, batch_indices, digits, make_batches
from diffusion.data.batches import batch_flips, full_batches
from diffusion.data.images import image_grid, labelled_grid, save_png, to_float, to_uint8, wrap
from diffusion.files import replacing


def numbered(count=20, shape=(4, 3, 1)):
    """Image i holds i in its left half and 100 + i elsewhere, its label is i."""
    image = np.tile(np.arange(100, 100 + count, dtype=np.uint8)[:, None, None, None], (1, *shape))
    image[:, :, : shape[1] // 2] -= 100
    return array_source(image, np.arange(count), "numbered", "train", count)


# --- the order


def test_order_is_frozen():
    # Recorded once; a published run can only be repeated while these hold, whatever NumPy is installed.
    assert batch_indices(7, 3, 8, 20).tolist() == [3, 12, 8, 17, 4, 14, 18, 15]
    assert batch_indices(2**40 + 1, 10**9, 5, 1000).tolist() == [985, 391, 15, 818, 493]
    assert batch_flips(7, 3, 16, 20).astype(int).tolist() == [0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1]


@pytest.mark.parametrize("batch_size", [1, 7, 13, 20])
def test_every_epoch_shows_every_image_once(batch_size):
    stream = np.concatenate([batch_indices(3, step, batch_size, 20) for step in range(60 // batch_size + 1)])[:60]
    epochs = stream.reshape(3, 20)
    assert (np.sort(epochs) == np.arange(20)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    # One stream, cut differently: the batch size does not change the order in which images come.
    assert (stream == np.concatenate([batch_indices(3, step, 20, 20) for step in range(3)])).all()


def test_order_depends_on_the_whole_seed():
    orders = [tuple(batch_indices(seed, 0, 20, 20).tolist()) for seed in (0, 1, 2**32, 2**32 + 1, 2**63)]
    assert len(set(orders)) == len(orders)


def test_batches_are_the_callers_own():
    batch_indices(5, 0, 4, 20)[:] = 0
    assert len(set(batch_indices(5, 0, 4, 20).tolist())) == 4


def test_flips_are_fair():
    coins = np.concatenate([batch_flips(0, step, 500, 1000) for step in range(40)])
    assert abs(coins.mean() - 0.5) < 4 * 0.5 / len(coins) ** 0.5  # four standard errors
    assert (coins[:1000] != coins[1000:2000]).any()  # every epoch has its own


@pytest.mark.parametrize(
    ("seed", "step", "batch_size", "line"),
    [
        (-1, 0, 4, "seed"),
        (0, -1, 4, "no batch number -1"),
        (0, 0, 21, "batch_size is 21.*20 images"),
        (0, 0, 0, "batch_size"),
    ],
)
def test_bad_batches_are_refused(seed, step, batch_size, line):
    with pytest.raises(ValueError, match=line):
        batch_indices(seed, step, batch_size, 20)
    with pytest.raises(ValueError, match=line):
        make_batches(numbered(), seed, batch_size, start_step=step)


# --- the batches


def collect(source, steps, **options):
    batches = list(make_batches(source, 11, 8, num_steps=steps, **options))
    return {name: np.stack([batch[name] for batch in batches]) for name in ("image", "label")}


def test_batches_hold_the_images_of_their_indices():
    got = collect(numbered(), 7)
    assert got["image"].shape == (7, 8, 4, 3, 1) and got["image"].dtype == np.uint8 and got["label"].dtype == np.int32
    assert (got["label"] == [batch_indices(11, step, 8, 20) for step in range(7)]).all()
    assert (got["image"][..., 0, 0] == got["label"][..., None]).all()
    assert (got["image"][..., 2, 0] == got["label"][..., None] + 100).all()


def test_batches_start_anywhere_and_do_not_depend_on_threads_or_processes():
    whole = collect(numbered(), 7, flip=True)
    later = collect(numbered(), 4, flip=True, start_step=3, num_threads=1, prefetch=1)
    parts = [collect(numbered(), 7, flip=True, process_index=p, process_count=4, num_threads=0) for p in range(4)]
    for name in ("image", "label"):
        assert (whole[name][3:] == later[name]).all()
        assert (whole[name] == np.concatenate([part[name] for part in parts], axis=1)).all()


def test_flip_mirrors_left_and_right_and_nothing_else():
    plain, flipped = collect(numbered(), 7), collect(numbered(), 7, flip=True)
    mirrored = np.stack([batch_flips(11, step, 8, 20) for step in range(7)])
    assert 10 < mirrored.sum() < 46
    assert (flipped["image"][mirrored] == plain["image"][mirrored][:, :, ::-1]).all()
    assert (flipped["image"][~mirrored] == plain["image"][~mirrored]).all()
    assert (flipped["label"] == plain["label"]).all()


def test_a_process_reads_only_its_share():
    asked = []

    def read(indices):
        asked.extend(indices.tolist())
        return {"image": np.zeros((len(indices), 4, 3, 1), np.uint8), "label": np.zeros(len(indices), np.int32)}

    next(make_batches(numbered()._replace(read=read), 11, 8, num_steps=1, process_index=1, process_count=4))
    assert asked == batch_indices(11, 0, 8, 20)[2:4].tolist()
    with pytest.raises(ValueError, match="is 8: it does not divide among 3 processes"):
        make_batches(numbered(), 11, 8, process_count=3)


def test_an_error_while_reading_comes_out_as_it_was():
    def read(indices):
        raise LookupError("shelf 17 is empty")

    with pytest.raises(LookupError, match="shelf 17 is empty"):
        next(make_batches(numbered()._replace(read=read), 0, 8))


def test_closing_the_batches_ends_their_threads():
    before = set(threading.enumerate())
    batches = make_batches(numbered(), 0, 8)
    next(batches)
    readers = set(threading.enumerate()) - before
    assert readers
    batches.close()
    for thread in readers:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in readers)


@pytest.mark.parametrize(("count", "batch_size"), [(10, 4), (8, 4), (3, 7), (1, 1), (0, 4)])
def test_full_batches_cover_everything_once_and_are_full(count, batch_size):
    batches = list(full_batches(count, batch_size))
    assert all(rows.shape == (batch_size,) for rows in batches) and len(batches) == -(-count // batch_size)
    rows = np.concatenate([*batches, np.zeros(0, int)])
    assert rows[:count].tolist() == list(range(count))
    assert (rows >= 0).all() and (rows < max(count, 1)).all()


# --- arrays


def test_array_source_names_what_is_wrong():
    good, label = np.zeros((30, 4, 4, 3), np.uint8), np.zeros(30, np.int64)
    nan = good / 127.5 - 1
    nan[17, 2, 1, 0] = np.nan
    for image, labels, line in [
        (nan, label, "hold nan at example 17"),
        (good / 127.5 - 1, label, r"float64 in \[-1, -1\], not uint8.*to_uint8"),
        (good.astype(np.int32), label, "int32, not uint8"),
        (good[..., 0], label, r"shape \[30, 4, 4\]"),
        (good[..., :2], label, r"shape \[30, 4, 4, 2\]"),
        (good[:0], label[:0], r"shape \[0, 4, 4, 3\]"),
        (good, label[:29], r"images are 30 but labels int64\[29\]"),
        (good, label / 2, r"labels float64\[30\]"),
        (good, label + 10, r"label 10 of example 0 is not in 0\.\.10 - 1"),
        (good, label - 1, "label -1 of example 0"),
    ]:
        with pytest.raises(ValueError, match=line) as error:
            array_source(image, labels, "set", "train", 10)
        assert "\n" not in str(error.value) and "set (train)" in str(error.value)


def test_fingerprint_identifies_the_data():
    image, label = np.random.RandomState(0).randint(0, 256, (9, 4, 4, 3), np.uint8), np.arange(9)
    one = array_source(image, label, "a", "train", 9).fingerprint
    assert one == array_source(image.copy(), label.astype(np.uint8), "b", "test", 9).fingerprint
    changed = image.copy()
    changed[8, 3, 3, 2] ^= 1
    others = [(changed, label), (image[::-1], label), (image, label[::-1]), (image.reshape(9, 2, 8, 3), label)]
    assert len({one, *(array_source(i, n, "a", "train", 9).fingerprint for i, n in others)}) == 5


def test_without_labels():
    source = array_source(np.zeros((3, 2, 2, 1), np.uint8), None, "set", "train", None)
    assert source.num_classes is None and source.read(np.array([2]))["label"].tolist() == [0]


def test_digits():
    from sklearn.datasets import load_digits

    train, test = digits("train"), digits("test")
    assert (train.num_examples, test.num_examples, test.image_shape, test.num_classes) == (1297, 500, (8, 8, 1), 10)
    parts = [source.read(np.arange(source.num_examples)) for source in (train, test)]
    assert np.bincount(parts[1]["label"]).tolist() == [50] * 10
    # Both together are scikit-learn's set, each of its 17 grey levels at its place in 0..255.
    data: Any = load_digits()
    both = [np.concatenate([part[name].reshape(len(part[name]), -1) for part in parts]) for name in ("image", "label")]
    assert sorted(np.unique(both[0]).tolist()) == [round(level * 255 / 16) for level in range(17)]
    ours = sorted(map(tuple, np.hstack([np.round(both[0] * (16 / 255)), both[1]]).astype(int).tolist()))
    assert ours == sorted(map(tuple, np.hstack([data["data"], data["target"][:, None]]).astype(int).tolist()))
    # The hold-out never moves: published figures stand on it.
    assert test.fingerprint == "sha256:0442ae2aace5c92960c361234f592df2d534e74a984af954e71dc1f20a846316"
    with pytest.raises(ValueError, match="'train' and 'test', not 'val'"):
        digits("val")


# --- pictures


def test_every_level_survives_the_way_there_and_back():
    level = np.arange(256, dtype=np.uint8)
    assert (np.asarray(jax.jit(lambda x: to_uint8(to_float(x)))(level)) == level).all()
    assert np.asarray(to_float(level))[[0, 255]].tolist() == [-1.0, 1.0]
    assert np.asarray(to_uint8(np.array([-3.0, -1.0, 0.999, 1.0, 7.0], np.float32))).tolist() == [0, 0, 255, 255, 255]


def test_grid_puts_every_image_in_its_place():
    image = np.random.RandomState(0).randint(0, 256, (5, 4, 3, 3), np.uint8)
    grid = image_grid(image, columns=3)
    assert grid.shape == (2 * 4 + 1, 3 * 3 + 2, 3)
    for i in range(5):
        top, left = (i // 3) * 5, (i % 3) * 4
        assert (grid[top : top + 4, left : left + 3] == image[i]).all()
    assert (grid[4] == 128).all() and (grid[:, 3] == 128).all() and (grid[5:, 8:] == 128).all()
    assert image_grid(image).shape == grid.shape  # near a square
    assert image_grid(image, columns=99).shape == (4, 5 * 4 - 1, 3)
    with pytest.raises(ValueError, match="1 column"):
        image_grid(image, columns=0)
    with pytest.raises(ValueError, match="not uint8"):
        image_grid(image / 255)


def test_labelled_grid_keeps_the_pictures_and_writes_every_label_within_its_row():
    image = np.random.RandomState(0).randint(0, 200, (3, 2, 4, 4, 3), np.uint8)
    labels = ["a red three", "a large green eight to the left of a small yellow two, which is " + 40 * "w", ""]
    grid = labelled_grid(image, labels, smallest_side=8, width=260)
    assert grid.shape[1] == 2 * 128 and grid.shape[0] % 2 == 0
    height = grid.shape[0] // 2
    for i in range(3):
        block = grid[height * (i // 2) :, 128 * (i % 2) :][:height, :128]
        for k in range(2):
            assert (block[4:12, 4 + 10 * k : 12 + 10 * k] == image[i, k].repeat(2, 0).repeat(2, 1)).all()
        ink = block[12:].min(axis=2) < 128
        assert ink.any() == bool(labels[i]) and not ink[:, -4:].any()
    assert (grid[height:, 128:] == 255).all()  # no fourth row
    one_line, several = (labelled_grid(image[:1], [label]).shape[0] for label in labels[:2])
    assert several > one_line + 3 * 12  # broken, not cut off where the row ends
    narrow = labelled_grid(image[..., :1], labels, width=140)
    assert narrow.shape == (3 * labelled_grid(image[:1], labels[1:2]).shape[0], 2 * 64 + 2 + 8, 3)
    narrower = labelled_grid(image, labels, width=100)  # the pictures of a row stand beneath each other
    assert (narrower[4 + 66 : 4 + 66 + 64, 4 : 4 + 64] == image[0, 1].repeat(16, 0).repeat(16, 1)).all()
    with pytest.raises(ValueError, match="shorter"):
        labelled_grid(image, labels[:2])


def test_wrapped_lines_hold_every_word_and_are_no_wider_than_asked():
    texts = "a large green eight to the left of " + "w" * 25 + " and\nno  more"
    lines = wrap(texts, 10, len)
    assert lines == ["a large", "green", "eight to", "the left", "of", "w" * 10, "w" * 10, "wwwww and", "no more"]
    assert wrap(texts, 10, len, most=9) == lines and wrap("", 10, len) == [""]
    assert wrap(texts, 10, len, most=8) == [*lines[:7], "wwwww and…"]
    assert wrap(texts, 10, len, most=6) == [*lines[:5], "w" * 9 + "…"]


def test_wrapping_costs_no_more_than_the_text_is_long():
    measured = []

    def measure(text):
        measured.append(len(text))
        return len(text)

    for texts in ("word " * 10_000, "w" * 50_000):
        measured.clear()
        assert len(wrap(texts, 20, measure)) == 12
        assert sum(measured) < 2 * 50_000  # not its square, of which a prompt of 2,000 characters took 14 s


@pytest.mark.parametrize("channels", [1, 3])
def test_png_can_be_seen_and_read_back(tmp_path, channels):
    image = np.random.RandomState(0).randint(0, 256, (8, 9, channels), np.uint8)
    save_png(tmp_path / "new" / "small.png", image)
    read = np.asarray(Image.open(tmp_path / "new" / "small.png")).reshape(256, 288, channels)
    assert (read == image.repeat(32, 0).repeat(32, 1)).all()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["small.png"]
    save_png(tmp_path / "large.png", np.tile(image, (40, 40, 1)))
    assert Image.open(tmp_path / "large.png").size == (360, 320)


def test_a_failed_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(OSError, match="disk"), replacing(path) as temporary:
        temporary.write_text("ne")
        raise OSError("disk full")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with open(path) as reader:
        with replacing(path) as temporary:
            temporary.write_text("new")
        assert reader.read() == "old"  # who has begun to read the old file reads it to the end
    assert path.read_text() == "new"
