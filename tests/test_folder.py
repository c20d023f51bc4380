"""Folders of pictures as sources: sizes, classes, splits that never move, broken files, the cache of large folders."""

import logging
import os
from functools import partial

import numpy as np
import pytest
from PIL import Image

from diffusion.data import decoded
from diffusion.data.folder import image_folder, place
from diffusion.data.images import save_png
from diffusion.data.named import named_images, open_images
from diffusion.data.samples import save_samples
from diffusion.data.sources import digits

RANDOM = np.random.RandomState(0)


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffusion" / "pictures"


def pictures(folder, names, shape=(4, 6, 3)):
    """Writes a random picture of each name; returns them in that order."""
    images = RANDOM.randint(0, 256, (len(names), *shape), np.uint8)
    for name, image in zip(names, images, strict=True):
        save_png(folder / name, image, smallest_side=1)
    return images


def images_of(source):
    return source.read(np.arange(source.num_examples))["image"]


def test_pictures_of_one_size_keep_it(tmp_path):
    grey = pictures(tmp_path / "set", ["1.png", "2.png", "10.png"], (4, 6, 1))
    source = image_folder(tmp_path / "set")
    assert (source.name, source.split, source.num_examples) == ("set", "all", 3)
    assert (source.image_shape, source.num_classes, source.class_names) == ((4, 6, 1), None, ())
    np.testing.assert_array_equal(images_of(source), grey)

    colour = pictures(tmp_path / "set", ["deeper/b.png"])
    both = image_folder(tmp_path / "set")
    np.testing.assert_array_equal(images_of(both), np.concatenate([grey.repeat(3, -1), colour]))
    assert both.fingerprint != source.fingerprint
    assert image_folder(tmp_path / "set", channels=4).image_shape == (4, 6, 4)

    pictures(tmp_path / "set", ["large.png"], (8, 8, 3))
    with pytest.raises(ValueError, match=r"large\.png is 8x8 but .*1\.png is 6x4: .*--config\.data\.image_size=N"):
        image_folder(tmp_path / "set")


def test_pictures_of_any_size_are_brought_to_one(tmp_path):
    (wide,) = pictures(tmp_path, ["1.png"], (4, 8, 3))
    pictures(tmp_path, ["2.png"], (9, 7, 1))
    source = image_folder(tmp_path, image_size=4)
    assert source.image_shape == (4, 4, 3)
    np.testing.assert_array_equal(images_of(source)[0], wide[:, 2:6])  # its central square, which needs no resizing
    assert image_folder(tmp_path, image_size=(6, 3), channels=1).image_shape == (6, 3, 1)


def test_sub_folders_are_classes(tmp_path):
    names = ["class2/1.png", "class2/deep/2.png", "class10/1.png", "other/1.png"]
    images = pictures(tmp_path / "set", names)
    source = image_folder(tmp_path / "set", classes=True)
    assert source.num_classes == 3 and source.class_names == ("class2", "class10", "other")
    assert source.read(np.arange(4))["label"].tolist() == [0, 0, 1, 2]
    np.testing.assert_array_equal(images_of(source), images)
    assert image_folder(tmp_path / "set").num_classes is None
    pictures(tmp_path / "set", ["loose.png"])
    with pytest.raises(ValueError, match=r"loose\.png has no class, .*sub-folder"):
        image_folder(tmp_path / "set", classes=True)


def test_splits_are_disjoint_and_never_move(tmp_path):
    names = [f"{kind}/{i}.png" for kind in "ab" for i in range(20)]
    pictures(tmp_path, names, (1, 1, 3))

    def split_of(split):
        return {bytes(image.tobytes()) for image in images_of(image_folder(tmp_path, split, held_out=0.3))}

    train, test = split_of("train"), split_of("test")
    assert train | test == split_of("all") and not train & test and len(test) >= 4
    pictures(tmp_path, ["0.png", "a/0.5.png", "c/1.png"], (1, 1, 3))
    assert train <= split_of("train") and test <= split_of("test")
    # Classes have the same numbers in every split, also where a split lacks one.
    (tmp_path / "0.png").unlink()
    for split in ("train", "test"):
        assert image_folder(tmp_path, split, held_out=0.3, classes=True).class_names == ("a", "b", "c")


