"""Picture files: what every decoder of the data shares, and which files of a folder are pictures."""

import io
import logging
import re
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffusion.data.pictures import decode, natural_key, picture_files, shape_of

RANDOM = np.random.RandomState(0)
COLOUR = RANDOM.randint(0, 256, (4, 6, 3), np.uint8)
GREY = COLOUR[..., 0]


def encoded(picture, form="png", **options):
    """The bytes of a PIL image, or of an array, as a file."""
    file = io.BytesIO()
    (Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture).save(file, form, **options)
    return file.getvalue()


# --- pixels


def test_greys_and_colours_keep_their_bits():
    for file, pixels in ((encoded(COLOUR), COLOUR), (encoded(GREY), GREY[..., None])):
        assert (decode(file) == pixels).all() and decode(file).dtype == np.uint8
        assert shape_of(file) == pixels.shape
        assert (decode(file, channels=3) == pixels).all() and decode(file, channels=3).shape == COLOUR.shape
        four = decode(file, channels=4)
        assert (four[..., :3] == pixels).all() and (four[..., 3] == 255).all()
    assert decode(encoded(COLOUR), channels=1).shape == (4, 6, 1)
    assert (decode(encoded(GREY > 127)) == np.where(GREY > 127, 255, 0)[..., None]).all()  # one bit
    palette = encoded(Image.fromarray(COLOUR).quantize(24))  # one colour for each pixel
    assert decode(palette).shape == COLOUR.shape


def test_a_path_bytes_and_an_open_file_are_the_same(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(COLOUR))
    with open(path, "rb") as file:
        assert (decode(file) == COLOUR).all()
    assert (decode(path) == COLOUR).all() and (decode(str(path)) == COLOUR).all()


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_greys_of_16_bits_are_scaled_and_not_clipped(dtype):
    level = (np.arange(256).reshape(16, 16) * 257).astype(dtype)  # 257 x is x in 16 bits: 65535 = 257 * 255
    file = encoded(level, "tiff")
    assert (decode(file)[..., 0] == np.arange(256).reshape(16, 16)).all()
    assert decode(file, channels=3).shape == (16, 16, 3) and shape_of(file) == (16, 16, 1)
    if dtype == np.uint16:
        assert (decode(encoded(level, "png")) == decode(file)).all()
        near = np.array([[128, 129, 65535 - 129, 65535 - 128]], np.uint16)  # half a level is 128.5
        assert decode(encoded(near))[0, :, 0].tolist() == [0, 1, 254, 255]


