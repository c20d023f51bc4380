"""Captioned scenes: what the caption says is what the picture shows, and held-out combinations are never trained on."""

import itertools

import numpy as np
import pytest

from diffusion.data import scenes as scenes_module
from diffusion.data.captions import with_text
from diffusion.data.scenes import (
    COLOURS,
    DIGITS,
    KINDS,
    PLACES,
    PLURALS,
    RELATIONS,
    Box,
    draw,
    held_out,
    place_of,
    relation_holds,
    scene,
    scenes,
)

COUNT = 150


def made(split, canvas, count=COUNT):
    return [scene(0, split, index, canvas) for index in range(count)]


@pytest.mark.parametrize("canvas", [16, 32, 48])
@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_word_of_the_caption_is_true_of_the_picture(split, canvas):
    for one in made(split, canvas):
        assert one.kind in KINDS and 1 <= len(one.objects) <= 3
        image = draw(one, split, canvas).astype(int)
        covered = np.zeros((canvas, canvas), bool)
        for digit in one.objects:
            left, top, side = digit.box
            part = (slice(top, top + side), slice(left, left + side))
            assert 0 <= left <= canvas - side and 0 <= top <= canvas - side
            # Nothing overlaps, nor touches: another one's pixels begin after a gap.
            assert not covered[max(0, top - 1) : top + side + 1, max(0, left - 1) : left + side + 1].any()
            covered[part] = True
            # Every pixel lies between the background and the named colour, the strongest near the colour.
            paint = np.array(COLOURS[digit.colour]) - one.background
            ink = (image[part] - one.background) @ paint / (paint @ paint)
            assert ink.max() > 0.6
            assert np.abs(image[part] - one.background - ink[..., None] * paint).max() <= 1.0
            assert (digit.size == "medium") == (digit.size not in one.caption)
        assert (image[~covered] == one.background).all()
        first = one.objects[0]
        if one.kind == "counting":
            assert {(o.colour, o.digit) for o in one.objects} == {(first.colour, first.digit)}
            assert one.caption == f"{DIGITS[len(one.objects)]} {first.colour} {PLURALS[first.digit]}"
            continue
        words = one.caption.split()
        named = [(words[i - 1], word) for i, word in enumerate(words) if word in DIGITS]
        assert named == [(o.colour, DIGITS[o.digit]) for o in one.objects]
        assert len(set(named)) == len(named)
        assert words[0] == ("an" if words[1][0] == "o" else "a")
        relations = [relation for relation in RELATIONS if relation in one.caption]
        places = [place for row in PLACES for place in row if one.caption.endswith(place)]
        if one.relation:
            assert [one.relation] == relations
            holding = [r for r in RELATIONS if relation_holds(r, one.objects[0].box, one.objects[1].box)]
            assert holding == relations
        if one.place:
            assert [one.place] == places == [place_of(first.box, canvas)]


def test_the_examples_of_the_docstring_occur():
    said = {one.caption for one in made("train", 16, 1500)}
    shapes = [
        "in the top right corner",
        "on the left",
        "to the left of",
        "above a large",
        " and an ",
        "three ",
        "a large ",
    ]
    assert all(any(shape in caption for caption in said) for shape in shapes)
    kinds = [one.kind for one in made("held_out", 16, 600)]
    # 100 expected, a standard deviation of 9.1.
    assert all(abs(kinds.count(kind) - 100) < 46 for kind in KINDS)


def test_no_held_out_combination_is_ever_trained_on_and_pictures_are_not_shared():
    def combinations(split):
        return {frozenset((o.colour, o.digit) for o in one.objects) for one in made(split, 16, 1000)}

    train, test, unseen = (combinations(split) for split in ("train", "test", "held_out"))
    assert not train & unseen and not test & unseen
    single = {one for one in unseen if len(one) == 1}
    assert len(single) == 16 and {digit for ((_, digit),) in single} == set(range(10))
    assert {colour for ((colour, _),) in single} == set(COLOURS)
    pairs = list(itertools.combinations(itertools.product(COLOURS, range(10)), 2))
    # Binomial(3160, 1/5): 20% with a standard deviation of 0.7%.
    assert abs(np.mean([held_out(pair) for pair in pairs]) - 0.2) < 0.03
    assert all(held_out(pair) == held_out(pair[::-1]) for pair in pairs[:200])
    # "train" and "test" differ in the handwriting: their pictures are rows of different splits of the digits.
    assert max(o.picture for one in made("train", 16) for o in one.objects) > 500
    assert max(o.picture for one in made("test", 16) for o in one.objects) < 500


def test_scenes_are_a_pure_function_of_seed_split_and_index():
    assert scene(3, "train", 7) == scene(3, "train", 7)
    assert len({str(scene(seed, "train", index)) for seed, index in [(3, 7), (4, 7), (3, 8)]}) == 3
    assert scene(2**40, "test", 0) != scene(0, "test", 0)
    captioned = scenes("test", 16, 50)
    read = captioned.read(np.arange(50))
    assert captioned.image_shape == (16, 16, 3) and read["image"].dtype == np.uint8
    for index in (0, 17, 49):
        one = scene(0, "test", index)
        assert captioned.captions[read["label"][index]] == one.caption
        assert (read["image"][index] == draw(one, "test")).all()
    assert len(set(captioned.captions)) == len(captioned.captions) == captioned.num_classes
    assert captioned.fingerprint == scenes("test", 16, 50).fingerprint
    assert captioned.fingerprint != scenes("test", 16, 50, seed=1).fingerprint


def test_digits_are_those_of_the_caption():
    atlas = scenes_module._atlas("train", 16)
    source = scenes_module.digits("train")
    label = source.read(np.arange(source.num_examples))["label"]
    assert all((label[rows] == digit).all() for digit, rows in enumerate(atlas.rows))
    assert all(o.picture in atlas.rows[o.digit] for one in made("train", 16, 100) for o in one.objects)


def test_text_is_read_beside_the_images():
    captioned = scenes("train", 16, 30)
    source = with_text(captioned, lambda captions: np.array([[len(c), i] for i, c in enumerate(captions)], np.int32))
    read = source.read(np.array([3, 3, 21]))
    assert (read["text"][:, 1] == read["label"]).all()
    assert read["text"][2, 0] == len(captioned.captions[read["label"][2]])
    with pytest.raises(ValueError, match="one for each"):
        with_text(captioned, lambda captions: np.zeros((1, 2)))


def test_places_and_relations_of_boxes():
    assert place_of(Box(0, 9, 7), 16) == "in the bottom left corner" and place_of(Box(4, 4, 7), 16) == "in the middle"
    assert relation_holds("above", Box(4, 0, 7), Box(4, 8, 7)) and not relation_holds(
        "below", Box(4, 0, 7), Box(4, 8, 7)
    )
    assert not relation_holds("to the left of", Box(0, 0, 7), Box(6, 0, 7))  # they overlap
    assert not relation_holds("above", Box(0, 0, 6), Box(10, 10, 6))  # as much to the left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(split="validation"), "not 'validation'"),
        (dict(split="train", canvas=20), "multiples of 16"),
        (dict(split="train", kinds=("triple",)), "kind triple: choose among single"),
        (dict(split="train", num_examples=0), "at least 1"),
    ],
)
def test_what_cannot_be_drawn(arguments, message):
    with pytest.raises(ValueError, match=message):
        scenes(**{"num_examples": 2, **arguments})
