"""Is the input ever what one waits for? The cifar10 experiment's input alone, and its train step with and without it.

    python -m benchmarks.data --data_dir=DIR --json OUT.json

The steps take real batches, or the same batch again and again; the two take turns, and medians are reported with the
ratio round by round. The network is tiny, so that a cost of the input would be seen; `--channels 128 --blocks 2
--multipliers 1,2,2,2 --dtype bfloat16` is the paper's on a GPU.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from diffusion.data.batches import make_batches
from diffusion.data.tfds import tfds_source
from diffusion.files import replacing
from diffusion.training import init_state, make_mesh, make_train_step, place_batch
from experiments import command_line, image_diffusion

CONFIG = Path(__file__).parents[1] / "experiments" / "configs" / "cifar10_ddpm.py"


def make_config(arguments: argparse.Namespace) -> Any:
    config = command_line.load(str(CONFIG))
    config.data.batch_size = arguments.batch
    config.network.channels, config.network.num_blocks = arguments.channels, arguments.blocks
    config.network.multipliers = tuple(int(multiplier) for multiplier in arguments.multipliers.split(","))
    config.network.num_groups = min(32, arguments.channels // 4)
    config.network.dtype = arguments.dtype
    return config


class Steps:
    """The experiment's own train step, compiled ahead of time."""

    def __init__(self, config: Any, source: Any):
        self.mesh = make_mesh()
        experiment = image_diffusion.make_experiment(config, source, self.mesh)
        self.real = experiment.batches(0)
        self.same = itertools.repeat(next(self.real))
        batch = place_batch(self.mesh, next(self.same))
        self.state = jax.jit(lambda: init_state(experiment, 0, batch))()
        step = make_train_step(experiment, seed=0, ema_decay=0.9999)
        self.step = jax.jit(step, donate_argnums=0).lower(self.state, batch).compile()

    def __call__(self, batches: Iterator[Any], count: int) -> float:
        """Returns the seconds of `count` steps; as the training loop does, it prepares a batch during the step."""
        batch = place_batch(self.mesh, next(batches))
        jax.block_until_ready((self.state, batch))
        begun = time.perf_counter()
        previous = None
        for _ in range(count):
            self.state, report = self.step(self.state, batch)
            if previous is not None:
                float(previous.loss)
            previous = report
            batch = place_batch(self.mesh, next(batches))
        jax.block_until_ready((self.state, batch))
        return time.perf_counter() - begun


def input_alone(source: Any, batch_size: int, flip: bool, rounds: int, seconds: float) -> float:
    """Returns the median images per second of `make_batches`, over rounds of so many seconds."""
    rates = []
    batches = make_batches(source, 0, batch_size, flip=flip)
    for _ in range(20):
        next(batches)
    for _ in range(rounds):
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            next(batches)
            count += 1
        rates.append(count * batch_size / (time.perf_counter() - begun))
    batches.close()
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", help="where TFDS has its sets")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--multipliers", default="1,1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=10, help="steps a round")
    parser.add_argument("--json", help="where to write the result")
    arguments = parser.parse_args()

    command_line.use_compilation_cache()
    config = make_config(arguments)
    source = tfds_source("cifar10", "train", arguments.data_dir)
    alone = input_alone(source, arguments.batch, config.data.flip, arguments.rounds, 1.0)
    steps = Steps(config, source)
    sides = {"real": steps.real, "same": steps.same}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for batches in sides.values():
        steps(batches, 2)  # warm-up
    for number in range(arguments.rounds):
        for name in sorted(sides, reverse=bool(number % 2)):  # neither is always the first
            seconds[name].append(steps(sides[name], arguments.count))
    steps.real.close()
    images = arguments.batch * arguments.count
    result = {
        "device": jax.devices()[0].device_kind,
        "device_count": jax.device_count(),
        "cpu_count": os.cpu_count(),
        "batch_size": arguments.batch,
        "dtype": arguments.dtype,
        "network": {name: config.network[name] for name in ("channels", "multipliers", "num_blocks")},
        "jax": jax.__version__,
        "input_alone_images_per_second": round(alone),
        "train_images_per_second": {
            name: round(images / statistics.median(values), 1) for name, values in seconds.items()
        },
        "real_over_same": round(
            statistics.median([same / real for real, same in zip(seconds["real"], seconds["same"], strict=True)]), 4
        ),
        "rounds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
    }
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        with replacing(arguments.json) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
