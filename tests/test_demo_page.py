"""The page in a real browser: what a visitor sees, takes along and is refused, and that nothing leaves this machine."""

import http.client
import io
import json
import os
import re
import shutil
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from typing import Any

import numpy as np
import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from diffusion import open_run
from diffusion.data.samples import load_samples
from diffusion.demo import __main__ as command
from diffusion.demo.controls import properties_of
from diffusion.demo.engine import Engine
from diffusion.demo.page import SESSIONS, make_page
from diffusion.demo.requests import Limits
from diffusion.demo.server import make_app
from diffusion.runs.provenance import read_png
from diffusion.training import RunError

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: on Debian, apt-get install chromium")
PROMPT = "a red three above a blue seven"
NUM_STEPS = 12
PAUSE = 0.15  # seconds that each step of a tiny network takes at least, so that it can be watched and cancelled
LOOPBACK = ("127.0.0.1", "localhost", "::1")
SECONDS = 120_000  # milliseconds: the first picture is compiled
left: list[str] = []  # addresses outside this machine that this process looked for


def watch_sockets(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[1] if event == "socket.connect" else arguments
        host = host[0] if isinstance(host, tuple) else host
        if host not in (*LOOPBACK, "0.0.0.0", None, "") and not str(host).startswith("/"):
            left.append(f"{event} {host}")


class Site:
    """A page that is served, and what it is served from."""

    def __init__(self, folders, **options):
        runs = {name: open_run(path, num_devices=1) for name, path in folders.items()}
        self.folders = folders
        self.engine = Engine(runs, Limits(num_steps=50))
        for name, preview in self.engine._previews.items():
            self.engine._previews[name] = lambda *given, preview=preview: time.sleep(PAUSE) or preview(*given)
        app = make_app(self.engine, {name: run.stored.get("examples", ()) for name, run in runs.items()}, **options)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}/"
        self.server = uvicorn.Server(
            uvicorn.Config(app, port=self.port, log_level="warning", timeout_graceful_shutdown=1)
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.05)

    def close(self):
        self.server.should_exit = True
        self.engine.close()
        self.thread.join(10)


@pytest.fixture(scope="module")
def site(trained):
    sys.addaudithook(watch_sockets)
    site = Site({"scenes": trained("scenes"), "digits": trained("digits_classes")})
    yield site
    site.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to run as root, as in a container.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=SECONDS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, site):
    """visit() -> the page, opened by another visitor. Every request has to stay on this machine."""
    asked, errors, contexts = [], [], []

    def opened():
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS)
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(site.address)
        page.wait_for_selector("#draw")
        set_steps(page, NUM_STEPS)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert asked and not [url for url in asked if not url.startswith((site.address, "data:"))]
    assert not errors and not left


def set_steps(page, count):
    page.get_by_text("Settings", exact=True).click()
    page.fill("#num_steps input[type=number]", str(count))


def ask(page, prompt, pictures=1, seed=None):
    page.fill("#prompt textarea", prompt)
    page.fill("#num_pictures input[type=number]", str(pictures))
    if seed is not None:
        page.fill("#seed input", str(seed))
        expect(page.locator("#fresh input")).not_to_be_checked()
    page.click("#draw")


def wait(page, state):
    """Waits until the request has come so far; returns the line that the page says."""
    page.wait_for_function(f"document.querySelector('.result').dataset.state === '{state}'", timeout=SECONDS)
    return page.inner_text(".result .line")


def download(page, folder, number=0):
    with page.expect_download() as found:
        page.locator(".grid .save").nth(number).click()
    path = folder / found.value.suggested_filename
    found.value.save_as(path)
    return path


RECORD = """() => {
    window.lines = [];
    const look = () => {
        const shown = document.querySelectorAll('.grid img').length;
        window.lines.push(`${shown} ${document.querySelector('.line').textContent}`);
    };
    new MutationObserver(look).observe(document.querySelector('.result'), {subtree: true, childList: true});
}"""


