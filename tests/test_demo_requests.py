"""What the prompt page is asked for: requests and uploads are checked before anything is drawn; previews."""

import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.demo.previews import make_linear, make_preview
from diffusion.demo.requests import Limits, Request, TooLarge, check, read_upload
from diffusion.model.space import Space
from diffusion.runs.run import open_run

PICTURE = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
MASK = np.arange(30)[None].repeat(20, 0) > 15


@pytest.fixture(scope="module")
def classes(trained):
    return open_run(trained("digits_classes"), num_devices=1)


@pytest.fixture(scope="module")
def scenes(trained):
    return open_run(trained("scenes"), num_devices=1)


@pytest.mark.parametrize(
    "run, fields, sentence",
    [
        ("scenes", {}, "The prompt is empty"),
        ("scenes", {"prompt": " \n"}, "The prompt is empty"),
        ("scenes", {"prompt": "x" * 5000}, "has 5000 characters: use at most 2000"),
        ("scenes", {"prompt": "a", "negative_prompt": "x" * 2001}, "negative prompt has 2001"),
        ("scenes", {"prompt": "a", "label": 3}, "reads no classes"),
        ("scenes", {"prompt": 3}, "no text"),
        ("classes", {"prompt": "a"}, "reads no prompts"),
        ("classes", {"negative_prompt": "a"}, "reads no prompts"),
        ("classes", {"label": 10}, "class is 10: give a whole number from 0 to 9"),
        ("classes", {"label": True}, "class is True"),
        ("classes", {"seed": -1}, "seed is -1"),
        ("classes", {"seed": 2**32}, "seed is 4294967296"),
        ("classes", {"seed": "1"}, "seed is 1"),
        ("classes", {"seed": 1.5}, "seed is 1.5"),
        ("classes", {"num_pictures": 0}, "number of pictures is 0"),
        ("classes", {"num_pictures": 17}, "from 1 to 16"),
        ("classes", {"num_steps": 201}, "number of steps is 201"),
        ("classes", {"num_steps": -1}, "number of steps is -1"),
        ("classes", {"sampler": "magic"}, "no sampler 'magic': choose from ancestral, ddim"),
        ("classes", {"guidance": float("nan")}, "guidance is nan"),
        ("classes", {"guidance": 1e9}, "guidance is 1000000000.0"),
        ("classes", {"guidance": "x"}, "guidance is x"),
        ("classes", {"size": (0, 8)}, "height is 0"),
        ("classes", {"size": (8, 100_000)}, "width is 100000"),
        ("classes", {"size": (8,)}, "a height and a width"),
        ("classes", {"strength": 0.0, "image": PICTURE}, "strength is 0"),
        ("classes", {"strength": 1.5, "image": PICTURE}, "strength is 1.5"),
        ("classes", {"mask": np.ones((20, 30), bool)}, "A mask needs the picture"),
        ("classes", {"image": PICTURE, "mask": np.ones((3, 3), bool)}, "not as large"),
        ("classes", {"image": PICTURE, "mask": np.zeros((20, 30), bool)}, "mask is empty"),
        ("classes", {"image": PICTURE, "mask": PICTURE}, "not as large"),
        ("classes", {"image": PICTURE, "mask": np.ones((20, 30))}, "neither of bool nor of uint8"),
        ("classes", {"image": PICTURE / 255.0}, "are float64"),
        ("classes", {"image": np.zeros((0, 3, 3), np.uint8)}, "nothing empty"),
        ("classes", {"references": (PICTURE,)}, "not told of pictures to edit"),
    ],
)
def test_what_cannot_be_drawn_is_one_sentence(classes, scenes, run, fields, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        check(Request(**fields), {"classes": classes, "scenes": scenes}[run])
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_a_checked_request_is_explicit_and_stays_as_it_is(classes):
    asked = Request(label=3, image=PICTURE, mask=MASK)
    found: Any = check(asked, classes)
    assert (found.num_steps, found.sampler, found.guidance, found.size) == (3, "dpm_solver_pp", 1.5, (8, 8))
    assert found.image.shape == (8, 8, 1) and found.mask.shape == (8, 8) and found.mask[:, 5:].all()
    again: Any = check(found, classes)
    assert again.image.tobytes() == found.image.tobytes() and again[:9] == found[:9]


def png_header(width, height):
    """A PNG that says how large it is, and holds nothing."""
    chunk = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    head = b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return head + (1000).to_bytes(4, "big") + b"IDAT"


def test_uploads_are_bounded_before_they_are_decoded(monkeypatch):
    monkeypatch.setattr("diffusion.demo.requests.decode", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(TooLarge, match="has 11 bytes: send at most 10"):
        read_upload(b"0" * 11, Limits(upload_bytes=10))
    with pytest.raises(TooLarge, match="9000x8000 pixels"):
        read_upload(png_header(9_000, 8_000) + bytes(100))
    with pytest.raises(ValueError, match="cannot be read"):  # Pillow's own limit
        read_upload(png_header(100_000, 100_000) + bytes(100))
    for broken in (b"", b"GIF89a", b"%PDF-1.4", png_header(10, 10)[:20], png_header(0, 1)[:-8]):
        with pytest.raises(ValueError, match="cannot be read"):
            read_upload(broken)


def test_a_broken_upload_is_refused():
    file = io.BytesIO()
    Image.fromarray(PICTURE).save(file, "png")
    np.testing.assert_array_equal(read_upload(file.getvalue()), PICTURE)
    with pytest.raises(ValueError, match=r"a picture of \d+ bytes cannot be read"):
        read_upload(file.getvalue()[:-200])


@pytest.mark.parametrize("cell", [1, 4, 16])
def test_previews_of_latents_show_the_colours_beneath(cell):
    """Of an encoder that is linear in the colours, the preview is exact but for rounding."""
    mix = np.random.RandomState(1).standard_normal((3 * max(1, cell // 8) ** 2, 12))

    def encode(params, images, keys):
        del keys
        n, height, width, _ = images.shape
        k = max(1, cell // 8)
        colours = images.reshape(n, height // cell, k, cell // k, width // cell, k, cell // k, 3).mean((3, 6))
        return params + colours.swapaxes(2, 3).reshape(n, height // cell, width // cell, -1) / 127.5 @ mix

    none: Any = None
    space = Space((2 * cell, 2 * cell, 3), (2, 2, 12), encode, decode=none, of_batch=none)
    image = np.random.RandomState(0).randint(0, 256, (1, 2 * cell, 3 * cell, 3), np.uint8)
    shown = make_linear(space, 0.5)(np.asarray(encode(0.5, image, None)), (2 * cell, 3 * cell, 3))
    side = cell // max(1, cell // 8)
    small = image.reshape(1, 2 * cell // side, side, 3 * cell // side, side, 3).mean((2, 4))
    assert shown.shape == image.shape
    assert np.abs(shown[:, ::side, ::side].astype(float) - small).max() < 0.51  # half a level, and float32


def test_previews_of_pixels_are_their_levels(classes):
    shown = make_preview(classes)(np.array([[[[-1.0], [1.0], [9.0], [np.nan]]]], np.float32), (1, 4, 1))
    assert shown.ravel().tolist() == [0, 255, 255, 0]
