"""The engine of the prompt page: bits of the command line, batches, cancelling, the queue, refusals."""

import shlex
import threading
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from diffusion.demo import engine as engines
from diffusion.demo.engine import Engine, QueueFull
from diffusion.demo.requests import Limits, Request
from diffusion.runs.plans import Plan
from diffusion.runs.provenance import command, read_png, write_png
from diffusion.runs.run import open_run

WAIT = 300  # seconds: compiling on a machine that does other things too
PICTURE = np.random.RandomState(0).randint(0, 256, (20, 30, 3), np.uint8)
MASK = np.arange(30)[None].repeat(20, 0) > 15


def restless(run):
    """The run with weights so large that all of them matter: those of six steps return hardly anything."""
    random = np.random.RandomState(0)

    def draw(leaf):
        return jax.device_put(random.standard_normal(leaf.shape).astype(leaf.dtype) * 0.3, leaf.sharding)

    return run._replace(params=jax.tree.map(draw, run.params), known_digest=None)


@pytest.fixture(scope="module")
def classes(trained):
    return restless(open_run(trained("digits_classes"), num_devices=1))


@pytest.fixture(scope="module")
def scenes(trained):
    return restless(open_run(trained("scenes"), num_devices=1))


@pytest.fixture(scope="module")
def engine(classes, scenes):
    engine = Engine({"classes": classes, "scenes": scenes}, Limits(batch=4, num_pictures=6))
    yield engine
    engine.close()


def last(ticket) -> Any:
    """The last update of a ticket that is drawn."""
    update = list(ticket.updates(WAIT))[-1]
    assert update.error is None, update.error
    return update


def hold(monkeypatch, *, in_step=False):
    """Holds the worker before it draws, or in the first step: returns the events of being held and of going on."""
    held, go, draw = threading.Event(), threading.Event(), engines.draw_plans

    def wait():
        held.set()
        assert go.wait(WAIT)

    def draw_held(run, plans, watch):
        if in_step:
            show = watch.show
            watch.show = lambda x_0_hat, time: (show(x_0_hat, time), wait())
        else:
            wait()
        return draw(run, plans, watch)

    monkeypatch.setattr(engines, "draw_plans", draw_held)
    return held, go


def submit_behind(engine, monkeypatch, *requests):
    """Tickets of requests that stand in the queue together, behind one that is thrown away."""
    held, go = hold(monkeypatch)
    first = engine.submit(Request(run="classes", label=0))
    assert held.wait(WAIT)
    tickets = [engine.submit(request) for request in requests]
    first.cancel()
    go.set()
    return tickets


def test_mixed_requests_are_one_batch_and_each_picture_is_its_own_samples(engine, classes, monkeypatch):
    before = engine.batch_sizes.copy()
    asked = [(3, 5, 1), (None, 5, 1), (3, 6, 2), (9, 2**32 - 1, 1), (0, 0, 2)]
    requests = [Request(run="classes", label=label, seed=seed, num_pictures=n) for label, seed, n in asked]
    other = Request(run="classes", label=1, guidance=1.0)
    tickets = submit_behind(engine, monkeypatch, *requests[:2], other, *requests[2:])
    for (label, seed, count), ticket in zip(asked, [*tickets[:2], *tickets[3:]], strict=True):
        found = last(ticket)
        expected = engines.draw_plans(  # one at a time, by the program of --mode=sample
            classes, [Plan(label, None, seed, 0)], None
        )
        np.testing.assert_array_equal(found.pictures[0], expected[0])
        assert len(found.pictures) == count == len(found.provenance)
        assert [made["index"] for made in found.provenance] == list(range(count))
    last(tickets[2])
    # The four first pictures, the other guidance's, the three left: those are of two requests, padded to four.
    assert engine.batch_sizes - before == {1: 2, 4: 1, 3: 1} or engine.batch_sizes - before == {1: 1, 4: 1, 3: 1}
    same = classes.sample(labels=[0], num_samples=2, seed=0)
    np.testing.assert_array_equal(last(tickets[-1]).pictures, same)


