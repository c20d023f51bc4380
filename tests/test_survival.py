"""Runs that are interrupted, damaged or refused: what they report, and that they resume to the same bits."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax import monitoring
from jax.sharding import NamedSharding, PartitionSpec
from test_training import (
    assert_same_bits,
    batches_from,
    do_train,
    logged,
    make_experiment,
)

from diffusion.training import Checkpoints, RunError, make_mesh
from diffusion.training.checkpoints import open_existing, read_description
from diffusion.training.integrity import MANIFEST, flaw, seal
from diffusion.training.lock import NAME, sole_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 12 steps with checkpoints 4, 8 and 12, and its last state."""
    folder = tmp_path_factory.mktemp("finished")
    state = jax.device_get(do_train(folder))
    return folder, state


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    return tmp_path / "run"


def steps_in(workdir):
    return sorted(path.name for path in (workdir / "checkpoints").iterdir())


def flip_a_bit(path):
    data = bytearray(path.read_bytes() or b"was empty")
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def largest_file(checkpoint):
    return max((path for path in checkpoint.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_kept_aside_and_the_one_before_is_used(finished, copy, damage, capfd):
    DAMAGES[damage](largest_file(copy / "checkpoints" / "12"))
    assert_same_bits(do_train(copy), finished[1])
    assert steps_in(copy) == ["12", "12.bad", "4", "8"]
    lines = [line for line in capfd.readouterr().err.splitlines() if " is damaged: " in line]
    assert len(lines) == 1 and "kept as 12.bad. Using step 8" in lines[0]
    assert logged(copy) == logged(finished[0])


def test_every_file_of_a_checkpoint_is_covered(finished, tmp_path):
    source = finished[0] / "checkpoints" / "12"
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    assert len(names) > 5 and flaw(source) is None
    for name in names:
        for damage in (flip_a_bit, lambda path: path.unlink()):
            shutil.copytree(source, tmp_path / "12")
            damage(tmp_path / "12" / name)
            assert flaw(tmp_path / "12") is not None, name
            shutil.rmtree(tmp_path / "12")


def test_readers_change_nothing_and_use_the_newest_intact_checkpoint(copy):
    flip_a_bit(largest_file(copy / "checkpoints" / "12"))
    (copy / "checkpoints" / ".saving-16").mkdir()  # a run may be just writing it
    with open_existing(copy) as checkpoints:
        assert checkpoints.newest == 8 and checkpoints.description()["experiment"] == "test"
    assert steps_in(copy) == [".saving-16", "12", "4", "8"]


def test_a_reader_may_open_another_step_than_the_newest(finished, copy):
    abstract = jax.eval_shape(lambda: finished[1])
    with open_existing(copy, 8) as checkpoints:
        assert checkpoints.newest == 8 and int(checkpoints.restore(abstract).step) == 8
    with pytest.raises(RunError, match=r"no checkpoint of step 5 in .*: choose from 4, 8, 12"):
        open_existing(copy, 5)
    flip_a_bit(largest_file(copy / "checkpoints" / "8"))
    with pytest.raises(RunError, match=r"no checkpoint in .* is intact \(8: "):
        open_existing(copy, 8)


def test_a_run_without_an_intact_checkpoint_is_not_started_from_step_0(copy):
    for step in (4, 8, 12):
        (copy / "checkpoints" / str(step) / MANIFEST).unlink()
    with pytest.raises(RunError, match=f"no checkpoint in .* is intact .*4: {MANIFEST} is missing") as refused:
        do_train(copy)
    assert "\n" not in str(refused.value) and steps_in(copy) == ["12", "4", "8"]
    seal(copy / "checkpoints" / "8")  # as is done by hand for checkpoints that were written without checksums
    assert int(do_train(copy, num_steps=9).step) == 9


def test_what_a_killed_run_left_half_written_is_removed(copy):
    for name in (".saving-16", ".saving-16.orbax-checkpoint-tmp-1", ".deleting-1"):
        (copy / "checkpoints" / name / "state").mkdir(parents=True)
    do_train(copy, num_steps=13)
    assert steps_in(copy) == ["12", "13", "8"]


def test_a_clock_set_back_and_times_of_files_change_nothing(finished, copy, tmp_path, monkeypatch, capfd):
    """Steps decide which checkpoint is newest: not the age of files, nor the clock."""
    for step, seconds in (("4", 4e9), ("8", 2e9), ("12", 1e9)):
        checkpoint = copy / "checkpoints" / step
        for path in (checkpoint, *checkpoint.rglob("*")):
            os.utime(path, (seconds, seconds))
    begun = time.time()
    now = iter(range(10**9))
    monkeypatch.setattr(time, "time", lambda: begun - 3600.0 * next(now))
    monkeypatch.setattr(time, "time_ns", lambda: int(1e9 * time.time()))
    state = do_train(copy, num_steps=16, keep_newest=2)
    assert next(now) > 1  # the clock was looked at
    assert "resuming from step 12 in" in capfd.readouterr().err
    assert steps_in(copy) == ["12", "16"]
    with open_existing(copy) as checkpoints:
        assert checkpoints.newest == 16
    monkeypatch.undo()
    assert_same_bits(state, do_train(tmp_path / "undisturbed", num_steps=16))
    assert logged(copy)[: len(logged(finished[0]))] == logged(finished[0])


@contextlib.contextmanager
def full_disk():
    """fill(bytes): from now to the end of the block no file of this process may grow over so many bytes.

    The block ends before the test does: pytest's own report may go to a file.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        yield lambda limit=4000: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_stops_the_run_with_its_reason_and_leaves_earlier_checkpoints(finished, copy):
    def batches(start_step):
        for step, batch in enumerate(batches_from(start_step), start_step):
            if step == 13:
                fill()
            yield batch

    expected = pytest.raises(RunError, match=r"step 16 could not be saved.*File too large")
    with full_disk() as fill, expected as stopped:
        do_train(copy, make_experiment(batches=batches), num_steps=24, log_every=100)
    assert "\n" not in str(stopped.value)
    # What other threads of the save still wrote while it was removed may be left: the resumed run removes it.
    saved = [name for name in steps_in(copy) if not name.startswith(".saving-16")]
    assert saved == ["12", "4", "8"]
    assert all(flaw(copy / "checkpoints" / step) is None for step in saved)


def test_a_folder_that_stops_being_one_stops_the_run(copy):
    """Stands for a lost permission, which root, who may run this, is never refused."""

    def batches(start_step):
        for step, batch in enumerate(batches_from(start_step), start_step):
            if step == 14:
                (copy / "checkpoints").rename(copy / "elsewhere")
                (copy / "checkpoints").write_text("in the way")
            yield batch

    with pytest.raises(RunError, match="step 16 could not be saved"):
        do_train(copy, make_experiment(batches=batches), num_steps=20)
    assert all(flaw(copy / "elsewhere" / step) is None for step in ("4", "8", "12"))
    # The end of the interpreter would wait for them.
    assert not [thread for thread in threading.enumerate() if type(thread).__module__.startswith("orbax")]


def test_metrics_that_cannot_be_written_stop_the_run(copy, capsys):
    del capsys  # keeps what is printed in memory: the limit is for files

    def batches(start_step):
        for step, batch in enumerate(batches_from(start_step), start_step):
            if step == 13:
                fill(10)
            yield batch

    with full_disk() as fill, pytest.raises(RunError, match="File too large"):
        do_train(copy, make_experiment(batches=batches), num_steps=20, checkpoint_every=100)


HOLD = """
import os, sys, time
from pathlib import Path
from diffusion.training.lock import sole_run
with sole_run(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_is_refused_with_the_pid_of_the_first_whose_death_frees_the_folder(tmp_path):
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert first.stdout is not None and first.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"another run is active in .*: pid {first.pid} on {os.uname().nodename}"):
            do_train(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [NAME]
    finally:
        first.kill()
        first.wait()
    os.utime(tmp_path / NAME, (2e9, 2e9))  # the clock was set back since: no age is looked at
    with sole_run(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
        with pytest.raises(RunError, match="another run"), sole_run(tmp_path):
            pass


@pytest.mark.parametrize("number", [1, 2, 4, 8])
def test_a_checkpoint_of_two_devices_is_resumed_on_any_number(finished, copy, number):
    """Six steps on two devices, six on others: the losses of twelve on two."""
    shutil.rmtree(copy / "checkpoints" / "12")
    shutil.rmtree(copy / "checkpoints" / "8")
    state = do_train(copy, num_devices=number)
    # Sums of 16 losses in another order; eight steps of Adam pass on what differs in the gradients' last bits.
    np.testing.assert_allclose(state.metrics["loss"].total, finished[1].metrics["loss"].total, rtol=1e-6)
    assert len(state.params["w"].sharding.device_set) == number


class Runs:
    """Makes and unmakes a file: what a pickle can do to whoever loads it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_nothing_executes_from_a_checkpoint(finished, copy, tmp_path):
    proof = tmp_path / "executed"
    checkpoint = copy / "checkpoints" / "12"
    hostile = pickle.dumps(Runs(proof))
    for path in [path for path in checkpoint.rglob("*") if path.is_file()]:
        kept = path.read_bytes()
        path.write_bytes(hostile)
        if path.name != MANIFEST:
            seal(checkpoint)  # by one who knows of the checksums
        try:
            with Checkpoints(copy / "checkpoints", read_only=True) as checkpoints:
                checkpoints.description()
                checkpoints.restore(finished[1])
        except RunError as error:
            assert "\n" not in str(error)
        path.write_bytes(kept)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_manifest_that_names_files_elsewhere_is_refused(copy, name):
    (copy / "secret").write_text("1")
    manifest = copy / "checkpoints" / "12" / MANIFEST
    manifest.write_text(json.dumps({name: [1, 0]}))
    assert "outside" in str(flaw(manifest.parent))


@pytest.mark.parametrize("saved", [None, [], {"experiment": "x", "config": "os.system('id')"}, {"config": {}}])
def test_a_description_of_another_kind_is_refused(tmp_path, saved):
    (tmp_path / "_CHECKPOINT_METADATA").write_text(json.dumps({"custom_metadata": saved}))
    with pytest.raises(RunError, match="not written by this project"):
        read_description(tmp_path)


KILLED = """
import os, signal, sys
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"  # the last count holds
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
import test_training
from diffusion.training import integrity

def seal(folder):
    if folder.name == ".saving-8":
        os.kill(os.getpid(), signal.SIGKILL)
    whole(folder)

whole, integrity.seal = integrity.seal, seal
test_training.do_train(Path(sys.argv[1]))
"""


def test_a_run_killed_in_the_middle_of_a_save_resumes_to_the_same_bits(finished, tmp_path):
    here = Path(__file__).parent
    program = KILLED.format(tests=str(here), root=str(here.parent))
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, timeout=100)
    assert done.returncode == -signal.SIGKILL, (done.stderr[-2000:], time.monotonic() - begun)
    assert ".saving-8" in steps_in(tmp_path) and "8" not in steps_in(tmp_path)
    assert_same_bits(do_train(tmp_path), finished[1])
    assert steps_in(tmp_path) == ["12", "4", "8"]
    assert logged(tmp_path) == logged(finished[0])


def test_saving_many_shapes_from_several_devices_compiles_nothing(finished, tmp_path):
    """Where each device saved a part of every small array, the first save compiled a program for each shape."""
    whole = NamedSharding(make_mesh(4), PartitionSpec())
    shapes = {f"{n}": np.full((8 * n, 3), n, np.float32) for n in range(1, 7)}
    state = jax.device_put(finished[1]._replace(params=shapes), whole)
    compiled = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if "compile" in event:
            compiled.append(event)

    monitoring.register_event_duration_secs_listener(listen)
    try:
        with Checkpoints(tmp_path, keep_newest=1) as checkpoints:
            checkpoints.save(1, state, {"experiment": "x", "config": {}})
    finally:
        monitoring.unregister_event_duration_listener(listen)
    assert not compiled
