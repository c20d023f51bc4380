"""What a person types: every mistake is one clear line, and nothing is half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from diffusion.training import RunError, workdir
from experiments import command_line

ROOT = Path(__file__).parent.parent
MODES = {"train": lambda run: None, "sample": lambda run: None}


def parse(folder, *arguments):
    argv = ["digits", f"--workdir={folder}", *arguments]
    file = ROOT / "experiments" / "digits.py"
    return command_line.parse(argv, file, "doc", "digits_ddpm.py", MODES, flags.FlagValues())


def test_fields_are_overridden_with_their_own_type(tmp_path):
    run, mode = parse(
        tmp_path, "--config.network.multipliers=1,2,4", "--config.optimizer.learning_rate=1", "--steps=7", "--seed=3"
    )
    assert mode == "train" and run.flags.seed == 3
    assert run.config.network.multipliers == (1, 2, 4)
    assert run.config.optimizer.learning_rate == 1.0 and isinstance(run.config.optimizer.learning_rate, float)
    assert run.config.sampling.num_steps == 7
    stored = json.loads(json.dumps(run.description))
    assert stored["experiment"] == "digits" and stored["config"]["network"]["multipliers"] == [1, 2, 4]
    assert command_line.from_plain(stored["config"]) == run.config


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.network.channel=5", "did you mean --config.network.channels"),
        ("--config.netwrok.channels=5", "did you mean --config.network.channels"),
        ("--config.network.channels=many", "--config.network.channels=many"),
        ("--config.network.channels=0.5", "--config.network.channels=0.5"),
        ("channels", "unexpected argument 'channels'"),
        ("--num_smaples=5", "did you mean --num_samples"),
        ("--config=nowhere.py", "digits_ddpm"),
    ],
)
def test_unknown_or_bad_arguments_are_refused_with_the_nearest_name(tmp_path, argument, message):
    with pytest.raises(RunError, match=message) as refused:
        parse(tmp_path / "run", argument)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_belongs_to_one_experiment_and_config(tmp_path):
    run, _ = parse(tmp_path)
    assert not any(tmp_path.iterdir())
    workdir.claim(tmp_path, "digits", run.description["config"])
    parse(tmp_path, "--config.training.num_steps=7", "--config.sampling.num_steps=3")  # free to change
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(RunError, match=r"network\.channels: 32 -> 64; optimizer\.learning_rate: 0\.002 -> 0\.5"):
        parse(tmp_path, "--config.network.channels=64", "--config.optimizer.learning_rate=0.5")
    with pytest.raises(RunError, match="experiment digits, not cifar10"):
        workdir.claim(tmp_path, "cifar10", {})
    assert (tmp_path / "config.json").read_text() == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    # A file in the way fails for every user; permissions would not stop root.
    (tmp_path / "file").write_text("")
    run, _ = parse(tmp_path / "fine")
    with pytest.raises(RunError, match=r"cannot (use|write to) --workdir"):
        workdir.claim(tmp_path / "file" / "run", "digits", run.description["config"])


def test_sampling_needs_a_checkpoint(tmp_path):
    with pytest.raises(RunError, match=r"no checkpoint in .*: train first"):
        parse(tmp_path / "none", "--mode=sample")
    assert not (tmp_path / "none").exists()


def run_main(tmp_path, *arguments):
    command = [sys.executable, "-m", "experiments.digits", f"--workdir={tmp_path}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_an_error_is_one_line_and_a_non_zero_exit(tmp_path):
    done = run_main(tmp_path / "run", "--config.process.first=-0.5")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "beta" in done.stderr


def launch(*arguments, **environment):
    import os

    command = [str(ROOT / "launch.sh"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment})


def test_launch_lists_the_experiments_with_a_line_each():
    for arguments in ((), ("--help",)):
        done = launch(*arguments)
        assert done.returncode == 0
        for name in ("digits", "cifar10"):
            assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in done.stdout.splitlines())
        assert "command_line" not in done.stdout


def test_launch_refuses_unknown_experiments_and_old_pythons(tmp_path):
    done = launch("cifar11")
    assert done.returncode == 1 and "unknown experiment 'cifar11'" in done.stderr and "digits" in done.stderr
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    done = launch("digits", PYTHON=str(old))
    assert done.returncode == 1 and "Python 3.9.1 is too old" in done.stderr and done.stderr.count("\n") == 1
    done = launch("digits", "--processes", "two")
    assert done.returncode == 1 and "--processes" in done.stderr
