"""The page in a real browser: what a visitor sees, takes along and is refused, and that nothing leaves this machine."""

import io
import json
import os
import re
import shutil
import time

import numpy as np
import pytest
from demo_site import PROMPT, left, serve
from PIL import Image
from playwright.sync_api import expect, sync_playwright

from diffusion.data.samples import load_samples
from diffusion.runs.provenance import read_png

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: on Debian, apt-get install chromium")
NUM_STEPS = 12
SECONDS = 120_000  # milliseconds: the first picture is compiled


@pytest.fixture(scope="module")
def site(trained):
    yield from serve(trained)


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
    """Opens the settings; a browser that is cold may mount them anew just after, with their first values."""
    page.get_by_text("Settings", exact=True).click()
    field, held = page.locator("#num_steps input[type=number]"), 0
    for _ in range(40):
        if field.input_value() != str(count):
            field.fill(str(count))
            held = 0
        page.wait_for_timeout(100)
        held += 1
        if held == 8:
            break
    expect(field).to_have_value(str(count))


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
    first.fill("#num_steps input[type=number]", "50")  # long enough to be seen and cancelled on a busy machine
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
