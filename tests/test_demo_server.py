"""What serves the prompt page: files, passwords and bounds of requests, what a run shows of itself, the command."""

import http.client
import json
import urllib.error
import urllib.request
from typing import Any

import pytest
from demo_site import PROMPT, Site, left, serve

from diffusion import open_run
from diffusion.demo import __main__ as command
from diffusion.demo.controls import properties_of
from diffusion.demo.page import SESSIONS, make_page
from diffusion.training import RunError


@pytest.fixture(scope="module")
def site(trained):
    yield from serve(trained)


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
        (["--workdir="], "give the folder of one, --workdir=DIR"),
        (["--workdir=a", "--auth=ann"], "--auth=user:password"),
        (["--workdir=a", "b"], "unexpected argument 'b'"),
    ],
)
def test_a_command_that_cannot_be_says_what_to_give(flags, line):
    with pytest.raises(RunError, match=line):
        command.parse(["demo", *flags])


def test_the_best_model_that_is_there_is_served_where_none_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"no run in runs/emoji or runs/scenes.*\./launch.sh emoji"):
        command.serve(["demo"])
    for name in ("scenes", "emoji"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "config.json").write_text("{}")
        assert command.default_folders() == [f"runs/{name}"]


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
