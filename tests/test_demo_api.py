"""The prompt page's HTTP interface: what it returns, what it refuses and how, and that nothing reaches the disk."""

import base64
import io
import json
import os
import sys
import threading
import time

import numpy as np
import pytest
from fastapi import FastAPI
from helpers import make_call
from PIL import Image
from published_flux2 import ASKED, REFERENCES, write_pipeline
from starlette.testclient import TestClient

from diffusion.demo import engine as engines
from diffusion.demo.api import BESIDE, add_api
from diffusion.demo.engine import Engine
from diffusion.demo.requests import Limits
from diffusion.runs import weights
from diffusion.runs.plans import Plan, draw_plans, fit_mask
from diffusion.runs.provenance import pixels_digest, read_png
from diffusion.runs.run import open_run
from diffusion.runs.watch import Watch
from experiments import flux2

PICTURE = np.random.RandomState(0).randint(0, 256, (8, 8, 1), np.uint8)
MASK = np.arange(8)[None].repeat(8, 0) > 3


@pytest.fixture(scope="module")
def run(trained):
    return open_run(trained("digits_classes"), num_devices=1)


@pytest.fixture(scope="module")
def engine(run):
    engine = Engine({"digits": run}, Limits(upload_bytes=30_000))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def client(engine):
    app = FastAPI()
    add_api(app, engine)
    return TestClient(app)


def png(array):
    """An array as base64 of a PNG."""
    file = io.BytesIO()
    Image.fromarray(array[..., 0] if array.shape[2:] == (1,) else array).save(file, "png")
    return base64.b64encode(file.getvalue()).decode()


def decoded(text):
    """The pixels in a PNG in base64, and how they were made."""
    return decoded_pixels(text), read_png(io.BytesIO(base64.b64decode(text)))


def decoded_pixels(text):
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    return pixels[..., None] if pixels.ndim == 2 else pixels


def ask(client, **fields):
    """The answer to a request that is drawn."""
    answer = client.post("/api/pictures", json=fields)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_runs_are_described(client, run):
    (found,) = client.get("/api/runs").json()
    assert (found["run"], found["reads"], found["num_classes"], found["size"]) == ("digits", "classes", 10, [8, 8])
    drawn = ("num_steps", "sampler", "guidance", "references")
    assert tuple(found[name] for name in drawn) == (3, "dpm_solver_pp", 1.5, False)
    assert found["limits"]["num_pictures"] == 16 and found["weights"] == run.digest


def test_pictures_are_those_of_python_with_their_provenance(client, run):
    answer = ask(client, run="digits", label=3, seed=5, num_pictures=2)
    pictures, made = zip(*map(decoded, answer["pictures"]), strict=True)
    np.testing.assert_array_equal(np.stack(pictures), run.sample(labels=[3], num_samples=2, seed=5))
    assert list(made) == answer["provenance"] and answer["seeds"] == [5, 5] and [one["index"] for one in made] == [0, 1]
    assert "--mode=sample --like=PICTURE.png" in answer["command"] and answer["seconds"] > 0


@pytest.mark.parametrize(
    "fields", [{"image": png(PICTURE), "strength": 0.4}, {"image": png(PICTURE), "mask": png(MASK)}]
)
def test_pictures_to_begin_with(client, run, fields):
    answer = ask(client, label=2, seed=1, **fields)
    mask = fit_mask(MASK, (8, 8)) if "mask" in fields else None
    plan = Plan(2, None, 1, 0, PICTURE, fields.get("strength", 1.0), mask)
    np.testing.assert_array_equal(decoded(answer["pictures"][0])[0], draw_plans(run, [plan], Watch())[0])
    if mask is not None:
        np.testing.assert_array_equal(decoded(answer["pictures"][0])[0][~MASK], PICTURE[~MASK])
    assert "--like=PICTURE.png --images=FILE.png" in answer["command"]


