"""Takes the picture of the prompt page in the README: docs/demo.png.

    python docs/shoot_demo.py --workdir=runs/scenes --prompt="a red three above a blue seven" --num_pictures=6

Needs Debian's chromium beside the extras demo and test.
"""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

from absl import app, flags
from playwright.sync_api import sync_playwright

PICTURE = Path(__file__).parent / "demo.png"
WORKDIR = flags.DEFINE_string("workdir", "runs/scenes", "folder of the run")
PROMPT = flags.DEFINE_string("prompt", "a red three above a blue seven", "what is drawn")
SEED = flags.DEFINE_integer("seed", 0, "of the noise")
COUNT = flags.DEFINE_integer("num_pictures", 6, "that are drawn")


def main(argv: list[str]) -> None:
    """Serves the run, draws, and takes the picture."""
    del argv
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "diffusion.demo", f"--workdir={WORKDIR.value}", f"--port={port}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None and "draws from" in server.stdout.readline()
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1240, "height": 990})
            page.set_default_timeout(300_000)
            page.goto(f"http://127.0.0.1:{port}/")
            page.fill("#prompt textarea", PROMPT.value)
            page.fill("#num_pictures input[type=number]", str(COUNT.value))
            page.fill("#seed input", str(SEED.value))
            page.click("#draw")
            page.wait_for_function("document.querySelector('.result').dataset.state === 'done'")
            page.mouse.move(0, 0)
            page.wait_for_timeout(1000)
            page.screenshot(path=PICTURE)
            browser.close()
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    app.run(main)
