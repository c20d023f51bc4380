"""What the end of a run needs is checked before its beginning: paths, devices, pictures, scores."""

from pathlib import Path

import numpy as np
import pytest
from helpers import CONFIGS, do, make_call
from PIL import Image

from diffusion.files import check_file, check_folder
from diffusion.runs import edit, sample
from diffusion.runs.run import open_run
from experiments import captions, digits, folder


def test_where_a_run_and_its_files_are_written_is_checked_first(kinds, trained, tmp_path, refused):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.npz").mkdir()
    kind, folder = kinds["digits"], trained("digits")
    for out, line in (
        ("file/a.npz", r"--out=.*file/a\.npz: .*file is a file, not a folder"),
        ("folder.npz", r"--out=.*folder\.npz is a folder: name a file"),
        (f"{'y' * 250}.npz", "--out=.*: choose a name of at most 200 bytes"),
        (f"{'y' * 250}/a.npz", "--out=.*: choose a name of at most 200 bytes"),
    ):
        refused(line, lambda out=out: kind.call(folder, "--mode=sample", f"--out={tmp_path / out}"))
    for flags in ((), ("--mode=import",)):
        line = "--workdir=.*file/run: .*file is a file, not a folder"
        refused(line, lambda flags=flags: kind.call(tmp_path / "file" / "run", *flags))
    weights = f"--weights={tmp_path / 'file' / 'new'}"
    call = kind.call(folder, "--mode=export", weights)
    refused(f"{weights}: .*file is a file, not a folder", lambda: do(call))


def test_folders_without_permission_are_named(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)  # to root everything is permitted
    line = f"--out=x: {tmp_path} cannot be written to: choose another folder"
    refused(line, lambda: check_file(tmp_path / "new" / "a.npz", "--out=x"))
    refused(line, lambda: check_folder(tmp_path / "new", "--out=x"))


@pytest.mark.parametrize("why", [AssertionError(), RuntimeError("Unable to initialize backend 'cuda'")])
def test_a_machine_without_the_device_asked_for_is_reported(kinds, tmp_path, why, monkeypatch, refused):
    def devices():
        raise why

    monkeypatch.setattr("jax.devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    line = rf"JAX_PLATFORMS=cuda names no device of this machine( \({why}\))?: set JAX_PLATFORMS=cpu"
    refused(line, lambda: kinds["digits"].call(tmp_path / "run", *kinds["digits"].flags))


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("image_size=-4", "data.image_size is -4: it must be at least 0"),
        ("channels=2", "data.channels is 2: choose 1, 3 or 4, or 0 for what the pictures have"),
        ("channels=-1", "data.channels is -1: choose 1, 3 or 4"),
    ],
)
def test_sizes_of_pictures_are_checked_before_they_are_read(tmp_path, field, line, refused):
    flags = (f"--config.data.dir={tmp_path}", f"--config.data.{field}")
    refused(line, lambda: do(make_call(folder.TASK, "folder", tmp_path / "run", *flags)))


@pytest.mark.parametrize("mode", ["sample", "evaluate", "img2img", "interpolate", "inpaint", "progressive"])
def test_where_images_are_written_is_checked_first(kinds, trained, tmp_path, mode, refused):
    line = "--out=.*foo.png: images are written to an .npz file, with a picture of them beside it"
    refused(line, lambda: kinds["digits"].call(trained("digits"), f"--mode={mode}", f"--out={tmp_path / 'foo.png'}"))


AFTER = "--config.evaluation.after_training=True"


@pytest.mark.parametrize(
    ("kind", "flags", "line"),
    [
        ("captions", ("--config.evaluation.dir=",), r"name one by --config\.evaluation\.dir=DIR"),
        ("captions", ("--config.evaluation.dir=nowhere",), r"there is no nowhere/captions\.jsonl"),
        ("captions", ("--config.evaluation.metrics=('FID',)",), "unknown metric 'FID': choose from fid, kid"),
        ("captions", ("--config.evaluation.judge=nowhere",), "nowhere"),
        ("captions", ("--config.evaluation.features=clip",), "features=clip needs the folder of a published CLIP"),
        ("digits", ("--config.evaluation.metrics=('fid','beauty')",), "unknown metric 'beauty': choose from"),
        ("digits", ("--config.evaluation.features=vgg",), "unknown features 'vgg': choose from inception, pixels"),
        ("digits", ("--config.evaluation.metrics=('inception_score',)",), "needs the probabilities of a classifier"),
        ("digits", ("--config.evaluation.num_samples=1",), "fid needs at least 2 samples, not 1"),
        ("digits", ("--config.evaluation.bound_terms=1000",), "bound_terms"),
        ("cifar10", ("--config.evaluation.features=inception",), "cannot fetch .*no network here.*: put https"),
        (
            "cifar10",
            ("--config.evaluation.features=inception", "--config.evaluation.weights=x.pth"),
            "x.pth is not a file",
        ),
    ],
)
def test_what_evaluation_needs_is_checked_before_training(
    kinds, kind, flags, line, tmp_path, untrained, refused, monkeypatch
):
    def offline(*given, **more):
        raise OSError("no network here")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache" / "diffusion" / "weights").mkdir(parents=True)
    monkeypatch.setattr("urllib.request.urlopen", offline)
    call = kinds[kind].call(tmp_path / "run", *kinds[kind].flags, AFTER, *flags)
    refused(line, lambda: do(call))


def test_paths_begin_with_a_tilde(kinds, trained, shared, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "runs").symlink_to(trained("digits").parent)
    (tmp_path / "pairs").symlink_to(shared / "pairs")
    Image.fromarray(np.full((8, 8), 255, np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "prompts.txt").write_text("a red two\n")
    (tmp_path / "my.py").write_text((CONFIGS / "digits.py").read_text())

    call = make_call(
        digits.TASK, "digits", Path("~/runs/digits"), "--mode=img2img", "--images=~/a.png", "--out=~/b.npz"
    )
    run = call.open()
    assert call.workdir == tmp_path / "runs" / "digits"
    assert edit.make_place(call, run, "x", [None]).path == tmp_path / "b.npz"
    image, _ = edit.read_images(call, run, 1)
    assert image.shape == (1, 8, 8, 1) and edit.read_mask("~/a.png", (8, 8, 1)).all()
    assert open_run("~/runs/digits").workdir == tmp_path / "runs" / "digits"
    call = make_call(digits.TASK, "~/my.py:flow", Path("~/new"))
    assert call.config.process.name == "flow" and call.workdir == tmp_path / "new"

    flags = ("--config.data.dir=~/pairs/train", "--config.evaluation.dir=~/pairs/test")
    call = make_call(captions.TASK, "captions", Path("~/new"), *flags, "--config.data.image_size=16")
    assert [captions.read(call.config, split).num_examples for split in ("train", "test")] == [48, 24]
    call = make_call(captions.TASK, "captions", trained("captions"), "--mode=sample", "--prompts=~/prompts.txt")
    assert sample.read_prompts(call) == ["a red two"]
