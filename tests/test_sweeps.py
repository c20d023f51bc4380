"""Sweeps over configs, on runs that a stand-in writes in milliseconds, and --mode=compare."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, make_call
from PIL import Image

from diffusion.evaluation.run_figures import Scores, draw_runs
from diffusion.runs import compare, sweeps
from diffusion.runs.records import LAST, last_loss, read_record, table
from diffusion.training import RunError
from experiments.digits import TASK

# What stands for the training of a point: an experiment that writes what one leaves in its folder.
EXPERIMENT = """
import json, os, sys
from pathlib import Path
given = dict(one.lstrip("-").split("=", 1) for one in sys.argv[1:])
folder, rate = Path(given["workdir"]), float(given["config.optimizer.learning_rate"])
with open("calls.txt", "a") as file:
    file.write(folder.name + "\\n")
if rate == 9:
    sys.exit("error: the loss is not finite")
steps = 4 if os.environ.get("STOPPED") else 20
(folder / "checkpoints" / str(steps)).mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps({"config": {"training": {"num_steps": 20}}}))
lines = [json.dumps({"step": s, "loss": rate / s, "grad_norm": 1.0}) for s in range(1, steps + 1)]
(folder / "metrics.jsonl").write_text("\\n".join(lines) + "\\n")
value = {"mean": rate, "standard error": 0.1}
(folder / "report.json").write_text(json.dumps({"measurements": [{"name": "FID", "value": value}]}))
"""
RATES = ("--set", "config.optimizer.learning_rate=1,2")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder as a checkout is, whose experiment digits is the stand-in."""
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "digits.py").write_text(EXPERIMENT)
    (tmp_path / "experiments" / "configs").symlink_to(ROOT / "experiments" / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls(place):
    path = place / "calls.txt"
    return path.read_text().split() if path.exists() else []


def results(place, name="sweep_digits"):
    return json.loads((place / "runs" / name / "results.json").read_text())["points"]


def test_a_sweep_trains_the_product_and_draws_a_table_and_a_figure(place, capfd):
    sweeps.main(["digits", *RATES, "--set", "seed=0,1"])
    names = [f"learning_rate={rate}_seed={seed}" for rate in (1, 2) for seed in (0, 1)]
    assert calls(place) == names
    found = results(place)
    assert [one["settings"] for one in found][1] == {"learning_rate": "1", "seed": "1"}
    assert [one["status"] for one in found] == ["finished"] * 4
    mean = {rate: np.mean([rate / 19, rate / 20]) for rate in (1, 2)}  # of steps 19 and 20, the last tenth of 20
    assert [one["numbers"][LAST] for one in found] == pytest.approx([mean[1]] * 2 + [mean[2]] * 2)
    assert found[3]["numbers"]["FID, mean"] == 2
    written = (place / "runs" / "sweep_digits" / "table.md").read_text()
    assert written == capfd.readouterr().out
    assert len({len(line) for line in written.splitlines() if line.startswith("|")}) == 1  # aligned
    with Image.open(place / "runs" / "sweep_digits" / "sweep.png") as picture:
        assert picture.width == 1000 and len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 100


def test_finished_points_are_skipped_and_others_are_trained(place):
    sweeps.main(["digits", *RATES])
    sweeps.main(["digits", "--set", "config.optimizer.learning_rate=1,2,3"])
    assert calls(place) == [f"learning_rate={rate}" for rate in (1, 2, 3)]
    sweeps.main(["digits", *RATES, "--config.training.log_every=7"])  # another command: its points are not finished
    assert calls(place)[3:] == ["learning_rate=1", "learning_rate=2"]


def test_a_point_that_fails_is_reported_and_the_others_go_on(place, capfd):
    with pytest.raises(
        RunError, match=r"^1 of 3 points failed, the first runs/sweep_digits/learning_rate=9: the loss is"
    ):
        sweeps.main(["digits", "--set", "config.optimizer.learning_rate=9,1,2"])
    assert [one["status"].partition(":")[0] for one in results(place)] == ["failed", "finished", "finished"]
    assert "error: the loss is not finite" in capfd.readouterr().err
    with pytest.raises(RunError):
        sweeps.main(["digits", "--set", "config.optimizer.learning_rate=9,1,2"])
    assert calls(place) == [f"learning_rate={rate}" for rate in (9, 1, 2, 9)]  # it is tried again, they are not


def test_a_point_that_was_stopped_is_not_finished(place, monkeypatch):
    """A run that is asked to stop saves, and ends without an error."""
    monkeypatch.setenv("STOPPED", "1")
    with pytest.raises(RunError, match="2 of 2 points failed"):
        sweeps.main(["digits", *RATES])
    monkeypatch.delenv("STOPPED")
    sweeps.main(["digits", *RATES])
    assert [one["status"] for one in results(place)] == ["finished"] * 2


def test_a_signal_reaches_the_point_and_ends_the_sweep(place, monkeypatch):
    """The run saves; nothing is noted of it, so that the same command resumes it."""
    child = "import os, signal; os.kill(os.getppid(), signal.SIGTERM); signal.pause()"
    before = signal.getsignal(signal.SIGTERM)
    assert sweeps.run([sys.executable, "-c", child]) == (-signal.SIGTERM, "", True)
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.setattr(sweeps, "run", lambda command: (0, "", True))
    with pytest.raises(SystemExit) as left:
        sweeps.main(["digits", *RATES])
    assert left.value.code == 130 and not list(place.rglob("sweep_point.json"))


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["digits"], "--set"),
        (["digits", "--set", "seed"], r"--set seed: name a field and its values"),
        (["digits", "--set", "seed=1,1"], "two points have the same values"),
        (["digits", "--set", "seed=1", "--set", "config.seed=2"], "--set seed is given twice"),
        (
            ["digits", "--set", "optimizer.learning_rat=1"],
            r"learning_rat is not a field of .* did you mean learning_rate",
        ),
        (["digits", "--set", "optimizer.learning_rate=1,fast"], "fast"),
        (["digits", "--set", "optimizer.learning_rate=1,-1"], "optimizer.learning_rate is -1"),
        (["digits", "--set", "optimizer=adam,adamax"], "optimizer.name is 'adamax': choose from adam, adamw"),
        (["digits", "--set", "config=digits,mnist"], "no config file mnist"),
        (["digits", *RATES, "--mode=sample"], "--mode is not one for every point"),
        (["digits", *RATES, "--workdir=calls.txt/a"], "--workdir=calls.txt/a"),
        (["digits", *RATES, "--point=2"], "--point=2: there are points 0 to 1"),
        (["digits", *RATES, "--sbatch=--gres=gpu:1"], "add --slurm"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_trained(place, arguments, line):
    (place / "calls.txt").touch()
    with pytest.raises((RunError, ValueError), match=line) as error:
        sweeps.main(arguments)
    assert "\n" not in str(error.value)
    assert not calls(place) and not (place / "runs").exists()


def test_values_are_parted_outside_of_brackets_and_quotes():
    assert sweeps.split("1e-4,3e-4") == ["1e-4", "3e-4"]
    assert sweeps.split("(1, 2),(1,2,2)") == ["(1, 2)", "(1,2,2)"]
    assert sweeps.split("('fid','kid'),()") == ["('fid','kid')", "()"]


def test_points_are_told_apart_by_the_shortest_names(place):
    folder, points = sweeps.make_points("digits", ["sampling.num_steps=5", "training.num_steps=6"], [], None)
    assert points[0].folder == folder / "sampling.num_steps=5_training.num_steps=6"
    _, points = sweeps.make_points("digits", ["config=digits:flow,digits:edm", "network.multipliers=(1,2)"], [], None)
    assert [point.folder.name for point in points] == [
        f"config=digits-{name}_multipliers=1-2" for name in ("flow", "edm")
    ]
    assert points[1].arguments == ["--config=digits:edm", "--config.network.multipliers=(1,2)"]


def test_an_array_job_trains_each_point_and_the_last_table_is_whole(place, monkeypatch, capsys):
    """Its script is run for each number of the array, with a launch.sh that does what ours does."""
    launch = place / "launch.sh"
    run = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from diffusion.runs import sweeps; sweeps.main(sys.argv[2:])"
    launch.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{run}" "$@"\n')
    launch.chmod(0o755)
    (place / "bin").mkdir()
    (place / "bin" / "sbatch").write_text("#!/bin/sh\necho Submitted batch job 7, $1\n")
    (place / "bin" / "sbatch").chmod(0o755)
    asked = ["digits", *RATES, "--slurm", "--sbatch", "--gres=gpu:1 --time=2:00:00"]
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    sweeps.main(asked[:-2])
    assert "there is no sbatch on this machine: submit it where there is, sbatch runs/" in capsys.readouterr().out
    monkeypatch.setenv("PATH", f"{place / 'bin'}:/usr/bin:/bin")
    sweeps.main(asked)
    script = Path("runs/sweep_digits/sweep.sbatch")
    assert capsys.readouterr().out == f"Submitted batch job 7, {script}\n"
    options = [line.removeprefix("#SBATCH ") for line in script.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--array=0-1", "--gres=gpu:1", "--time=2:00:00", "--job-name=sweep_digits"} <= set(options)
    for number in (1, 0):
        done = subprocess.run(["bash", str(script)], env={"SLURM_ARRAY_TASK_ID": str(number), "PATH": "/usr/bin:/bin"})
        assert done.returncode == 0
    assert calls(place) == ["learning_rate=2", "learning_rate=1"]
    assert [one["status"] for one in results(place)] == ["finished"] * 2


# --- records and figures


def test_records_are_read_of_whatever_is_there(tmp_path):
    assert read_record(tmp_path, "none").numbers == {}
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_record(tmp_path, "cut off").course == [{"step": 1, "loss": 2.0}]
    assert last_loss([{"step": 1, "accuracy": 1.0}]) == {}


def test_tables_are_aligned():
    assert table(["a", "long head"], [["x|y", 0.123456789]]) == "\n".join(
        ["| a    | long head |", "| ---- | --------- |", "| x\\|y | 0.12346   |"]
    )


def test_a_figure_is_drawn_of_many_runs_of_names_and_of_none(tmp_path):
    courses = {f"run {i}": [{"step": s, "loss": 1 / s} for s in (1, 2, 3)] for i in range(12)} | {"empty": []}
    scores = Scores("optimizer", "FID", {"": [("adam", 1.0), ("muon", 2.0)]})
    for name, panel in (("a.png", scores), ("b.png", None)):
        draw_runs(tmp_path / name, courses, ["loss"], panel)
        assert (tmp_path / name).stat().st_size > 5000
    draw_runs(tmp_path / "c.png", {"empty": []})


# --- compare


def test_folders_after_the_mode_are_those_that_are_compared():
    named = compare.named
    assert named(["p", "--mode=compare", "a", "b", "c"]) == ["p", "--mode=compare", "--workdir=a", "--with=b,c"]
    assert named(["p", "--mode=compare", "--workdir=a", "b"]) == ["p", "--mode=compare", "--workdir=a", "--with=b"]
    for others in (["p", "--mode=sample", "a"], ["p", "--mode=compare", "--workdir=a", "--with=b"]):
        assert named(others) == others


def test_runs_are_compared(trained, copied, capsys):
    """What differs, and nothing else; the courses; the scores of the one that has some."""
    folder, other = copied("digits"), trained("digits_classes")
    (folder / "report.json").write_text(json.dumps({"measurements": [{"name": "FID", "value": 3.5}]}))
    call = make_call(TASK, "digits", folder, "--mode=compare", f"--with={other}", num_devices=1)
    compare.compare(call)
    written = (folder / "compare" / other.name / "compare.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in written.splitlines() if line.startswith("|")]
    fields = {row[0]: row[1:] for row in rows}
    assert fields["condition.name"] == ["nothing", "classes"]
    assert fields["sampling.guidance"] == ["1.0", "1.5"]
    assert "network.channels" not in fields and "seed" not in fields
    assert fields["FID"] == ["3.5", "-"] and LAST in fields
    assert (folder / "compare" / other.name / "compare.png").stat().st_size > 5000
    assert capsys.readouterr().out.startswith(written.rstrip())


def test_what_cannot_be_compared_is_refused(trained):
    folder = trained("digits")
    with pytest.raises(ValueError, match=r"--mode=compare needs other runs"):
        compare.compare(make_call(TASK, "digits", folder, "--mode=compare", num_devices=1))
    with pytest.raises(RunError, match=r"with other runs, not with itself"):
        compare.compare(make_call(TASK, "digits", folder, "--mode=compare", f"--with={folder}", num_devices=1))
    with pytest.raises(RunError, match=r"nowhere"):
        compare.compare(make_call(TASK, "digits", folder, "--mode=compare", "--with=nowhere", num_devices=1))
    assert compare.names_of([Path("/x/a/run"), Path("/x/b/run")]) == ["a-run", "b-run"]
