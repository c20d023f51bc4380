"""Pictures that are not square, and of up to 256 pixels: data.image_size=(height, width) from end to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CLIP, CONFIGS, SHORT, SMALL, SMALL_TEXT, config_of, do_call, make_call
from PIL import Image
from published_vaes import write_vae

from diffusion.data import scenes
from diffusion.data.captions import with_text
from diffusion.data.named import named_images
from diffusion.data.samples import load_samples
from diffusion.data.sources import array_source
from diffusion.demo.controls import title_of
from diffusion.evaluation.clip_features import fit
from diffusion.evaluation.features import LARGEST_PIXELS, REDUCED_PIXELS, pixel_features
from diffusion.evaluation.figures import nearest
from diffusion.model import clip as contrastive_model
from diffusion.model import vae
from diffusion.model.config import from_plain, plain
from diffusion.model.experiment import make_model
from diffusion.model.fields import change, load
from diffusion.networks.unet import UNet
from diffusion.pretrained.clip import save_clip
from diffusion.runs import modes
from diffusion.runs.run import open_run
from diffusion.runs.target import source_of
from diffusion.training import RunError
from experiments import autoencoder, captions, clip, folder

RANDOM = np.random.RandomState(0)
SIZES = [(30, 44), (50, 50), (64, 40)]
TWO_STEPS = (*SHORT, "--config.training.num_steps=2", "--config.data.batch_size=4", "--config.training.num_previews=2")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A dozen pictures of three sizes, also with captions."""
    path = tmp_path_factory.mktemp("pictures")
    lines = []
    for i in range(12):
        Image.fromarray(RANDOM.randint(0, 256, (*SIZES[i % 3], 3), np.uint8)).save(path / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "caption": f"number {i}"}))
    (path / "captions.jsonl").write_text("\n".join(lines))
    return path


# --- the field


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (("--config.data.image_size=64",), 64),
        (("--config.data.image_size=1e2",), 100),
        (("--config.data.image_size=(48, 64)",), (48, 64)),
        (("--config.data.image_size=48,64",), (48, 64)),
        (("--config.data.image_size", "(48,64)"), (48, 64)),
        (("--config.data.image_size=(48,64)", "--config.data.image_size=64"), 64),
        (("--config.data.image_size=64", "--config.data.image_size=(48,64)"), (48, 64)),
    ],
)
def test_one_side_or_two_on_a_command_line(tmp_path, flags, size):
    config = make_call(folder.TASK, "folder", tmp_path / "run", *flags).config
    assert config.data.image_size == size and config.data.batch_size == 32
    assert from_plain(json.loads(json.dumps(plain(config)))).data.image_size == size


def test_one_side_or_two_from_python():
    wide = config_of("folder", data__image_size=[48, 64])
    assert wide.data.image_size == (48, 64)
    assert change(wide, {"data.image_size": 32}).data.image_size == 32 and wide.data.image_size == (48, 64)


@pytest.mark.parametrize("size", ["(48,)", "(48, 64, 3)", "(0, 64)", "(48, 6.5)", "(48, 'a')"])
def test_other_sizes_are_refused(tmp_path, size, refused):
    line = r"^data\.image_size is \(.*\): give one side, as 64, or height and width, as \(48, 64\)"
    refused(line, lambda: make_call(folder.TASK, "folder", tmp_path / "run", f"--config.data.image_size={size}"))


def test_pictures_are_cropped_around_the_centre_and_not_squeezed(tmp_path):
    image = RANDOM.randint(0, 256, (20, 44, 3), np.uint8)
    Image.fromarray(image).save(tmp_path / "1.png")
    Image.fromarray(image.swapaxes(0, 1)).save(tmp_path / "2.png")
    source = named_images("folder", "all", data_dir=tmp_path, image_size=(20, 30))
    wide, high = source.read(np.arange(2))["image"]
    np.testing.assert_array_equal(wide, image[:, 7:37])  # of the ratio that was asked for: nothing is resized
    middle = image.swapaxes(0, 1)[15:29]  # 44x20 holds 13.3x20 of it
    assert high.shape == (20, 30, 3) and abs(high.mean() - middle.mean()) < 5


# --- whole runs


