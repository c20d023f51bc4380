"""The prompt page under load: N requests at once against one by one, on a small model; how many are lost.

    python -m benchmarks.demo_load --out benchmarks/results/demo_load_cpu.json

Trains a small run of the digits where --workdir holds none, compiles every batch size first, and then takes turns: all
requests submitted together, which the engine draws in batches, and each submitted when the one before is done. Pictures
of both have to be equal, bit for bit.
"""

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

import diffusion
from benchmarks.common import SMALL, make_parser, median_ratio, take_turns, write_results
from diffusion.data.sources import digits
from diffusion.demo.engine import Engine
from diffusion.demo.requests import Limits, Request
from diffusion.demo.tickets import Update
from diffusion.runs.command_line import use_compilation_cache
from diffusion.runs.train import train_run

CHANGES = {**SMALL, "sampling.num_steps": 20, "sampling.batch_size": 64, "network.channels": 32}


def ask(engine: Engine, number: int) -> Update:
    """Returns the last update of request `number`."""
    return list(engine.submit(Request(label=number % 10, seed=number)).updates())[-1]


def at_once(engine: Engine, count: int) -> tuple[float, list[Update]]:
    """Returns the seconds that `count` visitors took who ask together, and what each was given."""
    found: dict[int, Update] = {}
    visitors = [threading.Thread(target=lambda n=n: found.update({n: ask(engine, n)})) for n in range(count)]
    begun = time.monotonic()
    for visitor in visitors:
        visitor.start()
    for visitor in visitors:
        visitor.join()
    return time.monotonic() - begun, [found[n] for n in range(count) if n in found]


def one_by_one(engine: Engine, count: int) -> tuple[float, list[Update]]:
    """Returns the seconds that requests took of which each waits for the one before, and what was drawn."""
    begun = time.monotonic()
    found = [ask(engine, number) for number in range(count)]
    return time.monotonic() - begun, found


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--requests", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8, help="pictures that are drawn at once, at most")
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo_load"))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    use_compilation_cache()
    if not (arguments.workdir / "checkpoints").exists():
        config = diffusion.load_config("digits:class_conditional", CHANGES)
        train_run(config, digits("train"), arguments.workdir, name="digits")
    run = diffusion.open_run(arguments.workdir, num_devices=1)
    engine = Engine({"digits": run}, Limits(batch=arguments.batch, queue=arguments.requests))
    updates: dict[str, list[list[Update]]] = {"at once": [], "one by one": []}

    def timer(name: str, work: Any) -> Any:
        def measure() -> float:
            seconds, found = work(engine, arguments.requests)
            updates[name].append(found)
            return seconds

        return measure

    for _ in range(2):  # every size of batch is compiled
        at_once(engine, arguments.requests)
    for size in (1, 2, 4, 8, 16):
        if size <= min(arguments.batch, engine.limits.num_pictures):
            list(engine.submit(Request(label=0, num_pictures=size)).updates())
    engine.batch_sizes.clear()
    timers = {"at once": timer("at once", at_once), "one by one": timer("one by one", one_by_one)}
    seconds = take_turns(timers, arguments.rounds)
    engine.close()
    drawn = [[update.pictures for update in found] for both in updates.values() for found in both]
    lost = sum(arguments.requests - sum(picture is not None for picture in found) for found in drawn)
    pairs = [(np.asarray(a), np.asarray(b)) for found in drawn for a, b in zip(drawn[0], found, strict=False)]
    equal = all(np.array_equal(a, b) for a, b in pairs)
    results = {
        "question": "requests per second of the prompt page, asked at once and one by one",
        "requests": arguments.requests,
        "num_rounds": arguments.rounds,
        "largest batch": arguments.batch,
        "model": {
            "experiment": "digits",
            "steps": run.config.sampling.num_steps,
            "guidance": run.config.sampling.guidance,
        },
        "requests per second": {name: [arguments.requests / one for one in found] for name, found in seconds.items()},
        "times as fast at once": median_ratio(seconds["one by one"], seconds["at once"]),
        "lost": lost,
        "pictures equal bit for bit": equal,
        "batch sizes": {str(size): count for size, count in sorted(engine.batch_sizes.items())},
    }
    print(write_results(arguments.out, results))
    if lost or not equal:
        raise SystemExit(f"{lost} requests were lost, pictures equal: {equal}")


if __name__ == "__main__":
    main()
