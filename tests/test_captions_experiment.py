"""Text to image on a folder of pictures and captions, from end to end."""

import json
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.data.samples import load_samples
from diffusion.evaluation.clip_features import Encoder
from diffusion.runs.train import stored_in
from experiments import captions


@pytest.fixture
def kind(kinds):
    return kinds["captions"]


def test_a_folder_of_pairs_is_scored_beside_real_pictures(kind, copied):
    folder = copied("captions")
    kind.do(folder, "--mode=evaluate")
    (fid,) = json.loads((folder / "report.json").read_text())["measurements"]
    assert fid["name"] == "FID" and fid["num_samples"] == 24
    assert fid["reference"]["name"] == "test" and fid["ema"] == 0.9999
    assert np.asarray(Image.open(folder / "captions.png")).std() > 10


def test_pairs_are_judged_by_their_own_captions(kind, copied, monkeypatch):
    """Of real pictures a judge that knows them returns 100, of drawn ones less."""
    folder = copied("captions")
    call = kind.call(folder, "--mode=evaluate", "--config.evaluation.judge=clip", "--num_samples=8")
    source = captions.read(call.config, "test")
    known = {source.read(np.array([i]))["image"].tobytes(): i for i in range(source.num_examples)}
    rows = {source.captions[label]: i for i, label in enumerate(source.read(np.arange(24))["label"])}

    def embed(numbers):
        return np.stack([np.eye(25, dtype=np.float32)[number] for number in numbers])

    judge = Encoder(
        lambda image: embed([known.get(one[None].tobytes(), 24) for one in image]),
        lambda prompts: embed([rows[prompt] for prompt in prompts]),
        1.0,
        "one that knows",
    )
    monkeypatch.setattr(captions, "load_judge", lambda name: judge)
    found = {one.name: one for one in captions.evaluate(call, call.open())}
    assert found["that of the real pictures"].value == 100 and found["CLIP score"].value == 0
    assert found["that of the real pictures"].sampler == "real images" and found["CLIP score"].seeds == [0]
    assert {one.num_samples for one in found.values()} == {8}


def test_a_trained_run_draws_without_the_pairs_it_was_trained_on(kind, copied, tmp_path, monkeypatch):
    folder, out = copied("captions"), tmp_path / "a.npz"
    monkeypatch.setattr(captions, "read", None)
    blind = kind._replace(task=kind.task._replace(read=None))
    stored: Any = stored_in(folder)
    words = stored["condition"]["vocabulary"]
    assert len(words) > 20 and {"red", "above"} & set(words)
    blind.do(folder, "--mode=sample", "--prompt=a red three", "--num_samples=3", f"--out={out}")
    assert load_samples(out).shape == (3, 16, 16, 3)
    with pytest.raises(ValueError, match="nothing to draw: give --prompt"):
        blind.do(folder, "--mode=sample")


def test_held_out_pictures_are_where_img2img_begins(kind, copied):
    folder = copied("captions")
    kind.do(folder, "--mode=img2img", "--num_samples=2", "--strength=0.5")
    (out,) = (folder / "uses").glob("img2img_*.npz")
    with np.load(out) as stored:
        begun = stored["image"]
    source = captions.read(kind.call(folder, "--mode=sample").config, "test")
    held_out = {one.tobytes() for one in source.read(np.arange(source.num_examples))["image"]}
    assert len(begun) == 2 and {one.tobytes() for one in begun} <= held_out


def test_what_cannot_be_trained_or_scored_is_refused_before_training(kind, tmp_path):
    folder = tmp_path / "run"

    def refused(line, *arguments):
        with pytest.raises(ValueError, match=line):
            kind.do(folder, *kind.flags, *arguments)
        assert not (folder / "checkpoints").exists()

    refused(r"name one by --config\.data\.dir=DIR", "--config.data.dir=")
    refused("there is no .*captions.jsonl", f"--config.data.dir={tmp_path}")
    scored = "--config.evaluation.after_training=True"
    refused(r"name one by --config\.evaluation\.dir=DIR", scored, "--config.evaluation.dir=")
    refused("there is no .*captions.jsonl", scored, f"--config.evaluation.dir={tmp_path}")
    refused("unknown metric 'FID': choose from fid, kid", scored, "--config.evaluation.metrics=('FID',)")
    refused("needs the probabilities of a classifier", scored, "--config.evaluation.metrics=('inception_score',)")
    none = "--config.evaluation.weights=none.pth"
    refused("none.pth is not a file", scored, "--config.evaluation.features=inception", none)
