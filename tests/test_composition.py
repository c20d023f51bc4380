"""The reader of scenes on real ones, and what it must not let pass."""

import numpy as np
import pytest

from diffusion.data.scenes import Box, draw, scene
from diffusion.evaluation.composition import Found, blobs, by_kind, colour_of, fit_reader, satisfied, wholly


@pytest.fixture(scope="module")
def read():
    return fit_reader(num_scenes=3000)


def found_of(wanted):
    """What a perfect reader would find, from the last to the first."""
    return [Found(thing.digit, thing.colour, thing.size, thing.box) for thing in reversed(wanted.objects)]


@pytest.mark.parametrize("split", ["test", "held_out"])
def test_ceiling_on_real_scenes(read, split):
    wanted = [scene(7, split, i) for i in range(300)]
    images = np.stack([draw(one, split) for one in wanted])
    right = wholly(wanted, images, read)
    # A share of 98% of 300 has a standard error of 0.8%, and so small a training set costs 1%.
    assert right.mean() >= 0.95
    assert not wholly(wanted[1:] + wanted[:1], images, read).mean() > 0.02
    shares = by_kind(wanted, right)
    assert list(shares) == ["all", "single", "position", "size", "colours", "relation", "counting", "two objects"]
    assert shares["all"] == right.mean()


def test_noise_and_blank_pictures_hold_nothing_right(read):
    wanted = [scene(0, "test", i) for i in range(8)]
    noise = np.random.RandomState(0).randint(0, 256, (8, 16, 16, 3)).astype(np.uint8)
    assert not wholly(wanted, noise, read).any()
    assert read(np.zeros((2, 16, 16, 3), np.uint8)) == [[], []]


def test_noise_of_a_generated_picture_does_not_hide_the_digit(read):
    wanted = [scene(3, "test", i, kinds=["single"]) for i in range(60)]
    images = np.stack([draw(one, "test") for one in wanted]).astype(int)
    images = np.clip(images + np.random.RandomState(0).randint(-12, 13, images.shape), 0, 255).astype(np.uint8)
    assert wholly(wanted, images, read).mean() > 0.9


def test_colours_are_named_by_their_direction():
    assert colour_of(np.array([200.0, 102.0, 3.0], np.float32)) == "orange"
    assert colour_of(np.array([90.0, 88.0, 91.0], np.float32)) == "white"


def test_ink_is_separated_from_a_grey_background():
    image = np.full((16, 16, 3), 30, np.uint8)
    image[2:8, 3:6] = (255, 30, 30)
    (blob,) = blobs(image)
    assert blob.extent == (3, 6) and blob.middle == (4.5, 5.0) and colour_of(blob.hue) == "red"
    np.testing.assert_allclose(blob.window.sum(), 18, rtol=1e-5)


@pytest.mark.parametrize("kind", ["single", "position", "size", "colours", "relation", "counting"])
def test_every_aspect_counts(kind):
    for index in range(20):
        wanted = scene(11, "test", index, kinds=[kind])
        found = found_of(wanted)
        assert all(satisfied(wanted, found, 16).values())
        one, *others = found
        assert not any(satisfied(wanted, others, 16).values())

        def aspects(change, one=one, others=others, wanted=wanted):
            return satisfied(wanted, [one._replace(**change), *others], 16)

        assert not all(aspects({"digit": (one.digit + 1) % 10}).values())
        assert not all(aspects({"colour": "white" if one.colour != "white" else "red"}).values())
        if wanted.objects[-1].size != "medium":
            assert not aspects({"size": "medium"})["sizes"]
        if wanted.place:
            left, top = (9 if start < 6 else 0 for start in one.box[:2])
            far = Box(left, top, 7)
            assert not aspects({"box": far})["places"]
        if wanted.relation:
            swapped = [a._replace(box=b.box) for a, b in zip(found, reversed(found), strict=True)]
            assert not all(satisfied(wanted, swapped, 16).values())
