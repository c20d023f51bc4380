"""The page: a visitor sets what a run can do, sees the pictures grow, and takes them along with how they were made."""

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anyio
import gradio as gr
import numpy as np
from gradio.themes import Base

from diffusion.data.pictures import refit
from diffusion.demo.api import read_picture
from diffusion.demo.controls import NO_CLASS, Properties, picker_limits, properties_of
from diffusion.demo.engine import Engine
from diffusion.demo.requests import Limits, Request
from diffusion.demo.shown import Shown, show_line, show_update
from diffusion.demo.tickets import Ticket

HERE = Path(__file__).parent
SESSIONS = 500  # that Gradio remembers: of the oldest it forgets what their controls show
SYSTEM = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # no font is fetched
THEME = Base(
    primary_hue="orange",
    neutral_hue="zinc",
    font=SYSTEM,
    font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    radius_size="sm",
)
CHIPS = '<div class="chips">{{#each value}}<button type="button">{{this}}</button>{{/each}}</div>'
CLICK = "element.onclick = (e) => e.target.tagName === 'BUTTON' && trigger('click', {text: e.target.textContent});"


class Controls(NamedTuple):
    """What a visitor sets; see `make_controls`."""

    run: gr.Dropdown
    prompt: gr.Textbox
    label: gr.Dropdown
    negative: gr.Textbox
    seed: gr.Number
    fresh: gr.Checkbox
    num_pictures: gr.Slider
    num_steps: gr.Slider
    guidance: gr.Slider
    sampler: gr.Dropdown
    height: gr.Number
    width: gr.Number
    begin: gr.HTML
    strength: gr.Slider
    references: gr.HTML


def make_page(engine: Engine, examples: Mapping[str, Sequence[str]]) -> gr.Blocks:
    """Returns the page.

    Args:
      engine: what draws.
      examples: prompts to click, by the name of the run.
    """
    visits: dict[str, set[Ticket]] = {}  # by the session that Gradio gives each page that is open

    async def draw(given: dict[Any, Any], visitor: gr.Request) -> AsyncIterator[tuple[Shown, Any]]:
        try:
            values = {name: given[control] for name, control in controls._asdict().items()}
            asked = request_of(values, engine, properties)
            ticket = await anyio.to_thread.run_sync(engine.submit, asked)
        except ValueError as error:
            yield show_line("error", str(error)), gr.skip()
            return
        run = engine.runs[asked.run]
        yield show_line("waiting", "Sent"), asked.seed
        own = visits.setdefault(str(visitor.session_hash), set())
        own.add(ticket)
        try:
            updates = ticket.updates()
            while (update := await anyio.to_thread.run_sync(next, updates, None, limiter=waiting)) is not None:
                yield show_update(update, ticket.request, run), gr.skip()
        finally:  # a visitor who leaves too
            ticket.cancel()
            own.discard(ticket)

    def cancel(visitor: gr.Request) -> None:
        for ticket in list(visits.get(str(visitor.session_hash), ())):
            ticket.cancel()

    def leave(visitor: gr.Request) -> None:
        cancel(visitor)
        visits.pop(str(visitor.session_hash), None)

    def switch(name: str) -> list[Any]:
        return [gr.update(**properties[name][control]) for control in switched]

    waiting = anyio.CapacityLimiter(engine.limits.queue + 1)
    properties = {name: properties_of(run, engine.limits, examples.get(name, ())) for name, run in engine.runs.items()}
    found = next(iter(properties.values()))
    with gr.Blocks(title="diffusion", analytics_enabled=False) as page:
        about = gr.HTML(elem_id="title", apply_default_css=False, **found["about"])
        with gr.Row(equal_height=False):
            with gr.Column(scale=4, min_width=340):
                controls, chips, go, stop = make_controls(engine, found)
            with gr.Column(scale=7, min_width=400):
                result = gr.HTML(
                    None,
                    html_template=read("result.html"),
                    js_on_load=read("result.js"),
                    apply_default_css=False,
                    elem_id="result",
                )
        switched = list(found)
        places = {**controls._asdict(), "chips": chips, "about": about}
        controls.run.change(switch, controls.run, [places[name] for name in switched], show_progress="hidden")
        controls.seed.input(None, None, controls.fresh, js="() => false")
        chips.click(chip_text, None, controls.prompt, show_progress="hidden")
        asks = [go.click, controls.prompt.submit]  # one at a time of each visitor, who can cancel it
        gr.on(asks, draw, set(controls), [result, controls.seed], show_progress="hidden", trigger_mode="once")
        stop.click(cancel, None, None, show_progress="hidden")
        page.unload(leave)
    for block in page.blocks.values():
        block.async_move_resource_to_block_cache = refuse_file
    page.state_session_capacity = SESSIONS
    return page.queue(default_concurrency_limit=None)


async def refuse_file(url_or_file_path: str | Path | None) -> str | None:
    """Refuses what Gradio would read, or fetch, where a request names a file as its own client does."""
    del url_or_file_path
    raise gr.Error("This page takes no files by name.", print_exception=False)


