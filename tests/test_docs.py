"""README and docs/ against the code.

Blocks of Python run, commands parse, files and functions exist, the lecture runs, and the picture of the rooms and the
numbers of versions are those of the source.
"""

import ast
import importlib
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import test_architecture
from absl import flags
from helpers import SHORT, SMALL, do_call
from PIL import Image

import diffusion
from diffusion.demo import __main__ as demo
from diffusion.model import fields
from diffusion.runs import command_line, compare, modes
from diffusion.training.description import FORMAT

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.S)
PAIRS = [flag.removeprefix("--config.").partition("=") for flag in (*SMALL, *SHORT)]
TINY = {name: ast.literal_eval(value) for name, _, value in PAIRS}  # as load_config takes them
FILMS = "21, 8, 8, 1"  # frames of a run of 20 steps; the tiny run has 3


@pytest.fixture
def place(tmp_path, monkeypatch, copied):
    """A folder as the checkout is, with trained runs of digits and scenes."""
    (tmp_path / "runs").mkdir()
    for name in ("digits", "scenes"):
        (tmp_path / "runs" / name).symlink_to(copied(name))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("block", [block for block in BLOCKS if "Task(" not in block], ids=range(len(BLOCKS) - 1))
def test_python_in_the_readme_runs(block, place):
    """Every array has the shape in the comment beside it."""
    text = block.replace(FILMS, FILMS.replace("21", "4"))
    text = text.replace('{"training.num_steps": 400, "optimizer.cooldown_steps": 200}', repr(TINY))
    names = {}
    exec(compile(text, "README.md", "exec"), names)
    for name, shape in re.findall(r"^(\w+) = .*# uint8\[([\d, ]+)\]", text, flags=re.M):
        assert names[name].dtype == np.uint8
        assert names[name].shape == tuple(map(int, shape.split(","))), name
    if "save_gif" in text:
        with Image.open("digits.gif") as film:
            assert film.is_animated  # pyright: ignore[reportAttributeAccessIssue]


def test_the_first_uses_take_at_most_six_lines():
    first = [block for block in BLOCKS if "open_run" in block]
    assert len(first) == 2
    assert all(len(block.strip().splitlines()) <= 6 for block in first)


def test_the_experiment_in_the_readme_trains(tmp_path):
    (block,) = [block for block in BLOCKS if "Task(" in block]
    assert len(block.strip().splitlines()) <= 25
    (tmp_path / "squares.py").write_text(block)
    task = runpy.run_path(str(tmp_path / "squares.py"))["TASK"]
    do_call(task, "digits", tmp_path / "run", *SMALL, *SHORT)
    do_call(task, "digits", tmp_path / "run", "--mode=sample", "--num_samples=8", f"--out={tmp_path / 'out.npz'}")
    assert np.load(tmp_path / "out.npz")["arr_0"].shape == (8, 8, 8, 1)


def commands():
    """(page, experiment, its arguments) of each command in the pages."""
    for page in PAGES:
        text = re.sub(r"\n(?=--)", " ", page.read_text())
        for name, rest in re.findall(r"(?:\./launch\.sh|python -m experiments\.)\s*(\w+)([^`\n]*)", text):
            if name not in ("test", "lint", "sweep", "NAME", "squares", "EXPERIMENT"):
                yield page.name, name, shlex.split(rest, comments=True)


@pytest.mark.parametrize("page, name, arguments", [pytest.param(*one, id=" ".join(one[2])) for one in commands()])
def test_commands_parse(page, name, arguments):
    """Every flag and config field of a command exists, in the experiment that it runs."""
    if name == "demo":
        demo.parse([name, *arguments])
        return
    module = importlib.import_module(f"experiments.{name}")
    if not hasattr(module, "TASK"):
        assert not arguments
        return
    values = flags.FlagValues()
    getattr(module, "define_flags", modes.define_flags)(values)
    command_line.define_flags(values, getattr(module, "MODES", modes.MODES))
    rest = values(compare.named([name, *arguments]), known_only=True)
    config, _ = fields.load(values.config or name, ROOT / "experiments" / "configs")
    command_line.override(config, rest, values)


