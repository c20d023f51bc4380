"""python -m diffusion.evaluation: any two sets, CLIP as a judge, and every mistake in one line."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import metrics
from diffusion.data import text
from diffusion.data.images import save_png
from diffusion.data.samples import save_samples
from diffusion.evaluation import (
    clip_score,
    load_encoder,
    pixel_features,
)
from diffusion.evaluation.__main__ import main as command_line
from diffusion.evaluation.clip_features import OPENAI_MEAN, OPENAI_STD, make_encoder
from diffusion.networks.clip import CLIP, ImageTower, TextTower
from diffusion.pretrained.clip import load_clip, save_clip

rng = np.random.RandomState(0)


def test_the_command_scores_any_two_sets(real, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_samples(tmp_path / "a.npz", real["test"]["image"])
    for number, image in enumerate(real["test"]["image"]):
        save_png(tmp_path / "pictures" / f"{number:04d}.png", image, smallest_side=1)
    own = metrics.statistics(pixel_features(real["train"]["image"]))
    np.savez(tmp_path / "statistics.npz", mu=own.mean, sigma=own.cov)
    printed = []
    for samples, reference in (("a.npz", "digits:train"), ("pictures", "digits:train"), ("a.npz", "statistics.npz")):
        reference = reference if ":" in reference else str(tmp_path / reference)
        command_line([str(tmp_path / samples), reference, "--features=pixels", f"--out={tmp_path / 'out'}"])
        printed.append(" ".join(capsys.readouterr().out.split()))
        report = json.loads((tmp_path / "out" / "report.json").read_text())
        names = [one["name"] for one in report["measurements"]]
        every = ["FID", "KID", "precision and recall"]
        assert names == (every[:1] if "statistics" in reference else every)
        assert report["measurements"][0]["value"] == pytest.approx(0.29806, rel=1e-4)  # as held-out images have
        assert "biased upwards, because 500 samples" in printed[-1]
    assert (tmp_path / "out" / "nearest.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A published CLIP, tiny, that has learned nothing."""
    tokenizer = text.train_tokenizer(["a red digit", "a blue digit"], 300)
    sizes: Any = dict(width=16, num_layers=1, num_heads=2, mlp_width=16, projection=8)
    end = text.end_of_text(tokenizer)
    clip = CLIP(
        ImageTower(image_size=8, patch_size=4, **sizes),
        TextTower(vocabulary_size=tokenizer.get_vocab_size(), end_of_text=end, length=12, **sizes),
    )
    params = jax.jit(clip.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), jnp.zeros((1, 12), jnp.int32))
    folder = tmp_path_factory.mktemp("published") / "clip"
    save_clip(folder, clip, params, text.to_json(tokenizer))
    return folder


