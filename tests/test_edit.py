"""The modes that use a trained model, on digits and a network that has not learned: at the start it returns 0."""

import jax
import numpy as np
import pytest
from helpers import CONFIGS, SMALL_TEXT, do_call, make_call
from PIL import Image

from diffusion.data.samples import load_samples
from diffusion.data.sources import digits
from diffusion.model import model as model_module
from diffusion.model.experiment import abstract_batch, make_learner, make_model
from diffusion.model.model import init
from diffusion.runs import edit
from diffusion.runs.pictures import read_mask
from diffusion.runs.run import open_run
from diffusion.runs.weights import write_run
from diffusion.training import RunError
from experiments import digits as experiment
from experiments import scenes

SMALL = (
    "--config.network.channels=8",
    "--config.network.num_groups=4",
    "--config.network.multipliers=(1,)",
    "--config.network.attention_resolutions=()",
    "--config.sampling.num_steps=50",
)
VOCABULARY = ["a", "above", "blue", "red", "seven", "three"]


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """untrained(task, config) -> the folder of a run at step 0, made once: digits return 0, prompts have an effect."""
    made = {}

    def folder(task, spec):
        if spec in made:
            return made[spec]
        path = tmp_path_factory.mktemp("runs") / "run"
        prompts = task is scenes.TASK
        config = make_call(task, spec, path, *(SMALL_TEXT if prompts else SMALL), "--mode=check").config
        facts = {"image_shape": (16, 16, 3) if prompts else (8, 8, 1), "num_classes": None if prompts else 10}
        model = make_model(config, **facts, vocabulary=VOCABULARY)
        params = init(model, jax.random.key(0))
        if prompts:  # at the start the output's kernel is 0
            params = jax.tree.map(lambda x: x + 0.1 * np.random.RandomState(0).standard_normal(x.shape), params)
        facts["condition"] = dict(model.condition.description or {})
        learner, batch = make_learner(config, model), abstract_batch(config, model)
        write_run(path, task.name, config, learner, batch, params, [CONFIGS / "digits.py"], facts)
        made[spec] = path
        return path

    return folder


@pytest.fixture
def call(untrained, tmp_path):
    """call(mode, *flags) -> the arrays of the .npz and the picture, of the mode on test images."""

    def call(mode, *arguments, config="digits", task=experiment.TASK):
        out = tmp_path / f"made{len(list(tmp_path.glob('made*.npz')))}.npz"
        do_call(task, config, untrained(task, config), f"--mode={mode}", f"--out={out}", *arguments)
        arrays, picture = dict(np.load(out)), np.asarray(Image.open(out.with_suffix(".png")))
        np.testing.assert_array_equal(load_samples(out), arrays["arr_0"])
        return arrays, picture

    return call


def near(a, b):
    """Alike, image by image, but for the noise of DDPM's t = 20, 0.076 or 10 levels; other digits are 40 away."""
    return np.abs(np.asarray(a, float) - b).mean(axis=(-3, -2, -1)) < 12


def test_img2img_shows_every_strength_of_an_image_in_its_row(call):
    arrays, picture = call("img2img", "--num_samples=3", "--strength=0.02,1.0", "--seed=1")
    rows, image = arrays["arr_0"].reshape(3, 2, 8, 8, 1), arrays["image"]
    np.testing.assert_array_equal(near(rows, image[:, None]), [[True, False]] * 3)
    # 3 images a row, each enlarged to 64 pixels, lines of 4 between and one of 12 after the first; above are heads.
    picture = picture[6:-6, 6:-6]  # without its margin
    assert picture.shape[0] > 3 * 64 + 2 * 4 and picture.shape[1:] == (3 * 64 + 4 + 12, 3)
    heads, picture = picture[: -(3 * 64 + 2 * 4)], picture[-(3 * 64 + 2 * 4) :, :, 0]
    assert all((heads[:, x : x + 64] < 128).any() for x in (0, 76, 144))
    np.testing.assert_array_equal(picture[68:132:8, :64:8], image[1, ..., 0])
    np.testing.assert_array_equal(picture[68:132:8, 76:140:8], rows[1, 0, ..., 0])


def test_img2img_at_one_strength_shows_several_samples(call):
    arrays, _ = call("img2img", "--num_samples=2", "--strength=0.02")
    rows = arrays["arr_0"].reshape(2, edit.DRAWS, 8, 8, 1)
    assert np.all(near(rows, arrays["image"][:, None]))
    assert len({row.tobytes() for row in rows[0]}) == edit.DRAWS
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
    np.testing.assert_array_equal(read_mask(mask, (8, 8, 3)), expected)


def test_inpainting_keeps_what_is_known_and_fills_in_the_rest_in_several_ways(call, tmp_path):
    white = np.zeros((16, 16), np.uint8)
    white[4:6, 2:] = 255
    Image.fromarray(white).save(tmp_path / "mask.png")
    arrays, picture = call("inpaint", "--num_samples=2", f"--mask={tmp_path / 'mask.png'}", "--resample=2", "--steps=5")
    known, rows = arrays["known"][..., 0], arrays["arr_0"].reshape(2, edit.DRAWS, 8, 8)
    np.testing.assert_array_equal(np.argwhere(~known), [[2, column] for column in range(1, 8)])
    image = arrays["image"][..., 0]
    assert np.all((rows == image[:, None])[..., known])
    assert len({row.tobytes() for row in rows[0]}) == edit.DRAWS
    shown = picture[-138:-74:8, 82:146:8, 0]  # the second column: grey where hidden
    np.testing.assert_array_equal(shown, np.where(known, image[0], 128))


