"""Whole published pipelines of random weights: written, imported and measured, each in a process of its own."""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import make_parser, write_results
from diffusion.runs.run import Run, open_run


def parse(doc: str | None, gigabytes: int, num_steps: int, stage: str, out: str) -> argparse.Namespace:
    """Returns what the command line asks for, with the folders `published` and `run` and the file `found` within it.

    Args:
      doc: of the script.
      gigabytes: of the weights.
      num_steps: of the sampler, by default.
      stage: what is done after the weights are written and imported.
      out: where the results are written, by default.
    """
    parser = make_parser(doc)
    help_text = f"for the weights, {gigabytes} GB; made where it is not there"
    parser.add_argument("--folder", type=Path, required=True, help=help_text)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--num_steps", type=int, default=num_steps)
    parser.add_argument("--stage", choices=("all", "write", stage), default="all", help="one alone, in this process")
    parser.add_argument("--out", type=Path, default=Path(out))
    arguments = parser.parse_args()
    arguments.published, arguments.run = arguments.folder / "published", arguments.folder / "run"
    arguments.found = arguments.folder / "found.json"
    return arguments


def run_module(name: str, *flags: str) -> float:
    """Returns the seconds that `python -m NAME FLAGS` takes."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-m", name, *flags], check=True)
    return round(time.perf_counter() - begun, 1)


def do_stage(name: str, arguments: argparse.Namespace, stage: str) -> None:
    """Does a stage of the benchmark NAME in a process of its own."""
    sizes = (f"--side={arguments.side}", f"--num_steps={arguments.num_steps}")
    run_module(name, f"--folder={arguments.folder}", *sizes, f"--stage={stage}")


def import_anew(name: str, arguments: argparse.Namespace, experiment: str) -> float:
    """Returns the seconds that importing takes; before, the benchmark NAME writes the weights if there are none."""
    if not arguments.published.exists():
        do_stage(name, arguments, "write")
    shutil.rmtree(arguments.run, ignore_errors=True)
    flags = (f"--weights={arguments.published}", f"--workdir={arguments.run}")
    return run_module(experiment, "--mode=import", *flags)


def open_sized(workdir: Path, side: int, num_steps: int) -> Run:
    """Returns the imported run, which draws one picture of SIDE x SIDE at a time on one device."""
    changes = {"sampling.size": (side, side), "sampling.num_steps": num_steps, "sampling.batch_size": 1}
    return open_run(workdir, changes=changes, num_devices=1)


def check_drawn(image: Any, side: int) -> None:
    """Raises AssertionError where an image is not one picture of SIDE x SIDE, or shows hardly anything."""
    assert image.shape == (1, side, side, 3) and len(np.unique(image)) > 16


def finish(out: Path, results: Mapping[str, Any]) -> None:
    """Prints the results, and writes them with the machine."""
    print(json.dumps(results))
    write_results(out, results)
