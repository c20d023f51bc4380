"""The server: the HTTP interface and the page in one app, with what guards both."""

import base64
import secrets
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from diffusion.demo.api import add_api
from diffusion.demo.engine import Engine
from diffusion.demo.page import THEME, make_page, read

LOOPBACK = ("127.0.0.1", "localhost", "::1")
SHUT = ("/gradio_api/upload", "/gradio_api/file", "/gradio_api/proxy", "/gradio_api/stream", "/proxy", "/file")
Scope = MutableMapping[str, Any]
App = Callable[[Scope, Any, Any], Awaitable[None]]


def make_app(
    engine: Engine, examples: Mapping[str, Sequence[str]], host: str = LOOPBACK[0], auth: str | None = None
) -> FastAPI:
    """Returns the app that serves the page at / and the HTTP interface at /api.

    Args:
      engine: what draws.
      examples: prompts to click, by the name of the run.
      host: on which it listens; of the loopback, requests under other names are refused, as those of a page elsewhere.
      auth: "user:password" that every request has to give (HTTP Basic); None: none.
    """
    app = FastAPI(title="diffusion", openapi_url="/api/openapi.json", docs_url=None, redoc_url=None)
    add_api(app, engine)
    page = make_page(engine, examples)
    app = gr.mount_gradio_app(
        app,
        page,
        path="/",
        server_name=host,
        theme=THEME,
        css=read("page.css"),
        footer_links=[],
        run_history=False,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    app.add_middleware(bounded, most=2 * engine.limits.upload_bytes)
    app.add_middleware(without_files)
    if auth:
        app.add_middleware(guarded, auth=auth)
    if host in LOOPBACK:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost", "[::1]"])
    return app


async def refuse(send: Any, status: int, sentence: str, *headers: tuple[bytes, bytes]) -> None:
    """Answers a request with one sentence."""
    body = sentence.encode()
    head = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})


def guarded(app: App, auth: str) -> App:
    """Returns an app for those who give the user and the password, "user:password"."""
    wanted = b"Basic " + base64.b64encode(auth.encode())

    async def serve(scope: Scope, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or secrets.compare_digest(given, wanted):
            await app(scope, receive, send)
        else:
            ask = (b"www-authenticate", b'Basic realm="diffusion"')
            await refuse(send, 401, "Give the user and the password.", ask)

    return serve


def bounded(app: App, most: int) -> App:
    """Returns an app that reads at most so many bytes of a request."""

    async def serve(scope: Scope, receive: Any, send: Any) -> None:
        length = dict(scope.get("headers", ())).get(b"content-length", b"0")
        if scope["type"] == "http" and (not length.isdigit() or int(length) > most):
            await refuse(send, 413, f"The request is larger than {most} bytes.")
            return
        seen = 0

        async def receive_bounded() -> Any:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            # What comes in chunks has no length.
            return {"type": "http.disconnect"} if seen > most else message

        await app(scope, receive_bounded, send)

    return serve


def without_files(app: App) -> App:
    """Returns an app without the routes of Gradio that write uploads to the disk, or read files."""

    async def serve(scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].startswith(SHUT):
            await refuse(send, 404, "There is nothing here.")
        else:
            await app(scope, receive, send)

    return serve