def test_progressive_generation_ends_in_the_samples_of_the_run(call, untrained):
    asked = ("--num_samples=8", "--seed=3", "--sampler=ancestral", "--steps=12")
    arrays, _ = call("progressive", *asked)
    rows = arrays["arr_0"].reshape(8, -1, 8, 8, 1)
    assert arrays["step"][0] == 1 and rows.shape[1] == len(arrays["step"]) + 1
    changes = {"sampling.sampler": "ancestral", "sampling.num_steps": 12}
    run = open_run(untrained(experiment.TASK, "digits"), changes=changes, num_devices=1)
    films = run.sample(8, seed=3, trajectory=True)
    assert films.shape == (8, 13, 8, 8, 1)
    np.testing.assert_array_equal(films[:, [*(arrays["step"] - 1), 12]], rows)
    assert np.abs(rows[:, -1].astype(int) - run.sample(8, seed=3)).max() <= 1  # another program may round another way


def test_pictures_of_ones_own_are_made_to_fit(call, tmp_path):
    own = digits("train").read(np.arange(2))["image"][..., 0]
    wide, large = np.pad(own[1], ((0, 0), (4, 4)), constant_values=255), np.full((32, 32), 100, np.uint8)
    paths = [str(tmp_path / f"{i}.png") for i in range(3)]
    for path, pixels in zip(paths, (own[0], wide, large), strict=True):
        Image.fromarray(pixels).convert("RGB").save(path)
    arrays, _ = call("img2img", f"--images={','.join(paths)}", "--strength=0.02")
    np.testing.assert_array_equal(arrays["image"][..., 0], [*own, large[:8, :8]])
    with pytest.raises(ValueError, match="--images are 1: give pairs"):
        call("interpolate", f"--images={paths[0]}")
    with pytest.raises(ValueError, match=r"none\.png"):
        call("img2img", f"--images={tmp_path / 'none.png'}")


def test_a_network_with_classes_is_told_those_of_the_images(call, monkeypatch):
    told = []
    make_denoise = model_module.make_denoise

    def recording(model, params, condition):
        jax.debug.callback(lambda label: told.append(np.asarray(label)), condition["label"])
        return make_denoise(model, params, condition)

    monkeypatch.setattr(model_module, "make_denoise", recording)

    def labels_told(*arguments):
        told.clear()
        arrays, _ = call(*arguments, config="digits:class_conditional")
        jax.effects_barrier()
        both = max(told, key=len)  # guidance leads away from no class, each image beside its own
        np.testing.assert_array_equal(both[1::2], 10)
        return both[::2], arrays["image"]

    to, images = labels_told("img2img", "--num_samples=2", "--strength=0.02")
    test = digits("test").read(np.arange(500))
    labels = [test["label"][np.all(test["image"] == image, axis=(1, 2, 3))][0] for image in images]
    np.testing.assert_array_equal(to, np.repeat(labels, edit.DRAWS))
    to, _ = labels_told("interpolate", "--num_samples=1", "--strength=0.02")
    np.testing.assert_array_equal(to, 10)  # a mixture is of no class


def test_prompts_are_mixed_from_one_to_the_other(call, untrained):
    asked = ["--prompt=a red three", "--prompt=a blue seven above a red three", "--num_samples=2", "--seed=1"]
    arrays, _ = call("interpolate", *asked, "--steps=2", config="scenes", task=scenes.TASK)
    rows = arrays["arr_0"].reshape(2, len(edit.SHARES), 16, 16, 3)
    run = open_run(untrained(scenes.TASK, "scenes"), num_devices=1)
    ends = [run.sample(2, prompts=[text], seed=1, num_steps=2) for text in ("a red three", asked[1][9:])]
    assert np.abs(ends[0].astype(int) - ends[1]).max() > 10
    for end, share in zip(ends, (0, -1), strict=True):
        assert np.abs(rows[:, share].astype(int) - end).max() <= 1  # another program may round another way
    with pytest.raises(ValueError, match="1 were given: give two"):
        call("interpolate", "--prompt=a red three", config="scenes", task=scenes.TASK)


def test_held_out_scenes_are_filled_in_under_their_own_captions(call):
    arrays, _ = call("inpaint", "--num_samples=2", "--resample=1", "--steps=2", config="scenes", task=scenes.TASK)
    rows, image = arrays["arr_0"].reshape(2, edit.DRAWS, 16, 16, 3), arrays["image"]
    assert np.all((rows == image[:, None])[..., :8, :]) and np.any(rows[..., 8:, :] != image[:, None, :, 8:])


@pytest.mark.parametrize("config", ["digits:edm", "digits:flow", "digits:cosine_hybrid"])
def test_other_processes_are_used_in_the_same_way(call, config):
    arrays, _ = call("inpaint", "--num_samples=1", "--steps=4", "--resample=2", config=config)
    assert len(arrays["arr_0"]) == edit.DRAWS


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
def test_bad_arguments_are_refused_in_one_line_and_nothing_is_written(untrained, mode, argument, message):
    folder = untrained(experiment.TASK, "digits")
    with pytest.raises((RunError, ValueError), match=message) as refused:
        do_call(experiment.TASK, "digits", folder, f"--mode={mode}", argument)
    assert "\n" not in str(refused.value) and not (folder / "uses").exists()


def test_a_mask_without_white_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "black.png")
    with pytest.raises(ValueError, match="nothing to fill in"):
        read_mask(str(tmp_path / "black.png"), (8, 8, 1))
