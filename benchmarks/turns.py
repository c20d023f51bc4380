"""Ours and a peer in another interpreter, timed in turns, so that a machine whose speed drifts does not favour one."""

import argparse
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks import common
from diffusion.training import Experiment, init_state, make_mesh, make_train_step, place_batch

# timer(what, count) -> the seconds per run of `count` runs of "train" or "forward", after UNCOUNTED that do not count:
# after the other's turn, or seconds of sleep, a run takes half as long again, since the memory it works in has gone
# cold, which training does not see while it goes on. Runs are queued as in training, where the host prepares one while
# the device computes the one before: two have memory at once, so two warm it.
Timer = Callable[[str, int], float]
UNCOUNTED = 2
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


class Ours:
    """A timer of this project's own train step (with averaging) of an experiment, and of `forward`.

    Both are compiled ahead of time.

    Args:
      experiment: that is trained.
      forward: (params, batch) -> output.
      batch: arrays of the host.
      options: of the compiler.
    """

    def __init__(
        self,
        experiment: Experiment,
        forward: Callable[[Any, Any], Any],
        batch: dict[str, Any],
        options: dict[str, Any] | None = None,
    ):
        self.batch = place_batch(make_mesh(), batch)
        self.state = jax.jit(lambda: init_state(experiment, 0, self.batch))()
        step = jax.jit(make_train_step(experiment, seed=0, ema_decay=0.9999), donate_argnums=0)
        self.compile_seconds = {}
        self.compiled: dict[str, Any] = {}
        for name, function, argument in (
            ("train", step, self.state),
            ("forward", jax.jit(forward), self.state.params),
        ):
            begun = time.perf_counter()
            self.compiled[name] = function.lower(argument, self.batch).compile(options)
            self.compile_seconds[name] = round(time.perf_counter() - begun, 2)

    def __call__(self, what: str, count: int) -> float:
        """Returns the seconds per run, see `Timer`."""
        jax.block_until_ready([self.run(what) for _ in range(UNCOUNTED)][-1])
        begun = time.perf_counter()
        for _ in range(count):
            last = self.run(what)
        jax.block_until_ready(last)
        return (time.perf_counter() - begun) / count

    def run(self, what: str) -> Any:
        """Starts a run and returns its results, which may not be there yet."""
        if what == "forward":
            return self.compiled["forward"](self.state.params, self.batch)
        self.state, report = self.compiled["train"](self.state, self.batch)
        return self.state, report


class Peer:
    """A process of its own for a script beside this file that calls `turns_peer.serve`."""

    def __init__(self, python: str, script: str, arguments: list[str]):
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name(script)), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.unread = 0
        self.versions = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def _ask(self, mode: str, what: str, count: int) -> None:
        assert self.process.stdin is not None
        request = {"mode": mode, "what": what, "count": count, "uncounted": UNCOUNTED}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()

    def prepare(self, modes: list[str]) -> None:
        """Has it compile while this process does other things."""
        for mode in modes:
            for what in ("train", "forward"):
                self._ask(mode, what, 1)
                self.unread += 1

    def mode(self, mode: str) -> Timer:
        """Returns timer(what, count) for "eager" or "compiled"."""

        def run(what: str, count: int) -> float:
            self._ask(mode, what, count)
            while self.unread:
                self._answer()
                self.unread -= 1
            return self._answer()

        return run


def start_peer(arguments: argparse.Namespace, script: str, extra: list[str]) -> Peer | None:
    """Returns the peer, where --peer_python names an interpreter for it.

    Args:
      arguments: of `make_parser`.
      script: the peer's file.
      extra: its arguments beside --batch and --dtype.
    """
    if not arguments.peer_python:
        return None
    given = ["--batch", str(arguments.batch), "--dtype", arguments.dtype, *extra]
    peer = Peer(arguments.peer_python, script, given)
    if arguments.peer_first:
        peer.prepare(arguments.peer_modes.split(","))
    return peer


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns the flags of every such benchmark."""
    parser = common.make_parser(doc)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=2, help="runs per round")
    parser.add_argument("--peer_python", help="an interpreter with the packages that the peer needs")
    parser.add_argument("--peer_modes", default="eager,compiled")
    parser.add_argument("--cublas", action="store_true", help="time ours without Triton's products, too (GPUs)")
    parser.add_argument("--peer_first", action="store_true", help="the peer compiles while ours does")
    parser.add_argument("--json", help="where to write the result")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Returns the arguments of a parser of `make_parser`; exits where a flag would change nothing."""
    arguments = parser.parse_args()
    if arguments.cublas and jax.default_backend() != "gpu":
        parser.error(f"--cublas is for GPUs, and JAX has {jax.default_backend()}")
    if arguments.peer_first and not arguments.peer_python:
        parser.error("--peer_first needs a peer: --peer_python")
    return arguments


def compare(
    arguments: argparse.Namespace,
    ours: Ours,
    peer: Peer | None,
    flop: float,
    variants: dict[str, Ours] | None = None,
) -> None:
    """Prints, and writes to --json, what `measure` finds of ours, and of the peer.

    Args:
      arguments: of `make_parser`.
      ours: what is timed.
      peer: of `start_peer`.
      flop: of one forward pass of one example.
      variants: of ours, by names, which take turns with it.
    """
    timers: dict[str, Timer] = {"ours": ours, **(variants or {})}
    if peer is not None:
        timers |= {f"torch {mode}": peer.mode(mode) for mode in arguments.peer_modes.split(",")}
    results = {
        "batch_size": arguments.batch,
        "dtype": arguments.dtype,
        "versions": peer.versions if peer else {},
        "compile_seconds": ours.compile_seconds,
        **{f"compile_seconds, {name}": one.compile_seconds for name, one in (variants or {}).items()},
        **measure(timers, arguments.rounds, arguments.count, arguments.batch, flop),
    }
    if peer is not None:
        peer.process.kill()
    print(common.write_results(arguments.json, results), end="")


def measure(timers: dict[str, Timer], rounds: int, count: int, batch_size: int, flop: float) -> dict[str, Any]:
    """Returns, for "train" and "forward", the images per second of each timer and ours over each, in medians."""
    results = {}
    for what in ("train", "forward"):
        for timer in timers.values():
            timer(what, 1)  # warm-up, and the peer's compilation
        seconds = common.take_turns({name: partial(timer, what, count) for name, timer in timers.items()}, rounds)
        rates = {name: batch_size / statistics.median(values) for name, values in seconds.items()}
        ours_over = {
            name: common.median_ratio(values, seconds["ours"]) for name, values in seconds.items() if name != "ours"
        }
        # Training costs three forward passes: the gradients by inputs and by weights.
        each = 3 * flop if what == "train" else flop
        results[what] = {
            "images_per_second": {name: round(rate, 2) for name, rate in rates.items()},
            "ours_over": {name: round(ratio, 3) for name, ratio in ours_over.items()},
            "gflop_per_second": round(rates["ours"] * each / 1e9, 1),
            "rounds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        }
    return results
