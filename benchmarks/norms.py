"""What do fused norms gain on a GPU, and which cut of the images is best? All norms of the exact U-Net, in turns.

    python -m benchmarks.norms --batch 512 --json OUT.json

Each norm with its SiLU and dropout, forward and with its gradient, in XLA's steps and by the kernel with several values
of `norm_kernel`'s CHANNELS, PIXELS and WARPS. "a step" is the sum over the norms of one training step.
"""

import contextlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.common import make_parser, take_turns, write_results
from diffusion.networks import norm_kernel
from diffusion.networks.fused_norm import fused, unfused
from diffusion.networks.group_norm import Plan
from diffusion.networks.layers import FusedNorm
from diffusion.networks.unet import UNet

SETTINGS = [(64, 32, 8), (64, 64, 8), (32, 64, 8), (64, 32, 4)]  # channels, pixels, warps


class Case(NamedTuple):
    """A norm: pixels and channels of its images, groups, whether SiLU follows, and dropout's rate."""

    pixels: int
    channels: int
    groups: int
    silu: bool
    rate: float


def norms_of(network: UNet, side: int) -> Counter[Case]:
    """Returns the norms of a network on images of a side, and how many there are of each."""
    found: Counter[Case] = Counter()

    def note(call: Callable[..., Any], arguments: Any, options: Any, context: Any) -> Any:
        if isinstance(norm := context.module, FusedNorm) and context.method_name == "__call__":
            _, height, width, channels = arguments[0].shape
            rate = arguments[2] if len(arguments) > 2 else 0.0
            found[Case(height * width, channels, norm.num_groups, norm.silu, rate)] += 1
        return call(*arguments, **options)

    def apply(key: jax.Array, x: jax.Array, times: jax.Array) -> Any:
        params = network.init(key, x, times)
        with nn.intercept_methods(note):
            return network.apply(params, x, times, train=True, rngs={"dropout": key})

    jax.eval_shape(apply, jax.random.key(0), jnp.zeros((1, side, side, 3)), jnp.zeros(1))
    return found


def timer(case: Case, batch: int, count: int, training: bool, kernel: bool) -> Callable[[], float]:
    """Returns what measures the seconds of a norm, each of `count` on the result of the one before."""
    plan = Plan(case.groups, 1e-6, case.silu, case.rate, jnp.bfloat16)
    shape = (batch, case.pixels, case.channels)
    x, dy = (jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(2))
    shift, scale, bias = jnp.ones((batch, case.channels)), jnp.ones(case.channels), jnp.zeros(case.channels)
    keep = [jnp.ones(shape, jnp.uint8)] if case.rate else []

    def norm(x: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        return (fused if kernel else unfused)(plan, x, *arrays, *keep)

    def once(_: Any, carry: Any) -> Any:
        x, shift, scale, bias = carry
        if not training:
            return norm(x, shift, scale, bias)[1], shift, scale, bias
        _, pull = jax.vjp(norm, x, shift, scale, bias)
        return pull((x, dy))  # what the network's gradient adds to x's is as large

    run = jax.jit(lambda *carry: jax.lax.fori_loop(0, count, once, carry)).lower(x, shift, scale, bias).compile()

    def seconds() -> float:
        begun = time.perf_counter()
        jax.block_until_ready(run(x, shift, scale, bias))
        return (time.perf_counter() - begun) / count

    seconds()
    return seconds


def measure(
    cases: Counter[Case], batch: int, settings: Sequence[tuple[int, int, int]], count: int, rounds: int
) -> dict[str, Any]:
    """Returns, forward and in training, the milliseconds of each case and their sum over a step's norms."""
    found: dict[str, Any] = {}
    for what in ("forward", "training"):
        rows: list[dict[str, Any]] = []
        sums: dict[str, float] = defaultdict(float)
        for case, number in cases.items():
            make = partial(timer, case, batch, count, what == "training")
            timers = {"steps": make(False)}
            for setting in settings:
                with cut(setting):
                    timers["kernel {}, {}, {}".format(*setting)] = make(True)
            taken = {name: statistics.median(values) for name, values in take_turns(timers, rounds).items()}
            for name, seconds in taken.items():
                sums[name] += number * seconds
            rows.append({**case._asdict(), "number": number, "milliseconds": in_milliseconds(taken)})
        found[what] = {"a step": in_milliseconds(sums), "norms": rows}
    return found


@contextlib.contextmanager
def cut(setting: tuple[int, int, int]) -> Iterator[None]:
    """Lets programs of the kernel take so many channels and pixels, with so many warps."""
    before = norm_kernel.CHANNELS, norm_kernel.PIXELS, norm_kernel.WARPS
    norm_kernel.CHANNELS, norm_kernel.PIXELS, norm_kernel.WARPS = setting
    try:
        jax.clear_caches()
        yield
    finally:
        norm_kernel.CHANNELS, norm_kernel.PIXELS, norm_kernel.WARPS = before


def in_milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns times in milliseconds, rounded."""
    return {name: round(1e3 * value, 4) for name, value in seconds.items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--count", type=int, default=20, help="runs in a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="where to write the result")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"this times a kernel for GPUs, and JAX has {jax.default_backend()}")
    cases = norms_of(UNet(fused_norms=True, dtype=jnp.bfloat16), 32)
    found = measure(cases, arguments.batch, SETTINGS, arguments.count, arguments.rounds)
    print(write_results(arguments.json, {"batch_size": arguments.batch, **found}), end="")


if __name__ == "__main__":
    main()