@needs_browser
def test_a_prompt_becomes_a_picture_that_the_command_line_repeats(visit, site, kinds, tmp_path):
    page = visit()
    page.evaluate(RECORD)
    ask(page, PROMPT, pictures=2, seed=5)
    assert re.fullmatch(r"2 pictures in [\d.]+ s · seed 5", wait(page, "done"))
    lines = page.evaluate("window.lines")
    steps = {found[1] for line in lines if (found := re.match(r"2 Step (\d+) of 12 ", line))}
    assert len(steps) > 2, lines  # previews that were shown
    assert page.locator(".gallery figure").count() == 2
    page.locator(".grid img").nth(1).click()
    assert "experiments.scenes" in page.inner_text(".command")
    assert "--like=scenes_seed5_1.png" in page.inner_text(".command")
    path = download(page, tmp_path, number=1)
    made = read_png(path)
    assert (made["prompt"], made["seed"], made["index"]) == (PROMPT, 5, 1)
    assert made["sampling"]["num_steps"] == NUM_STEPS

    out = tmp_path / "again.npz"
    kinds["scenes"].do(site.folders["scenes"], "--mode=sample", f"--like={path}", f"--out={out}")
    np.testing.assert_array_equal(load_samples(out)[-1], np.asarray(Image.open(path)))


@needs_browser
def test_cancel_ends_it(visit, site):
    page = visit()
    before = site.engine.statistics["cancelled"]
    ask(page, PROMPT)
    wait(page, "drawing")
    page.click("#cancel")
    assert wait(page, "stopped").startswith("Stopped after")
    assert site.engine.statistics["cancelled"] == before + 1
    ask(page, PROMPT)  # and it goes on
    wait(page, "done")


@needs_browser
def test_of_two_visitors_one_cancels_his_own(visit):
    first, second = visit(), visit()
    set_steps(first, 50)  # long enough to be seen and cancelled on a busy machine
    ask(first, "a red three", pictures=2, seed=1)
    ask(second, "two green fours", seed=2)
    wait(first, "drawing")
    first.click("#cancel")
    wait(first, "stopped")
    assert wait(second, "done").endswith("seed 2")
    assert "two green fours" in second.inner_text(".made .caption")
    assert first.locator(".gallery figure").count() == 0


@needs_browser
def test_whoever_leaves_waits_no_more(visit, site):
    page = visit()
    before = site.engine.statistics["cancelled"]
    ask(page, PROMPT)
    wait(page, "drawing")
    page.close()
    end = time.monotonic() + 30
    while site.engine.statistics["cancelled"] == before and time.monotonic() < end:
        time.sleep(0.1)
    assert site.engine.statistics["cancelled"] == before + 1


@needs_browser
def test_bad_prompts_are_answered_by_a_sentence(visit):
    page = visit()
    for prompt, sentence in (("", "The prompt is empty: describe the picture."), ("x" * 5000, "5000 characters")):
        ask(page, prompt)
        page.wait_for_function(f"document.querySelector('.line').textContent.includes({json.dumps(sentence)})")
        assert page.get_attribute(".result", "data-state") == "error"
    ask(page, "a red three", seed=-1)
    page.wait_for_function("document.querySelector('.line').textContent.startsWith('The seed is -1')")
    assert "Traceback" not in page.inner_text("body")


@needs_browser
def test_a_prompt_is_text_and_not_part_of_the_page(visit):
    page = visit()
    ask(page, "a red three <img src=x onerror='document.title=1'><b>bold</b>", seed=1)
    wait(page, "done")
    assert "<b>bold</b>" in page.inner_text(".made .caption") and page.locator(".made b").count() == 0
    assert page.title() == "diffusion"


