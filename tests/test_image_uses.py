"""The modes that use a trained model, on digits and a network that has not learned: at the start it answers 0."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from diffusion.data.samples import load_samples
from diffusion.data.sources import digits
from diffusion.training import make_mesh
from experiments import command_line, image_diffusion, image_modes, image_uses

ROOT = Path(__file__).parent.parent
SMALL = (
    "--config.network.channels=8",
    "--config.network.num_groups=4",
    "--config.network.multipliers=1",
    "--config.network.attention_resolutions=8",
    "--steps=50",
)


@pytest.fixture(autouse=True)
def untrained(monkeypatch):
    """No checkpoint is needed: the weights are those of a start."""

    def load(run, source, ema_length=None):
        diffusion = image_diffusion.make_diffusion(run.config)
        network = image_diffusion.make_network(run.config, source, diffusion)
        label = None if network.num_classes is None else jnp.zeros(1, jnp.int32)
        x = jnp.zeros((1, *source.image_shape))
        return image_modes.Trained(network.init(jax.random.key(0), x, jnp.zeros(1), label), 0)

    monkeypatch.setattr(image_modes, "load", load)


@pytest.fixture
def call(tmp_path):
    """call(mode, *flags) -> the arrays of the .npz and the picture, of the mode on the digits' test split."""

    def call(mode, *arguments, config="digits_ddpm"):
        values = flags.FlagValues()
        image_modes.define_flags(values)
        image_uses.define_flags(values)
        modes = {"train": lambda run: None, **image_uses.make_modes(lambda run: digits("test"))}
        config = ROOT / "experiments" / "configs" / f"{config}.py"
        argv = ["digits", f"--workdir={tmp_path}", f"--config={config}", *SMALL, *arguments]
        run, _ = command_line.parse(argv, ROOT / "experiments" / "digits.py", "doc", "digits_ddpm.py", modes, values)
        modes[mode](run._replace(mesh=make_mesh(1)))
        (path,) = (tmp_path / "uses").glob("*.npz")
        arrays, picture = dict(np.load(path)), np.asarray(Image.open(path.with_suffix(".png")))
        np.testing.assert_array_equal(load_samples(path), arrays["arr_0"])
        for file in (path, path.with_suffix(".png")):
            file.unlink()
        return arrays, picture

    return call


def near(a, b):
    """Alike, image by image, but for the noise of DDPM's t = 20, 0.076 or 10 levels; other digits are 40 away."""
    return np.abs(np.asarray(a, float) - b).mean(axis=(-3, -2, -1)) < 12


def test_img2img_shows_every_strength_of_an_image_in_its_row(call):
    arrays, picture = call("img2img", "--num_samples=3", "--strength=0.02,1.0", "--seed=1")
    rows, image = arrays["arr_0"].reshape(3, 2, 8, 8, 1), arrays["image"]
    np.testing.assert_array_equal(near(rows, image[:, None]), [[True, False]] * 3)
    # 3 images a row, each enlarged to 64 pixels, with lines of 4 between and one of 12 after the first.
    assert picture.shape == (3 * 64 + 2 * 4, 3 * 64 + 4 + 12)
    np.testing.assert_array_equal(picture[68:132:8, :64:8], image[1, ..., 0])
    np.testing.assert_array_equal(picture[68:132:8, 76:140:8], rows[1, 0, ..., 0])


def test_img2img_at_one_strength_shows_several_samples(call):
    arrays, _ = call("img2img", "--num_samples=2", "--strength=0.02")
    rows = arrays["arr_0"].reshape(2, image_uses.DRAWS, 8, 8, 1)
    assert np.all(near(rows, arrays["image"][:, None]))
    assert len({row.tobytes() for row in rows[0]}) == image_uses.DRAWS
    again, other = (call("img2img", "--num_samples=2", "--strength=0.02", f"--seed={seed}")[0] for seed in (0, 1))
    np.testing.assert_array_equal(again["arr_0"], arrays["arr_0"])
    assert np.any(other["image"] != arrays["image"])


def test_interpolation_goes_from_image_to_image(call):
    arrays, _ = call("interpolate", "--num_samples=2", "--strength=0.02,1.0")
    rows, image = arrays["arr_0"].reshape(2, 2, 9, 8, 8, 1), arrays["image"]
    weak, strong = rows[:, 0], rows[:, 1]
    assert np.all(near(weak[:, 0], image[0::2])) and np.all(near(weak[:, -1], image[1::2]))
    middle = (image[0::2].astype(float) + image[1::2]) / 2
    assert np.all(near(weak[:, 4], middle))
    assert not np.any(near(strong[:, 0], image[0::2]))


@pytest.mark.parametrize(
    ("mask", "hidden"),
    [
        ("left", np.s_[:, :4]),
        ("right", np.s_[:, 4:]),
        ("top", np.s_[:4]),
        ("bottom", np.s_[4:]),
        ("center", np.s_[2:6, 2:6]),
    ],
)
def test_masks_hide_what_they_say(mask, hidden):
    expected = np.zeros((8, 8, 1), bool)
    expected[hidden] = True
    np.testing.assert_array_equal(image_uses.read_mask(mask, (8, 8, 3)), expected)


