"""Every mode on every kind of run: each leaves whole files, or is refused in one line."""

import json

import numpy as np
import pytest
from PIL import Image

from diffusion.data.samples import load_samples
from diffusion.runs.modes import MODES

KINDS = ("digits", "digits_classes", "cifar10", "scenes", "captions")
# What each mode is asked for, beside --mode; and what must be in the folder afterwards, as patterns.
ASKED = {
    "check": (),
    "sample": ("--num_samples=5", "--seed=1"),
    "evaluate": (),
    "sweep": ("--sweep_steps=2,3", "--num_samples=12"),
    "likelihood": ("--num_samples=2", "--steps=3"),
    "interpolate": ("--num_samples=1",),
    "inpaint": ("--num_samples=2", "--mask=right", "--resample=2"),
    "img2img": ("--num_samples=2", "--strength=0.4,0.8"),
    "progressive": ("--num_samples=2",),
}
LEFT = {
    "check": (),
    "sample": ("samples/*.npz", "samples/*.png", "samples/*.json"),
    "evaluate": ("report.json", "report.md", "curves.png"),
    "sweep": ("sweeps/steps/report.json", "sweeps/steps/score.png"),
    "likelihood": ("likelihood/report.json",),
    "interpolate": ("uses/interpolate_*.npz", "uses/interpolate_*.png"),
    "inpaint": ("uses/inpaint_right_*.npz", "uses/inpaint_right_*.png"),
    "img2img": ("uses/img2img_*.npz", "uses/img2img_*.png"),
    "progressive": ("uses/progressive_*.npz", "uses/progressive_*.png"),
}
# Cheap evaluations.
OF_KIND = {
    "digits": ("--num_samples=20", "--metrics=fid,kid"),
    "digits_classes": ("--num_samples=20", "--metrics=fid,kid"),
    "cifar10": ("--num_samples=12", "--metrics=kid"),
    "scenes": ("--num_samples=6", "--config.evaluation.num_swept=4", "--config.evaluation.guidance=(1.0, 2.0)"),
    "captions": ("--num_samples=6", "--config.evaluation.metrics=('kid',)"),
}


def test_the_table_has_every_mode():
    assert set(ASKED) | {"train", "import", "export", "compare"} == set(MODES)


@pytest.mark.parametrize("mode", ASKED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_mode_leaves_whole_files(kind, mode, kinds, copied, capsys):
    folder = copied(kind)
    arguments = [*ASKED[mode], *(OF_KIND[kind] if mode == "evaluate" else ())]
    if mode == "sweep" and kind in ("cifar10", "captions"):
        arguments.append("--metrics=kid")  # the FID of so many pixels takes minutes
    if mode == "check":
        arguments += [*kinds[kind].flags]
    if kind == "captions" and mode in ("sample", "progressive"):  # it has no examples of its own
        arguments.append("--prompt=a red two")
    if kind == "captions" and mode == "interpolate":
        arguments += ["--prompt=a red two", "--prompt=a blue four"]
    kinds[kind].do(folder, f"--mode={mode}", *arguments)
    for pattern in LEFT[mode]:
        found = list(folder.glob(pattern))
        assert found, f"{mode} left no {pattern}"
        for path in found:
            match path.suffix:
                case ".npz":
                    assert load_samples(path).dtype == np.uint8
                case ".png":
                    with Image.open(path) as picture:
                        picture.load()
                case ".json":
                    json.loads(path.read_text())
    assert not list(folder.rglob(".*.npz")) and capsys.readouterr().out.strip()


@pytest.mark.parametrize("kind", KINDS)
def test_exports_are_read_back(kind, kinds, copied, tmp_path):
    """U-Nets without prompts as diffusers publishes them, all others in a form of ours."""
    folder = copied(kind)
    kinds[kind].do(folder, "--mode=export", f"--weights={tmp_path / 'published'}")
    kinds[kind].do(tmp_path / "again", "--mode=import", f"--weights={tmp_path / 'published'}")
    if kinds[kind].config in ("scenes", "captions"):
        how = ("--prompt=a red two",)
    else:
        sampling = ("sampler=ancestral", "grid=leading", "guidance=1.0")
        how = ("--steps=3", *(f"--config.sampling.{field}" for field in sampling))
    for name, workdir in (("ours", folder), ("theirs", tmp_path / "again")):
        out = f"--out={tmp_path / name}.npz"
        kinds[kind].do(workdir, "--mode=sample", "--num_samples=4", *how, out)
    np.testing.assert_array_equal(load_samples(tmp_path / "theirs.npz"), load_samples(tmp_path / "ours.npz"))


@pytest.mark.parametrize("mode", ["sample", "img2img", "progressive"])
@pytest.mark.parametrize("flag", ["--prompt=a cat", "--negative_prompt=a cat"])
def test_prompts_are_refused_by_runs_that_read_none(mode, flag, kinds, trained):
    with pytest.raises(ValueError, match="is unconditional: it cannot draw from prompts"):
        kinds["digits"].do(trained("digits"), f"--mode={mode}", flag)