@pytest.mark.parametrize("name, fields", [("digits_classes", {"label": 3}), ("scenes", {"prompt": "a red three"})])
def test_a_picture_of_the_page_is_that_of_the_command_line(name, fields, kinds, copied, tmp_path):
    folder = copied(name)
    engine = Engine({name: open_run(folder, num_devices=1)})
    Image.fromarray(PICTURE).save(tmp_path / "image.png")
    Image.fromarray(np.uint8(255) * MASK).save(tmp_path / "mask.png")
    begun = (f"--images={tmp_path / 'image.png'}",)
    asked = {
        "plain": (Request(**fields, seed=3, num_pictures=2, num_steps=2, guidance=2.0), ()),
        "img2img": (Request(**fields, image=PICTURE, strength=0.5, num_steps=2), begun),
        "inpaint": (Request(**fields, image=PICTURE, mask=MASK, num_steps=2), (*begun, f"--mask={tmp_path}/mask.png")),
    }
    try:
        found = {kind: last(engine.submit(request)) for kind, (request, _) in asked.items()}
    finally:
        engine.close()

    def call(*flags):
        out.append(tmp_path / f"out{len(out)}.npz")
        kinds[name].do(folder, f"--out={out[-1]}", *flags)
        return np.load(out[-1])["arr_0"]

    out: list[Any] = []

    for kind, (_, flags) in asked.items():
        write_png(found[kind].pictures[-1], found[kind].provenance[-1], tmp_path / f"{kind}.png")
        again = call("--mode=sample", f"--like={tmp_path / kind}.png", *flags)
        np.testing.assert_array_equal(again[0], found[kind].pictures[-1])
        assert read_png(out[-1].with_suffix(".png")) == found[kind].provenance[-1]
    for picture, made in zip(found["plain"].pictures, found["plain"].provenance, strict=True):
        line = command(made, folder).replace("PICTURE.png", str(tmp_path / "plain.png"))
        np.testing.assert_array_equal(call(*shlex.split(line)[4:]), picture[None])
    with pytest.raises(ValueError, match="begun with 1 pictures, and 0 are given"):
        call("--mode=sample", f"--like={tmp_path / 'img2img.png'}")
    with pytest.raises(ValueError, match="number 1 is not the picture that"):
        call("--mode=sample", f"--like={tmp_path / 'img2img.png'}", f"--images={tmp_path / 'mask.png'}")


def test_prompts_with_guidance_and_negative_prompts_of_their_own(engine, scenes, monkeypatch):
    asked = [("a red three", "", 1), ("a blue seven above a green one", "red", 1), ("a green five", "", 2)]
    requests = [Request("scenes", prompt, negative, seed=seed) for prompt, negative, seed in asked]
    tickets = submit_behind(engine, monkeypatch, *requests)
    for (prompt, negative, seed), ticket in zip(asked, tickets, strict=True):
        expected = scenes.sample(prompts=[prompt], negative_prompt=negative or None, seed=seed)
        np.testing.assert_array_equal(last(ticket).pictures, expected)
        made = last(ticket).provenance[0]
        assert (made["prompt"], made["negative_prompt"]) == (prompt, negative or None)
    assert scenes.config.sampling.guidance != 1
    assert [last(ticket).provenance[0]["batch"] for ticket in tickets] == [[0, 4], [1, 4], [2, 4]]


def test_previews_are_x_0_hat_of_every_step(engine, classes, monkeypatch):
    taken, draw = threading.Semaphore(0), engines.draw_plans

    def draw_in_step(run, plans, watch):  # the worker waits for this slow reader, who would miss steps, or all of them
        show = watch.show
        watch.show = lambda *shown: (show(*shown), taken.acquire(timeout=WAIT))
        return draw(run, plans, watch)

    monkeypatch.setattr(engines, "draw_plans", draw_in_step)
    seen = {}
    for update in engine.submit(Request(run="classes", label=2, seed=4)).updates(WAIT):
        if update.previews is not None and update.step not in seen:
            seen[update.step] = update.previews
            taken.release()
    film = classes.sample(labels=[2], seed=4, trajectory=True)[0]
    assert list(seen) == [1, 2, 3]
    for step, previews in seen.items():  # XLA's and NumPy's rounding may differ at a half
        assert np.abs(previews[0].astype(int) - film[step - 1]).max() <= 1


def test_cancel_of_one_leaves_the_others_and_the_last_stops_the_work(engine, classes, monkeypatch):
    requests = [Request(run="classes", label=4, seed=seed, num_steps=7) for seed in (1, 2)]
    expected = [last(engine.submit(request)).pictures for request in requests]
    before = engine.statistics["evaluations"]

    def cancelled(which):
        held, go = hold(monkeypatch)
        first = engine.submit(requests[0])
        assert held.wait(WAIT)
        tickets = [engine.submit(request) for request in requests]
        first.cancel()
        monkeypatch.undo()
        in_step, on = hold(monkeypatch, in_step=True)
        go.set()
        assert in_step.wait(WAIT)
        for number in which:
            tickets[number].cancel()
            assert tickets[number].newest.cancelled
        on.set()
        updates = [list(ticket.updates(WAIT))[-1] for ticket in tickets]
        last(engine.submit(Request(run="classes", label=1)))  # the worker is done with the batch when this is drawn
        monkeypatch.undo()
        return updates

    left = cancelled([0])
    assert left[0].cancelled and left[0].pictures is None
    np.testing.assert_array_equal(left[1].pictures, expected[1])
    middle = engine.statistics["evaluations"]
    assert middle - before == 0 + 7 + 3  # nobody waited for the first's, all steps of the second's, 3 of the last's
    assert all(update.cancelled for update in cancelled([0, 1]))
    assert engine.statistics["evaluations"] - middle == 0 + 1 + 3  # of 7 one, in which they cancelled


