"""What do fused norms gain on a GPU, and which cut of the images is best? All norms of the exact U-Net, in turns.

    python -m benchmarks.norms --batch 512 --json OUT.json

Each norm with its SiLU and dropout, forward and with its gradient, in XLA's steps, by the kernel as it is, and as it
would be with other cuts than `norm_kernel.FORWARD` and `GRADIENT`. "a step" is the sum over the norms of one training
step.
"""

import contextlib
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.common import make_parser, take_turns, write_results
from diffusion.networks import norm_kernel
from diffusion.networks.fused_norm import fused, unfused
from diffusion.networks.group_norm import Plan
from diffusion.networks.layers import FusedNorm
from diffusion.networks.unet import UNet

# Channels, warps and loads of a program.
SETTINGS = [
    (64, 8, 4),
    (64, 8, 2),
    (64, 8, 8),
    (64, 4, 4),
    (64, 16, 2),
    (64, 16, 4),
    (128, 8, 4),
    (128, 16, 2),
    (128, 16, 4),
    (128, 32, 2),
    (32, 8, 4),
    (32, 4, 4),
]

QUEUED = 8  # runs of a program that are waited for together


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


def arrays_of(case: Case, batch: int) -> tuple[jax.Array, ...]:
    """Returns x, shift, scale and bias of a norm; and what dropout lets pass, if there is dropout."""
    shape = (batch, case.pixels, case.channels)
    x = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    shift, scale, bias = jnp.ones((batch, case.channels)), jnp.ones(case.channels), jnp.zeros(case.channels)
    return x, shift, scale, bias, *([jnp.ones(shape, jnp.uint8)] if case.rate else [])


def lower(case: Case, arrays: Sequence[jax.Array], count: int, training: bool, kernel: bool) -> jax.stages.Lowered:
    """Returns the program of a norm, `count` times, each on the result of the one before."""
    plan = Plan(case.groups, 1e-6, case.silu, case.rate, jnp.bfloat16)

    def run(x: jax.Array, shift: jax.Array, scale: jax.Array, bias: jax.Array, *keep: jax.Array) -> Any:
        def norm(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
            return (fused if kernel else unfused)(plan, *arrays, *keep)

        carry = (x, shift, scale, bias)
        for _ in range(count):  # XLA's loop would copy what a kernel returns
            if training:
                outputs, pull = jax.vjp(norm, *carry)
                carry = pull(outputs)  # what the network's gradient adds to x's is as large
            else:
                carry = norm(*carry)[1], *carry[1:]
        return carry

    return jax.jit(run).lower(*arrays)


def seconds(run: Callable[..., Any], arrays: Sequence[jax.Array], count: int) -> float:
    """Returns the seconds of one of the `count` norms of a program, which is queued `QUEUED` times."""
    begun = time.perf_counter()
    for _ in range(QUEUED):
        last = run(*arrays)
    jax.block_until_ready(last)
    return (time.perf_counter() - begun) / (count * QUEUED)


def measure(
    cases: Counter[Case], batch: int, settings: Sequence[tuple[int, ...]], count: int, rounds: int
) -> dict[str, Any]:
    """Returns, forward and in training, the milliseconds of each case and their sum over these norms of a step."""
    found: dict[str, Any] = {}
    pool = ThreadPoolExecutor()
    for what in ("forward", "training"):
        rows: list[dict[str, Any]] = []
        sums: dict[str, float] = defaultdict(float)
        for case, number in cases.items():
            arrays = arrays_of(case, batch)
            lowered = {
                name: lower(case, arrays, count, what == "training", kernel)
                for name, kernel in (("steps", False), ("kernel", True))
            }
            for setting in settings:
                with cut(setting):
                    program = lower(case, arrays, count, what == "training", True)
                    lowered["kernel {}, {}, {}".format(*setting)] = program
            compiled = pool.map(lambda program: program.compile(), lowered.values())
            timers = {name: partial(seconds, run, arrays, count) for name, run in zip(lowered, compiled, strict=True)}
            take_turns(timers, 1)
            taken = {name: statistics.median(values) for name, values in take_turns(timers, rounds).items()}
            for name, value in taken.items():
                sums[name] += number * value
            rows.append({**case._asdict(), "number": number, "milliseconds": in_milliseconds(taken)})
        found[what] = {"a step": in_milliseconds(sums), "norms": rows}
    return found


@contextlib.contextmanager
def cut(setting: tuple[int, ...]) -> Iterator[None]:
    """Lets programs of the kernel take so many channels, with so many warps and loads."""
    cuts = {1: norm_kernel.Cut(*setting)}
    with mock.patch.multiple(norm_kernel, FORWARD=cuts, GRADIENT=cuts):
        jax.clear_caches()
        yield


def in_milliseconds(seconds: Mapping[str, float]) -> dict[str, float]:
    """Returns times in milliseconds, rounded."""
    return {name: round(1e3 * value, 4) for name, value in seconds.items()}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--count", type=int, default=4, help="norms of a program")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", type=int, help="only so many different norms: those with the largest images")
    parser.add_argument("--json", help="where to write the result")
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"this times a kernel for GPUs, and JAX has {jax.default_backend()}")
    cases = norms_of(UNet(fused_norms=True, dtype=jnp.bfloat16), 32)
    largest = sorted(cases.items(), key=lambda case: -case[0].pixels * case[0].channels)
    cases = Counter(dict(largest[: arguments.cases]))
    found = measure(cases, arguments.batch, SETTINGS, arguments.count, arguments.rounds)
    print(write_results(arguments.json, {"batch_size": arguments.batch, **found}), end="")


if __name__ == "__main__":
    main()