def test_clip_judges_samples_by_features_and_by_prompts(clip_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = [rng.randint(0, 256, (40, 8, 8, 3), np.uint8) for _ in range(2)]
    for name, image in zip("ab", images, strict=True):
        save_samples(tmp_path / f"{name}.npz", image)
    prompts = ["a red digit", "a blue digit"] * 20
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    samples, reference = str(tmp_path / "a.npz"), str(tmp_path / "b.npz")
    clip = ["--features=clip", f"--weights={clip_folder}", f"--out={tmp_path}"]
    command_line([samples, reference, *clip, f"--prompts={tmp_path / 'prompts.txt'}"])
    report = json.loads((tmp_path / "report.json").read_text())
    found = {one["name"]: one["value"] for one in report["measurements"]}

    clip_network, params = load_clip(clip_folder)
    pixels = (images[0] / 255 - np.array(OPENAI_MEAN)) / np.array(OPENAI_STD)
    ids = text.encode(text.read_tokenizer(clip_folder), prompts, 12)
    image, caption, *_ = jax.jit(clip_network.apply)(params, jnp.asarray(pixels, jnp.float32), jnp.asarray(ids))
    cosine = np.sum(np.asarray(image) * np.asarray(caption), axis=1)
    assert found["CLIP score"] == pytest.approx(100 * np.maximum(cosine, 0).mean(), rel=1e-4)
    own, other = (metrics.statistics(load_encoder(clip_folder).image(x).astype(np.float64)) for x in images)
    assert found["FID"] == pytest.approx(metrics.frechet_distance(own.mean, own.cov, other.mean, other.cov), rel=1e-6)


def test_line_n_of_the_prompts_is_that_of_picture_n(clip_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = np.random.RandomState(1).randint(0, 256, (12, 8, 8, 3), np.uint8)
    for number, image in enumerate(images, 1):
        save_png(tmp_path / "pictures" / f"{number}.png", image, smallest_side=1)  # 10.png comes after 9.png
    prompts = [f"a {colour} digit" for colour in ("red", "blue", "red blue", "a", "digit", "blue red") * 2]
    prompts[3] = "a\u2028red\x85digit"  # is one line
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(prompts).encode())
    pictures, where = str(tmp_path / "pictures"), f"--prompts={tmp_path / 'prompts.txt'}"
    command_line([pictures, pictures, "--features=clip", f"--weights={clip_folder}", where, f"--out={tmp_path}"])
    capsys.readouterr()
    found = {one["name"]: one for one in json.loads((tmp_path / "report.json").read_text())["measurements"]}
    encoder = load_encoder(clip_folder)
    order = sorted(range(12), key=lambda i: f"{i + 1}.png")  # that of the alphabet
    right, wrong = (clip_score(encoder, images[rows], prompts).mean() for rows in (range(12), order))
    assert found["CLIP score"]["value"] == pytest.approx(right, rel=1e-5) and abs(right / wrong - 1) > 1e-3
    assert found["CLIP score"]["reference"] is None and found["CLIP score"]["num_samples"] == 12


def test_embeddings_that_are_not_finite_are_refused(clip_folder):
    clip, params = load_clip(clip_folder)
    tokenizer = text.read_tokenizer(clip_folder)
    image = rng.randint(0, 256, (3, 8, 8, 3), np.uint8)
    prompts = ["a red digit"] * 3
    for tower, line in (("image", "3 of 3 features by CLIP's image"), ("text", "3 of 3 embeddings of prompts are not")):
        bad = jax.tree.map_with_path(lambda path, x, tower=tower: x * np.nan if path[1].key == tower else x, params)
        with pytest.raises(ValueError, match=line):
            clip_score(make_encoder(clip, bad, tokenizer), image, prompts)
    nothing = jax.tree.map_with_path(lambda path, x: x * 0 if path[1].key == "image" else x, params)
    with pytest.raises(ValueError, match="an embedding is zero, NaN or infinite and has no direction"):
        clip_score(make_encoder(clip, nothing, tokenizer), image, prompts)


def test_bad_input_of_the_command_gets_one_line_before_features_are_computed(real, clip_folder, tmp_path, monkeypatch):
    good, where = real["test"]["image"], tmp_path / "in"
    for name, image in (("one", good[:1]), ("few", good[:3]), ("colour", good.repeat(3, -1)), ("good", good)):
        save_samples(where / f"{name}.npz", image)
    (where / "cut.npz").write_bytes((where / "good.npz").read_bytes()[:-50])
    (where / "empty.npz").write_bytes(b"")
    (where / "text.npz").write_text("no archive")
    np.savez(where / "float.npz", arr_0=np.zeros((9, 8, 8, 1)))
    np.savez(where / "unit.npz", arr_0=np.linspace(0, 1, 9 * 64).reshape(9, 8, 8, 1))
    np.savez(where / "none.npz", arr_0=np.zeros((0, 8, 8, 1), np.uint8))
    np.savez(where / "flat.npz", arr_0=np.zeros((9, 64), np.uint8))
    np.savez(where / "two_channels.npz", arr_0=np.zeros((9, 8, 8, 2), np.uint8))
    np.savez(where / "other.npz", images=np.zeros((9, 8, 8, 1), np.uint8))
    np.savez(where / "mu.npz", mu=np.zeros(64))
    for name, mu, sigma in (
        ("nan", np.zeros(64), np.full((64, 64), np.nan)),
        ("square", np.zeros(64), np.zeros((64, 3))),
        ("negative", np.zeros(64), -np.eye(64)),
        ("skew", np.zeros(64), np.triu(np.ones((64, 64)))),
        ("half", np.zeros(64, np.float16), np.eye(64)),
        ("statistics", np.zeros(64), np.eye(64)),
        ("statistics_9", np.zeros(9), np.eye(9)),
    ):
        np.savez(where / f"{name}.npz", mu=mu, sigma=sigma)
    (where / "empty").mkdir()
    for name in ("a.png", "b.jpg"):
        (where / "broken").mkdir(exist_ok=True)
        (where / "broken" / name).write_bytes(b"no picture")
    for side in (4, 5):
        save_png(where / "sizes" / f"{side}.png", good[0, :side], smallest_side=1)
    (where / "hidden" / ".cache").mkdir(parents=True)
    save_png(where / "hidden" / ".cache" / "a.png", good[0], smallest_side=1)
    (where / "prompts.txt").write_text("a\nb\nc\n")
    (where / "gap.txt").write_text("a\n\nb\nc\n")
    (where / "blank.txt").write_text("\n \n")
    (where / "latin.txt").write_bytes(b"a\nb\ncaf\xe9\n")
    (where / "clip").mkdir()
    clip = ["--features=clip", f"--weights={clip_folder}"]
    prompts = [*clip, "--prompts=prompts.txt"]
    before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
    monkeypatch.chdir(where)

    def computed(*arguments):
        raise AssertionError("features were computed")

    cases = [
        # SAMPLES
        (["one.npz", "digits"], "fid needs at least 2 samples, not 1"),
        (["cut.npz", "digits"], "cut.npz is not a whole .npz"),
        (["empty.npz", "digits"], "empty.npz is not a whole .npz"),
        (["text.npz", "digits"], r"text.npz is not a whole .npz file of samples \(cut off, or of another format\)$"),
        (["missing.npz", "digits"], "missing.npz is not a whole .npz"),
        (["prompts.txt", "digits"], "prompts.txt is not a whole .npz"),
        (["float.npz", "digits"], "float64 in .* not uint8"),
        (["unit.npz", "digits"], r"float64 in \[0, 1\], not uint8"),
        (["none.npz", "digits"], r"shape \[0, 8, 8, 1\], not"),
        (["flat.npz", "digits"], r"shape \[9, 64\], not"),
        (["two_channels.npz", "digits"], r"shape \[9, 8, 8, 2\], not"),
        (["other.npz", "digits"], "no array arr_0"),
        (["mu.npz", "digits"], "no array arr_0"),
        (
            ["statistics.npz", "digits"],
            r"statistics.npz holds statistics \(mu and sigma\), no images: give it as REFERENCE",
        ),
        (["empty", "digits"], "holds no pictures"),
        (["hidden", "digits"], "holds no pictures"),
        (["broken", "digits"], r"a.png cannot be read \([^()]*\): repair it, or move it away$"),
        (["sizes", "digits"], "5.png is 8x5 but .*4.png is 8x4: crop and resize all to one size first$"),
        (["broken/a.png", "digits"], "broken/a.png is one picture: give a folder of pictures, or an .npz of samples$"),
        (["digits:all", "digits"], "splits 'train' and 'test'"),
        (["", "digits"], "."),
        (["tfds:", "digits"], "."),
        # REFERENCE
        (["good.npz", "digits:all"], "splits 'train' and 'test'"),
        (["good.npz", "digits:TEST"], "splits 'train' and 'test'"),
        (["good.npz", "nan.npz"], "sigma is not all finite numbers"),
        (["good.npz", "square.npz"], "not a mean and a covariance"),
        (["good.npz", "negative.npz"], "sigma is not a covariance: .* eigenvalues are from -1 to -1"),
        (["good.npz", "skew.npz"], "sigma is not a covariance: it differs from its transpose by up to 1"),
        (["good.npz", "half.npz"], "mu is not all finite numbers of float32 or float64"),
        (["good.npz", "missing.npz"], "missing.npz is not a whole .npz"),
        (["good.npz", "mu.npz"], "no array arr_0"),
        (["good.npz", "empty"], "holds no pictures"),
        (["good.npz", "broken/b.jpg"], "b.jpg is one picture: give a folder of pictures"),
        (["good.npz", "one.npz"], "fid needs a reference of at least 2 images, not 1"),
        # --metrics
        (["good.npz", "digits", "--metrics=FID"], "unknown metric 'FID': choose from fid, kid, inception_score"),
        (["good.npz", "digits", "--metrics=fid,beauty"], "unknown metric 'beauty'"),
        (["good.npz", "digits", "--metrics=fid;kid"], "unknown metric 'fid;kid'"),
        (["good.npz", "digits", "--metrics="], "unknown metric ''"),
        (["good.npz", "digits", "--metrics=fid,"], "unknown metric ''"),
        (["good.npz", "digits", "--metrics=inception_score"], "needs the probabilities of a classifier"),
        (["good.npz", "statistics.npz", "--metrics=kid"], "kid needs the reference's images"),
        (["few.npz", "digits", "--metrics=fid,precision_recall"], "precision_recall needs at least 4 samples, not 3"),
        (["good.npz", "few.npz", "--metrics=precision_recall"], "needs a reference of at least 4 images, not 3"),
        # --features and --weights
        (["good.npz", "digits", "--features=inception", "--weights=none.pth"], "none.pth is not a file"),
        (["good.npz", "digits", "--features=inception", "--weights=clip"], "clip is not a file"),
        (["good.npz", "digits", "--features=inception", "--weights=prompts.txt"], "prompts.txt is not pt_inception"),
        (["good.npz", "digits", "--features=clip"], "needs the folder of a published CLIP"),
        (["good.npz", "digits", "--features=clip", "--weights=clip"], "config.json"),
        (["good.npz", "digits", "--features=clip", "--weights=none"], "config.json"),
        (["good.npz", "digits", "--features=clip", "--weights=good.npz"], "config.json"),
        (["good.npz", "digits", "--weights=clip"], "--weights are those of a network, and --features=pixels has none"),
        (["good.npz", "digits", "--data-dir=empty"], "--data-dir is where sets named tfds:NAME are, and none is named"),
        # --prompts
        (["colour.npz", "colour.npz", "--features=pixels", "--prompts=prompts.txt"], "add --features=clip"),
        (["colour.npz", "colour.npz", "--features=clip", "--prompts=prompts.txt"], "--weights=FOLDER"),
        (["colour.npz", "colour.npz", *prompts], "500 samples and 3 prompts: one prompt per sample is needed"),
        (["colour.npz", "colour.npz", *clip, "--prompts=gap.txt"], "gap.txt, line 2 is blank: line n is the prompt of"),
        (["colour.npz", "colour.npz", *clip, "--prompts=blank.txt"], "blank.txt holds no prompt"),
        (["colour.npz", "colour.npz", *clip, "--prompts=latin.txt"], "latin.txt, line 3: not UTF-8"),
        (["colour.npz", "colour.npz", *clip, "--prompts=none.txt"], "cannot read none.txt"),
        (["colour.npz", "colour.npz", *clip, "--prompts=empty"], "cannot read empty"),
        # --out
        (["good.npz", "digits", "--out=good.npz"], "--out=good.npz: .*good.npz is a file, not a folder"),
        (["good.npz", "digits", "--out=good.npz/report"], "good.npz is a file, not a folder"),
    ]
    with monkeypatch.context() as patch:
        patch.setattr("diffusion.evaluation.reference_set", computed)
        patch.setattr("diffusion.evaluation.compare", computed)
        for arguments, line in cases:
            refused(arguments, line)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for arguments, line in (
        (["colour.npz", "digits"], r"shape \[8, 8, 3\] have 192 features, the reference digits has 64"),
        (["good.npz", "statistics_9.npz"], "the reference statistics_9.npz has 9: is it of other features"),
        (["good.npz", "good.npz", *clip], "CLIP reads RGB images, not 1 channels"),
    ):
        refused(arguments, line)
    after = {path.relative_to(tmp_path) for path in tmp_path.rglob("*")}
    assert {path.parts[0] for path in after - set(before)} <= {"cache"} and after >= set(before)


def refused(arguments, line):
    """Checks that the command ends with one line, which matches."""
    with pytest.raises(SystemExit) as left:
        command_line(["--features=pixels", *arguments])
    printed = str(left.value.code)
    assert re.search(line, printed) and printed.startswith("error: "), printed
    assert "\n" not in printed and len(printed) < 500, printed


def test_inception_that_cannot_be_fetched_is_reported_before_images_are_read(tmp_path, monkeypatch):
    def offline(*arguments, **options):
        raise OSError("no network")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("urllib.request.urlopen", offline)
    monkeypatch.setattr("diffusion.evaluation.__main__.open_images", None)
    with pytest.raises(SystemExit, match=r"error: cannot fetch pt_inception.* \(no network\): put https://.* at "):
        command_line(["a.npz", "digits"])


def test_features_of_a_network_without_its_device_are_refused(monkeypatch):
    def devices():
        raise AssertionError

    monkeypatch.setattr("jax.devices", devices)
    with pytest.raises(SystemExit, match=r"error: JAX.* set JAX_PLATFORMS=cpu, or install JAX for the device$"):
        command_line(["a.npz", "digits"])


def test_paths_of_the_command_begin_with_a_tilde(real, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    save_samples(tmp_path / "a.npz", real["test"]["image"])
    command_line(["~/a.npz", "~/a.npz", "--features=pixels", "--metrics=fid", "--out=~/out/new"])
    assert "FID" in capsys.readouterr().out and (tmp_path / "out" / "new" / "report.json").exists()
    with pytest.raises(SystemExit, match=f"{tmp_path}/none.pth is not a file"):
        command_line(["~/a.npz", "~/a.npz", "--weights=~/none.pth"])
