"""Augmentations by name: what each does to an image, and that (seed, name, step, place in the batch) decide it."""

import hashlib

import numpy as np
import pytest
from helpers import config_of

from diffusion.data.augmentations import AUGMENTATIONS, augment, check_augmentations, colour, crop, rotate90, shift
from diffusion.data.batches import make_batches
from diffusion.data.sources import array_source
from diffusion.model.batches import check_batches, training_batches
from diffusion.runs.train import refuse_changes

NAMES = tuple(AUGMENTATIONS)
RANDOM = np.random.RandomState(0)
PICTURE = RANDOM.randint(0, 256, (16, 16, 3), np.uint8)


def numbered(height=8, width=8, count=20):
    """Images whose every pixel is another."""
    image = np.arange(count * height * width * 3, dtype=np.uint32).astype(np.uint8).reshape(count, height, width, 3)
    return array_source(image, None, "numbered", "train", None)


def collect(source=None, steps=5, **options):
    batches = make_batches(source or numbered(), 11, 8, num_steps=steps, **options)
    return np.stack([batch["image"] for batch in batches])


# --- what they do


def test_shift_moves_by_an_eighth_at_most_and_every_way():
    place = np.arange(16 * 24, dtype=np.uint16).reshape(16, 24)
    image = np.stack([place // 24, place % 24], axis=-1).astype(np.uint8)[..., [0, 1, 1]]  # row, column
    found = set()
    for numbers in RANDOM.random_sample((400, 3)):
        moved = shift(image, numbers)
        down, right = (int(moved[8, 12, axis]) - at for axis, at in ((0, 8), (1, 12)))
        found.add((down, right))
        assert (moved[3:-3, 4:-4] == image[3 + down : 13 + down, 4 + right : 20 + right]).all()
        assert (np.abs(np.diff(moved[..., 0].astype(int), axis=0)) <= 1).all()  # reflected: no edge is seen
        assert (np.abs(np.diff(moved[..., 1].astype(int), axis=1)) <= 1).all()
    assert found == {(down, right) for down in range(-2, 3) for right in range(-3, 4)}


def test_crop_resizes_a_part_of_the_same_ratio():
    ramp = np.broadcast_to(np.linspace(0, 255, 64).astype(np.uint8)[None, :, None], (48, 64, 3))
    spans = []
    for numbers in RANDOM.random_sample((100, 3)):
        part = crop(np.ascontiguousarray(ramp), numbers)
        assert part.shape == ramp.shape and part.dtype == np.uint8 and (part[0] == part[-1]).all()
        spans.append(int(part[0, -1, 0]) - int(part[0, 0, 0]))
    assert 0.74 * 255 <= min(spans) < 0.8 * 255 and 0.95 * 255 < max(spans) <= 255
    np.testing.assert_array_equal(crop(PICTURE, np.array([0.0, 0.5, 0.5])), PICTURE)  # all of it
    assert (crop(np.full((9, 7, 1), 77, np.uint8), np.array([0.9, 0.1, 0.9])) == 77).all()
    assert crop(np.zeros((9, 7, 4), np.uint8), np.array([0.9, 0.1, 0.9])).shape == (9, 7, 4)


def test_rotations_are_of_a_quarter_each():
    turned = [rotate90(PICTURE, np.array([number, 0.0, 0.0])) for number in (0.0, 0.3, 0.6, 0.99)]
    for one, following in zip(turned, [*turned[1:], turned[0]], strict=True):
        np.testing.assert_array_equal(following, one.swapaxes(0, 1)[::-1])  # transposed, then upside down


def test_colour_changes_contrast_and_brightness_and_not_alpha():
    picture = np.concatenate([PICTURE, RANDOM.randint(0, 256, (16, 16, 1), np.uint8)], axis=-1) // 2 + 64
    np.testing.assert_array_equal(colour(picture, np.array([0.5, 0.5, 0.5])), picture)
    lighter, flatter = colour(picture, np.array([0.5, 1.0, 0.5])), colour(picture, np.array([0.0, 0.5, 0.5]))
    for changed in (lighter, flatter):
        np.testing.assert_array_equal(changed[..., 3], picture[..., 3])
    before, light, flat = (one[..., :3].astype(float) for one in (picture, lighter, flatter))
    assert set(np.unique(light - before)) <= {25, 26}  # a tenth of 255, rounded
    # Each pixel is rounded by half a level at most.
    assert abs(flat.mean() - before.mean()) <= 0.5 and abs(flat.std() - 0.8 * before.std()) <= 0.5
    assert colour(np.full((2, 2, 1), 250, np.uint8), np.array([0.5, 1.0, 0.0])).max() == 255


# --- what decides it


def test_batches_start_anywhere_and_do_not_depend_on_threads_or_processes():
    whole = collect(augmentations=NAMES, flip=True)
    assert whole.shape == (5, 8, 8, 8, 3) and whole.dtype == np.uint8
    later = collect(augmentations=NAMES, flip=True, steps=2, start_step=3, num_threads=1, prefetch=1)
    parts = [collect(augmentations=NAMES, flip=True, process_index=p, process_count=4, num_threads=0) for p in range(4)]
    np.testing.assert_array_equal(whole[3:], later)
    np.testing.assert_array_equal(whole, np.concatenate(parts, axis=1))


def test_what_one_draws_does_not_depend_on_the_others():
    image = RANDOM.randint(0, 256, (8, 16, 16, 3), np.uint8)

    def changed(image, *names, seed=3, step=5):
        return augment(image, names, seed, step, 8, slice(8))

    both = changed(image, "shift", "colour")
    np.testing.assert_array_equal(both, changed(changed(image, "shift"), "colour"))
    assert (changed(image, "colour", "shift") != both).any()  # of what is reflected, the mean is another
    np.testing.assert_array_equal(changed(image, "shift"), changed(image, "shift"))
    for other in ({"seed": 4}, {"step": 6}):
        assert (changed(image, "shift", **other) != changed(image, "shift")).any()
    same = augment(np.repeat(image[:1], 8, axis=0), ["shift"], 3, 5, 8, slice(8))
    assert len({one.tobytes() for one in same}) > 1  # and each image of a batch by its own


def test_labels_order_and_flips_are_as_without():
    plain = list(make_batches(numbered(), 11, 8, num_steps=3, flip=True))
    turned = list(make_batches(numbered(), 11, 8, num_steps=3, flip=True, augmentations=["rotate90"]))
    for one, other in zip(plain, turned, strict=True):
        np.testing.assert_array_equal(one["label"], other["label"])
        for image, changed in zip(one["image"], other["image"], strict=True):
            assert any((np.rot90(image, turns) == changed).all() for turns in range(4))


def test_the_flip_has_the_bits_that_it_had():
    image = np.arange(10 * 4 * 6 * 3, dtype=np.uint32).astype(np.uint8).reshape(10, 4, 6, 3)
    batches = make_batches(array_source(image, None, "numbered", "train", None), 3, 4, num_steps=5, flip=True)
    digest = hashlib.sha256(b"".join(batch["image"].tobytes() for batch in batches)).hexdigest()
    assert digest[:16] == "db8f9d69f2fedbf9"  # recorded of the code before there were augmentations


def test_a_config_names_them():
    config = config_of("digits", data__augment=("shift", "rotate90"), data__batch_size=8)
    batch = next(training_batches(config, numbered(), 2))
    wanted = next(make_batches(numbered(), config.seed, 8, start_step=2, augmentations=("shift", "rotate90")))
    np.testing.assert_array_equal(batch["image"], wanted["image"])


# --- what is refused


@pytest.mark.parametrize(
    ("names", "shape", "line"),
    [
        (("blur",), (8, 8), r"data\.augment names 'blur': choose from shift, crop, rotate90, colour"),
        (("flip",), (8, 8), r"names 'flip', which is data\.flip=True: choose from"),
        (("shift", "shift"), (8, 8), "name each once"),
        (("colour", "rotate90"), (6, 8), r"rotates images of 6x8, which are not square: leave rotate90 out, or set"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_compiled(names, shape, line):
    source = numbered(*shape)
    with pytest.raises(ValueError, match=line) as error:
        check_augmentations(names, [source.image_shape])
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=line):
        make_batches(source, 0, 4, augmentations=names)
    with pytest.raises(ValueError, match=line):
        check_batches(config_of("digits", data__augment=names, data__batch_size=4), source)


def test_pictures_of_several_shapes_are_augmented_but_not_turned():
    parts = (numbered(6, 8), numbered(8, 6))
    source = numbered()._replace(parts=parts, num_examples=40)
    shapes = {batch["image"].shape for batch in make_batches(source, 0, 8, num_steps=5, augmentations=["shift"])}
    assert shapes == {(8, 6, 8, 3), (8, 8, 6, 3)}
    with pytest.raises(ValueError, match="images of 6x8, which are not square"):
        make_batches(source, 0, 8, augmentations=["rotate90"])


def test_what_is_read_beside_images_or_in_their_place_is_not_augmented(refused):
    for changes, line in (
        ({"data__augment": ("shift",)}, r"data\.augment=\('shift',\) augments images, and latents are not aug.*: X"),
        ({"data__flip": True}, r"data\.flip=True mirrors images, and latents are not mirrored: X"),
    ):
        refused(line, lambda changes=changes: refuse_changes(config_of("digits", **changes), "latents", "X"))
    refuse_changes(config_of("digits"), "latents", "X")
