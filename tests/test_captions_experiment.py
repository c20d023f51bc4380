"""Text to image on a folder of pictures and captions, from end to end; frozen text encoded once."""

import json
import sys
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from test_text_to_image import clip_parts, init  # noqa: F401 (a fixture)

from diffusion.data import scenes
from diffusion.data.captions import with_text
from diffusion.data.samples import load_samples
from experiments import captions, text_encoders, text_modes, text_to_image
from experiments.command_line import main

SMALL = (
    "--config.data.image_size=16",
    "--config.data.batch_size=8",
    "--config.text.width=8",
    "--config.network.width=16",
    "--config.network.depth=1",
    "--config.network.num_heads=2",
    "--config.network.dtype=float32",
    "--config.training.num_steps=2",
    "--config.training.preview_every=100",
    "--config.training.num_previews=8",
    "--config.sampling.num_steps=2",
    "--config.evaluation.features=pixels",
    "--config.evaluation.metrics=('fid',)",
)


def write_pairs(folder, split, count):
    folder.mkdir()
    lines = []
    for index in range(count):
        scene = scenes.scene(0, split, index)
        Image.fromarray(scenes.draw(scene, split)).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "caption": scene.caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines))


@pytest.fixture
def call(tmp_path, monkeypatch):
    """call(*flags) -> how the experiment's command line ended."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["captions", f"--workdir={tmp_path / 'run'}", *arguments])
        with pytest.raises(SystemExit) as ended:
            main(
                captions.__file__,
                "",
                default_config="captions_mmdit.py",
                modes=captions.MODES,
                extra_flags=text_modes.define_flags,
            )
        return ended.value.code

    return call


def test_a_folder_of_pairs_is_learned_drawn_and_scored(call, tmp_path):
    write_pairs(tmp_path / "pairs", "train", 24)
    write_pairs(tmp_path / "held_out", "held_out", 12)
    data = (f"--config.data.dir={tmp_path / 'pairs'}", f"--config.evaluation.dir={tmp_path / 'held_out'}")
    assert call(*SMALL, *data) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    (fid,) = report["measurements"]
    assert fid["num_samples"] == 12 and fid["reference"]["name"] == "held_out" and fid["ema"] == 0.9999
    assert np.asarray(Image.open(tmp_path / "run" / "captions.png")).std() > 10

    # Words that the checkpoint knows: the folder of pairs is not read again.
    (tmp_path / "pairs" / "captions.jsonl").unlink()
    out = tmp_path / "a.npz"
    assert call("--mode=sample", "--prompt=a red three", "--num_samples=3", f"--out={out}") == 0
    assert load_samples(out).shape == (3, 16, 16, 3)
    assert "nothing to draw" in call("--mode=sample")
    assert call("--mode=img2img", "--num_samples=2", "--strength=0.5") == 0
    assert "text.precomputed=True is for an encoder" in call(
        *SMALL, f"--config.data.dir={tmp_path / 'held_out'}", "--config.text.precomputed=True", "--workdir=elsewhere"
    )


def test_words_are_the_most_frequent():
    said = ["A dog, a dog and a cat", "a cat", "a bird's nest"]
    assert text_encoders.frequent_words(said, 3) == ["a", "and", "cat"]  # of those in one caption, by the alphabet
    assert text_encoders.frequent_words(said, 100) == ["a", "and", "bird", "cat", "dog", "nest", "s"]


def test_features_made_once_give_the_loss_of_features_made_at_every_step(clip_parts, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    params = init(clip_parts)
    captioned = scenes.scenes("train", 16, 40)
    encoder = clip_parts.encoder
    made_once = text_encoders.with_features(captioned, encoder, params["text"], batch_size=16)
    blind: Any = encoder._replace(encode=None)
    again = text_encoders.with_features(captioned, blind, params["text"])
    assert len(list(tmp_path.rglob("*.npy"))) == 2
    other = jax.tree.map(lambda x: x + 1, params["text"])
    text_encoders.with_features(captioned, encoder, other)
    assert len(list(tmp_path.rglob("*.npy"))) == 4  # other weights, other features

    config, network = clip_parts.config, clip_parts.network
    loss = jax.jit(text_to_image.make_loss(config, network, encoder, clip_parts.diffusion))
    rows, key = np.arange(32), jax.random.key(3)
    expected, _ = loss(params, with_text(captioned, encoder.tokenize).read(rows), key)
    for source in (made_once, again):
        batch = source.read(rows)
        assert "text" not in batch
        found, _ = loss(params, batch, key)
        # Of sums in float32 of another order; a dropped caption that was not would differ by far more.
        np.testing.assert_allclose(found, expected, rtol=1e-4)
