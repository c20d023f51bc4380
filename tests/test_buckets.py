"""Aspect buckets: shapes, the nearest, and an order that is a pure function of (seed, step)."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import SHORT, SMALL_TEXT, do_call
from PIL import Image
from published_vaes import write_vae

from diffusion.data.batches import make_batches
from diffusion.data.buckets import bucket_rows, bucket_shapes, nearest_bucket
from diffusion.data.captions import caption_folder
from diffusion.data.named import named_captions
from diffusion.runs.run import open_run
from diffusion.training import RunError
from diffusion.training.programs import Programs
from experiments import captions


@pytest.mark.parametrize(("side", "multiple"), [(64, 16), (1024, 64), (256, 8)])
def test_shapes_have_about_the_pixels_of_the_square(side, multiple):
    shapes = bucket_shapes(side, multiple)
    assert (side, side) in shapes and len(set(shapes)) == len(shapes)
    for height, width in shapes:
        assert height % multiple == width % multiple == 0 and (width, height) in shapes
        assert height * width <= side**2 < height * (width + multiple) or side**2 < width * (height + multiple)
        assert max(height, width) <= 2 * min(height, width)


def test_a_picture_goes_where_least_of_it_is_cropped():
    shapes = bucket_shapes(1024, 64)
    random = np.random.RandomState(0)
    for _ in range(50):
        height, width = map(int, random.randint(200, 2000, 2))
        kept = [min(height / h, width / w) ** 2 * h * w for h, w in shapes]  # pixels that are not cropped
        assert nearest_bucket(height, width, shapes) == int(np.argmax(np.divide(kept, height * width)))


@pytest.mark.parametrize(("counts", "size"), [((10, 7, 3), 4), ((100, 1, 0, 33), 8), ((5,), 8)])
def test_every_picture_is_seen_equally_often(counts, size):
    seen = [Counter() for _ in counts]
    for step in range(50 * sum(counts) // size):
        bucket, rows = bucket_rows(3, step, size, counts)
        assert len(rows) == size and rows.max() < counts[bucket]
        seen[bucket].update(rows.tolist())
    for count, own in zip(counts, seen, strict=True):
        assert len(own) == count
        if count:  # of 50 epochs, up to one batch
            assert 50 - size / count - 1 <= min(own.values()) <= max(own.values()) <= 51


def test_buckets_come_mixed_and_in_another_order_for_another_seed():
    orders = [[bucket_rows(seed, step, 2, (40, 40))[0] for step in range(40)] for seed in (0, 1)]
    assert orders[0] != orders[1] and sum(orders[0]) == 20
    assert sum(a != b for a, b in zip(orders[0], orders[0][1:], strict=False)) > 10


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="16 has to divide 60"):
        bucket_shapes(60, 16)
    with pytest.raises(ValueError, match="ratio be at least 1"):
        bucket_shapes(64, 16, 0.5)
    with pytest.raises(ValueError, match="are of a folder of captions"):
        named_captions("tfds:coco_captions", "train", image_size=64, buckets=16)
    with pytest.raises(ValueError, match="there is none"):
        bucket_rows(0, -1, 2, (4,))


@pytest.fixture
def pairs(tmp_path):
    """Twelve pictures of three ratios with captions."""
    lines = []
    for i, (height, width) in enumerate([(40, 80), (50, 50), (90, 60)] * 4):
        Image.fromarray(np.full((height, width, 3), 20 * i, np.uint8)).save(tmp_path / f"{i}.png")
        lines.append(f'{{"image": "{i}.png", "caption": "number {i}"}}')
    (tmp_path / "captions.jsonl").write_text("\n".join(lines))
    return tmp_path


def test_batches_hold_one_shape_and_their_own_captions(pairs):
    source = caption_folder(pairs, 64, buckets=16)
    assert [part.image_shape for part in source.parts] == [(48, 80, 3), (64, 64, 3), (80, 48, 3)]
    assert source.num_examples == 12 and len(source.captions) == 12
    shapes = set()
    batches = make_batches(source, 0, 2, num_steps=12)
    for step, batch in enumerate(batches):
        bucket, rows = bucket_rows(0, step, 2, [4, 4, 4])
        part = source.parts[bucket]
        assert batch["image"].shape == (2, *part.image_shape)
        shapes.add(batch["image"].shape)
        for image, label, row in zip(batch["image"], batch["label"], rows, strict=True):
            number = int(part.captions[label].split()[1])
            assert image.mean() == 20 * number and part.read(np.array([row]))["label"] == label
    assert len(shapes) == 3
    with pytest.raises(ValueError, match=r"data\.flip=True does not go with"):
        make_batches(source, 0, 2, flip=True)
    with pytest.raises(ValueError, match=r"set data\.image_size"):
        caption_folder(pairs, None, buckets=16)


@pytest.mark.parametrize("space", ["pixels", "latents"])
def test_a_run_trains_on_pictures_of_several_shapes(pairs, tmp_path, space):
    """And a batch of a shape that no bucket has is a fault, not another program."""
    vae = write_vae(tmp_path / "vae", "sd3")
    latents = ("--config.space=latents", f"--config.space.folder={vae}", "--config.network.patch=1")
    flags = (
        *SMALL_TEXT,
        *SHORT,
        f"--config.data.dir={pairs}",
        "--config.data.image_size=32",
        "--config.data.buckets=16",
        "--config.data.batch_size=4",
        "--config.network.patch=4",
        "--config.training.num_steps=6",
        "--config.evaluation.after_training=False",
        *(latents if space == "latents" else ()),
    )
    do_call(captions.TASK, "captions", tmp_path / "run", *flags)
    run = open_run(tmp_path / "run")
    assert run.step == 6 and run.sample(prompts=["number 1"], num_samples=1).shape == (1, 32, 32, 3)


def test_a_batch_of_an_unknown_shape_is_refused():
    programs = Programs(
        SimpleNamespace(lower=lambda batch: SimpleNamespace(compile=lambda: len)), lambda batch: (batch,)
    )
    batches = [{"image": np.zeros((2, side))} for side in (3, 4, 5)]
    assert programs.of(batches[0], most=2) is programs.of(batches[1], most=2)
    with pytest.raises(RunError, match=r"a batch has other shapes than those before: image \[2, 5\]"):
        programs.of(batches[2], most=2)


def test_a_fault_of_compiling_is_raised_where_the_program_is_asked_for():
    programs = Programs(
        SimpleNamespace(lower=lambda batch: SimpleNamespace(compile=lambda: 1 / 0)), lambda batch: (batch,)
    )
    programs.begin({"image": np.zeros((2, 3))})
    with pytest.raises(ZeroDivisionError):
        programs.of({"image": np.zeros((2, 3))}, most=1)
