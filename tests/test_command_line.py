"""What a person types: every mistake is one clear line, and nothing is half-written."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import make_call

from diffusion.model.config import from_plain, plain
from diffusion.training import RunError, workdir
from experiments import digits

ROOT = Path(__file__).parent.parent


def parse(folder, *arguments):
    return make_call(digits.TASK, "digits", folder, *arguments)


def test_fields_are_overridden_with_their_own_type(tmp_path):
    call = parse(
        tmp_path, "--config.network.multipliers=1,2,4", "--config.optimizer.learning_rate=1", "--steps=7", "--seed=3"
    )
    assert call.flags.mode == "train" and call.flags.seed == 3
    assert call.config.network.multipliers == (1, 2, 4)
    assert call.config.optimizer.learning_rate == 1.0 and isinstance(call.config.optimizer.learning_rate, float)
    assert call.config.sampling.num_steps == 7
    stored = json.loads(json.dumps(plain(call.config)))
    assert stored["network"]["multipliers"] == [1, 2, 4] and from_plain(stored) == call.config


def test_the_fields_of_a_choice_are_those_of_its_name(tmp_path):
    config = parse(tmp_path, "--config.sampling.sampler.order=3", "--sampler=unipc", "--config.process=flow").config
    assert config.sampling.sampler.to_dict() == {"name": "unipc", "order": 3}
    assert config.process.to_dict() == {"name": "flow", "times": "uniform", "shift": 1.0, "time_scale": 1000.0}
    with pytest.raises(RunError, match=r"eta is not a field of sampling\.sampler\.name=unipc: it has order"):
        parse(tmp_path, "--config.sampling.sampler.eta=0.5", "--sampler=unipc")
    assert parse(tmp_path, "--config.training.num_steps=1e3").config.training.num_steps == 1000


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.network.channel=5", "did you mean channels"),
        ("--config.netwrok.channels=5", "did you mean network.channels"),
        ("--config.network.channels=many", "--config.network.channels=many"),
        ("--config.network.channels=0.5", "--config.network.channels=0.5"),
        ("channels", "unexpected argument 'channels'"),
        ("--num_smaples=5", "did you mean --num_samples"),
        ("--config=nowhere.py", "captions, cifar10"),
    ],
)
def test_unknown_or_bad_arguments_are_refused_with_the_nearest_name(tmp_path, argument, message):
    with pytest.raises(RunError, match=message) as refused:
        parse(tmp_path / "run", argument)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_folder_belongs_to_one_experiment_and_config(tmp_path):
    endless = "--config.optimizer.cooldown_steps=0"
    config = plain(parse(tmp_path, endless).config)
    assert not any(tmp_path.iterdir())
    workdir.claim(tmp_path, "digits", config)
    parse(tmp_path, endless, "--config.training.num_steps=7", "--config.sampling.num_steps=3")  # free to change
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(RunError, match=r"network\.channels: 32 -> 64; optimizer\.learning_rate: 0\.002 -> 0\.5"):
        parse(tmp_path, endless, "--config.network.channels=64", "--config.optimizer.learning_rate=0.5")
    with pytest.raises(RunError, match="experiment digits, not cifar10"):
        workdir.claim(tmp_path, "cifar10", {})
    assert (tmp_path / "config.json").read_text() == before


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    # A file in the way fails for every user; permissions would not stop root.
    (tmp_path / "file").write_text("")
    config = plain(parse(tmp_path / "fine").config)
    with pytest.raises(RunError, match=r"cannot (use|write to) --workdir"):
        workdir.claim(tmp_path / "file" / "run", "digits", config)


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
        assert "__init__" not in done.stdout and "configs" not in done.stdout


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
