"""How fast is the exact U-Net of DDPM on this device, in training and forward, and how fast is PyTorch's?

    python -m benchmarks.unet --batch 8 --peer_python /path/to/python/with/torch/and/diffusers --json OUT.json

Ours and the peer's runs take turns, so that a machine whose speed drifts does not favour one; medians are reported, and
ratios round by round. Without a peer only ours is timed. On a GPU: `--batch 512 --dtype bfloat16`.
"""

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion.files import replacing
from diffusion.networks.unet import UNet
from diffusion.training import Experiment, init_state, make_mesh, make_train_step, place_batch

# One forward pass of one image is 6.22 GMAC; training costs three times that (the gradients by inputs and by weights).
FORWARD_FLOP = 2 * 6.22e9
TRAIN_FLOP = 3 * FORWARD_FLOP


class Ours:
    """This project's network and its own train step (Adam, averaging, clipping off), compiled ahead of time."""

    def __init__(self, batch_size: int, dtype: str):
        network = UNet(dtype=jnp.dtype(dtype))
        random = np.random.RandomState(0)
        x = random.randn(batch_size, 32, 32, 3).astype(np.float32)
        times = (np.arange(batch_size) % 1000).astype(np.float32)

        def loss(params: Any, batch: Any, key: jax.Array) -> Any:
            output: Any = network.apply(params, batch["x"], batch["time"], train=True, rngs={"dropout": key})
            return jnp.mean((output - batch["eps"]) ** 2, axis=(1, 2, 3)), {}

        experiment = Experiment(
            init=lambda key: network.init(key, jnp.zeros((1, 32, 32, 3)), jnp.zeros((1,))),
            loss=loss,
            optimizer=optax.adam(2e-4),
            learning_rate=lambda step: 2e-4,
            batches=lambda step: (_ for _ in ()),
            batch_size=batch_size,
        )
        self.batch = place_batch(make_mesh(), {"x": x, "eps": random.randn(*x.shape).astype(np.float32), "time": times})
        self.state = jax.jit(lambda: init_state(experiment, 0, self.batch))()
        step = jax.jit(make_train_step(experiment, seed=0, ema_decay=0.9999), donate_argnums=0)
        forward = jax.jit(lambda params, batch: network.apply(params, batch["x"], batch["time"]))
        self.compile_seconds = {}
        self.compiled: dict[str, Any] = {}
        for name, function, argument in (("train", step, self.state), ("forward", forward, self.state.params)):
            begun = time.perf_counter()
            self.compiled[name] = function.lower(argument, self.batch).compile()
            self.compile_seconds[name] = round(time.perf_counter() - begun, 2)

    def __call__(self, what: str, count: int) -> list[float]:
        """Returns the seconds of `count` single runs."""
        seconds = []
        for _ in range(count):
            begun = time.perf_counter()
            if what == "train":
                self.state, report = self.compiled["train"](self.state, self.batch)
                jax.block_until_ready((self.state, report))
            else:
                jax.block_until_ready(self.compiled["forward"](self.state.params, self.batch))
            seconds.append(time.perf_counter() - begun)
        return seconds


class Peer:
    """PyTorch and diffusers in a process of their own."""

    def __init__(self, python: str, batch_size: int, dtype: str):
        script = Path(__file__).with_name("unet_peer.py")
        self.process = subprocess.Popen(
            [python, str(script), "--batch", str(batch_size), "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.versions = self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def mode(self, mode: str) -> Callable[[str, int], list[float]]:
        """Returns timer(what, count) for "eager" or "compiled"."""

        def run(what: str, count: int) -> list[float]:
            assert self.process.stdin is not None
            self.process.stdin.write(json.dumps({"mode": mode, "what": what, "count": count}) + "\n")
            self.process.stdin.flush()
            return self._answer()

        return run


def measure(timers: dict[str, Callable[[str, int], list[float]]], rounds: int, count: int, batch_size: int) -> dict:
    """Returns, for "train" and "forward", everyone's images per second and the ratio of ours to each, in medians."""
    result = {}
    for what in ("train", "forward"):
        for timer in timers.values():
            timer(what, 2)  # warm-up, and the peer's compilation
        seconds = {name: [] for name in timers}
        for _ in range(rounds):
            for name, timer in timers.items():
                seconds[name].append(statistics.median(timer(what, count)))
        rates = {name: batch_size / statistics.median(values) for name, values in seconds.items()}
        ratios = {
            name: statistics.median([peer / ours for peer, ours in zip(values, seconds["ours"], strict=True)])
            for name, values in seconds.items()
            if name != "ours"
        }
        flop = TRAIN_FLOP if what == "train" else FORWARD_FLOP
        result[what] = {
            "images_per_second": {name: round(rate, 2) for name, rate in rates.items()},
            "ours_over": {name: round(ratio, 3) for name, ratio in ratios.items()},
            "gflop_per_second": round(rates["ours"] * flop / 1e9, 1),
            "rounds": {name: [round(value, 4) for value in values] for name, values in seconds.items()},
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--count", type=int, default=2, help="runs a round; the round's median counts")
    parser.add_argument("--peer_python", help="an interpreter with torch and diffusers")
    parser.add_argument("--peer_modes", default="eager,compiled")
    parser.add_argument("--json", help="where to write the result")
    arguments = parser.parse_args()

    ours = Ours(arguments.batch, arguments.dtype)
    timers: dict[str, Callable[[str, int], list[float]]] = {"ours": ours}
    peer = Peer(arguments.peer_python, arguments.batch, arguments.dtype) if arguments.peer_python else None
    if peer is not None:
        timers |= {f"torch {mode}": peer.mode(mode) for mode in arguments.peer_modes.split(",")}
    result = {
        "device": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "batch_size": arguments.batch,
        "dtype": arguments.dtype,
        "versions": {"jax": jax.__version__, **(peer.versions if peer else {})},
        "compile_seconds": ours.compile_seconds,
        **measure(timers, arguments.rounds, arguments.count, arguments.batch),
    }
    if peer is not None:
        peer.process.kill()
    text = json.dumps(result, indent=2) + "\n"
    print(text, end="")
    if arguments.json:
        with replacing(arguments.json) as temporary:
            temporary.write_text(text)


if __name__ == "__main__":
    main()
