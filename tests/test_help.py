"""--help: every mode, flag and field of the config, explained from one source, in columns that fit."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags
from helpers import CONFIGS, make_call

from diffusion.model.config import plain
from diffusion.model.field_comments import Block, comments_of, docstring_of, read_blocks
from diffusion.model.fields import find_file, load, nearest
from diffusion.model.processes import PROCESSES
from diffusion.runs import command_line, modes
from diffusion.runs.command_line import is_slip
from diffusion.training import RunError
from diffusion.training.workdir import flatten
from experiments import digits

ROOT = Path(__file__).parent.parent
SPECS = [path.stem for path in sorted(CONFIGS.glob("[!_]*.py"))]
METHODS = ["digits:flow", "digits:edm", "digits:cosine_hybrid", "scenes:unet", "scenes:clip"]


def help_of(name, capsys, *arguments, columns=100):
    """What python -m experiments.NAME ARGUMENTS --help prints."""
    module = importlib.import_module(f"experiments.{name}")
    values = flags.FlagValues()
    getattr(module, "define_flags", modes.define_flags)(values)
    table = dict(getattr(module, "MODES", modes.MODES))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setenv("COLUMNS", str(columns))
        argv = [name, *arguments, "--help"]
        command_line.parse(argv, module.TASK, module.__doc__, CONFIGS, name, table, values)
    assert left.value.code == 0
    return capsys.readouterr().out, values, table


@pytest.mark.parametrize("spec", SPECS + METHODS)
def test_every_field_of_every_config_has_its_comment(spec):
    config, _ = load(spec, CONFIGS)
    comments = comments_of(config, find_file(spec, CONFIGS)[0], CONFIGS / "_base.py")
    fields = flatten(plain(config))
    assert comments.keys() <= fields.keys()
    assert [field for field in fields if field not in comments and not field.endswith(".name")] == []


def test_a_comment_is_that_of_the_config_and_not_of_another_with_the_same_field():
    comments = {}
    for spec in ("digits", "folder", "captions"):
        config, _ = load(spec, CONFIGS)
        comments[spec] = comments_of(config, CONFIGS / f"{spec}.py", CONFIGS / "_base.py")["data.dir"]
    assert comments["digits"] == "their folder; empty: the data set's own"
    assert comments["folder"] == "the pictures, in sub-folders too"
    assert comments["captions"].startswith("folder: of captions.jsonl")


def test_blocks_are_read_as_config_files_write_them():
    source = """
NETWORK = dict(name="unet", width=3)
def get_config():
    config.network = ConfigDict(NETWORK)
    config.data = ConfigDict(
        dict(
            dir="",  # where
            # two lines
            # above
            size=(
                1,
                2,
            ),
            inner=ConfigDict(dict(name="a")),  # of it
            one=1, two=2,  # which?
        )
    )
    config.data.update(flip=True)  # mirror
    config.process.shift = 0.0  # of times
    other.thing = 1  # is no config
