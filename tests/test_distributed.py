"""Several processes: missing and dead ones are named, and two of them train as one does."""

import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_training import do_train, logged

from diffusion.training import RunError
from diffusion.training.integrity import flaw
from diffusion.training.processes.launchers import Launch, find_launch
from diffusion.training.processes.lifeline import GRACE_SECONDS, Lifeline
from diffusion.training.processes.rollcall import roll_call

HERE = Path(__file__).parent


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def calls(*arguments):
    """Calls the roll in one thread for each (address, rank, count, seconds); returns what each raised, or returned."""

    def attempt(call):
        try:
            return roll_call(*call)
        except RunError as error:
            return str(error)

    with ThreadPoolExecutor(len(arguments)) as threads:
        return list(threads.map(attempt, arguments))


def test_all_processes_that_connect_may_start():
    address = free_address()
    peers: Any = calls(*[(address, rank, 4, 20.0) for rank in range(4)])
    assert [sorted(each) for each in peers] == [[1, 2, 3], [0], [0], [0]]
    # JAX's service will listen at this port, beside the connections that stay.
    socket.create_server(("", int(address.split(":")[1]))).close()


def test_missing_processes_are_named_to_all_others():
    address = free_address()
    replies: Any = calls((address, 0, 5, 1.0), (address, 2, 5, 1.0), (address, 4, 5, 1.0))
    assert replies[0] == replies[1] == replies[2]
    assert f"process 1, 3 of 5 did not connect within 1 s (connected: 0: pid {os.getpid()} on" in replies[0]
    assert "\n" not in replies[0]
    assert "process 0 was not at" in str(calls((address, 1, 5, 0.3))[0])


def test_a_process_of_another_run_is_refused():
    address = free_address()
    with ThreadPoolExecutor(1) as threads:
        run = threads.submit(calls, (address, 0, 2, 20.0))
        (reply,) = calls((address, 1, 3, 20.0))
        assert "process 1 of 3" in str(reply) and "is not of this run of 2" in str(reply)
        assert [sorted(each) for each in (calls((address, 1, 2, 20.0))[0], run.result()[0])] == [[0], [1]]


def test_other_clients_of_the_port_are_ignored():
    address = free_address()
    with ThreadPoolExecutor(2) as threads:
        run = threads.submit(calls, (address, 0, 2, 20.0))
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\n", b"diffusion one two\n"):
            while True:
                try:
                    with socket.create_connection(("127.0.0.1", int(address.split(":")[1])), timeout=5) as knock:
                        knock.sendall(words)
                    break
                except ConnectionRefusedError:
                    pass
        assert list(calls((address, 1, 2, 20.0))[0]) == [0] and list(run.result()[0]) == [1]


@pytest.fixture
def three() -> Any:
    """The connections of three processes after their roll call, as each of them holds them."""
    address = free_address()
    return calls(*[(address, rank, 3, 20.0) for rank in range(3)])


def lifeline(peers, rank):
    """Returns the lifeline of a process, and a queue of the lines with which it would end."""
    ends = queue.Queue()
    return Lifeline(rank, len(peers), peers[rank], ends.put), ends


def die(peers, rank):
    """Closes the connections of a process, as the kernel does when it is gone."""
    for connection, _ in peers[rank].values():
        connection.close()


@pytest.mark.parametrize("victim", [1, 2])
def test_a_death_is_known_to_all_at_once(three, victim):
    ends = [lifeline(three, rank)[1] for rank in (0, 3 - victim)]
    begun = time.monotonic()
    die(three, victim)
    dead = f"process {victim} of 3 (pid {os.getpid()} on {socket.gethostname()}) has ended unexpectedly"
    assert ends[0].get(timeout=5) == dead and time.monotonic() - begun < GRACE_SECONDS
    assert ends[1].get(timeout=5) == dead


def test_the_death_of_process_0_is_known_to_the_others(three):
    ends = [lifeline(three, rank)[1] for rank in (1, 2)]
    die(three, 0)
    for each in ends:
        assert each.get(timeout=5).startswith(f"process 0 of 3 (pid {os.getpid()} on ")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_an_orderly_end_is_no_death(three, order):
    lifelines, ends = zip(*[lifeline(three, rank) for rank in range(3)], strict=True)
    for rank in order:
        lifelines[rank].announce_end()
        lifelines[rank].announce_end()  # and a second time, when others have left already
        time.sleep(0.1)
        assert ends[rank].empty()
        if rank != 0:
            die(three, rank)  # its own threads, which would be gone with it, may take that for the death of others
    time.sleep(0.2)
    assert ends[0].empty()


def test_a_connection_that_closes_before_the_thread_runs_raises_nothing(three, monkeypatch):
    threads, raised = [], []
    monkeypatch.setattr(threading, "excepthook", raised.append)
    with monkeypatch.context() as held:
        held.setattr(threading.Thread, "start", lambda self: threads.append(self))
        lifeline(three, 1)
    die(three, 1)
    threads[0].start()
    threads[0].join(0.3)
    assert [thread.name for thread in threads] == ["lifeline"] and not raised


def test_the_reason_of_a_leaving_process_reaches_the_others_after_a_grace_period(three):
    going = lifeline(three, 1)[0]
    ends = [lifeline(three, rank)[1] for rank in (0, 2)]
    begun = time.monotonic()
    going.announce_reason("error: the disk\nis full")
    die(three, 1)
    for each in ends:
        assert re.fullmatch(r"process 1 of 3 \(pid .*\) has left: error: the disk is full", each.get(timeout=5))
    assert time.monotonic() - begun >= GRACE_SECONDS
    time.sleep(0.2)
    assert ends[0].empty()  # one line, whatever follows from the end of the first process