def test_a_masks_greys_are_resized_before_they_are_cut(client, run):
    """As --mode=inpaint has it: of two columns that become one, white and a dark grey are more white than black."""
    grey = np.zeros((16, 16), np.uint8)
    grey[:, :5], grey[:, 5:8] = 255, 100
    large = PICTURE.repeat(2, axis=0).repeat(2, axis=1)
    answer = ask(client, label=2, seed=1, image=png(large), mask=png(grey))
    _, made = decoded(answer["pictures"][0])
    late, early = fit_mask(grey, (8, 8)), fit_mask(grey > 127, (8, 8))
    assert made["mask"] == pixels_digest(late) != pixels_digest(early)


def test_updates_are_streamed_until_the_pictures(client, run):
    answer = client.post("/api/pictures?stream=true", json={"label": 4, "seed": 2})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    assert len({event["id"] for event in events}) == 1 and len(events) >= 2
    assert [event["step"] for event in events[:-1]] == sorted(event["step"] for event in events[:-1])
    np.testing.assert_array_equal(decoded(events[-1]["pictures"][0])[0], run.sample(labels=[4], seed=2)[0])


def test_a_request_can_be_cancelled_by_its_id_alone(client, engine, monkeypatch):
    tickets, go, answers = [], threading.Event(), []
    submit, draw = engine.submit, engines.draw_plans
    monkeypatch.setattr(engine, "submit", lambda request: tickets.append(submit(request)) or tickets[0])
    monkeypatch.setattr(engines, "draw_plans", lambda *args: go.wait(100) and draw(*args))
    asking = threading.Thread(target=lambda: answers.append(client.post("/api/pictures", json={"label": 4})))
    asking.start()
    until = time.monotonic() + 100
    while not tickets or client.delete(f"/api/pictures/{tickets[0].id}").status_code == 404:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert client.delete("/api/pictures/none").status_code == 404
    asking.join()
    go.set()
    assert (answers[0].status_code, answers[0].json()) == (409, {"error": "The request was cancelled."})


def test_pictures_are_edited_as_python_edits_them(tmp_path):
    """By FLUX.2 in small: latents, text encoder, sampler and decoder are programs of their own."""
    flags = ("--config.network.dtype=float32", "--config.condition.dtype=float32", "--config.sampling.size=(16, 16)")
    flags += (f"--config.condition.length={ASKED['length']}", f"--config.condition.states={tuple(ASKED['states'])}")
    given = ("--mode=import", f"--weights={write_pipeline(tmp_path / 'published')}", *flags)
    weights.import_weights(make_call(flux2.TASK, "flux2", tmp_path / "flux2", *given))
    run = open_run(tmp_path / "flux2", num_devices=1, changes={"sampling.num_steps": 1})
    engine = Engine({"flux2": run})
    try:
        app = FastAPI()
        add_api(app, engine)
        client = TestClient(app)
        sent = [png(picture) for picture in REFERENCES[:1]]
        answer = client.post("/api/pictures?stream=1", json={"prompt": "a red fox", "references": sent, "seed": 3})
        plain = ask(client, prompt="a red fox", seed=3)
    finally:
        engine.close()
    events = [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]
    edited, made = decoded(events[-1]["pictures"][0])
    own = {"prompts": ["a red fox"], "seed": 3}
    np.testing.assert_array_equal(edited, run.sample(**own, references=REFERENCES[:1])[0])
    np.testing.assert_array_equal(decoded(plain["pictures"][0])[0], run.sample(**own)[0])
    assert (edited != decoded(plain["pictures"][0])[0]).any() and len(made["references"]) == 1
    shown = [decoded_pixels(one) for event in events[:-1] for one in event["previews"]]
    assert all(one.shape == (16, 16, 3) for one in shown)


