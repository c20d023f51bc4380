"""A checkpoint of one Python and JAX is read by another: its training resumes, and its samples are the same images.

    python -m benchmarks.versions --other_python=PATH

Small digits runs, both ways; PATH is an interpreter with the project's requirements. Writes
benchmarks/results/versions_cpu.json; every line of it is also a claim that fails the script when it does not hold.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.common import make_parser, write_results
from benchmarks.processes import FLAGS, LAST, apart, curve
from diffusion.training.checkpoints import read_description

# Of the losses. Two versions of XLA round differently in every step, by parts of 1e-7, and each step builds on it.
LARGEST_DIFFERENCE = 1e-4


def run_digits(python: str, workdir: Path, *flags: str) -> None:
    """Runs the experiment under an interpreter, in this checkout."""
    command = [python, "-m", "experiments.digits", f"--workdir={workdir}", *flags]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {done.stderr[-2000:]}")


def sampled(python: str, workdir: Path, out: Path) -> np.ndarray:
    """Returns uint8[64, H, W, C], sampled under an interpreter."""
    run_digits(python, workdir, "--mode=sample", "--num_samples=64", "--sampler=ddim", "--steps=20", f"--out={out}")
    return np.load(out)["arr_0"]


def handed_over(writer: str, reader: str, whole: Path, folder: Path) -> dict[str, Any]:
    """Compares half a run by `writer` and the rest by `reader` with the writer's `whole`, and samples of the half."""
    half, rest = folder / "half", folder / "rest"
    shutil.rmtree(folder, ignore_errors=True)
    run_digits(writer, half, *FLAGS, f"--config.training.num_steps={LAST // 2}")
    shutil.copytree(half, rest)
    run_digits(reader, rest, *FLAGS)
    losses = apart(whole, rest)
    assert curve(rest)[: LAST // 2] == curve(whole)[: LAST // 2] and losses < LARGEST_DIFFERENCE, losses
    own = sampled(writer, half, folder / "own.npz")
    pixels = np.abs(own.astype(int) - sampled(reader, half, folder / "others.npz"))
    assert own.std() > 10 and pixels.max() <= 1, pixels.max()
    return {
        "steps after the other's": LAST // 2,
        "largest relative difference of the losses": losses,
        "largest difference of 64 samples, of 255": int(pixels.max()),
        "share of their pixels that differ": float((pixels > 0).mean()),
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--other_python", required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/versions"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/versions_cpu.json"))
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # where the runs are
    pythons = {"this": sys.executable, "the other": arguments.other_python}
    results: dict[str, Any] = {}
    for name, python in pythons.items():
        workdir = arguments.folder / f"whole_{name.replace(' ', '_')}"
        shutil.rmtree(workdir, ignore_errors=True)
        run_digits(python, workdir, *FLAGS)
        results[name] = read_description(workdir / "checkpoints" / str(LAST))["provenance"]["versions"]
    assert results["this"] != results["the other"], "the two have the same versions"
    for writer, reader in (("this", "the other"), ("the other", "this")):
        whole = arguments.folder / f"whole_{writer.replace(' ', '_')}"
        name = f"written by {writer}, read by {reader}"
        results[name] = handed_over(pythons[writer], pythons[reader], whole, arguments.folder / "handed_over")
        print(name, json.dumps(results[name]), flush=True)
    write_results(arguments.out, results)


if __name__ == "__main__":
    main()
