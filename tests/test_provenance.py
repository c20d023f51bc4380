"""How a picture was made, inside its PNG file, and --like, which draws it again."""

import io
import json
import shlex

import numpy as np
import pytest
from helpers import do_call
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffusion.runs.plans import Plan
from diffusion.runs.provenance import command, made_of, read_png, readable, write_png
from diffusion.runs.run import open_run
from diffusion.training import RunError


def pixels(path):
    """What a call wrote."""
    return np.load(path.with_suffix(".npz"))["arr_0"]


@pytest.fixture(scope="module")
def classes(trained):
    return open_run(trained("digits_classes"), num_devices=1)


@pytest.fixture(scope="module")
def made(classes):
    return made_of(classes, Plan(3, None, 5, 1), 2, 4)


def test_a_png_returns_what_was_written_and_its_pixels(made, tmp_path):
    picture = np.random.RandomState(0).randint(0, 256, (5, 7, 3), np.uint8)
    made = {**made, "prompt": "ein „Füchslein“ 🦊\nunter Tannen"}
    write_png(picture, made, tmp_path / "a.png")
    file = io.BytesIO()
    write_png(picture, made, file)
    assert read_png(tmp_path / "a.png") == read_png(io.BytesIO(file.getvalue())) == made
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)
    assert Image.open(tmp_path / "a.png").info["parameters"] == readable(made)


def test_what_is_written_names_no_path(classes, made, tmp_path):
    assert str(classes.workdir.parent) not in json.dumps(made) and made["run"] == "digits_classes"
    assert made["weights"] == classes.digest and made["label"] == 3 and made["index"] == 1 and made["batch"] == [2, 4]


def test_files_without_it_are_refused_in_one_line(made, tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "plain.png").read_bytes()[:30])
    for text, name in (("{", "damaged"), ('["format"]', "damaged"), (json.dumps({**made, "format": 9}), "format 9")):
        info = PngInfo()
        info.add_itxt("diffusion", text)
        Image.new("L", (4, 4)).save(tmp_path / "bad.png", pnginfo=info)
        with pytest.raises(ValueError, match=name):
            read_png(tmp_path / "bad.png")
    with pytest.raises(ValueError, match=r"plain\.png does not hold how it was made"):
        read_png(tmp_path / "plain.png")
    for name in ("broken.png", "missing.png"):
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            read_png(tmp_path / name)


def test_the_command_quotes_what_a_shell_would_read(made):
    asked = {**made, "index": 0, "prompt": "a fox; rm -rf $HOME 'n' \"o\"", "negative_prompt": "--seed=3"}
    words = shlex.split(command(asked, "runs/my run"))
    assert f"--prompt={asked['prompt']}" in words and "--negative_prompt=--seed=3" in words
    assert "--workdir=runs/my run" in words and words[:3] == ["python", "-m", "experiments.digits"]


def test_the_command_repeats_from_the_file_what_flags_do_not_say(made):
    """Samples are numbered from 0 on, and without --label or --prompt they are of all classes, or of the examples."""
    words = {
        name: shlex.split(command({**made, **changed}))[5:]
        for name, changed in {
            "flags": {"index": 0},
            "number": {"index": 1},
            "no class": {"index": 0, "label": None},
            "no prompt": {"index": 0, "prompt": ""},
        }.items()
    }
    assert words.pop("flags")[:3] == ["--label=3", "--seed=5", "--num_samples=1"]
    assert all(flags == ["--like=PICTURE.png"] for flags in words.values())


def test_readable_text_has_the_fields_order(made):
    first, second, fields = readable({**made, "prompt": "a fox", "negative_prompt": "a dog"}).split("\n")
    assert first == "a fox" and second == "Negative prompt: a dog"
    assert fields.startswith(
        "Steps: 3, Sampler: dpm_solver_pp, CFG scale: 1.5, Seed: 5, Size: 8x8, Model: digits_classes, Model"
    )


def test_a_single_sample_is_drawn_again_and_flags_change_only_what_they_name(kinds, copied, tmp_path):
    folder, kind = copied("digits_classes"), kinds["digits_classes"]

    def draw(name, *flags):
        kind.do(folder, "--mode=sample", f"--out={tmp_path / name}.npz", *flags)
        return pixels(tmp_path / name)

    first = draw("first", "--num_samples=1", "--label=4", "--seed=7", "--steps=2", "--config.sampling.guidance=2.5")
    like = f"--like={tmp_path / 'first.png'}"
    np.testing.assert_array_equal(draw("again", like), first)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "again.png"))[..., None], first[0])
    # The copy's own file repeats it too, though its account was made from the account.
    np.testing.assert_array_equal(draw("third", f"--like={tmp_path / 'again.png'}"), first)
    same = ("--num_samples=1", "--label=4", "--config.sampling.guidance=2.5")
    expected = draw("expected", *same, "--seed=8", "--steps=2")
    np.testing.assert_array_equal(draw("seed", like, "--seed=8"), expected)
    made, other = (read_png(tmp_path / f"{name}.png") for name in ("first", "seed"))
    assert {**made, "seed": 8} == other
    np.testing.assert_array_equal(draw("two", like, "--num_samples=2")[0], first[0])
    draw("steps", like, "--steps=1", "--label=5", "--config.sampling.guidance=1.0")
    found = read_png(tmp_path / "steps.png")
    changed = {**made["sampling"], "num_steps": 1, "guidance": 1.0}
    assert found == {**made, "label": 5, "sampling": changed}


def test_a_picture_of_other_weights_or_another_experiment_is_refused(kinds, trained, copied, tmp_path):
    kinds["digits"].do(copied("digits"), "--mode=sample", "--num_samples=1", f"--out={tmp_path / 'a.npz'}")
    like = f"--like={tmp_path / 'a.png'}"
    with pytest.raises(RunError, match="drawn with other weights"):
        kinds["digits_classes"].do(trained("digits_classes"), "--mode=sample", like)
    with pytest.raises(RunError, match=r"drawn by experiments\.digits, not scenes"):
        kinds["scenes"].do(trained("scenes"), "--mode=sample", like)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--strength=0.5",), "--strength: .* was not begun with a picture"),
        (("--mask=left",), "--mask: .* was not filled in"),
        (("--images=a.png",), "--images: .* was begun with no picture"),
        (("--label=1,2",), "at most one"),
    ],
)
def test_flags_that_the_picture_has_no_use_for_are_refused(kinds, copied, tmp_path, flags, message):
    folder = copied("digits_classes")
    write_png(np.zeros((8, 8, 1), np.uint8), made_of(open_run(folder, num_devices=1), Plan(1)), tmp_path / "like.png")
    with pytest.raises(ValueError, match=message):
        kinds["digits_classes"].do(folder, "--mode=sample", f"--like={tmp_path / 'like.png'}", *flags)


def test_strength_and_mask_need_like(kinds, trained):
    for flag in ("--strength=0.5", "--mask=left"):
        with pytest.raises(ValueError, match=r"with --like=PICTURE\.png alone"):
            kinds["digits"].do(trained("digits"), "--mode=sample", flag)
    with pytest.raises(RunError, match="--like is not read by --mode=progressive"):
        do_call(kinds["digits"].task, "digits", trained("digits"), "--mode=progressive", "--like=a.png")