@pytest.mark.parametrize(
    "status, sentence, fields",
    [
        (400, "no field 'prmpt': choose from run, prompt", {"prmpt": "a"}),
        (400, "There is no run '../digits'", {"run": "../digits"}),
        (400, "field run is no text", {"run": 3}),
        (400, "field size is no list", {"size": 8}),
        (400, "height is x", {"size": ["x", 8]}),
        (400, "seed is [1]", {"seed": [1]}),
        (400, "class is 11", {"label": 11}),
        (400, "reads no prompts", {"prompt": "a"}),
        (400, "field image is no picture in base64", {"image": "/etc/passwd"}),
        (400, "field image is no picture in base64", {"image": 5}),
        (400, "cannot be read", {"image": base64.b64encode(b"GIF89a no").decode()}),
        (400, "cannot be read", {"image": png(PICTURE)[:60]}),
        (400, "not told of pictures to edit", {"references": [png(PICTURE)]}),
        (400, "5 pictures to edit: give at most 4", {"references": [png(PICTURE)] * 5}),
        (400, "A mask needs the picture", {"mask": png(MASK)}),
        (413, "send at most 30000 bytes", {"image": "A" * 50_000}),
        (413, "send at most 30000 bytes", {"image": "A" * (BESIDE + 50_000)}),
    ],
)
def test_what_cannot_be_drawn_is_a_status_and_a_sentence(client, status, sentence, fields):
    answer = client.post("/api/pictures", json=fields)
    assert answer.status_code == status and list(answer.json()) == ["error"]
    assert sentence in answer.json()["error"] and "\n" not in answer.json()["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"3", b"\xff", b"[" * 100_000, b'{"seed": ' + b"9" * 5000 + b"}"])
def test_a_body_that_is_no_object_is_refused(client, body):
    answer = client.post("/api/pictures", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400 and "JSON" in answer.json()["error"]


def test_forms_of_other_pages_are_refused(client):
    """A page elsewhere can send text to localhost without asking, but no JSON."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        answer = client.post("/api/pictures", content=b'{"label": 1}', headers={"content-type": kind})
        assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]


def test_a_body_without_a_length_is_bounded_as_it_comes(client):
    sent = []

    def chunks():
        for _ in range(1000):
            sent.append(1)
            yield b"A" * 10_000

    answer = client.post("/api/pictures", content=chunks(), headers={"content-type": "application/json"})
    assert answer.status_code == 413


def test_a_full_queue_is_429_and_a_failed_drawing_500(client, engine, monkeypatch):
    monkeypatch.setattr(engine, "limits", engine.limits._replace(queue=0))
    answer = client.post("/api/pictures", json={"label": 1})
    assert answer.status_code == 429 and "wait already" in answer.json()["error"]
    monkeypatch.undo()

    def fail(*_):
        raise RuntimeError("a secret")

    monkeypatch.setattr(engines, "draw_plans", fail)
    answer = client.post("/api/pictures", json={"label": 1})
    assert (
        answer.status_code == 500
        and answer.json()["error"].startswith("Drawing failed")
        and "secret" not in answer.text
    )


def test_other_addresses_are_404_as_json(client):
    for path in ("/api", "/api/", "/api/pictures/x/y", "/api/../etc/passwd"):
        assert client.get(path).status_code in (404, 405)
    assert "GET /api/runs" in client.get("/api/else").json()["error"]


WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND
OPENED: list[tuple[str, int]] | None = None
HOOKED = False


def test_nothing_of_a_request_reaches_the_disk(client):
    """Not even a temporary file: every file that is opened meanwhile is listed, by Python's own audit."""
    global OPENED, HOOKED

    def audit(event, args):
        if event == "open" and OPENED is not None:
            OPENED.append((str(args[0]), args[2]))

    asked = {"label": 5, "image": png(PICTURE), "mask": png(MASK)}
    ask(client, **asked)  # compiled
    if not HOOKED:
        sys.addaudithook(audit)
        HOOKED = True
    OPENED = []
    try:
        ask(client, **asked, seed=77)
        client.post("/api/pictures", json={"run": "/tmp/marked", "image": "/tmp/marked"})
        client.post("/api/pictures", json={**asked, "image": png(PICTURE)[:80]})
        with open(os.devnull, "w"):  # the audit works
            pass
        found = list(OPENED)
    finally:
        OPENED = None
    written = [name for name, flags in found if flags & WRITES and name != os.devnull]
    assert (os.devnull, found[-1][1]) == found[-1] and found[-1][1] & WRITES
    assert not written and not any("marked" in name for name, _ in found)