def png(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def give(page, data, name="a.png"):
    file = {"name": name, "mimeType": "image/png", "buffer": data}
    page.set_input_files("#begin_picker input[type=file]", files=[file])


@needs_browser
def test_broken_uploads_are_answered_by_a_sentence(visit):
    page = visit()
    page.get_by_text("Begin with a picture", exact=True).click()
    give(page, b"no picture at all")
    expect(page.locator("#begin_picker .problem")).to_contain_text("a.png is not a picture that can be read")
    give(page, bytes(20_000_001), "large.png")
    expect(page.locator("#begin_picker .problem")).to_contain_text("at most 20 MB are taken")
    whole = png(np.random.RandomState(0).randint(0, 256, (64, 64, 3), np.uint8))
    give(page, whole[: len(whole) // 2])  # of which a browser shows what is there
    page.wait_for_selector("#begin_picker .given img")
    ask(page, PROMPT)
    assert "cannot be" in wait(page, "error")
    page.click("#begin_picker .remove")
    ask(page, PROMPT)
    wait(page, "done")


@needs_browser
def test_only_what_is_painted_over_is_drawn_anew(visit, tmp_path):
    page = visit()
    page.get_by_text("Begin with a picture", exact=True).click()
    image = np.random.RandomState(0).randint(0, 256, (16, 16, 3), np.uint8)
    give(page, png(image))
    canvas = page.wait_for_selector("#begin_picker canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + 40, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + 100, box["y"] + 40, steps=4)
    page.mouse.up()
    ask(page, PROMPT, seed=3)
    wait(page, "done")
    assert "a part of a picture filled in" in page.inner_text(".made .caption")
    with page.expect_download() as found:
        page.click("#begin_picker .tools .save")
    hidden = np.asarray(Image.open(found.value.path()).convert("L")) > 127
    drawn = np.asarray(Image.open(download(page, tmp_path)))
    assert hidden.any() and not hidden.all() and hidden.shape == (16, 16)
    np.testing.assert_array_equal(drawn[~hidden], image[~hidden])
    assert (drawn[hidden] != image[hidden]).mean() > 0.5


@needs_browser
def test_a_run_shows_what_it_can_do_and_nothing_else(visit):
    page = visit()
    for name in ("prompt", "negative"):
        expect(page.locator(f"#{name}")).to_be_visible()
    expect(page.locator("#label")).to_have_count(0)
    example = page.locator("#examples button").first
    text = example.inner_text()
    example.click()
    expect(page.locator("#prompt textarea")).to_have_value(text)
    page.click("#run input")
    page.get_by_role("option", name="digits").click()
    expect(page.locator("#title h1")).to_have_text("digits_classes")
    expect(page.locator("#label")).to_be_visible()
    for name in ("prompt", "negative", "examples", "references"):
        expect(page.locator(f"#{name}")).not_to_be_visible()
    page.fill("#num_steps input[type=number]", "3")
    page.click("#draw")
    wait(page, "done")
    assert page.inner_text(".made .caption").startswith("class 0 · seed")


def fetch(url, body=None, **headers):
    request = urllib.request.Request(url, body, {name.replace("_", "-"): text for name, text in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_files_are_neither_taken_nor_given(site):
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="../a.png"\r\n\r\nabc\r\n--x--\r\n'
    assert fetch(f"{site.address}gradio_api/upload", form, Content_Type="multipart/form-data; boundary=x")[0] == 404
    assert fetch(f"{site.address}gradio_api/file=/etc/hostname")[0] == 404
    assert fetch(f"{site.address}gradio_api/proxy=http://127.0.0.1/")[0] == 404


@pytest.mark.parametrize("path", ["http://127.0.0.1:{port}/api/runs?fetched", "/etc/hostname"])
def test_a_file_that_a_request_names_is_not_read(site, monkeypatch, path):
    """As Gradio's own client names files it has uploaded."""
    opened = []
    monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", lambda *given: opened.append(given))
    config = json.loads(fetch(f"{site.address}config")[1])
    (draw,) = [one for one in config["dependencies"] if len(one["inputs"]) > 10]
    values = {one["id"]: one["props"].get("value") for one in config["components"]}
    names = {one["props"].get("elem_id"): one["id"] for one in config["components"]}
    forged = {"path": path.format(port=site.port), "meta": {"_type": "gradio.FileData"}}

    def answer(begin, number):
        data = [begin if one == names["begin_picker"] else values[one] for one in draw["inputs"]]
        body = {"data": data, "fn_index": draw["id"], "session_hash": f"visitor{number}{len(path)}"}
        fetch(f"{site.address}gradio_api/queue/join", json.dumps(body).encode(), Content_Type="application/json")
        return fetch(f"{site.address}gradio_api/queue/data?session_hash={body['session_hash']}")[1].decode()

    assert "The prompt is empty" in answer(None, 0)  # it is read where no file is named
    assert "This page takes no files by name." in answer({"images": [forged]}, 1)
    assert not opened and not left


def test_a_request_is_bounded_and_comes_from_this_machine(site):
    connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
    connection.putrequest("POST", "/gradio_api/queue/join")
    connection.putheader("Content-Length", "40000001")
    connection.endheaders()
    assert connection.getresponse().status == 413
    assert fetch(f"{site.address}api/runs", Host="evil.example")[0] == 400
    assert fetch(f"{site.address}api/runs")[0] == 200


def test_a_password_is_asked_for_page_and_interface_alike(trained):
    site = Site({"digits": trained("digits_classes")}, auth="ann:secret")
    try:
        for place in ("", "api/runs", "config", "theme.css"):
            assert fetch(site.address + place)[0] == 401
            assert fetch(site.address + place, Authorization="Basic YW5uOndyb25n")[0] == 401  # ann:wrong
            assert fetch(site.address + place, Authorization="Basic YW5uOnNlY3JldA==")[0] == 200
    finally:
        site.close()


@pytest.mark.parametrize(
    "flags, line",
    [
        ([], "--workdir=runs/scenes.*./launch.sh scenes"),
        (["--workdir="], "give the folder of a run"),
        (["--workdir=a", "--auth=ann"], "--auth=user:password"),
        (["--workdir=a", "b"], "unexpected argument 'b'"),
    ],
)
def test_a_command_that_cannot_be_says_what_to_give(flags, line):
    with pytest.raises(RunError, match=line):
        command.parse(["demo", *flags])


def test_samplers_are_those_that_draw_with_what_the_network_learned(site):
    shown = properties_of(site.engine.runs["scenes"], site.engine.limits, ())["sampler"]["choices"]
    assert "euler" in shown and "mean_flow" not in shown


def test_guidance_that_is_trained_in_is_not_asked_for(site):
    run, limits = site.engine.runs["digits"], site.engine.limits
    distilled = run._replace(stored={**run.stored, "distilled": True})
    shown = [properties_of(one, limits, ())["guidance"]["visible"] for one in (run, distilled)]
    assert shown == [True, False]


def test_examples_are_those_of_the_run_or_else_of_the_command(trained, monkeypatch):
    class Served(Exception):
        pass

    def make(engine, examples, host, auth):
        found.update(examples)
        assert make_page(engine, examples).state_session_capacity == SESSIONS
        raise Served

    found: dict[str, Any] = {}
    monkeypatch.setattr(command, "make_app", make)
    monkeypatch.setattr(command, "use_compilation_cache", lambda: None)
    folders = [f"--workdir={trained(name)}" for name in ("scenes", "digits_classes")]
    with pytest.raises(Served):
        command.serve(["demo", *folders, "--example=a fox", "--example=a dog"])
    assert found["digits_classes"] == ["a fox", "a dog"] and PROMPT not in found["digits_classes"]
    assert found["scenes"] == open_run(trained("scenes"), num_devices=1).stored["examples"]


def test_runs_are_chosen_by_the_names_of_their_folders(trained, tmp_path):
    with pytest.raises(RunError, match="two folders are called digits_classes"):
        command.open_runs([trained("digits_classes")] * 2)
    with pytest.raises(RunError):
        command.open_runs([tmp_path])