def test_a_folder_of_pictures_of_256_pixels(pictures, tmp_path):
    run = tmp_path / "run"
    flags = (
        *SMALL,
        *TWO_STEPS,
        f"--config.data.dir={pictures}",
        "--config.data.image_size=(192,256)",
        "--config.data.held_out=0.4",
        "--config.data.augment=('crop',)",
        "--config.network.channels=4",
        "--config.network.num_groups=2",
        "--config.network.middle_attention=False",
        "--config.training.preview_every=2",
    )
    do_call(folder.TASK, "folder", run, *flags)
    assert open_run(run, num_devices=1).model.space.image_shape == (192, 256, 3)
    (preview,) = (run / "previews").glob("*raw*")
    assert Image.open(preview).size == (3 * (2 * 256 + 1), 3 * 192)  # two side by side, enlarged
    do_call(folder.TASK, "folder", run, "--mode=evaluate", "--num_samples=4")
    found = json.loads((run / "report.json").read_text())["measurements"]
    assert {one["name"] for one in found} == {"KID", "precision and recall"}
    assert all(one["features"] == "pixels in [-1, 1], large images as means of blocks" for one in found)
    (drawn,) = (run / "samples").glob("*.npz")
    assert load_samples(drawn).shape == (4, 192, 256, 3) and (run / "nearest.png").exists()


def test_a_folder_of_captions_and_what_is_done_with_its_run(pictures, tmp_path):
    run = tmp_path / "run"
    flags = (
        *SMALL_TEXT,
        *TWO_STEPS,
        f"--config.data.dir={pictures}",
        f"--config.evaluation.dir={pictures}",
        "--config.data.augment=('shift', 'colour')",
    )
    wide, high = "--config.data.image_size=(8,12)", "--config.data.image_size=(12,8)"
    do_call(captions.TASK, "captions", run, *flags, wide)
    stored = json.loads((run / "config.json").read_text())["config"]["data"]
    assert stored["image_size"] == [8, 12] and stored["augment"] == ["shift", "colour"]
    do_call(captions.TASK, "captions", run, *flags, wide)  # is the same run
    with pytest.raises(RunError, match=r"data\.image_size: \[8, 12\] -> \[12, 8\]"):
        do_call(captions.TASK, "captions", run, *flags, high)
    opened = open_run(run, num_devices=1)
    assert opened.sample(prompts=["number 1"], num_samples=1).shape == (1, 8, 12, 3)
    assert title_of(opened).endswith("pictures of 8x12</p>")
    image = f"--images={pictures / '2.png'}"
    for mode, flag in (("inpaint", "--mask=left"), ("img2img", "--strength=0.5")):
        do_call(captions.TASK, "captions", run, f"--mode={mode}", flag, image, "--prompt=number 2")
        (out,) = (run / "uses").glob(f"{mode}_*.npz")
        with np.load(out) as arrays:
            assert arrays["image"].shape[1:] == (8, 12, 3)
            if mode == "inpaint":
                assert arrays["known"][0].sum() == 6
                assert (arrays["arr_0"][..., 6:, :] == arrays["image"][0, :, 6:]).all()


# --- parts


def test_a_unet_halves_each_side():
    network = UNet(channels=8, multipliers=(1, 1, 1), num_blocks=1, attention_resolutions=(3,), num_groups=4)
    x_t = jnp.zeros((2, 12, 20, 3))
    assert jax.eval_shape(lambda: network.init_with_output(jax.random.key(0), x_t, jnp.zeros(2)))[0].shape == x_t.shape