def test_inpainting_keeps_what_is_known_and_fills_in_the_rest_in_several_ways(call, tmp_path):
    white = np.zeros((16, 16), np.uint8)
    white[4:6, 2:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    arrays, picture = call("inpaint", "--num_samples=2", f"--mask={tmp_path / 'mask.png'}", "--resample=2", "--steps=5")
    known, rows = arrays["known"][..., 0], arrays["arr_0"].reshape(2, image_uses.DRAWS, 8, 8)
    np.testing.assert_array_equal(np.argwhere(~known), [[2, column] for column in range(1, 8)])
    image = arrays["image"][..., 0]
    assert np.all((rows == image[:, None])[..., known])
    assert len({row.tobytes() for row in rows[0]}) == image_uses.DRAWS
    shown = picture[:64:8, 76:140:8]  # the second column: grey where hidden
    np.testing.assert_array_equal(shown, np.where(known, image[0], 128))


def test_progressive_generation_ends_in_the_samples_of_mode_sample(call, tmp_path):
    arrays, _ = call("progressive", "--num_samples=8", "--seed=3", "--sampler=ancestral", "--steps=12")
    rows = arrays["arr_0"].reshape(8, -1, 8, 8, 1)
    assert arrays["step"][0] == 1 and rows.shape[1] == len(arrays["step"]) + 1
    argv = ["digits", f"--workdir={tmp_path}", *SMALL, "--sampler=ancestral", "--steps=12"]
    file = ROOT / "experiments" / "digits.py"
    run, _ = command_line.parse(argv, file, "doc", "digits_ddpm.py", {"train": lambda run: None}, flags.FlagValues())
    source = digits("train")
    samples = image_modes.generate(run, source, image_modes.load(run, source), 8, 3)
    assert np.abs(rows[:, -1].astype(int) - samples).max() <= 1  # another program may round another way


def test_pictures_of_ones_own_are_made_to_fit(call, tmp_path):
    own = digits("train").read(np.arange(2))["image"][..., 0]
    for i in range(2):
        large = Image.fromarray(own[i].repeat(4, axis=0).repeat(4, axis=1)).convert("RGB")
        large.save(tmp_path / f"{i}.png")
    paths = [str(tmp_path / f"{i}.png") for i in range(2)]
    arrays, _ = call("img2img", f"--images={','.join(paths)}", "--strength=0.02")
    np.testing.assert_array_equal(arrays["image"][..., 0], own)
    with pytest.raises(ValueError, match="--images are 1: give pairs"):
        call("interpolate", f"--images={paths[0]}")
    with pytest.raises(OSError, match=r"none\.png"):
        call("img2img", f"--images={tmp_path / 'none.png'}")


def test_a_network_with_classes_is_told_those_of_the_images(call, monkeypatch):
    told = []
    make_denoise = image_diffusion.make_denoise

    def recording(config, network, diffusion, params, label=None):
        if label is not None:
            jax.debug.callback(lambda label: told.append(np.asarray(label)), label)
        return make_denoise(config, network, diffusion, params, label)

    monkeypatch.setattr(image_diffusion, "make_denoise", recording)
    arrays, _ = call("img2img", "--num_samples=2", "--strength=0.02", config="digits_class_conditional")
    jax.effects_barrier()
    test = digits("test").read(np.arange(500))
    labels = [test["label"][np.all(test["image"] == image, axis=(1, 2, 3))][0] for image in arrays["image"]]
    np.testing.assert_array_equal(told[0], np.repeat(labels, image_uses.DRAWS))
    call("interpolate", "--num_samples=1", "--strength=0.02", config="digits_class_conditional")


@pytest.mark.parametrize("config", ["digits_edm", "digits_flow", "digits_cosine_hybrid"])
def test_other_processes_are_used_in_the_same_way(call, config):
    arrays, _ = call("inpaint", "--num_samples=1", "--steps=4", "--resample=2", config=config)
    assert len(arrays["arr_0"]) == image_uses.DRAWS


@pytest.mark.parametrize(
    ("mode", "argument", "message"),
    [
        ("img2img", "--strength=0", "--strength=0: give numbers in"),
        ("img2img", "--strength=0.5,1.5", "--strength=0.5,1.5: give numbers in"),
        ("interpolate", "--strength=half", "--strength=half: give numbers in"),
        ("inpaint", "--mask=middle", "--mask=middle is no file: choose left"),
        ("inpaint", "--num_samples=501", "501 images were asked for"),
        ("progressive", "--out=picture.png", "--out=picture.png: images are written to an .npz"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line_and_nothing_is_written(call, tmp_path, mode, argument, message):
    with pytest.raises(ValueError, match=message) as refused:
        call(mode, argument)
    assert "\n" not in str(refused.value) and not (tmp_path / "uses").exists()


def test_a_mask_without_white_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="nothing to fill in"):
        image_uses.read_mask(str(tmp_path / "black.png"), (8, 8, 1))
