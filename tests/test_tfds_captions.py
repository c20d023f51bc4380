"""Captioned sets prepared by TensorFlow Datasets, read without TensorFlow."""

import functools
import io
import sys
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from diffusion.data import tfds_captions as module
from diffusion.data.named import named_captions
from diffusion.data.tfds_captions import tfds_captions

CAPTIONS = (["a dog", "two dögs"], [], ["a dog"], ["a cat", "the cat", "cat"])


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder with the set "pairs" as TFDS prepares it, a config for each form of captions, and its images."""
    import tensorflow_datasets as tfds

    image = np.random.RandomState(0).randint(0, 256, (4, 6, 6, 1), np.uint8)
    one = tfds.features.Text()
    forms = {
        "coco": ("captions", tfds.features.Sequence({"id": np.int64, "text": one}), lambda captions: records(captions)),
        "many": ("captions", tfds.features.Sequence(one), lambda captions: captions),
        "one": ("title", one, lambda captions: " and ".join(captions)),
        "none": ("note", one, lambda captions: " and ".join(captions)),
        "number": ("caption", tfds.features.Tensor(shape=(), dtype=np.int64), len),
    }

    def records(captions):
        return [{"id": number, "text": text} for number, text in enumerate(captions)]

    def png(pixels) -> bytes:  # TFDS' own encoder is TensorFlow's
        file = io.BytesIO()
        Image.fromarray(pixels[..., 0]).save(file, "png")
        return file.getvalue()

    def config_of(builder: Any) -> str:
        return builder.builder_config.name

    class Pairs(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        BUILDER_CONFIGS: ClassVar = [tfds.core.BuilderConfig(name=name) for name in forms]

        def _info(self):
            name, feature, _ = forms[config_of(self)]
            features = {"image": tfds.features.Image(shape=(None, None, 1)), name: feature}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(), "val": self._generate_examples()}

        def _generate_examples(self):
            name, _, form = forms[config_of(self)]
            for i, captions in enumerate(CAPTIONS):
                yield i, {"image": png(image[i]), name: form(captions)}

    folder = tmp_path_factory.mktemp("tfds")
    for config in forms:
        Pairs(data_dir=folder, config=config, file_format="array_record").download_and_prepare()
    return folder, image


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pairs_of(captioned):
    """All (pixels, caption), sorted: TFDS shuffles when it prepares."""
    read = captioned.read(np.arange(captioned.num_examples))
    captions = [captioned.captions[row] for row in read["label"]]
    assert read["label"].dtype == np.int32
    return sorted((pixels.tobytes(), text) for pixels, text in zip(read["image"], captions, strict=True))


def wanted(image, captions):
    rgb = np.repeat(image, 3, axis=-1)
    return sorted((pixels.tobytes(), text) for pixels, texts in zip(rgb, captions, strict=True) for text in texts)


@pytest.mark.parametrize("form", ["coco", "many"])
def test_every_caption_is_a_pair(prepared, form):
    folder, image = prepared
    captioned = tfds_captions(f"pairs/{form}", "train", folder, 6)
    assert sorted(captioned.captions) == sorted({text for captions in CAPTIONS for text in captions})
    assert captioned.num_classes == len(captioned.captions) == 5
    assert captioned.image_shape == (6, 6, 3)
    assert pairs_of(captioned) == wanted(image, CAPTIONS)
    assert tfds_captions(f"pairs/{form}", "train", folder, 3).image_shape == (3, 3, 3)


def test_one_caption_an_image_and_a_part_of_a_split(prepared):
    folder, image = prepared
    whole = tfds_captions("pairs/one", "train", folder, 6)
    assert pairs_of(whole) == wanted(image, [[" and ".join(captions)] for captions in CAPTIONS])
    part = tfds_captions("pairs/one", "train[1:3]", folder, 6)
    assert set(pairs_of(part)) < set(pairs_of(whole)) and part.num_examples == 2
    assert part.fingerprint != whole.fingerprint


def test_captions_are_read_once(prepared, monkeypatch):
    folder, _ = prepared
    first = tfds_captions("pairs/coco", "train", folder, 6)
    monkeypatch.setattr(module, "_read_captions", None)
    again = tfds_captions("pairs/coco", "train", folder, 6)
    assert again.captions == first.captions and again.fingerprint == first.fingerprint
    assert "tensorflow" not in sys.modules


def test_sets_without_captions_are_refused(prepared):
    folder, _ = prepared
    with pytest.raises(ValueError, match=r"pairs/none/1.0.0 has no captions: none of its features image, note is one"):
        tfds_captions("pairs/none", "train", folder, 6)
    with pytest.raises(ValueError, match=r"none of its features caption, image is one of .* and holds texts"):
        tfds_captions("pairs/number", "train", folder, 6)
    with pytest.raises(ValueError, match="no prepared data set 'coco_captions'"):
        tfds_captions("coco_captions", "train", folder, 6)
    (alone,) = [i for i in range(4) if not any(captions_in(folder, f"train[{i}:{i + 1}]"))]
    with pytest.raises(ValueError, match=r"its 1 examples of .* have no caption"):
        tfds_captions("pairs/coco", f"train[{alone}:{alone + 1}]", folder, 6)


def captions_in(folder, split):
    prepared = module.open_set("pairs/coco", split, folder)
    return module._read_captions(prepared, ("captions", "text"), "")


def test_captions_by_name(prepared):
    folder, image = prepared
    named = functools.partial(named_captions, "tfds:pairs/coco", data_dir=folder, image_size=6)
    assert pairs_of(named("train")) == wanted(image, CAPTIONS)
    assert named("test").split == "val" and named("test", held_out_split="val[:2]").split == "val[:2]"
    with pytest.raises(ValueError, match="the splits 'train' and 'test', not 'val'"):
        named("val")
    with pytest.raises(ValueError, match="'' does not name a TFDS data set"):
        named_captions("tfds:", "train", data_dir=folder)
    for name in ("coco", ""):
        with pytest.raises(ValueError, match=f"data.name is '{name}': choose folder or tfds:NAME"):
            named_captions(name, "train", data_dir=folder)