def test_latents_of_pictures_that_are_not_square(tmp_path):
    space = {"space.name": "latents", "space.folder": str(write_vae(tmp_path / "vae", "sd3"))}
    config = change(config_of("captions", network__width=16, network__depth=1, network__num_heads=2), space)
    found = make_model(config, (24, 40, 3), vocabulary=["a"]).space
    cell = 24 // found.shape[0]
    assert found.shape[:2] == (24 // cell, 40 // cell) and cell > 1
    known = np.ones((24, 40, 1), bool)
    known[0, -1] = False
    hidden = ~found.mask(known)
    assert hidden.sum() == 1 and hidden[0, -1]
    with pytest.raises(ValueError, match=f"40x25x3 have no whole latents: .* divisible by {cell}; set data.image_size"):
        make_model(config, (40, 25, 3), vocabulary=["a"])


def test_an_autoencoder_learns_from_them():
    config = load("autoencoder", CONFIGS)[0]
    source = array_source(RANDOM.randint(0, 256, (40, 8, 12, 3), np.uint8), None, "noise", "train", None)
    preview = vae.make_experiment(change(config, {"training.num_previews": 2}), source).preview
    assert preview is not None
    params = jax.eval_shape(vae.make_learner(config).init, jax.random.key(0))
    assert jax.eval_shape(preview, params).shape == (4, 8, 12, 3)


def test_a_clip_sees_them_whole_and_is_not_exported(tmp_path):
    config = change(load("clip", CONFIGS)[0], {"data.image_size": (8, 12), "data.batch_size": 4})
    source = scenes.scenes("train", 16, 4)
    call = make_call(clip.TASK, "clip", tmp_path / "run", "--config.text.size=300", **CLIP)
    tokenizer = clip.make_tokenizer(call, source.captions)
    towers = contrastive_model.make_clip(config, tokenizer)
    pairs = with_text(source, lambda said: np.zeros((len(said), config.text.length), np.int32))
    contrastive_model.make_contrast(config, towers, pairs)  # traced
    params = jax.eval_shape(contrastive_model.make_dataless(config, towers).init, jax.random.key(0))
    assert params["params"]["image"]["position"].shape[0] == 2 * 3 + 1
    with pytest.raises(ValueError, match="CLIPModel are square, and the size is 8x12"):
        save_clip(tmp_path / "out", towers, {}, "")
    pixels = RANDOM.randint(0, 256, (2, 16, 24, 3), np.uint8)
    for shape in ((16, 24), (8, 12), (24, 8), (8, 8)):
        assert fit(pixels, shape).shape == (2, *shape, 3)
    np.testing.assert_array_equal(fit(pixels, 8), fit(pixels, (8, 8)))
    np.testing.assert_array_equal(fit(pixels, (16, 12)), pixels[:, :, 6:18])  # cropped alone


def test_a_stand_in_of_images_that_are_not_there(tmp_path):
    flags = (f"--config.data.dir={tmp_path / 'none'}", "--config.data.image_size=(48,64)", "--config.data.channels=1")
    source, (note,) = source_of(make_call(folder.TASK, "folder", tmp_path / "run", *flags))
    assert source.image_shape == (48, 64, 1) and "images of 48x64x1 are assumed" in note


def test_pixels_of_large_images_are_means_of_blocks():
    coarse = RANDOM.randint(0, 256, (3, 32, 42, 3), np.uint8)
    fine = coarse.repeat(6, axis=1).repeat(6, axis=2)
    assert coarse[0].size <= REDUCED_PIXELS < coarse[0].size * 36 / 25 and fine[0].size > LARGEST_PIXELS
    np.testing.assert_array_equal(pixel_features(fine), pixel_features(coarse))
    odd = np.pad(fine, ((0, 0), (0, 1), (0, 1), (0, 0)))
    np.testing.assert_array_equal(pixel_features(odd), pixel_features(coarse))
    with pytest.raises(ValueError, match="images of 1x40000 are too narrow, use inception"):
        pixel_features(np.zeros((1, 1, 40_000, 1), np.uint8))


def test_nearest_images_are_found_part_by_part(monkeypatch):
    real = RANDOM.randint(0, 256, (20, 4, 6, 3), np.uint8)
    whole = nearest(real[:5], real, 4)
    assert whole[:, 0].tolist() == [0, 1, 2, 3, 4]
    monkeypatch.setattr("diffusion.evaluation.figures.LARGEST_PART", 3 * real[0].size)
    np.testing.assert_array_equal(nearest(real[:5], real, 4), whole)


# --- what is refused

MODULES = {"folder": folder, "captions": captions, "autoencoder": autoencoder, "clip": clip}


@pytest.mark.parametrize(
    ("name", "size", "flag", "line"),
    [
        ("folder", "50,64", "network.attention_resolutions=()", "50x64 cannot be halved 2 times.*use multiples of 4"),
        ("folder", "48,64", "data.held_out=0", r"attention_resolutions \[16\] .* height 48 has levels of \[48, 24, 12"),
        ("captions", "10,12", "network.patch=4", "10x12 is not whole patches of 4x4: use multiples of 4"),
        ("captions", "192,256", "network.patch=4", r"192x256 is larger .* 32\^2 patches of 4x4: make table_size"),
        ("captions", "48,64", "data.buckets=16", "set data.image_size, to one side"),
        ("autoencoder", "10,16", "data.name=folder", "10x16: .* sides divisible by 4; set data.image_size"),
        ("autoencoder", "16,32", "data.name=scenes", r"on squares, not on \(16, 32\): give one side"),
        ("clip", "10,16", "data.name=folder", "image of 10x16: choose another patch_size, or sides divisible by 4"),
        ("clip", "16,32", "data.name=scenes", r"on squares, not on \(16, 32\): give one side"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_before_anything_is_compiled(
    pictures, tmp_path, untrained, refused, name, size, flag, line
):
    module = MODULES[name]
    own = {name: getattr(module, name) for name in ("define_flags",) if hasattr(module, name)}
    every = getattr(module, "MODES", modes.MODES)
    flags = (f"--config.data.dir={pictures}", "--config.evaluation.after_training=False", "--config.data.batch_size=4")
    flags = (*flags, f"--config.data.image_size={size}", f"--config.{flag}")

    def begin():
        call = make_call(module.TASK, name, tmp_path / "run", *flags, num_devices=1, modes=every, **own)
        every["train"](call)

    refused(line, begin)