"""
    assert read_blocks(source) == [
        Block("network", "unet", {"name": "", "width": ""}),
        Block("data.inner", "a", {"name": "of it"}),
        Block("data", "", {"dir": "where", "size": "two lines above", "one": "", "two": ""}),
        Block("process", "", {"shift": "of times"}),
        Block("data", "", {"flip": "mirror"}),
    ]


def test_docstrings_name_several_arguments_and_go_over_lines():
    def function(a, b, c):
        """Returns nothing.

        Args:
          a, b: two
            lines.
          c: one: more.

        Raises:
          ValueError: never.
        """

    assert docstring_of(function) == {"a": "two lines", "b": "two lines", "c": "one: more"}
    assert docstring_of(None) == {}


@pytest.mark.parametrize("name", ["digits", "clip", "flux2", "autoencoder"])
@pytest.mark.parametrize("columns", [80, 100])
def test_all_there_is_is_listed_and_fits(name, columns, capsys):
    text, values, table = help_of(name, capsys, columns=columns)
    assert all(
        len(line) <= columns for line in text.split("Modes, ")[1].splitlines() if " = (" not in line
    )  # but of long values
    words = {line.split()[0] for line in text.splitlines() if line.startswith("  ") and line.strip()}
    assert set(table) <= words
    ours = {name for name in values if name not in ("flagfile", "undefok", "mode", "steps")}
    named = {word.removeprefix("--").removeprefix("[no]").partition("=")[0] for word in words if word.startswith("--")}
    assert ours <= named and "steps" not in named
    assert set(flatten(plain(load(name, CONFIGS)[0]))) <= words


def test_choices_are_those_of_the_tables_and_columns_are_aligned(capsys):
    text, _, _ = help_of("digits", capsys)
    lines = text.splitlines()
    (process,) = [line for line in lines if line.startswith("  process.name = ")]
    assert process.split("  or ")[1].split(", ") == [name for name in PROCESSES if name != "ddpm"]
    assert "mean_flow" in text[text.index("Methods, as") :].split("\n\n")[0]
    block = [line for line in lines if line.startswith("  lora.")]
    comments = ("their product", "of the adapters", "modules of")
    assert len({line.index(comment) for line, comment in zip(block, comments, strict=True)}) == 1


def test_the_config_is_that_of_the_other_arguments(capsys):
    text, _, _ = help_of("digits", capsys, "--config=digits:flow", "--config.network.channels=7", "--sampler=heun")
    for line in ("process.name = flow", "process.times = logit_normal", "network.channels = 7", "sampler.name = heun"):
        assert line in text
    assert "process.beta" not in text


# --- names


FIELDS = flatten(plain(load("digits", CONFIGS)[0]))


@pytest.mark.parametrize(
    ("name", "offered"),
    [
        ("lr", "optimizer.learning_rate"),
        ("data.lr", "optimizer.learning_rate"),
        ("optimiser.learning_rate", "optimizer.learning_rate"),
        ("batch_size", "data.batch_size or sampling.batch_size"),
        ("data.batchsize", "data.batch_size"),
        ("training.steps", "training.num_steps"),
        ("sampling.steps", "sampling.num_steps"),
        ("training.ema", "training.ema_decay"),
        ("network.chanels", "network.channels"),
        ("foo", ""),
        ("epochs", ""),
        ("num_workers", ""),
        ("training.resolution", ""),
    ],
)
def test_only_names_that_are_near_are_offered(name, offered):
    assert nearest(name, FIELDS) == (f": did you mean {offered}?" if offered else "")


def test_flags_and_configs_are_offered_too(tmp_path):
    for argument, line in [
        ("--lr=3", "unknown flag --lr: did you mean --config.optimizer.learning_rate?"),
        ("--batch_size=3", "did you mean --config.data.batch_size or --config.sampling.batch_size?"),
        ("--config=digts", "no config file digts: did you mean digits?"),
    ]:
        with pytest.raises(RunError) as refused:
            make_call(digits.TASK, "digits", tmp_path / "run", argument)
        assert line in str(refused.value)


def test_steps_is_the_old_name_of_sampling_steps(tmp_path):
    for name in ("steps", "sampling_steps"):
        assert make_call(digits.TASK, "digits", tmp_path / "run", f"--{name}=7").config.sampling.num_steps == 7
        with pytest.raises(RunError, match=r"--sampling_steps and --config\.sampling\.num_steps say the same"):
            make_call(digits.TASK, "digits", tmp_path / "run", f"--{name}=7", "--config.sampling.num_steps=8")


# --- what is a slip


def raised(work):
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError


def test_slips_are_what_we_refuse_by_name():
    assert is_slip(raised(lambda: PROCESSES["ddpm"](beta="none")))
    assert is_slip(raised(Path("/nowhere/at/all").read_text))
    assert is_slip(RunError("anything"))
    assert not is_slip(raised(lambda: importlib.import_module("numpy").zeros(3).reshape(2, 2)))
    assert not is_slip(OSError("no file has to do with it"))


@pytest.mark.parametrize("lines", [0, 3])
def test_a_reader_that_has_enough_ends_it_quietly(lines):
    read = "import sys; [sys.stdin.readline() for _ in range(int(sys.argv[1]))]"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": ""}
    writer = subprocess.Popen(
        [sys.executable, "-m", "experiments.digits", "--help"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert writer.stdout and writer.stderr
    subprocess.run([sys.executable, "-c", read, str(lines)], stdin=writer.stdout, check=True)
    writer.stdout.close()
    assert writer.wait(timeout=120) in (0, 141) and writer.stderr.read() == b""
