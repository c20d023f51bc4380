"""Identification by the nearest true picture, on arrays whose answers are known."""

import doctest

import numpy as np
import pytest

from diffusion.evaluation import identify
from diffusion.evaluation.identify import Gallery, Nearest, chance, given_back, nearest, right, shares

# Two people in two tones, one thing without; the second picture of each person is held out.
POINTS = np.array([[0.0, 0.0], [0.0, 1.0], [10.0, 0.0], [10.0, 1.0], [50.0, 0.0]])
ASPECTS = {"person": ["ann", "ann", "bob", "bob", "apple"], "tone": ["light", "dark", "light", "dark", ""]}
GALLERY = Gallery(POINTS, ASPECTS, np.array([True, False, True, False, True]))


def test_the_nearest_picture_and_the_nearest_that_was_trained_on():
    drawn = np.array([[0.0, 0.9], [9.0, 0.2], [0.0, 1.0]])
    found = nearest(drawn, GALLERY, np.array([1, 3, 1]))
    np.testing.assert_array_equal(found.row, [1, 2, 1])
    np.testing.assert_allclose(found.distance, [0.1, np.hypot(1, 0.2), 0], atol=1e-7)
    np.testing.assert_array_equal(found.seen_row, [0, 2, 0])
    np.testing.assert_allclose(found.seen_distance, [0.9, np.hypot(1, 0.2), 1])


@pytest.mark.parametrize("wanted", [1, 2])
def test_of_pictures_that_are_the_same_the_wanted_one_is_found(wanted):
    gallery = Gallery(np.array([[5.0], [1.0], [1.0]]), {}, np.ones(3, bool))
    assert nearest(np.array([[1.5]]), gallery, np.array([wanted])).row == [wanted]
    assert nearest(np.array([[1.5]]), gallery, np.array([0])).row == [1]


def test_rows_do_not_depend_on_how_many_are_compared_at_once(monkeypatch):
    random = np.random.RandomState(0)
    gallery = Gallery(random.randn(50, 7), {}, np.arange(50) < 30)
    drawn, wanted = random.randn(23, 7), random.randint(0, 50, 23)
    distances = np.linalg.norm(drawn[:, None] - gallery.features, axis=-1)
    monkeypatch.setattr(identify, "ROWS", 5)
    found = nearest(drawn, gallery, wanted)
    np.testing.assert_array_equal(found.row, distances.argmin(1))
    np.testing.assert_array_equal(found.seen_row, distances[:, :30].argmin(1))
    np.testing.assert_allclose(found.distance, distances.min(1))


def test_features_of_another_type_are_compared_in_float64():
    """In float32 the squares of such features leave no digit for a distance of 1."""
    far = np.array([[2.0**24], [2.0**24 + 2]], np.float32)
    gallery = Gallery(far, {}, np.ones(2, bool))
    assert nearest(far[1:], gallery, np.array([0])).row == [1]


def test_a_gallery_without_pictures_of_the_training_is_refused():
    with pytest.raises(ValueError, match="no picture of the gallery was trained on: give those of the training too"):
        nearest(POINTS[:1], GALLERY._replace(seen=np.zeros(5, bool)), np.array([1]))


def test_what_is_right_by_aspect():
    found, wanted = np.array([1, 3, 0, 4]), np.array([1, 1, 1, 1])
    named = right(found, wanted, GALLERY)
    assert list(named) == ["picture", "person", "tone", "person and tone"]
    np.testing.assert_array_equal(named["person"], [True, False, True, False])
    np.testing.assert_array_equal(named["tone"], [True, True, False, False])
    np.testing.assert_array_equal(named["person and tone"], [True, False, False, False])
    assert shares(found, wanted, GALLERY) == {"picture": 0.25, "person": 0.5, "tone": 0.5, "person and tone": 0.25}


def test_another_picture_of_the_same_aspects_is_not_the_picture():
    gallery = Gallery(np.eye(2), {"person": ["ann", "ann"], "tone": ["dark", "dark"]}, np.ones(2, bool))
    found = shares(np.array([0]), np.array([1]), gallery)
    assert found == {"picture": 0.0, "person": 1.0, "tone": 1.0, "person and tone": 1.0}


def test_of_one_aspect_there_is_no_share_of_all():
    gallery = GALLERY._replace(aspects={"person": ASPECTS["person"]})
    assert list(shares(np.array([0]), np.array([1]), gallery)) == ["picture", "person"]


def test_chance_is_the_share_of_pictures_drawn_at_random():
    """Of five pictures one is the wanted one, two show its person and two its tone."""
    found = chance(np.array([1, 3]), GALLERY)
    assert found == pytest.approx({"picture": 0.2, "person": 0.4, "tone": 0.4, "person and tone": 0.2})
    random = np.random.RandomState(0).randint(0, 5, 20_000)
    drawn = shares(random, np.full(20_000, 1), GALLERY)
    assert drawn == pytest.approx(chance(np.array([1]), GALLERY), abs=4 * (0.25 / 20_000) ** 0.5)  # 4 standard errors


def test_pictures_of_the_training_that_are_given_back():
    """The limit is 0.5: the first is near to its own picture, the second a copy, the third merely nearest to one."""
    found = Nearest(np.array([1, 0, 2]), np.array([0.1, 0.4, 3.0]), np.array([0, 0, 2]), np.array([0.9, 0.4, 3.0]))
    through = np.full(10, 0.5)
    assert given_back(found, GALLERY, through) == pytest.approx({"nearest": 2 / 3, "copies": 1 / 3})


def test_the_examples():
    failures, count = doctest.testmod(identify, extraglobs={"np": np})
    assert count and not failures