def make_controls(engine: Engine, found: Mapping[str, Any]) -> tuple[Controls, gr.HTML, gr.Button, gr.Button]:
    """Returns what a visitor sets, example prompts, and the buttons to draw and to stop.

    Args:
      engine: what draws.
      found: `controls.properties_of` the first run.
    """
    names, limits = list(engine.runs), engine.limits
    run = gr.Dropdown(names, value=names[0], label="Model", visible=len(names) > 1, elem_id="run")
    hint = "What is in the picture"
    prompt = gr.Textbox(label="Prompt", lines=2, placeholder=hint, elem_id="prompt", **found["prompt"])
    bare: dict[str, Any] = {"apply_default_css": False}
    chips = gr.HTML(html_template=CHIPS, js_on_load=CLICK, elem_id="examples", **bare, **found["chips"])
    label = gr.Dropdown(label="Class", elem_id="label", **found["label"])
    negative = gr.Textbox(label="Negative prompt", elem_id="negative", **found["negative"])
    with gr.Row():
        go = gr.Button("Draw", variant="primary", elem_id="draw", scale=2)
        stop = gr.Button("Cancel", elem_id="cancel", scale=1)
    with gr.Row(elem_id="seed_row"):
        seed = gr.Number(0, label="Seed", precision=0, elem_id="seed", min_width=110)
        fresh = gr.Checkbox(True, label="Random each time", elem_id="fresh", min_width=110, container=False)
    num_pictures = gr.Slider(1, value=1, step=1, label="Pictures", elem_id="num_pictures", **found["num_pictures"])
    with gr.Accordion("Settings", open=False):
        num_steps = gr.Slider(1, step=1, label="Steps", elem_id="num_steps", **found["num_steps"])
        guidance = gr.Slider(0, step=0.1, label="Guidance (1: none)", elem_id="guidance", **found["guidance"])
        sampler = gr.Dropdown(label="Sampler", elem_id="sampler", **found["sampler"])
        with gr.Row():
            height = gr.Number(label="Height", precision=0, elem_id="height", **found["height"])
            width = gr.Number(label="Width", precision=0, elem_id="width", **found["width"])
    with gr.Accordion("Begin with a picture", open=False, elem_id="begin"):
        begin = make_picker("begin_picker", {}, **picker_limits(limits, 1, True))
        share = "Strength: share of the steps that are run"
        strength = gr.Slider(0.05, 1, 0.6, step=0.05, label=share, elem_id="strength")
        gr.HTML("<small>Paint over a part to have only that part drawn anew (inpainting).</small>", **bare)
    references = make_picker("references", found["references"], **picker_limits(limits, limits.references, False))
    fields = (run, prompt, label, negative, seed, fresh, num_pictures, num_steps, guidance, sampler)
    return Controls(*fields, height, width, begin, strength, references), chips, go, stop


def make_picker(name: str, found: Mapping[str, Any], **limits: Any) -> gr.HTML:
    """Returns what takes pictures of the visitor's."""
    template, script = read("picker.html"), read("picker.js")
    known: dict[str, Any] = {"value": None, **found}
    return gr.HTML(html_template=template, js_on_load=script, apply_default_css=False, elem_id=name, **known, **limits)


def read(name: str) -> str:
    """Returns a file beside this one."""
    return (HERE / name).read_text()


def chip_text(event: gr.EventData) -> str:
    """Returns the example that was clicked."""
    return str(event.text)


def request_of(values: Mapping[str, Any], engine: Engine, properties: Mapping[str, Properties]) -> Request:
    """Returns what the controls ask for, without those that the run does not have.

    Args:
      values: of the controls by name.
      engine: what draws.
      properties: of the controls, by the name of the run.

    Raises:
      ValueError: in one sentence, a run that is not there, or a picture that cannot be read.
    """
    name = values["run"] if len(engine.runs) > 1 else next(iter(engine.runs))
    if name not in engine.runs:
        raise ValueError(f"There is no run {name!r}: choose from {', '.join(engine.runs)}.")
    found, limits = properties[name], engine.limits
    has = {control for control in values if found.get(control, {}).get("visible", True)}
    image, mask = begin_of(values["begin"], limits)
    references = images_of(values["references"], limits) if "references" in has else []
    own_height, own_width, _ = engine.runs[name].model.space.image_shape
    height, width = (number(values[side]) if "height" in has else None for side in ("height", "width"))
    label = values["label"] if "label" in has else None
    return Request(
        run=name,
        prompt=values["prompt"] or "" if "prompt" in has else "",
        negative_prompt=values["negative"] or "" if "negative" in has else "",
        label=None if label in (None, NO_CLASS) else number(label),
        seed=secrets.randbelow(2**32) if values["fresh"] else number(values["seed"]),
        num_pictures=number(values["num_pictures"]),
        sampler=values["sampler"],
        num_steps=number(values["num_steps"]),
        guidance=values["guidance"] if "guidance" in has else None,
        size=(height or own_height, width or own_width) if height or width else (),
        image=image,
        strength=values["strength"],
        mask=mask,
        references=tuple(references),
    )


def number(value: Any) -> Any:
    """Returns a whole number that came as a float as what it is; others as they are, to be refused."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def images_of(given: Any, limits: Limits) -> list[np.ndarray]:
    """Returns the pictures that a picker holds. Raises ValueError where one cannot be read."""
    return [read_picture("images", url, limits) for url in (given or {}).get("images", ())]


def begin_of(given: Any, limits: Limits) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns the picture to begin with and the mask that was drawn on it; None where there is none."""
    images = images_of(given, limits)
    if not images:
        return None, None
    if not given.get("mask"):
        return images[0], None
    mask = read_picture("mask", given["mask"], limits)
    return images[0], refit(mask, channels=1, size=images[0].shape[:2])[..., 0]
