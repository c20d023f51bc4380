"""What saving costs a run, in seconds a save and in percent of the time: at most 3 is the promise.

    python -m benchmarks.saving [--unet]

Segments of steps with a save under way in the background and segments without take turns in one process; what the
former take longer is the cost, the copy that the loop waits for, the compression and the checksums included. The
percentage is that of the config's own interval between saves. Writes benchmarks/results/saving.json.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from diffusion.files import replacing
from diffusion.training import Checkpoints, abstract_train_state, init_state, place_batch
from diffusion.training.loop import make_step
from experiments import cifar10, command_line, digits, image_diffusion
from experiments.command_line import Config

EXPERIMENTS = {"digits": digits, "cifar10": cifar10}


def make_source(name: str, config: Config) -> Any:
    """Returns digits, or random images of CIFAR-10's shape: what they show does not matter here."""
    if name == "digits":
        return digits.make_source(config, "train")
    from diffusion.data.sources import array_source

    draw = np.random.RandomState(0)
    image = draw.randint(0, 256, (256, 32, 32, 3), np.uint8)
    return array_source(image, draw.randint(0, 10, 256), "random", "train", 10)


def measure(name: str, folder: Path, *, steps: int, rounds: int, arguments: list[str]) -> dict[str, Any]:
    """Returns the cost of a save of experiment `name` beside `steps` steps: medians of `rounds` pairs of segments."""
    values = flags.FlagValues()
    modes: Any = {"train": None}
    file = Path(EXPERIMENTS[name].__file__ or "")
    run, _ = command_line.parse([name, f"--workdir={folder}", *arguments], file, "", f"{name}_ddpm.py", modes, values)
    experiment = image_diffusion.make_experiment(run.config, make_source(name, run.config), run.mesh)
    settings = image_diffusion.make_settings(run.config)
    batches = experiment.batches(0)
    batch = place_batch(run.mesh, next(batches))
    abstract = abstract_train_state(experiment, settings, run.mesh, batch)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    init = lambda: init_state(experiment, settings.seed, batch, settings.ema_profiles)  # noqa: E731
    state = jax.jit(init, out_shardings=shardings)()
    step = jax.jit(make_step(experiment, settings), donate_argnums=0, out_shardings=(shardings, None))
    step = step.lower(state, batch).compile()

    number, plain, saving = 0, [], []
    shutil.rmtree(folder, ignore_errors=True)
    with Checkpoints(folder, keep_newest=2) as checkpoints:
        for turn in range(2 * rounds + 2):
            save = turn % 2 == 1
            begun = time.perf_counter()
            for _ in range(steps):
                state, report = step(state, batch)
                jax.block_until_ready(report)
                number += 1
                if save:
                    checkpoints.save(number, state, {"experiment": name, "config": {}})
                    save = False
            checkpoints.wait()  # where it takes longer than the segment, the cost is still all counted
            if turn >= 2:  # the first pair warms up
                (saving if turn % 2 else plain).append(time.perf_counter() - begun)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    batches.close()
    seconds = statistics.median(saving) - statistics.median(plain)
    a_step = statistics.median(plain) / steps
    every = run.config.training.checkpoint_every
    return {
        "MB a checkpoint": round(size / 1e6 / 2, 1),
        "seconds a save": round(seconds, 3),
        "seconds a step": round(a_step, 4),
        "batch": experiment.batch_size,
        "steps between saves": every,
        "percent of the time": round(100 * seconds / (every * a_step), 3),
        "segments with": [round(x, 2) for x in saving],
        "segments without": [round(x, 2) for x in plain],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", action="store_true", help="also the exact U-Net of CIFAR-10: minutes")
    parser.add_argument("--folder", type=Path, default=Path("runs/saving"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/saving.json"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {"device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores"}
    results["digits"] = measure("digits", arguments.folder, steps=40, rounds=5, arguments=[])
    print("digits", json.dumps(results["digits"]), flush=True)
    if arguments.unet:
        # A batch of 8 for the config's 128: a save then is dearer by the step, by 16 at most, than it really is.
        small = ["--config.data.batch_size=8"]
        results["exact U-Net"] = measure("cifar10", arguments.folder, steps=6, rounds=3, arguments=small)
        print("exact U-Net", json.dumps(results["exact U-Net"]), flush=True)
    with replacing(arguments.out) as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
