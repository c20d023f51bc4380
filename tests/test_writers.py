"""Writers of a run: metrics.jsonl, TensorBoard with pictures and config, Weights & Biases offline, a caller's own."""

import importlib.util
import json
import struct
from functools import partial
from typing import Any

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

from diffusion.evaluation import Measurement
from diffusion.extras import need
from diffusion.runs.report import finish_run
from diffusion.training import RunError
from diffusion.training.loggers import Loggers
from diffusion.training.writers import Writer, named, tensorboard, wandb

CONFIG = {"seed": 0, "optimizer": {"name": "adam", "learning_rate": 1e-3}}
IMAGE = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def report(workdir, start_step, *writers):
    """Logs two lines after a step each, and a picture."""
    with Loggers(workdir, start_step=start_step, num_steps=9, writers=writers, config=CONFIG) as logs:
        logs.log(start_step + 1, {"loss": 0.5})
        logs.log(start_step + 2, {"loss": 0.25, "grad_norm": 2.0})
        logs.picture(start_step + 2, "preview/ema", IMAGE)


def events(folder):
    """The events of TensorBoard's files in the order of their names: records of length, checksum, message, checksum."""
    for path in sorted(folder.iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = Event()
            event.ParseFromString(data[at + 12 : at + 12 + size])
            yield event
            at += size + 16


def values_of(folder, kind):
    """(step, name, value) of all values of a kind."""
    return [
        (event.step, value.tag, getattr(value, kind))
        for event in events(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == kind
    ]


def test_a_callers_writer_is_given_the_config_numbers_pictures_and_the_end(tmp_path):
    seen, began = [], []

    def mine(workdir, start_step):
        began.append((workdir, start_step))
        return Writer(
            numbers=lambda step, values: seen.append((step, dict(values))),
            picture=lambda step, name, image: seen.append((step, name, image.shape)),
            config=seen.append,
            close=lambda: seen.append("closed"),
        )

    report(tmp_path, 3, mine, lambda workdir, start_step: Writer())  # one that writes nothing
    assert began == [(tmp_path, 3)]
    assert seen == [
        CONFIG,
        (4, {"loss": 0.5}),
        (5, {"loss": 0.25, "grad_norm": 2.0}),
        (5, "preview/ema", (4, 6, 3)),
        "closed",
    ]


def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path):
    report(tmp_path, 0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')  # cut off by a kill
    report(tmp_path, 1)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]


def test_tensorboard_has_numbers_pictures_and_the_config(tmp_path):
    report(tmp_path, 0, tensorboard)
    folder = tmp_path / "tensorboard"
    numbers = [(1, "loss", 0.5), (2, "loss", 0.25), (2, "grad_norm", 2.0)]
    assert values_of(folder, "simple_value") == numbers
    ((step, name, picture),) = values_of(folder, "image")
    assert (step, name, picture.height, picture.width) == (2, "preview/ema", 4, 6)
    ((_, name, text),) = values_of(folder, "tensor")
    said = text.string_val[0].decode()
    assert name.startswith("config") and json.loads(said.replace("    ", "")) == CONFIG
    assert all(line.startswith("    ") for line in said.splitlines())  # as code, which Markdown leaves as it is


def test_an_evaluation_is_written_and_supersedes_nothing(tmp_path):
    report(tmp_path, 0, tensorboard)
    made: dict[str, Any] = dict(features="pixels", reference=None, sampler="ddim", num_steps=3, seeds=[0], ema=None)
    measured = [
        Measurement("FID", 7.0, 8, **made),
        Measurement("recall", {"at 1": 0.25, "at 5": 0.5}, 8, **made),
    ]
    finish_run(tmp_path, "digits", 1, measured, writers=[tensorboard])
    found = values_of(tmp_path / "tensorboard", "simple_value")
    assert {(1, "evaluation/FID", 7.0), (1, "evaluation/recall__at_5", 0.5)} <= set(found)
    starts = [event.step for event in events(tmp_path / "tensorboard") if event.WhichOneof("what") == "session_log"]
    assert starts == [1]  # of the training alone


def test_a_writer_that_fails_stops_the_run_and_closes_the_others(tmp_path):
    closed = []

    def fails(*arguments):
        raise OSError("disk full")

    opened = lambda workdir, start_step: Writer(close=lambda: closed.append(1))  # noqa: E731
    for writers in ([opened, fails], [opened, lambda workdir, start_step: Writer(numbers=fails)]):
        with pytest.raises(RunError, match=f"cannot be written to {tmp_path}: disk full"):
            report(tmp_path, 0, *writers)
        assert closed.pop() and not closed


def test_only_process_0_writes(tmp_path):
    with Loggers(tmp_path, start_step=0, num_steps=9, writers=[tensorboard], active=False) as logs:
        logs.log(1, {"loss": 0.5})
    assert not list(tmp_path.iterdir())


def test_writers_by_name(monkeypatch):
    assert named(["tensorboard"]) == [tensorboard]
    with pytest.raises(RunError, match=r"^unknown writer 'clearml': choose from tensorboard, wandb$"):
        named(["tensorboard", "clearml"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    need.cache_clear()
    with pytest.raises(RunError, match=r"^writer wandb: wandb is not installed: pip install .*\[wandb\]"):
        named(["wandb"])


@pytest.mark.skipif(not importlib.util.find_spec("wandb"), reason="wandb is not installed: pip install -e '.[wandb]'")
def test_wandb_offline(tmp_path, monkeypatch):
    """A folder that `wandb sync` takes, without a network; a resumed run is the same run of theirs."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for start_step in (0, 1):
        report(tmp_path, start_step, partial(wandb, project="tests"))
    run_id = (tmp_path / "wandb" / "run_id").read_text()
    stored = sorted((tmp_path / "wandb").glob(f"offline-run-*-{run_id}/run-{run_id}.wandb"))
    assert len(stored) >= 1  # one within the same second
    content = b"".join(path.read_bytes() for path in stored)
    assert all(word in content for word in (b"grad_norm", b"learning_rate", b"preview/ema", b"tests"))
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/preview/*.png"))