def test_a_waiting_request_that_is_cancelled_is_never_drawn(engine, monkeypatch):
    held, go = hold(monkeypatch)
    first = engine.submit(Request(run="classes", label=0))
    assert held.wait(WAIT)
    second, third = (engine.submit(Request(run="classes", label=n, guidance=n)) for n in (2, 3))
    assert (second.newest.position, third.newest.position) == (1, 2)
    second.cancel()
    assert third.newest.position == 1 and second.newest.cancelled
    go.set()
    assert last(first).position == last(third).position == 0
    assert second.drawn == [] and second.begun == 0


def test_fifty_at_once_are_all_drawn_in_few_batches(engine, classes):
    sizes, lock, found = engine.batch_sizes.copy(), threading.Lock(), {}

    def visit(number):
        update = last(engine.submit(Request(run="classes", label=number % 10, seed=number)))
        with lock:
            found[number] = update.pictures

    visitors = [threading.Thread(target=visit, args=(number,)) for number in range(50)]
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    assert sorted(found) == list(range(50))
    batches = engine.batch_sizes - sizes
    assert sum(size * count for size, count in batches.items()) == 50 and batches.total() <= 25
    for number in (0, 17, 49):
        alone = classes.sample(labels=[number % 10], seed=number, num_samples=1)
        # A batch sums in another order: a pixel on the edge between two of the 256 levels may fall to either side.
        assert np.max(np.abs(found[number].astype(int) - alone)) <= 1


def test_one_request_that_fails_fails_alone_and_the_engine_goes_on(engine, monkeypatch):
    draw = engines.draw_plans

    def draw_but_one(run, plans, watch):
        if any(plan.seed == 13 for plan in plans):
            raise RuntimeError("RESOURCE_EXHAUSTED: /secret/path")
        return draw(run, plans, watch)

    monkeypatch.setattr(engines, "draw_plans", draw_but_one)
    tickets = submit_behind(engine, monkeypatch, *(Request(run="classes", label=1, seed=seed) for seed in (12, 13, 14)))
    updates = [list(ticket.updates(WAIT))[-1] for ticket in tickets]
    assert updates[1].error == "There is not enough memory: ask for fewer or smaller pictures."
    assert updates[0].pictures is not None and updates[2].pictures is not None
    assert engines.sentence(RuntimeError("x")).startswith("Drawing failed")


def test_more_pictures_than_a_batch_takes_come_in_order(engine, classes):
    ticket = engine.submit(Request(run="classes", label=7, seed=3, num_pictures=6))
    np.testing.assert_array_equal(last(ticket).pictures, classes.sample(labels=[7], num_samples=6, seed=3))


def test_two_devices_draw_the_same(classes, trained):
    two = restless(open_run(trained("digits_classes"), num_devices=2))
    engine = Engine({"two": two})
    try:
        found = last(engine.submit(Request(label=3, seed=5)))
    finally:
        engine.close()
    np.testing.assert_array_equal(found.pictures, classes.sample(labels=[3], num_samples=1, seed=5))
    assert engine.statistics["evaluations"] == 3


def test_few_programs_are_kept(engine, classes, monkeypatch):
    monkeypatch.setattr(engines, "PROGRAMS", 2)
    for guidance in (1.1, 1.2, 1.3):
        last(engine.submit(Request(run="classes", label=1, num_steps=1, guidance=guidance)))
    assert len(engine.runs["classes"].programs) == 2 and not classes.programs.keys() & engine.runs["classes"].programs


def test_a_full_queue_and_a_closed_engine_refuse(classes, monkeypatch):
    engine = Engine({"classes": classes}, Limits(queue=1))
    held, go = hold(monkeypatch)
    first = engine.submit(Request(label=1))
    assert held.wait(WAIT)
    second = engine.submit(Request(label=1))
    with pytest.raises(QueueFull, match="1 requests wait already"):
        engine.submit(Request(label=1))
    with pytest.raises(TimeoutError):
        list(second.updates(0.01))
    closing = threading.Thread(target=engine.close)
    closing.start()
    assert list(second.updates(WAIT))[-1].error == engines.CLOSING == list(first.updates(WAIT))[-1].error
    go.set()
    closing.join()
    with pytest.raises(QueueFull, match="closing"):
        engine.submit(Request(label=1))


def test_ids_cannot_be_guessed(engine):
    ids = {engine.submit(Request(run="classes", label=1, seed=seed)).id for seed in range(3)}
    assert len(ids) == 3 and all(len(one) >= 20 for one in ids)


def test_an_unknown_run_is_refused(engine):
    for name in ("nothing", "../classes", ""):
        with pytest.raises(ValueError, match=r"There is no run .*: choose from classes, scenes"):
            engine.submit(Request(run=name, prompt="a"))
