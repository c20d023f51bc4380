"""The prompt page, served to tests as it is to visitors, and a watch over what leaves this machine."""

import socket
import sys
import threading
import time

import uvicorn

from diffusion import open_run
from diffusion.demo.engine import Engine
from diffusion.demo.requests import Limits
from diffusion.demo.server import make_app

PROMPT = "a red three above a blue seven"
PAUSE = 0.15  # seconds that each step of a tiny network takes at least, so that it can be watched and cancelled
LOOPBACK = ("127.0.0.1", "localhost", "::1")
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


def serve(trained):
    """Yields a site of two runs, and closes it at the end; `left` is then what was looked for elsewhere."""
    sys.addaudithook(watch_sockets)
    left.clear()  # of what other files of tests did since the first site, whose hook remains
    site = Site({"scenes": trained("scenes"), "digits": trained("digits_classes")})
    yield site
    site.close()
