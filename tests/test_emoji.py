"""Text to image on emoji: the folder that is made of the package, and the experiment on a package of 13 drawings."""

import hashlib
import json
import tarfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import do_call, make_call
from PIL import Image
from published_vaes import write_vae

import diffusion
from diffusion.data import emoji
from diffusion.data.samples import load_samples
from diffusion.evaluation import identify
from diffusion.files import cache_folder
from diffusion.model.processes import make_process
from diffusion.pretrained import taef2
from diffusion.training import RunError
from experiments import emoji as experiment

TONES = list(emoji.TONES)
PEOPLE = {"MAN COOK": (200, 0, 0), "WOMAN & CAT": (0, 0, 200)}


def variant_of(name: str, tone: str) -> str:
    return f"{name[:3].lower()}-{tone.lower()}.png"


@pytest.fixture(scope="module")
def package(tmp_path_factory) -> Path:
    """The unpacked folder of a package of two people, in six tones, and a thing without a name."""
    folder = tmp_path_factory.mktemp("emoji") / "package"
    pictures = folder / "img" / "google" / "64"
    pictures.mkdir(parents=True)
    records = [{"name": None, "short_name": "red_apple", "image": "apple.png"}]
    colours = {"apple.png": (250, 10, 10)}
    for name, colour in PEOPLE.items():
        variants = {tone: {"image": variant_of(name, tone)} for tone in TONES}
        variants |= {"1F3FB-1F3FC": {"image": "two.png"}}  # of two people, which are left out
        records.append({"name": name, "short_name": "x", "image": f"{name[:3]}.png", "skin_variations": variants})
        colours[f"{name[:3]}.png"] = colour
        colours |= {variant_of(name, tone): tuple(c + 8 * i for c in colour) for i, tone in enumerate(TONES, 1)}
    for file, colour in colours.items():
        drawn = np.zeros((60, 64, 4), np.uint8)
        drawn[10:50, 10:50] = (*colour, 255)
        Image.fromarray(drawn).save(pictures / file)
    records.append({"name": "ON THE LIST ALONE", "short_name": "x", "image": "nowhere.png"})
    (folder / "emoji.json").write_text(json.dumps(records))
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return cache_folder()


def packed(package: Path, file: Path) -> Path:
    """The package as npm packs it."""
    with tarfile.open(file, "w:gz") as archive:
        archive.add(package, "package")
    return file


def captions_of(folder: Path) -> dict[str, str]:
    """Captions by the names of their pictures."""
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    return {line["image"]: line["caption"] for line in lines}


def test_of_each_person_one_tone_is_held_out(package, cache):
    folder = emoji.emoji_folder(package=package)
    train, held_out = (captions_of(folder / split) for split in ("train", "held_out"))
    assert len(train) == 1 + 2 * 5 and len(held_out) == 2
    assert train["apple.png"] == "red apple" and train["WOM.png"] == "woman and cat"
    tone = TONES[int(hashlib.sha256(b"MAN COOK").hexdigest(), 16) % 5]
    assert held_out[variant_of("MAN COOK", tone)] == f"man cook, {emoji.TONES[tone]} skin"
    assert set(map(emoji.parts_of, held_out.values())).isdisjoint(map(emoji.parts_of, train.values()))
    picture = np.asarray(Image.open(folder / "train" / "apple.png"))
    assert picture.shape == (64, 64, 3) and (picture[0, 0] == 255).all()
    assert (picture[12:52, 10:50] == (250, 10, 10)).all() and (picture[11, 20] == 255).all()  # centred: 60 of 64 rows