def test_transparency_is_white_unless_it_is_asked_for():
    clear = np.dstack([COLOUR, np.full((4, 6), 255, np.uint8)])
    clear[0, :, 3] = 0
    half = clear.copy()
    half[1, :, 3] = 51  # a fifth
    for file in (encoded(clear), encoded(half), encoded(half, "webp", lossless=True, exact=True)):
        found = decode(file)
        assert found.shape == COLOUR.shape and (found[0] == 255).all() and (found[2:] == COLOUR[2:]).all()
    assert abs(decode(encoded(half))[1] - (0.2 * COLOUR[1] + 0.8 * 255)).max() <= 1
    assert (decode(encoded(half), channels=4) == half).all()
    grey = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(clear[..., 3])])
    found = decode(encoded(grey))
    assert found.shape == (4, 6, 1) and (found[0] == 255).all() and (found[1:, :, 0] == GREY[1:]).all()
    palette = Image.fromarray(COLOUR).quantize(24)
    one = palette.getpixel((0, 0))
    assert (decode(encoded(palette, transparency=one), channels=1)[0, 0] == 255).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    # By the table of EXIF 2.3 (tag 274): where row 0 and column 0 of the stored pixels are seen.
    upright = {
        1: COLOUR,
        2: COLOUR[:, ::-1],
        3: COLOUR[::-1, ::-1],
        4: COLOUR[::-1],
        5: COLOUR.swapaxes(0, 1),
        6: np.rot90(COLOUR, -1),
        7: COLOUR[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(COLOUR),
    }[orientation]
    for file in (encoded(COLOUR, exif=exif), encoded(COLOUR, "tiff", exif=exif)):
        assert (decode(file) == upright).all() and shape_of(file) == upright.shape


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
def test_damaged_exif_does_not_cost_the_picture(form):
    file = encoded(COLOUR, form, exif=b"Exif\0\0garbage")
    assert (decode(file) == decode(encoded(COLOUR, form))).all() and shape_of(file) == COLOUR.shape


# --- sizes


def test_the_middle_is_cropped_and_never_squeezed():
    stripes = np.zeros((10, 40, 3), np.uint8)
    stripes[:, 15:25] = 200  # the central square, of one colour
    assert (decode(encoded(stripes), size=10) == 200).all()
    assert (decode(encoded(stripes), size=(5, 5)) == decode(encoded(stripes), size=5)).all()
    assert decode(encoded(stripes), size=(5, 20)).shape == (5, 20, 3)
    tall = decode(encoded(stripes.swapaxes(0, 1)), size=(8, 4))  # rows 10..30 of 40
    assert tall.shape == (8, 4, 3) and (tall[3:5] > 190).all() and (tall[[0, -1]] < 10).all()
    assert (decode(encoded(COLOUR), size=(4, 6)) == COLOUR).all()  # of that size already: not resampled
    reference = ImageOps.fit(Image.fromarray(COLOUR), (3, 3), Image.Resampling.LANCZOS)
    assert (decode(encoded(COLOUR), size=3) == np.asarray(reference)).all()


# --- errors


def bomb():
    """A PNG of a few bytes that claims 40,000 x 40,000 pixels."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "empty, or not a picture"),
        ("text.jpg", b"hello", "not a picture of a known format"),
        ("short.png", encoded(RANDOM.randint(0, 256, (64, 64, 3), np.uint8))[:-5000], "truncated"),
        ("bomb.png", bomb(), "exceeds limit"),
        ("floats.tiff", encoded(GREY.astype(np.float32), "tiff"), "pixels of mode F are floats"),
        ("lab.tiff", encoded(Image.new("LAB", (4, 4)), "tiff"), "pixels of mode LAB are unsupported"),
        ("deep.tiff", encoded(GREY.astype(np.int32) * 1000, "tiff"), "not of 16 bits"),
        ("missing.png", None, "No such file"),
    ],
)
def test_what_cannot_be_read_is_named_in_one_line(tmp_path, name, content, reason):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))} cannot be read \(.*{reason}") as error:
        decode(path)
    assert "\n" not in str(error.value) and "object at 0x" not in str(error.value)
    if content is not None:
        with pytest.raises(
            ValueError, match=rf"^a picture of {len(content)} bytes cannot be read \(.*{reason}"
        ) as error:
            decode(content)
        assert "object at 0x" not in str(error.value)


def test_channels_are_chosen_from_three():
    with pytest.raises(ValueError, match="channels is 2: choose 1, 3 or 4"):
        decode(encoded(COLOUR), channels=2)


# --- folders


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def names_of(folder):
    return [path.relative_to(folder).as_posix() for path in picture_files(folder)]


def test_pictures_come_in_natural_order(tmp_path):
    names = [
        "1.png",
        "2.PNG",
        "10.png",
        "a2/b.webp",
        "a10/1.jfif",
        "b.gif",
        "b.tif",
        "b.tiff",
        "c.jpeg",
        "d.jpg",
        "e.bmp",
    ]
    touch(tmp_path, *reversed(names))
    assert names_of(tmp_path) == names
    assert sorted(["x10y2", "x10", "2", "x9", "x010", "x"], key=natural_key) == ["2", "x", "x9", "x010", "x10", "x10y2"]


def test_hidden_names_and_other_files_are_skipped(tmp_path, caplog):
    touch(tmp_path, "a.png", ".hidden.png", ".cache/b.png", "captions.jsonl", "deep/c.png", "._a.png")
    with caplog.at_level(logging.WARNING):
        assert names_of(tmp_path) == ["a.png", "deep/c.png"]
        assert not caplog.records
        touch(tmp_path, "photo.heic", "deep/raw.NEF", "d.avif")
        (tmp_path / "nothing.png").symlink_to(tmp_path / "nowhere.png")
        assert names_of(tmp_path) == ["a.png", "deep/c.png"]
    (record,) = caplog.records
    assert "4 files are left out" in record.getMessage() and "d.avif" in record.getMessage()


def test_links_to_folders_are_followed_and_end(tmp_path):
    touch(tmp_path, "elsewhere/1.png", "set/2.png", "set/a/3.png")
    (tmp_path / "set" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "itself").symlink_to(tmp_path / "set")
    assert names_of(tmp_path / "set") == ["2.png", "a/3.png", "linked/1.png"]
    assert names_of(tmp_path / "set" / "linked") == ["1.png", "back/2.png", "back/a/3.png"]


def test_a_folder_has_to_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*nowhere"):
        picture_files(tmp_path / "nowhere")
    assert picture_files(tmp_path) == []
