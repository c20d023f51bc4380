"""The page's HTTP interface: JSON in and out, on the same app as the page; docs/demo.md has examples."""

import asyncio
import base64
import binascii
import io
import json
import weakref
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
from fastapi import FastAPI
from fastapi import Request as HTTPRequest
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from diffusion.data.pictures import refit
from diffusion.demo.engine import Engine, QueueFull
from diffusion.demo.requests import Limits, Request, TooLarge, read_upload
from diffusion.demo.tickets import Ticket, Update
from diffusion.model.experiment import READ_REFERENCES
from diffusion.model.sampling import SAMPLERS
from diffusion.runs.provenance import command, write_png
from diffusion.runs.run import Run

BESIDE = 100_000  # bytes of a body beside its pictures
EVENTS = "text/event-stream"
EVERY = 0.02  # seconds between looks at a ticket


def add_api(app: FastAPI, engine: Engine) -> None:
    """Adds the routes under /api to an app."""
    tickets: weakref.WeakValueDictionary[str, Ticket] = weakref.WeakValueDictionary()

    @app.get("/api/runs")
    def runs() -> list[dict[str, Any]]:
        return [describe(name, run, engine.limits) for name, run in engine.runs.items()]

    @app.post("/api/pictures")
    async def pictures(asked: HTTPRequest) -> Response:
        try:
            body = await read_body(asked, engine.limits)
            request = await run_in_threadpool(read_request, body, engine.limits)
            ticket = await run_in_threadpool(engine.submit, request)
        except ValueError as error:
            return refusal(status_of(error), str(error))
        tickets[ticket.id] = ticket
        if asked.query_params.get("stream", "").lower() in ("1", "true"):
            return StreamingResponse(events(ticket), headers={"cache-control": "no-store"}, media_type=EVENTS)
        update = await last_of(ticket, asked)
        if update.pictures is None:
            return refusal(500 if update.error else 409, update.error or "The request was cancelled.")
        return JSONResponse(await run_in_threadpool(answer, ticket, update))

    @app.delete("/api/pictures/{id}")
    def cancel(id: str) -> Response:
        if id not in tickets:
            return refusal(404, "There is no such request.")
        tickets[id].cancel()
        return JSONResponse({"cancelled": id})

    @app.api_route("/api/{rest:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    def nothing(rest: str) -> Response:
        return refusal(404, "There is nothing here: GET /api/runs, POST /api/pictures, DELETE /api/pictures/ID.")


def describe(name: str, run: Run, limits: Limits) -> dict[str, Any]:
    """Returns what a run reads, its defaults, choices and limits, plain JSON."""
    condition, sampling = run.model.condition, run.config.sampling
    return {
        "run": name,
        "experiment": run.experiment,
        "reads": condition.kind,
        **({"num_classes": condition.num_classes} if condition.num_classes else {}),
        "references": run.config.network.name in READ_REFERENCES,
        "size": list(run.model.space.image_shape[:2]),
        "channels": run.model.space.image_shape[2],
        "sampler": sampling.sampler.name,
        "samplers": list(SAMPLERS),
        "num_steps": sampling.num_steps,
        "guidance": sampling.guidance,
        "weights": run.digest,
        "limits": limits._asdict(),
    }


async def read_body(asked: HTTPRequest, limits: Limits) -> bytes:
    """Returns the body of a request. Raises ValueError where it is no JSON, or longer than its pictures may be."""
    if asked.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        # Without this a form on any web page could draw.
        raise ValueError("The body has to be JSON: send it with the header Content-Type: application/json.")
    most, body = limits.upload_bytes * 4 // 3 + BESIDE, bytearray()
    async for chunk in asked.stream():
        body += chunk
        if len(body) > most:
            raise TooLarge(f"The request is too large: send at most {limits.upload_bytes} bytes of pictures.")
    return bytes(body)


def read_request(body: bytes, limits: Limits) -> Request:
    """Returns what a body of JSON asks for. Raises ValueError, in one sentence, where it cannot be read."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError("The body is no JSON.") from error
    if not isinstance(fields, dict):
        raise ValueError("The body is no JSON object of fields.")
    if unknown := sorted(set(fields) - set(Request._fields)):
        raise ValueError(f"There is no field {unknown[0][:40]!r}: choose from {', '.join(Request._fields)}.")
    given = {name: value for name, value in fields.items() if value is not None}
    for name, kind in (("run", str), ("sampler", str), ("size", list), ("references", list)):
        if name in given and not isinstance(given[name], kind):
            raise ValueError(f"The field {name} is no {'text' if kind is str else 'list'}.")
    if len(given.get("references", ())) > limits.references:
        raise ValueError(f"There are {len(given['references'])} pictures to edit: give at most {limits.references}.")
    sent = [*(given[name] for name in ("image", "mask") if name in given), *given.get("references", ())]
    if sum(len(text) for text in sent if isinstance(text, str)) * 3 // 4 > limits.upload_bytes:
        raise TooLarge(f"The pictures are too large: send at most {limits.upload_bytes} bytes.")
    if "image" in given:
        given["image"] = read_picture("image", given["image"], limits)
    if "mask" in given:
        given["mask"] = refit(read_picture("mask", given["mask"], limits), channels=1)[..., 0]
    given["references"] = tuple(read_picture("references", text, limits) for text in given.get("references", ()))
    return Request(**{**given, "size": tuple(given.get("size", ()))})


def read_picture(name: str, text: Any, limits: Limits) -> np.ndarray:
    """Returns a picture in base64. Raises ValueError, in one sentence, where it is none."""
    try:
        data = base64.b64decode(text.partition(",")[2] if text.startswith("data:") else text, validate=True)
    except (AttributeError, ValueError, binascii.Error) as error:
        raise ValueError(f"The field {name} is no picture in base64.") from error
    return read_upload(data, limits)


async def last_of(ticket: Ticket, asked: HTTPRequest) -> Update:
    """Returns the last update of a ticket, which is cancelled when whoever asked has gone."""
    while not ticket.finished:
        await asyncio.sleep(EVERY)
        if await asked.is_disconnected():
            ticket.cancel()
    return ticket.newest


async def events(ticket: Ticket) -> AsyncIterator[str]:
    """Yields a ticket's updates as server-sent events; it is cancelled when the reader goes away."""
    before = None
    try:
        while before is None or not before.last:
            update = ticket.newest
            if update is before:
                await asyncio.sleep(EVERY)
                continue
            before = update
            yield f"data: {json.dumps(await run_in_threadpool(event, ticket, update))}\n\n"
    finally:
        ticket.cancel()


def event(ticket: Ticket, update: Update) -> dict[str, Any]:
    """Returns an update, plain JSON."""
    if update.pictures is not None:
        return answer(ticket, update)
    if update.error or update.cancelled:
        return {"id": ticket.id, "error": update.error or "The request was cancelled."}
    fields = {name: getattr(update, name) for name in ("position", "step", "num_steps", "seconds")}
    shown = [] if update.previews is None else [png_of(picture) for picture in update.previews]
    return {"id": ticket.id, **fields, "previews": shown}


def answer(ticket: Ticket, update: Update) -> dict[str, Any]:
    """Returns the pictures of a request as PNG in base64, each with how it was made inside, plain JSON."""
    assert update.pictures is not None and update.provenance is not None
    return {
        "id": ticket.id,
        "pictures": [png_of(*both) for both in zip(update.pictures, update.provenance, strict=True)],
        "seeds": [made["seed"] for made in update.provenance],
        "seconds": update.seconds,
        "command": command(update.provenance[-1]),
        "provenance": update.provenance,
    }


def png_of(picture: np.ndarray, made: Mapping[str, Any] | None = None) -> str:
    """Returns a picture as PNG in base64, with how it was made inside where that is known."""
    file = io.BytesIO()
    write_png(picture, made, file)
    return base64.b64encode(file.getvalue()).decode()


def status_of(error: Exception) -> int:
    """Returns the HTTP status of a refusal."""
    return 429 if isinstance(error, QueueFull) else 413 if isinstance(error, TooLarge) else 400


def refusal(status: int, sentence: str) -> Response:
    """Returns an error as JSON."""
    return JSONResponse({"error": sentence}, status)
