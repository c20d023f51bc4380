"""Image sets prepared by TensorFlow Datasets, read without TensorFlow."""

import functools
import io
import os
import subprocess
import sys
import textwrap
import time
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from diffusion.data import make_batches, tfds, tfds_source
from diffusion.data.named import named_images, open_images


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the set "tiny" as TFDS prepares it, and its images, its labels, and its images of any size."""
    import tensorflow_datasets as tfds_library

    rng = np.random.RandomState(0)
    image, label = rng.randint(0, 256, (300, 6, 5, 3), np.uint8), rng.randint(0, 4, 300)
    other = rng.randint(0, 256, (20, 8, 8, 1), np.uint8)

    def png(pixels) -> bytes:  # TFDS' own encoder is TensorFlow's
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, "png")
        return file.getvalue()

    def config_of(builder: Any) -> str:
        return builder.builder_config.name

    class Tiny(tfds_library.core.GeneratorBasedBuilder):
        VERSION = tfds_library.core.Version("1.0.0")
        BUILDER_CONFIGS: ClassVar = [
            tfds_library.core.BuilderConfig(name="labelled"),
            tfds_library.core.BuilderConfig(name="any_size"),
        ]

        def _info(self):
            features = {"image": tfds_library.features.Image(shape=(None, None, 1))}
            if config_of(self) == "labelled":
                features = {
                    "image": tfds_library.features.Image(shape=(6, 5, 3)),
                    "label": tfds_library.features.ClassLabel(num_classes=4),
                    "note": tfds_library.features.Text(),
                }
            return tfds_library.core.DatasetInfo(builder=self, features=tfds_library.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            if config_of(self) == "labelled":
                for i in range(300):
                    yield i, {"image": png(image[i]), "label": int(label[i]), "note": str(i)}
            else:
                for i in range(20):
                    yield i, {"image": png(other[i, : 4 + i % 3])}

    folder = tmp_path_factory.mktemp("tfds")
    for config in ("labelled", "any_size"):
        Tiny(data_dir=folder, config=config, file_format="array_record").download_and_prepare()
    return folder, image, label, other


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "diffusion" / "decoded"


def all_of(source):
    read = source.read(np.arange(source.num_examples))
    return read["image"], read["label"]


def test_tfds_reads_what_was_written(prepared, cache):
    folder, image, label, _ = prepared
    lazy = tfds_source("tiny/labelled", "train", folder, in_memory=False)
    assert not cache.exists()
    whole = tfds_source("tiny/labelled:1.0.0", "train", folder)
    assert lazy.image_shape == whole.image_shape == (6, 5, 3) and lazy.num_classes == whole.num_classes == 4
    assert (all_of(lazy)[0] == all_of(whole)[0]).all() and (all_of(lazy)[1] == all_of(whole)[1]).all()
    pairs = {
        (row.tobytes(), number) for row, number in zip(*all_of(whole), strict=True)
    }  # TFDS shuffles when it prepares
    assert pairs == {(row.tobytes(), number) for row, number in zip(image, label, strict=True)}
    part = tfds_source("tiny/labelled", "train[10:15]", folder)
    assert (all_of(part)[0] == all_of(whole)[0][10:15]).all()
    batch = next(make_batches(lazy, 0, 16, flip=True))
    assert (batch["image"] == next(make_batches(whole, 0, 16, flip=True))["image"]).all()


def test_tfds_decodes_once(prepared, cache, monkeypatch):
    folder, *_ = prepared
    first = tfds_source("tiny/labelled", "train", folder)
    (file,) = cache.iterdir()
    decoded = []
    read_all = tfds._read_all
    monkeypatch.setattr(tfds, "_read_all", lambda source: decoded.append(1) or read_all(source))
    again = functools.partial(tfds_source, "tiny/labelled", "train", folder)
    assert again().fingerprint == first.fingerprint and not decoded
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # a flipped bit
    file.write_bytes(content)
    assert again().fingerprint == first.fingerprint and len(decoded) == 1
    file.write_bytes(file.read_bytes()[:-1000])  # half a file
    assert again().fingerprint == first.fingerprint and len(decoded) == 2
    assert again().fingerprint == first.fingerprint and len(decoded) == 2
    record = next((folder / "tiny/labelled/1.0.0").glob("*array_record*"))
    os.utime(record, ns=(0, record.stat().st_mtime_ns + 1))  # prepared anew
    assert again().fingerprint == first.fingerprint and len(decoded) == 3
    cache.parent.rename(cache.parent.with_name("old"))
    cache.parent.write_text("")  # no folder can be made there
    assert again().fingerprint == first.fingerprint and len(decoded) == 4


def test_tfds_sets_of_any_size_are_cropped_and_resized(prepared, cache):
    folder, _, _, other = prepared
    with pytest.raises(ValueError, match=r"differ in size.*--config\.data\.image_size"):
        tfds_source("tiny/any_size", "train", folder)
    source = tfds_source("tiny/any_size", "train", folder, image_size=4)
    image, label = all_of(source)
    assert image.shape == (20, 4, 4, 1) and source.num_classes is None and (label == 0).all()
    # Images 0, 3, 6, ... are 4 x 8: their central square is columns 2..5 and needs no resampling.
    assert {row.tobytes() for row in other[::3, :4, 2:6]} < {row.tobytes() for row in image}
    lazy = tfds_source("tiny/any_size", "train", folder, image_size=4, in_memory=False)
    assert (all_of(lazy)[0] == image).all()


def test_sets_by_name(prepared, cache):
    folder, *_ = prepared
    whole = named_images("tfds:tiny/labelled", "train", data_dir=folder)
    assert whole.num_classes == 4 and whole.class_names == ("0", "1", "2", "3")
    for name in ("tiny/labelled", "tiny/labelled:1.0.0"):  # without tfds: too
        assert named_images(name, "train", data_dir=folder).fingerprint == whole.fingerprint
    small = named_images("tfds:tiny/any_size", "train[:5]", data_dir=folder, image_size=(3, 4), channels=3)
    assert small.image_shape == (3, 4, 3) and small.num_examples == 5
    spec = open_images("tfds:tiny/labelled/train", folder)
    assert spec is not None and spec.fingerprint == whole.fingerprint
    for name in ("digit", "tfd:tiny/labelled", ""):
        with pytest.raises(ValueError, match=f"data.name is '{name}': choose digits, folder or tfds:NAME"):
            named_images(name, "train", data_dir=folder)
    with pytest.raises(ValueError, match=r"^no prepared data set 'digit'"):
        named_images("tfds:digit", "train", data_dir=folder)


def test_tfds_errors_are_one_line(prepared, tmp_path, cache):
    folder, *_ = prepared
    start = time.monotonic()
    for name, split, where, line in [
        (
            "mnist",
            "train",
            tmp_path,
            r"no prepared data set 'mnist'.*\[prepare\].*download_and_prepare.*or copy .*mnist",
        ),
        ("tiny/labelled:2.0.0", "train", folder, "no prepared data set"),
        ("tiny", "train", folder, "several configs: write tiny/CONFIG with one of any_size, labelled"),
        ("tiny/labelled", "test", folder, r"Unknown split 'test'.*\['train'\]"),
        ("../tiny", "train", folder, "does not name a TFDS data set"),
    ]:
        with pytest.raises(ValueError, match=line) as error:
            tfds_source(name, split, where)
        assert "\n" not in str(error.value)
    assert time.monotonic() - start < 5  # TFDS itself asks the network for minutes


def test_tfds_damaged_files_are_named(prepared, tmp_path, cache):
    folder, *_ = prepared
    subprocess.run(["cp", "-r", folder / "tiny", tmp_path], check=True)
    damaged = tmp_path / "tiny/labelled/1.0.0"
    record = next(damaged.glob("*array_record*"))
    os.truncate(record, record.stat().st_size - 1000)
    with pytest.raises(ValueError, match=f"{damaged} cannot be read; copy or prepare it again"):
        tfds_source("tiny/labelled", "train", tmp_path)
    assert not cache.exists()
    (damaged / "dataset_info.json").write_text(
        (damaged / "dataset_info.json").read_text().replace('"array_record"', '"tfrecord"')
    )
    with pytest.raises(ValueError, match="prepare it again with file_format='array_record'"):
        tfds_source("tiny/labelled", "train", tmp_path)


def test_tensorflow_is_never_imported_and_readers_do_not_outlive_the_program(prepared, tmp_path):
    folder, *_ = prepared
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("raise SystemExit('tensorflow was imported')")
    program = f"""
        import sys
        import diffusion.data
        assert not {{"tensorflow", "tensorflow_datasets", "grain", "sklearn"}} & set(sys.modules)  # slow
        for in_memory in (True, False):
            source = diffusion.data.tfds_source("tiny/labelled", "train", {str(folder)!r}, in_memory=in_memory)
            batches = diffusion.data.make_batches(source, 0, 32)
            assert next(batches)["image"].shape == (32, 6, 5, 3)
        assert "tensorflow" not in sys.modules
        print("read")
    """
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env=os.environ | {"PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and done.stdout == "read\n", done.stderr