def test_process_0_leaves_after_the_others(three):
    first, *others = [lifeline(three, rank) for rank in range(3)]
    with ThreadPoolExecutor(1) as threads:
        leaving = threads.submit(first[0].announce_reason, "error: the disk is full")
        for rank, (_, ends) in enumerate(others, 1):
            assert "process 0 of 3" in ends.get(timeout=5) and not leaving.done()
            die(three, rank)
        leaving.result(timeout=GRACE_SECONDS)


@pytest.fixture
def environment(monkeypatch):
    """Sets variables, after those that a launcher may have set are gone."""
    for name in list(os.environ):
        if name.startswith(("DIFFUSION_", "SLURM_", "OMPI_", "TPU_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)

    def put(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, None),
        ({"DIFFUSION_NUM_PROCESSES": "1"}, None),
        (
            {"DIFFUSION_NUM_PROCESSES": "4", "DIFFUSION_PROCESS_ID": "3", "JAX_COORDINATOR_ADDRESS": "a:1"},
            Launch(3, 4, "a:1"),
        ),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, Launch()),
        ({"SLURM_NTASKS": "2"}, None),  # an allocation, but no srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, Launch()),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, Launch()),
        ({"TPU_WORKER_HOSTNAMES": "a"}, None),
    ],
)
def test_launchers_are_recognized(environment, variables, launch):
    environment(variables)
    assert find_launch() == launch


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"DIFFUSION_NUM_PROCESSES": "two"}, "DIFFUSION_NUM_PROCESSES is 'two'"),
        ({"DIFFUSION_NUM_PROCESSES": "2"}, "DIFFUSION_PROCESS_ID is None: set it"),
        ({"DIFFUSION_NUM_PROCESSES": "2", "DIFFUSION_PROCESS_ID": "2"}, "it must be 0 to 1"),
    ],
)
def test_a_wrong_environment_is_refused_in_one_line(environment, variables, message):
    environment(variables)
    with pytest.raises(RunError, match=message) as refused:
        find_launch()
    assert "\n" not in str(refused.value)


TWO = """
import os, signal, sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
import jax
from diffusion.runs.command_line import run_to_end
from diffusion.training import make_mesh, processes
import test_training

processes.join()
assert len(make_mesh().local_devices) == 1

def batches(start_step):
    victim, last = map(int, sys.argv[2:])
    rows = test_training.BATCH_SIZE // jax.process_count()
    first = rows * jax.process_index()
    for step, batch in enumerate(test_training.batches_from(start_step), start_step):
        if (jax.process_index(), step) == (victim, last):
            os.kill(os.getpid(), signal.SIGKILL)
        yield {{"x": batch["x"][first : first + rows]}}

experiment = test_training.make_experiment(batches=batches)
run_to_end(lambda: test_training.do_train(Path(sys.argv[1]), experiment, num_devices=None, num_steps=8))
"""


def run_two(workdir, victim=-1, last=-1):
    """Trains 8 steps as two processes, of which `victim` dies at batch `last`; returns them and what they printed."""
    program = TWO.format(tests=str(HERE), root=str(HERE.parent))
    common = {**os.environ, "DIFFUSION_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": free_address()}
    common["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"  # the last count holds
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(workdir), str(victim), str(last)],
            env={**common, "DIFFUSION_PROCESS_ID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        return processes, [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()


def test_two_processes_train_as_one_and_one_resumes_from_them(tmp_path):
    whole = do_train(tmp_path / "whole")
    processes, printed = run_two(tmp_path / "parts")
    assert [process.returncode for process in processes] == [0, 0], printed
    for rank in (0, 1):
        assert f"process {rank} of 2 (pid {processes[rank].pid} on" in printed[rank]
        assert "has 1 of 2 devices" in printed[rank]
    processes, printed = run_two(tmp_path / "parts")  # once more: nothing is left to do
    assert [process.returncode for process in processes] == [0, 0], printed
    assert ["is finished: 8 of 8 steps" in each for each in printed] == [True, False]
    state = do_train(tmp_path / "parts")  # the last four steps, by this process on two devices
    assert int(state.step) == 12
    # The same sums over the same two devices; only the order of adding them up differs.
    np.testing.assert_allclose(state.params["w"], whole.params["w"], rtol=1e-5, atol=1e-6)
    losses, expected = ({line["step"]: line["loss"] for line in logged(tmp_path / name)} for name in ("parts", "whole"))
    for step in (5, 10, 12):
        assert losses[step] == pytest.approx(expected[step], rel=1e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_process_is_killed_the_other_reports_it_and_the_same_command_resumes(tmp_path, victim):
    processes, printed = run_two(tmp_path, victim, last=6)
    codes = [process.returncode for process in processes]
    assert (codes[victim], codes[1 - victim]) == (-signal.SIGKILL, 1), printed
    dead = (
        f"error: process {victim} of 2 (pid {processes[victim].pid} on {socket.gethostname()}) has ended unexpectedly"
    )
    line = f"process {1 - victim}: {dead}; the same command resumes from the newest checkpoint"
    assert line in printed[1 - victim].splitlines()
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name.isdecimal() and flaw(path)]
    assert int(do_train(tmp_path).step) == 12
