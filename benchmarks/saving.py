"""What saving costs a run, in seconds per save and in percent of the time: at most 3 is the promise.

    python -m benchmarks.saving [--unet]

Segments of steps with a save in the background and segments without take turns in one process. What the former take
longer is the cost: the copy that the loop waits for, the compression and the checksums. The percentage is that of the
config's own interval between saves. Writes benchmarks/results/saving.json.
"""

import json
import shutil
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

import diffusion
from benchmarks.common import make_parser, take_turns, write_results
from diffusion.data.sources import Source, array_source, digits
from diffusion.model.config import make_settings
from diffusion.model.experiment import make_experiment, make_model
from diffusion.training import Checkpoints, abstract_train_state, init_state, make_mesh, place_batch
from diffusion.training.loop import make_step


def random_images(count: int = 256) -> Source:
    """Returns random images of CIFAR-10's shape: what they show does not matter here."""
    draw = np.random.RandomState(0)
    image = draw.randint(0, 256, (count, 32, 32, 3), np.uint8)
    return array_source(image, draw.randint(0, 10, count), "random", "train", 10)


def measure(
    spec: str, source: Source, folder: Path, *, steps: int, rounds: int, changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the cost of a save beside `steps` steps of a config on `source`: medians of `rounds` pairs of segments.

    Args:
      spec: of the config, as `diffusion.load_config` takes it.
      source: of the images.
      folder: of the checkpoints; removed before and after.
      steps: of a segment.
      rounds: pairs of segments that count; one pair before them warms up.
      changes: of the config.
    """
    config = diffusion.load_config(spec, changes)
    mesh, settings = make_mesh(), make_settings(config)
    model = make_model(config, source.image_shape, source.num_classes)
    experiment = make_experiment(config, model, source, mesh)
    batches = experiment.batches(0)
    batch = place_batch(mesh, next(batches))
    batches.close()
    abstract = abstract_train_state(experiment, settings, mesh, batch)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    init = lambda: init_state(experiment, settings.seed, batch, settings.ema_profiles)  # noqa: E731
    state = jax.jit(init, out_shardings=shardings)()
    step = jax.jit(make_step(experiment, settings), donate_argnums=0, out_shardings=(shardings, None))
    step = step.lower(state, batch).compile()

    shutil.rmtree(folder, ignore_errors=True)
    number = 0
    with Checkpoints(folder, keep_newest=2) as checkpoints:

        def segment(save: bool) -> float:
            nonlocal state, number
            begun = time.perf_counter()
            for i in range(steps):
                state, report = step(state, batch)
                jax.block_until_ready(report)
                number += 1
                if save and i == 0:
                    checkpoints.save(number, state, {"experiment": spec, "config": {}})
            checkpoints.wait()  # where a save takes longer than its segment, its whole cost counts
            return time.perf_counter() - begun

        segments = {"with": lambda: segment(True), "without": lambda: segment(False)}
        take_turns(segments, 1)
        seconds = take_turns(segments, rounds)
    num_saved = sum(1 for path in folder.iterdir() if path.name.isdecimal())
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / num_saved
    shutil.rmtree(folder)
    per_save = [one - other for one, other in zip(seconds["with"], seconds["without"], strict=True)]
    per_step = [one / steps for one in seconds["without"]]
    every = settings.checkpoint_every
    share = statistics.median(per_save) / (every * statistics.median(per_step))
    return {
        "MB per checkpoint": round(size / 1e6, 1),
        "seconds per save": round(statistics.median(per_save), 3),
        "seconds per step": round(statistics.median(per_step), 4),
        "batch_size": experiment.batch_size,
        "steps between saves": every,
        "percent of the time": round(100 * share, 3),
        "rounds": {
            "seconds per save": [round(one, 3) for one in per_save],
            "seconds per step": [round(one, 4) for one in per_step],
        },
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--unet", action="store_true", help="also the exact U-Net of CIFAR-10: minutes")
    parser.add_argument("--steps", type=int, default=40, help="steps per segment of the digits")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of segments of the digits")
    parser.add_argument("--folder", type=Path, default=Path("runs/saving"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/saving.json"))
    arguments = parser.parse_args()
    folder, results = arguments.folder, {}
    results["digits"] = measure(
        "digits", digits("train"), folder, steps=arguments.steps, rounds=arguments.rounds, changes={}
    )
    print("digits", json.dumps(results["digits"]), flush=True)
    if arguments.unet:
        # A batch of 8 for the config's 128: by the step, a save then costs more than it really does, at most 16 times.
        few = {"data.batch_size": 8}
        results["exact U-Net"] = measure("cifar10", random_images(), folder, steps=6, rounds=3, changes=few)
        print("exact U-Net", json.dumps(results["exact U-Net"]), flush=True)
    write_results(arguments.out, results)


if __name__ == "__main__":
    main()
