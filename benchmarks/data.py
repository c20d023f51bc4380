"""Is the input ever what one waits for? The cifar10 experiment's input alone, and its train step with and without it.

    python -m benchmarks.data --data_dir=DIR --json OUT.json

The steps take real batches, or the same batch again and again; the two take turns, and medians are reported with the
ratio round by round. The network is tiny, so that a cost of the input would be seen; `--channels 128 --blocks 2
--multipliers 1,2,2,2 --dtype bfloat16` is the paper's on a GPU. `--data_name=digits` needs no prepared data.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

import diffusion
from benchmarks.common import make_parser, median_ratio, take_turns, write_results
from diffusion.data.batches import make_batches
from diffusion.data.named import named_images
from diffusion.data.sources import Source
from diffusion.model.config import Config
from diffusion.model.experiment import make_experiment, make_model
from diffusion.runs.command_line import use_compilation_cache
from diffusion.training import init_state, make_mesh, make_train_step, place_batch


def make_config(arguments: argparse.Namespace, height: int) -> Config:
    """Returns cifar10's config with the network and the batch of the command line, for images of this height."""
    multipliers = tuple(int(multiplier) for multiplier in arguments.multipliers.split(","))
    return diffusion.load_config(
        "cifar10",
        {
            "data.batch_size": arguments.batch,
            "network.channels": arguments.channels,
            "network.num_blocks": arguments.blocks,
            "network.multipliers": multipliers,
            "network.attention_resolutions": (height // 2,),  # 16 of CIFAR-10's 32, as in the config
            "network.num_groups": min(32, arguments.channels // 4),
            "network.dtype": arguments.dtype,
        },
    )


class Steps:
    """The experiment's own train step, compiled ahead of time."""

    def __init__(self, config: Config, source: Source):
        self.mesh = make_mesh()
        model = make_model(config, source.image_shape, source.num_classes)
        experiment = make_experiment(config, model, source, self.mesh)
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


def input_alone(source: Source, batch_size: int, flip: bool, rounds: int, seconds: float) -> list[float]:
    """Returns the seconds per batch of `make_batches`, one for each round of `seconds`."""
    batches = make_batches(source, 0, batch_size, flip=flip)
    for _ in range(20):
        next(batches)

    def timed() -> float:
        begun, count = time.perf_counter(), 0
        while time.perf_counter() - begun < seconds:
            next(batches)
            count += 1
        return (time.perf_counter() - begun) / count

    found = take_turns({"input": timed}, rounds)["input"]
    batches.close()
    return found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data_name", default="cifar10", help="of the images, as --config.data.name takes it")
    parser.add_argument("--data_dir", default="", help="where TFDS has its sets, or the folder of pictures")
    parser.add_argument("--image_size", type=int, default=0, help="side to which pictures are cropped and resized")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--channels", type=int, default=8)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--multipliers", default="1,1")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--count", type=int, default=10, help="steps per round")
    parser.add_argument("--json", help="where to write the result")
    arguments = parser.parse_args()

    use_compilation_cache()
    size = arguments.image_size or None
    source = named_images(arguments.data_name, "train", data_dir=arguments.data_dir, image_size=size)
    config = make_config(arguments, source.image_shape[0])
    alone = input_alone(source, arguments.batch, config.data.flip, arguments.rounds, 1.0)
    steps = Steps(config, source)
    sides = {"real": steps.real, "same": steps.same}
    for batches in sides.values():
        steps(batches, 2)  # warm-up
    timers = {name: partial(steps, batches, arguments.count) for name, batches in sides.items()}
    seconds = take_turns(timers, arguments.rounds)
    steps.real.close()
    images = arguments.batch * arguments.count
    text = write_results(
        arguments.json,
        {
            "data": source.name,
            "batch_size": arguments.batch,
            "dtype": arguments.dtype,
            "network": {name: config.network[name] for name in ("channels", "multipliers", "num_blocks")},
            "input_alone_images_per_second": round(arguments.batch / statistics.median(alone)),
            "train_images_per_second": {
                name: round(images / statistics.median(values), 1) for name, values in seconds.items()
            },
            "real_over_same": round(median_ratio(seconds["same"], seconds["real"]), 4),
            "rounds": {
                "input_alone_images_per_second": [round(value, 6) for value in alone],
                **{name: [round(value, 4) for value in values] for name, values in seconds.items()},
            },
        },
    )
    print(text, end="")


if __name__ == "__main__":
    main()
