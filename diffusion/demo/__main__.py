"""The prompt page of trained runs, and the same over HTTP.

    python -m diffusion.demo
    python -m diffusion.demo --workdir=runs/scenes --workdir=runs/digits

Open the address that it prints. Without --workdir it serves the first of runs/emoji and runs/scenes that is there. It
listens on this machine alone unless --host names another address. What a visitor sends stays in memory, and the page
needs no network.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from diffusion.demo.engine import Engine
from diffusion.demo.requests import Limits
from diffusion.extras import MissingExtra, need
from diffusion.runs.command_line import run_to_end, use_compilation_cache
from diffusion.runs.run import Run, open_run
from diffusion.training import RunError

try:
    need("demo")
    import uvicorn

    from diffusion.demo.server import LOOPBACK, make_app
except MissingExtra as missing:
    sys.exit(f"error: {missing}")

LIMITS = {
    "num_pictures": "pictures of a request",
    "prompt_length": "characters of a prompt",
    "side": "longest side of a picture, in pixels",
    "upload_bytes": "bytes of an upload",
    "num_steps": "steps of a picture",
    "queue": "requests that may wait",
    "batch": "pictures that are drawn at once",
    "references": "pictures to edit of a request",
}
DEFAULTS = ("runs/emoji", "runs/scenes")
TO_TRAIN = (
    f"there is no run in {' or '.join(DEFAULTS)}: give the folder of one, --workdir=DIR (several times for several). "
    "To train one to begin with: ./launch.sh emoji or scenes (an hour on 2 CPU cores), or ./launch.sh digits (minutes)"
)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags."""
    flags.DEFINE_multi_string("workdir", [], "folder of a run; may be given several times", flag_values=values)
    flags.DEFINE_string("host", LOOPBACK[0], "address to listen on; 0.0.0.0: every one", flag_values=values)
    flags.DEFINE_integer("port", 7860, "to listen on", 1, 65535, flag_values=values)
    flags.DEFINE_multi_string("example", [], "prompt to click, of runs that have none of their own", flag_values=values)
    flags.DEFINE_string("auth", None, "user:password that visitors have to give", flag_values=values)
    flags.DEFINE_bool("traceback", False, "show where an error comes from", flag_values=values)
    for name, default in Limits()._asdict().items():
        flags.DEFINE_integer(f"limit_{name}", default, LIMITS[name], 1, flag_values=values)


def parse(argv: list[str]) -> flags.FlagValues:
    """Returns the flags.

    Raises:
      RunError: a flag that does not exist or cannot be.
    """
    values = flags.FlagValues()
    define_flags(values)
    if {"--help", "-h"} & set(argv):
        print(f"{__doc__}\nFlags:\n{values.get_help()}")
        raise SystemExit(0)
    if rest := values(argv)[1:]:
        raise RunError(f"unexpected argument {rest[0]!r}: flags look like --name=value (--help lists all)")
    if not all(values.workdir):
        raise RunError(TO_TRAIN)
    user, colon, password = (values.auth or "").partition(":")
    if values.auth is not None and not (user and colon and password):
        raise RunError("--auth is no user and password: give --auth=user:password")
    return values


def default_folders() -> list[str]:
    """Returns the folder of the run that is served where none is named. Raises RunError where there is none."""
    there = [folder for folder in DEFAULTS if (Path(folder) / "config.json").is_file()]
    if not there:
        raise RunError(TO_TRAIN)
    return there[:1]


def open_runs(folders: Sequence[str | Path]) -> dict[str, Run]:
    """Returns runs by the names of their folders, on one device each.

    Raises:
      RunError: a folder holds no run that draws, or two have one name.
    """
    runs: dict[str, Run] = {}
    for folder in folders:
        name = Path(folder).expanduser().resolve().name
        if name in runs:
            raise RunError(f"two folders are called {name}: rename one, as visitors choose by that name")
        runs[name] = open_run(folder, num_devices=1)
    return runs


def serve(argv: list[str]) -> None:
    """Opens the runs and serves them until it is interrupted."""
    values = parse(argv)
    use_compilation_cache()
    runs = open_runs(values.workdir or default_folders())
    limits = Limits()._replace(**{name: values[f"limit_{name}"].value for name in Limits._fields})
    engine = Engine(runs, limits)
    examples = {name: run.stored.get("examples") or values.example for name, run in runs.items()}
    app = make_app(engine, examples, values.host, values.auth)
    if values.host not in LOOPBACK and not values.auth:
        print(f"whoever reaches {values.host} can draw: --auth=user:password asks for a password", file=sys.stderr)
    print(f"http://{values.host}:{values.port} draws from {', '.join(runs)}; Ctrl-C ends it", flush=True)
    try:
        uvicorn.run(app, host=values.host, port=values.port, log_level="warning", timeout_graceful_shutdown=2)
    finally:
        engine.close()


if __name__ == "__main__":
    run_to_end(lambda: serve(sys.argv))
