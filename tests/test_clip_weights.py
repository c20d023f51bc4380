"""A published CLIP becomes a run and the run that CLIP again; what does not fit is reported in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import make_call
from PIL import Image
from safetensors.numpy import load_file

from diffusion.data import text
from diffusion.model.clip import open_clip
from diffusion.networks.clip import CLIP, ImageTower, TextTower
from diffusion.pretrained.clip import load_clip, load_normalisation, save_clip
from diffusion.runs.command_line import run_to_end
from experiments import clip as experiment
from experiments.captions import load_judge

NORMALISATION = (0.5, 0.25, 0.125), (0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder as transformers writes it, of random towers."""
    tokenizer = text.train_tokenizer(["a red three", "a blue four"], 262)
    tower: Any = dict(num_layers=1, num_heads=2, mlp_width=24, projection=8, activation="gelu")
    sizes: Any = dict(vocabulary_size=262, end_of_text=text.end_of_text(tokenizer), length=77)
    clip = CLIP(ImageTower(16, 8, width=16, **tower), TextTower(**sizes, width=12, **tower))
    params = jax.jit(clip.init)(jax.random.key(0), jnp.zeros((1, 16, 16, 3)), jnp.zeros((1, 77), jnp.int32))
    folder = tmp_path_factory.mktemp("published") / "clip"
    save_clip(folder, clip, params, text.to_json(tokenizer), NORMALISATION)
    return folder


@pytest.fixture
def call(capsys):
    """`call(*arguments)` returns how the command ended, 0 or an error, and what it printed."""

    def run(*arguments):
        def work():
            modes: Any = {"modes": experiment.MODES, "define_flags": experiment.define_flags}
            made = make_call(experiment.TASK, "clip", Path("unnamed"), *arguments, **modes)
            experiment.MODES[made.flags.mode](made)

        with pytest.raises(SystemExit) as ended:
            run_to_end(work)
        return ended.value.code, capsys.readouterr().out

    return run


def test_a_published_folder_becomes_a_run_and_the_run_that_folder(published, call, tmp_path):
    run = tmp_path / "run"
    code, out = call("--mode=import", f"--weights={published}", f"--workdir={run}", "--config.data.batch_size=8")
    assert code == 0 and "is now a run of experiments.clip with the weights of" in out

    trained = open_clip(run)
    clip, params = load_clip(published)
    assert trained.clip == clip and trained.step == 0
    jax.tree.map(np.testing.assert_array_equal, trained.params, params)
    assert text.to_json(trained.tokenizer) == text.to_json(text.read_tokenizer(published))
    config = json.loads((run / "config.json").read_text())["config"]
    assert (tuple(config["data"]["mean"]), tuple(config["data"]["std"])) == NORMALISATION

    assert load_judge(str(published)).name == load_judge(str(run)).name == trained.encoder.name
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    code, out = call(
        "--mode=score", f"--workdir={run}", f"--images={tmp_path / 'a.png'}", "--prompts=a red three;a blue four"
    )
    assert code == 0 and "prompt 2: a blue four" in out
    few = ["num_examples=60", "num_candidates=10", "num_sets=2", "num_single=20"]
    code, _ = call("--mode=evaluate", f"--workdir={run}", *(f"--config.evaluation.{field}" for field in few))
    assert code == 0
    names = [one["name"] for one in json.loads((run / "report.json").read_text())["measurements"]]
    assert "retrieval among 10, held_out" in names

    again = tmp_path / "again"
    assert call("--mode=export", f"--weights={again}", f"--workdir={run}")[0] == 0
    for path in published.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in published.iterdir())


def test_openai_s_normalisation_where_there_is_none(published, call, tmp_path):
    shutil.copytree(published, tmp_path / "bare")
    (tmp_path / "bare" / "preprocessor_config.json").unlink()
    assert call("--mode=import", f"--weights={tmp_path / 'bare'}", f"--workdir={tmp_path / 'run'}")[0] == 0
    data = json.loads((tmp_path / "run" / "config.json").read_text())["config"]["data"]
    assert data["mean"] == [0.48145466, 0.4578275, 0.40821073] and data["std"] == [0.26862954, 0.26130258, 0.27577711]


def test_mistakes_are_one_line_and_leave_nothing(published, call, tmp_path):
    folder, new = tmp_path / "theirs", tmp_path / "new"
    shutil.copytree(published, folder)
    arguments = ["--mode=import", f"--weights={folder}", f"--workdir={new}"]

    def refused(message, *arguments):
        printed, _ = call(*arguments)
        assert str(printed).startswith("error: ") and message in printed and "\n" not in printed
        assert sorted(child.name for child in tmp_path.iterdir()) == ["theirs"]

    refused("--weights is missing", "--mode=import", f"--workdir={new}")
    refused("cannot read nowhere/config.json", "--mode=import", "--weights=nowhere", f"--workdir={new}")
    refused("no checkpoint in", "--mode=export", f"--weights={new}", f"--workdir={folder}")
    refused("is there already", "--mode=import", f"--weights={folder}", f"--workdir={folder}")

    tokenizer = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.to_json(text.train_tokenizer(["a"], 258)))
    refused("has 258 tokens, the weights 262: use the tokenizer files that were published with", *arguments)
    (folder / "tokenizer.json").unlink()
    refused("holds no tokenizer", *arguments)
    (folder / "tokenizer.json").write_text(tokenizer)

    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.5], "image_std": [1, 1, 1]}')
    refused("does not hold image_mean and image_std, three numbers each", *arguments)
    shutil.copy(published / "preprocessor_config.json", folder)
    assert load_normalisation(folder) == NORMALISATION

    fields = json.loads((folder / "config.json").read_text())
    fields["text_config"]["hidden_act"] = "quick_gelu"
    (folder / "config.json").write_text(json.dumps(fields))
    refused("towers with gelu and quick_gelu", *arguments)
    assert load_file(folder / "model.safetensors")  # their folder is as it was