def test_the_packed_file_gives_the_same_folder(package, cache, tmp_path, monkeypatch):
    file = packed(package, tmp_path / "package.tgz")
    with pytest.raises(ValueError, match=r"package.tgz is not emoji-datasource-google 16.0.0: its sha256 is"):
        emoji.emoji_folder(package=file)
    assert not list((cache / "data").iterdir())
    monkeypatch.setattr(emoji, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    of_file = emoji.emoji_folder(package=file)
    found = {path.name: path.read_bytes() for path in of_file.rglob("*") if path.is_file()}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    again = emoji.emoji_folder(package=package)
    assert again != of_file and found == {p.name: p.read_bytes() for p in again.rglob("*") if p.is_file()}
    assert emoji.emoji_folder(package=tmp_path / "nothing") == again  # it is made once
    assert emoji.emoji_folder(again) == again


@pytest.mark.parametrize(
    "script, message",
    [
        (None, "there is no npm to get it: get the package by any other way .* --config.data.package=PATH"),
        ("echo no such package >&2; exit 1", r"npm pack \S+@16.0.0 failed \(no such package\): get the package by"),
    ],
)
def test_where_npm_does_not_get_it_one_line_says_what_to_do(script, message, cache, tmp_path, monkeypatch):
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    if script:
        (bin_folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
        (bin_folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(bin_folder))
    with pytest.raises(ValueError, match=message) as error:
        emoji.emoji_folder()
    assert "\n" not in str(error.value) and not cache.exists()


def test_npm_gets_it(package, cache, tmp_path, monkeypatch):
    file = packed(package, tmp_path / "got.tgz")
    monkeypatch.setattr(emoji, "SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    (tmp_path / "npm").write_text(f'#!/bin/sh\n[ "$1 $2" = "pack emoji-datasource-google@16.0.0" ] && cp {file} .\n')
    (tmp_path / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert len(captions_of(emoji.emoji_folder() / "held_out")) == 2


def test_other_folders_are_refused(package, cache, tmp_path):
    with pytest.raises(ValueError, match=r"there is no \S+/train/captions.jsonl: leave data.dir empty"):
        emoji.emoji_folder(tmp_path)
    with pytest.raises(ValueError, match=r"there is no emoji\.json in it: it is not emoji-datasource-google"):
        emoji.emoji_folder(package=tmp_path)
    with pytest.raises(ValueError, match="nothing: give the file or the unpacked folder of emoji-datasource-google"):
        emoji.emoji_folder(package=tmp_path / "nothing")
    assert not list((cache / "data").iterdir())


@pytest.mark.parametrize("tone", ["", *emoji.TONES.values()])
def test_captions_have_two_parts(tone):
    assert emoji.parts_of(emoji.caption_of("KISS: MAN, MAN", tone)) == ("kiss: man, man", tone)


def test_taef2_is_known_by_its_name(cache, monkeypatch):
    folder = cache / "weights" / "taef2"
    folder.mkdir(parents=True)
    for name in taef2.SHA256:
        (folder / name).write_bytes(name.encode())
        monkeypatch.setitem(taef2.SHA256, name, hashlib.sha256(name.encode()).hexdigest())
    assert taef2.fetch_taef2() == folder
    (folder / "taef2_decoder.pth").write_bytes(b"other")
    with pytest.raises(
        ValueError, match=r"taef2_decoder.pth: its sha256 is .* get https://github.com/madebyollin/taesd"
    ):
        taef2.fetch_taef2()


def test_training_times_are_shifted_towards_noise():
    """SD3's shift by 3 takes t = 1/2 to 3/4, and leaves the ends."""
    config = make_call(experiment.TASK, "emoji", Path("runs/none"), "--mode=check").config
    u = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(make_process(config).quantile(u), [0.0, 0.75, 1.0])
    with pytest.raises(ValueError, match=r"process\.shift is -1\.0: it has to be positive"):
        make_process(diffusion.load_config("emoji", {"process.shift": -1.0}))


def test_a_frozen_encoder_of_text_is_a_config():
    config = diffusion.load_config("emoji:clip")
    assert config.condition.name == "clip" and config.condition.precomputed and config.network.patch == 1


SMALL = (
    "--config.network.width=16",
    "--config.network.depth=1",
    "--config.network.num_heads=2",
    "--config.condition.width=8",
    "--config.data.batch_size=8",
    "--config.training.num_steps=2",
    "--config.training.snapshot_every=0",
    "--config.training.ema_profiles=()",
    "--config.training.num_previews=0",
    "--config.sampling.num_steps=2",
    "--config.sampling.batch_size=8",
)


@pytest.fixture(scope="module")
def flags(package, tmp_path_factory) -> tuple[str, ...]:
    """Those of a run on the small package, in the latents of a tiny autoencoder."""
    root = tmp_path_factory.mktemp("of_run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        folder = emoji.emoji_folder(package=package)
    return (*SMALL, f"--config.space.folder={write_vae(root / 'tiny', 'tiny')}", f"--config.data.dir={folder}")


@pytest.fixture(scope="module")
def run_folder(flags, tmp_path_factory) -> Path:
    """The folder of a run that was trained and evaluated; write nothing there."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        do_call(experiment.TASK, "emoji", root / "emoji", *flags)
    return root / "emoji"


def test_the_report_has_shares_ceiling_chance_and_decibels(run_folder):
    found = {one["name"]: one for one in json.loads((run_folder / "report.json").read_text())["measurements"]}
    drawn, ceiling = found["held-out captions, right"], found["the same, of true pictures"]
    chance = found["the same, by chance"]
    assert drawn["num_samples"] == 8 and ceiling["num_samples"] == chance["num_samples"] == 2
    assert drawn["features"].startswith("latents, weights sha256:") and drawn["seeds"] == [0]
    # Of 13 pictures one is the wanted one, six show its person and two its tone.
    shares = {"picture": 1 / 13, "person": 6 / 13, "tone": 2 / 13, "person and tone": 1 / 13}
    assert chance["value"] == pytest.approx(shares)
    assert set(found["training pictures given back"]["value"]) == {"nearest", "copies"}
    assert found["dB to the true pictures"]["value"]["autoencoder"] > 0
    with Image.open(run_folder / "identified.png") as picture:
        assert picture.height > 2 * 64  # each drawing above its true picture


@pytest.mark.parametrize("features", ["latents", "pixels"])
def test_true_pictures_are_identified_wherever_the_true_ones_are_drawn(features, run_folder, flags, monkeypatch):
    """A model that draws the true pictures is right always, in any features, and gives back none of the training."""
    call = make_call(
        experiment.TASK,
        "emoji",
        run_folder,
        "--mode=evaluate",
        f"--config.evaluation.features={features}",
        num_devices=1,
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(run_folder.parent / "cache"))
    source = experiment.read(call.config, "test")
    true = source.read(np.arange(2))
    by_caption = {source.captions[label]: image for label, image in zip(true["label"], true["image"], strict=True)}
    monkeypatch.setattr(
        experiment, "draw", lambda painter, prompts, index, seed: np.stack([by_caption[p] for p in prompts])
    )
    monkeypatch.setattr(experiment, "save_labelled_png", lambda *args: None)
    found = {
        one.name: one.value for one in [*experiment.evaluate(call, call.open()), experiment.score(call, call.open())]
    }
    ones, zeros = (
        ["held-out captions, right", "held-out captions, right, each drawn once"],
        ["training pictures given back", "right person, another tone"],
    )
    for names, share in ((ones, 1.0), (zeros, 0.0)):
        for name in names:
            value = found[name]
            assert isinstance(value, dict) and set(value.values()) == {share}


def test_tones_that_are_off_are_counted_by_how_far():
    people, tones = ["ann"] * 4 + ["bob"], ["light", "medium light", "dark", "", "light"]
    gallery = identify.Gallery(np.eye(5), {"person": people, "tone": tones}, np.ones(5, bool))
    truth = experiment.Truth(np.zeros((5, 1, 1, 3), np.uint8), [], gallery, np.array([0]))
    found, wanted = np.array([1, 2, 3, 0, 4]), np.array([0, 0, 0, 1, 0])
    off = experiment.tones_off(found, wanted, truth)
    assert off == pytest.approx({"next darker": 1 / 5, "next lighter": 2 / 5, "another": 1 / 5})


def test_an_exported_run_draws_the_same_pictures_wherever_it_is_opened(run_folder, tmp_path):
    artefact, again = tmp_path / "artefact", tmp_path / "again"
    do_call(experiment.TASK, "emoji", run_folder, "--mode=export", f"--weights={artefact}")
    do_call(experiment.TASK, "emoji", again, "--mode=import", f"--weights={artefact}")
    prompts = ["man cook, dark skin", "red apple"]
    run, *others = (diffusion.open_run(folder) for folder in (run_folder, artefact, again))
    for other in others:
        np.testing.assert_array_equal(other.sample(prompts=prompts), run.sample(prompts=prompts))
        assert other.step == 2 and other.average == 0.999
    card = (artefact / "README.md").read_text()
    assert "Apache-2.0" in card and "held-out captions, right" in card and "x_0 has shape 16x16x16" in card
    stored = (artefact / "published.json").read_text()
    assert str(tmp_path.parent) not in stored and str(run_folder.parent.parent) not in stored
    do_call(
        experiment.TASK,
        "emoji",
        artefact,
        "--mode=sample",
        "--prompt=red apple",
        "--num_samples=2",
        f"--out={tmp_path / 'a.npz'}",
    )
    np.testing.assert_array_equal(load_samples(tmp_path / "a.npz")[:1], run.sample(1, prompts=["red apple"]))


def test_an_artefact_of_other_arrays_or_of_another_experiment_is_refused(run_folder, tmp_path):
    artefact = tmp_path / "artefact"
    do_call(experiment.TASK, "emoji", run_folder, "--mode=export", f"--weights={artefact}")
    other = experiment.TASK._replace(name="scenes")
    with pytest.raises(RunError, match="artefact holds a run of experiment emoji, not scenes"):
        do_call(other, "emoji", tmp_path / "again", "--mode=import", f"--weights={artefact}")
    about = json.loads((artefact / "published.json").read_text())
    about["config"]["network"]["depth"] = 2
    (artefact / "published.json").write_text(json.dumps(about))
    with pytest.raises(ValueError, match=r"run.*network/params/block_"):
        diffusion.open_run(artefact)


def test_pictures_of_128_are_trained_with_no_other_settings(flags, tmp_path, monkeypatch):
    """16x16 latents, as FLUX.2's of 128x128: the 64 tokens of 64x64 are assumed nowhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "run"
    sizes = ("--config.data.image_size=128", "--config.space.patch=2")  # this autoencoder's cells are 4 pixels wide
    do_call(experiment.TASK, "emoji", folder, *flags, *sizes, "--config.evaluation.num_drawings=1")
    run = diffusion.open_run(folder)
    assert run.model.space.shape == (16, 16, 64)
    assert run.sample(prompts=["red apple"]).shape == (1, 128, 128, 3)
    assert (folder / "report.md").exists()