def test_flags_exist():
    """Flags in the middle of a sentence are those of an experiment, of launch.sh, or of a program of ours."""
    programs = [*(ROOT / "benchmarks").glob("*.py"), ROOT / "diffusion" / "evaluation" / "__main__.py"]
    programs.append(ROOT / "diffusion" / "runs" / "sweeps.py")
    known = set(re.findall(r"--[a-z_-]+", "".join(path.read_text() for path in [*programs, ROOT / "launch.sh"])))
    clip = importlib.import_module("experiments.clip")
    for define in (modes.define_flags, clip.define_flags):
        values = flags.FlagValues()
        define(values)
        command_line.define_flags(values, {**modes.MODES, **clip.MODES})
        known |= {f"--{name}" for name in values}
    values = flags.FlagValues()
    demo.define_flags(values)
    known |= {f"--{name}" for name in values}
    for page in PAGES:
        used = set(re.findall(r"(?<![\w-])--[a-z_]+(?![a-z_.])", page.read_text()))
        assert used <= known, f"{page.name}: {used - known}"
        named = set(re.findall(r"--mode=([a-z0-9]+)", page.read_text()))
        assert named <= {*modes.MODES, *clip.MODES}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_files_and_functions_exist(page):
    """Links, paths in backticks, and the names that follow `FILE.py`:"""
    text = page.read_text()
    if page.name == "CHANGELOG.md":
        text = "\n".join(line for line in text.splitlines() if not line.startswith("|"))  # tables have old names
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / link).exists(), link
    for path in re.findall(r"`((?:[\w.]+/)+[\w.]*)`", text):
        if path.split("/")[0] in ("diffusion", "experiments", "tests", "benchmarks", "docs", ".ci"):
            assert (ROOT / path).exists() or path == "experiments/squares.py", path
    for path, names in re.findall(r"`([\w/]+\.py)`:((?:,? `\w+`)+)", text):
        tree = ast.parse((ROOT / path).read_text()).body
        defined = {node.name for node in tree if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        for node in tree:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            defined |= {target.id for target in targets if isinstance(target, ast.Name)}
        assert set(re.findall(r"\w+", names)) <= defined, (path, names)


def test_papers_in_the_readme_are_those_there_are():
    table = README[README.index("## Where the paper is") : README.index("## Add an experiment")]
    named = set(re.findall(r"`(\w+)\.py`", "".join(line.split("|")[1] for line in table.splitlines() if "|" in line)))
    there = {path.stem for path in (ROOT / "diffusion").glob("*.py")} - {
        "__init__",
        "compiler",
        "extras",
        "files",
        "randomness",
    }
    assert there <= named


@pytest.fixture
def drawing(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module("draw_architecture")


def test_the_picture_of_the_rooms_is_that_of_the_source(drawing):
    there = drawing.read_rooms()
    assert drawing.drawn_rooms() == there, "run python docs/draw_architecture.py"
    expected = {room: set() for room in there}
    for path in test_architecture.SOURCES:
        room = test_architecture.room(test_architecture.module_name(path))
        if room in expected and not path.is_relative_to(ROOT / "experiments" / "configs"):
            found = {test_architecture.room(name) for name in test_architecture.imports_of(path)}
            expected[room] |= found - {room, None, "front"}
    assert {room: set(found["imports"]) for room, found in there.items()} == expected


def test_arrows_that_follow_from_others_are_left_out(drawing):
    arrows = {"a": {"b", "c", "d"}, "b": {"c"}, "c": set(), "d": set()}
    assert set(drawing.needed(arrows)) == {("a", "b"), ("b", "c"), ("a", "d")}


def test_versions_are_the_same_everywhere():
    changes, citation = (ROOT / "CHANGELOG.md").read_text(), (ROOT / "CITATION.cff").read_text()
    assert re.findall(r"^## (\S+)", changes, flags=re.M)[0] == diffusion.__version__
    assert f"format {FORMAT}" in changes
    assert re.findall(r"^version: (\S+)", citation, flags=re.M) == [diffusion.__version__]
