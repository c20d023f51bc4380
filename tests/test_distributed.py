"""Several processes: who is missing is named, and two of them train as one does."""

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_training import do_train, logged

from diffusion.training import RunError
from diffusion.training.rollcall import roll_call

HERE = Path(__file__).parent


def free_address():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def calls(*arguments):
    """Calls the roll in one thread for each (address, rank, count, seconds); returns what each raised."""

    def attempt(call):
        try:
            roll_call(*call)
        except RunError as error:
            return str(error)

    with ThreadPoolExecutor(len(arguments)) as threads:
        return list(threads.map(attempt, arguments))


def test_all_who_are_there_are_let_go():
    address = free_address()
    assert calls(*[(address, rank, 4, 20.0) for rank in (3, 0, 2, 1)]) == [None] * 4


def test_missing_processes_are_named_to_all_who_came():
    address = free_address()
    said: Any = calls((address, 0, 5, 1.0), (address, 2, 5, 1.0), (address, 4, 5, 1.0))
    assert said[0] == said[1] == said[2]
    assert f"process 1, 3 of 5 did not come within 1 s (there are 0: pid {os.getpid()} on" in said[0]
    assert "\n" not in said[0]
    assert "process 0 was not at" in str(calls((address, 1, 5, 0.3))[0])


def test_a_process_of_another_run_is_sent_away():
    address = free_address()
    said: Any = calls((address, 0, 2, 2.0), (address, 1, 3, 2.0), (address, 1, 2, 2.0))
    assert said[0] is None and said[2] is None
    assert "process 1 of 3" in said[1] and "is not of this run of 2" in said[1]


def test_noise_at_the_door_is_not_an_answer():
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
        assert calls((address, 1, 2, 20.0)) == [None] and run.result() == [None]


TWO = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
import jax
from diffusion.training import distributed, make_mesh
import test_training

distributed.join()
assert len(make_mesh().local_devices) == 1

def batches(start_step):
    rows = test_training.BATCH_SIZE // jax.process_count()
    first = rows * jax.process_index()
    for batch in test_training.batches_from(start_step):
        yield {{"x": batch["x"][first : first + rows]}}

experiment = test_training.make_experiment(batches=batches)
test_training.do_train(Path(sys.argv[1]), experiment, num_devices=None, num_steps=8)
"""


def test_two_processes_train_as_one_and_one_goes_on_from_them(tmp_path):
    whole = do_train(tmp_path / "whole")
    program = TWO.format(tests=str(HERE), root=str(HERE.parent))
    common = {**os.environ, "DIFFUSION_NUM_PROCESSES": "2", "JAX_COORDINATOR_ADDRESS": free_address()}
    common["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "parts")],
            env={**common, "DIFFUSION_PROCESS_ID": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    for rank in (0, 1):
        assert f"process {rank} of 2 (pid {processes[rank].pid} on" in said[rank]
        assert "has 1 of 2 devices" in said[rank]
    state = do_train(tmp_path / "parts")  # the last four steps, by this process on two devices
    assert int(state.step) == 12
    # The same sums over the same two devices; only who adds them up differs.
    np.testing.assert_allclose(state.params["w"], whole.params["w"], rtol=1e-5, atol=1e-6)
    losses, expected = ({line["step"]: line["loss"] for line in logged(tmp_path / name)} for name in ("parts", "whole"))
    for step in (5, 10, 12):
        assert losses[step] == pytest.approx(expected[step], rel=1e-6)
