"""`experiments.published`: a published folder becomes a run and a run a published folder; mistakes are one line."""

import json
import pathlib
import sys

import numpy as np
import pytest
from absl import flags

from diffusion.data.sources import array_source
from diffusion.pretrained.unet import load_unet
from diffusion.training.checkpoints import open_existing
from experiments import cifar10, image_modes, published
from experiments.command_line import from_plain, parse

GOLDEN = pathlib.Path(__file__).parent / "golden" / "published_tiny.npz"


@pytest.fixture
def folder(tmp_path):
    for name, content in np.load(GOLDEN).items():
        if name.startswith("files/"):
            path = tmp_path / "theirs" / name.removeprefix("files/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.tobytes())
    return tmp_path / "theirs"


@pytest.fixture
def call(monkeypatch, capsys):
    """`call(*arguments)` runs the command line and returns what it said last: None, or an error."""
    image = np.random.RandomState(0).randint(0, 256, (200, 32, 32, 3), np.uint8)
    source = array_source(image, np.arange(200) % 10, "cifar10", "train", 10)
    monkeypatch.setattr(cifar10, "make_source", lambda config, split: source)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["published", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            published.main()
        capsys.readouterr()
        return ended.value.code

    run.source = source
    return run


def test_a_published_folder_becomes_a_run_and_the_run_that_folder(call, folder, tmp_path):
    run_folder = tmp_path / "run"
    assert call("--mode=import", f"--weights={folder}", f"--workdir={run_folder}", "--config.data.dir=/data") == 0
    with open_existing(run_folder) as checkpoints:
        stored = checkpoints.description()
    config = from_plain(stored["config"])
    assert stored["experiment"] == json.loads((run_folder / "config.json").read_text())["experiment"] == "cifar10"
    assert config.network.multipliers == (1, 2) and config.network.dtype == "float32" and config.data.dir == "/data"
    assert (config.sampling.variance, config.sampling.num_steps, config.sampling.threshold) == ("large", 1000, "clip")

    argv = ["cifar10", "--mode=sample", f"--workdir={run_folder}"]
    modes = dict.fromkeys(["train", "sample"], lambda run: None)
    run, _ = parse(argv, pathlib.Path(cifar10.__file__), None, "cifar10_ddpm.py", modes, flags.FlagValues())
    trained = image_modes.load(run, call.source)
    params = load_unet(folder)[1]
    assert trained.step == 0
    np.testing.assert_array_equal(trained.ema["params"]["conv_in"]["kernel"], params["conv_in"]["kernel"])

    assert call("--mode=export", f"--weights={tmp_path / 'ours'}", f"--workdir={run_folder}") == 0
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "ours" / weights).read_bytes() == (folder / weights).read_bytes()
    scheduler = "scheduler/scheduler_config.json"
    theirs, ours = (json.loads((root / scheduler).read_text()) for root in (folder, tmp_path / "ours"))
    assert {**theirs, **ours} == theirs


def test_mistakes_are_one_line_and_leave_nothing(call, folder, tmp_path):
    new = tmp_path / "new"
    for arguments, message in [
        (["--weights=x", f"--workdir={new}"], "--mode is missing"),
        (["--mode=import", f"--workdir={new}"], "--weights is missing"),
        (["--mode=import", "--weights=nowhere", f"--workdir={new}"], "cannot read nowhere/config.json"),
        (["--mode=import", f"--weights={folder}", f"--workdir={tmp_path}"], "is there already"),
        (["--mode=import", f"--weights={folder}", f"--workdir={new}", "--wieghts=3"], "did you mean --weights"),
        (["--mode=import", f"--weights={folder}", f"--workdir={new}", "--config.network.x=3"], "unknown config field"),
        (["--mode=export", f"--weights={new}", f"--workdir={folder}"], "no checkpoint in"),
    ]:
        said = call(*arguments)
        assert said.startswith("error: ") and message in said and "\n" not in said
    path = folder / "unet" / "config.json"
    fields = json.loads(path.read_text())
    arguments = ["--mode=import", f"--weights={folder}", f"--workdir={new}"]
    for changed, message in [
        ({"sample_size": 16}, "name the data by --config.data.name"),
        ({"out_channels": 6}, "conv_out.bias becomes"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
    ]:
        path.write_text(json.dumps(fields | changed))
        assert message in call(*arguments)
    assert sorted(child.name for child in tmp_path.iterdir()) == ["theirs"]