def test_places_are_even_and_frozen():
    found = np.array([place(f"folder/{i}.png") for i in range(2000)])
    assert found.min() >= 0 and found.max() < 1
    assert abs((found < 0.1).mean() - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5  # four standard errors
    assert place("a/1.png") == 0.5241839035952829  # recorded: a change moves pictures between training and test
    assert place("caf\u00e9.png") == place("cafe\u0301.png")


@pytest.mark.parametrize(
    ("split", "held_out", "line"),
    [
        ("test", 0.0, r"none of its 3 pictures is in the split 'test' with held_out=0\.0.*--config\.data\.held_out"),
        ("train", 1.0, r"held_out is 1\.0: choose a share .* \[0, 1\)"),
        ("val", 0.1, "the splits 'train', 'test' and 'all', not 'val'"),
    ],
)
def test_splits_that_cannot_be_had(tmp_path, split, held_out, line):
    pictures(tmp_path, ["1.png", "2.png", "3.png"])
    with pytest.raises(ValueError, match=line):
        image_folder(tmp_path, split, held_out=held_out)


def test_no_pictures(tmp_path):
    with pytest.raises(ValueError, match=r"holds no pictures \(png, jpg"):
        image_folder(tmp_path)
    with pytest.raises(ValueError, match="there is no folder"):
        image_folder(tmp_path / "nowhere")


@pytest.mark.parametrize("in_memory", [True, False])
def test_broken_pictures_are_named_or_skipped(tmp_path, caplog, in_memory):
    images = pictures(tmp_path / "set", ["a/1.png", "a/2.png", "b/3.png", "b/4.png"], (40, 40, 3))
    (tmp_path / "set/a/2.png").write_bytes((tmp_path / "set/a/2.png").read_bytes()[:-2000])  # its header is intact
    (tmp_path / "set/b/3.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^\S*3\.png cannot be read .*--config\.data\.skip_broken=True") as error:
        image_folder(tmp_path / "set", in_memory=in_memory)
    assert "\n" not in str(error.value)
    for _ in range(2):  # decoded, and from the cache
        with caplog.at_level(logging.WARNING):
            source = image_folder(tmp_path / "set", classes=True, skip_broken=True, in_memory=in_memory)
        (record,) = caplog.records
        assert "2 of 4 pictures cannot be read: " in record.getMessage() and "2.png" in record.getMessage()
        caplog.clear()
        np.testing.assert_array_equal(images_of(source), images[[0, 3]])
        assert source.read(np.arange(2))["label"].tolist() == [0, 1]
    for name in ("a/1.png", "b/4.png"):
        (tmp_path / "set" / name).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"none of the 4 pictures can be read, the first is .*1\.png"):
        image_folder(tmp_path / "set", skip_broken=True)


def test_large_folders_are_decoded_once_into_the_cache(tmp_path, cache, monkeypatch):
    pictures(tmp_path / "set", [f"{kind}/{i}.png" for kind in "ab" for i in range(4)])

    def make(**options):
        return image_folder(tmp_path / "set", image_size=4, classes=True, **options)

    memory = make()
    assert not cache.exists()
    monkeypatch.setattr(decoded, "LARGEST_IN_MEMORY", 8 * 4 * 4 * 3 - 1)
    mapped = make()
    (file,) = cache.glob("*.npy")
    assert mapped._replace(read=memory.read) == memory  # the same fingerprint among them
    np.testing.assert_array_equal(images_of(mapped), images_of(memory))
    np.testing.assert_array_equal(np.load(file), images_of(memory))
    image = images_of(mapped)
    image[:] = 0  # the caller's own
    np.testing.assert_array_equal(images_of(mapped), images_of(memory))

    calls = []
    decode = decoded.decode
    monkeypatch.setattr(decoded, "decode", lambda *args, **options: calls.append(1) or decode(*args, **options))
    assert make().fingerprint == memory.fingerprint and not calls
    for size in (file.stat().st_size - 1, 10, 0):  # truncated
        os.truncate(file, size)
        np.testing.assert_array_equal(images_of(make()), images_of(memory))
        assert len(calls) == 8 and len(list(cache.iterdir())) == 2
        calls.clear()
    file.with_suffix(".json").unlink()  # killed before it was complete
    assert make().fingerprint == memory.fingerprint and len(calls) == 8
    os.utime(tmp_path / "set/a/1.png", ns=(0, 1))  # changed
    make()
    assert len(calls) == 16
    assert image_folder(tmp_path / "set", image_size=3).image_shape == (3, 3, 3)  # another setting


def test_a_cache_without_room_is_reported(tmp_path, cache):
    pictures(tmp_path / "set", ["1.png"])
    cache.parent.parent.mkdir()
    cache.parent.write_text("")  # no folder can be made there
    with pytest.raises(ValueError, match=r"cannot write .*GiB of decoded pictures .*XDG_CACHE_HOME"):
        image_folder(tmp_path / "set", in_memory=False)


def test_orientation_counts_in_sizes(tmp_path):
    pictures(tmp_path, ["1.png"], (6, 4, 3))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying
    Image.fromarray(RANDOM.randint(0, 256, (4, 6, 3), np.uint8)).save(tmp_path / "2.jpg", exif=exif)
    assert image_folder(tmp_path).image_shape == (6, 4, 3)


def test_images_by_name(tmp_path):
    images = pictures(tmp_path / "set", [f"{kind}/{i}.png" for kind in "ab" for i in range(9)])
    named = partial(
        named_images, "folder", data_dir=tmp_path / "set", held_out=0.3, classes=True, image_size=0, channels=0
    )
    assert named("train").num_examples + named("test").num_examples == 18 and named("test").class_names == ("a", "b")
    assert named("train", image_size=3, channels=1).image_shape == (3, 3, 1)
    with pytest.raises(ValueError, match=r"name one by --config\.data\.dir=DIR"):
        named_images("folder", "train")
    assert named_images("digits", "test").fingerprint == digits("test").fingerprint
    with pytest.raises(ValueError, match="digits are 8x8 with 1 channel"):
        named_images("digits", "test", image_size=16)

    save_samples(tmp_path / "samples.npz", images)
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(3), sigma=np.eye(3))
    for spec in (tmp_path / "set", str(tmp_path / "samples.npz")):
        found = open_images(spec)
        assert found is not None and (images_of(found) == images).all() and found.num_classes is None
    assert open_images(tmp_path / "statistics.npz") is None
    for spec, split in (("digits:test", "test"), ("digits:", "train"), ("digits", "train")):
        found = open_images(spec)
        assert found is not None and (found.name, found.split) == ("digits", split)
    with pytest.raises(ValueError, match="nowhere"):
        open_images(tmp_path / "nowhere")
