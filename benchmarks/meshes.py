"""The same run on meshes of eight simulated devices; and how long networks of many blocks take to compile.

    python -m benchmarks.meshes [--steps=20] [--depths=6,12,24]

Of each mesh: the losses of a small MM-DiT on scenes, the largest relative difference from those on (data 8), samples,
bytes per device and the collectives of a step. Of each depth: the seconds of the processor in which a loss
and its gradient are traced and compiled, and their temporary memory, as a chain of blocks, as a loop over them
(`network.scan`), and as one that recomputes. Writes benchmarks/results/meshes.json.
"""

import json
import re
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import diffusion
from benchmarks.common import make_parser, write_results
from diffusion.data.captions import with_text
from diffusion.data.scenes import scenes
from diffusion.data.sources import Source
from diffusion.model.config import Config, make_settings
from diffusion.model.experiment import make_experiment, make_model
from diffusion.model.model import Model, make_generate
from diffusion.model.sampling import make_sampling
from diffusion.networks.mmdit import MMDiT
from diffusion.runs.call import words_of_captions
from diffusion.training import abstract_train_state, init_state, make_mesh, on_mesh, place_batch
from diffusion.training.loop import make_step

NUM_DEVICES = 8
MESHES = ("data:8", "fsdp:8", "data:2,fsdp:2,tensor:2")
SWITCHES = {"chain": {}, "scan": {"scan": True}, "scan, remat": {"scan": True, "remat": True}}
# Arrays of the smallest network that are large enough to be cut, and heads that two devices share.
TINY: dict[str, Any] = {
    "network.width": 32,
    "network.depth": 2,
    "network.num_heads": 2,
    "network.dtype": "float32",
    "condition.width": 32,
    "data.batch_size": 16,
    "optimizer.warmup_steps": 2,
    "optimizer.cooldown_steps": 0,
    "sampling.num_steps": 2,
}
COLLECTIVES = re.compile(r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


class Tiny(NamedTuple):
    """A run on a few scenes: its config, model and data."""

    config: Config
    model: Model
    source: Source


class Found(NamedTuple):
    """What a run on a mesh gave.

    Attributes:
      losses: of the steps.
      samples: uint8 [8, H, W, C] of the weights after them.
      megabytes: per device: parameters, and the whole state.
      collectives: of a compiled step, by kind.
    """

    losses: list[float]
    samples: np.ndarray
    megabytes: dict[str, float]
    collectives: dict[str, int]


def tiny_run(changes: Mapping[str, Any] = TINY) -> Tiny:
    """Returns a run of the config `scenes`, with changes of its fields."""
    config = diffusion.load_config("scenes", changes)
    source = scenes("train", num_examples=64)
    model = make_model(config, source.image_shape, vocabulary=words_of_captions(config, source))
    return Tiny(config, model, with_text(source, model.condition.read))


def run_on(mesh: Mesh, tiny: Tiny, num_steps: int) -> Found:
    """Returns what `num_steps` steps on a mesh, and then sampling, give."""
    config, model, source = tiny
    experiment, settings = make_experiment(config, model, source, mesh), make_settings(config)
    batches = experiment.batches(0)
    batch = place_batch(mesh, next(batches))
    abstract = abstract_train_state(experiment, settings, mesh, batch)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
    init = lambda: init_state(experiment, settings.seed, shapes, settings.ema_profiles)  # noqa: E731
    state = jax.jit(init, out_shardings=shardings)()
    step = on_mesh(mesh, make_step(experiment, settings))
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    step = step.lower(state, batch).compile()
    losses = []
    for _ in range(num_steps):
        state, report = step(state, batch)
        losses.append(float(report.loss))
        batch = place_batch(mesh, next(batches))
    batches.close()
    generate = make_generate(model, make_sampling(config, model.process), mesh)
    rows, away = (model.condition.read(asked) for asked in (source.captions[:NUM_DEVICES], [None] * NUM_DEVICES))
    samples = generate(state.params, rows, away, np.uint32(0), np.arange(NUM_DEVICES))[0]
    megabytes = {"parameters": per_device(abstract.params), "state": per_device(abstract)}
    counts = Counter(COLLECTIVES.findall(step.as_text() or ""))
    return Found(losses, np.asarray(samples), megabytes, dict(sorted(counts.items())))


def per_device(abstract: Any) -> float:
    """Returns the megabytes that each device holds of a tree of abstract arrays."""
    leaves = jax.tree.leaves(abstract)
    return float(sum(np.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves) / 1e6)


def largest_difference(losses: Sequence[float], expected: Sequence[float]) -> float:
    """Returns the largest relative difference of two rows of losses."""
    return max(abs(one - other) / abs(other) for one, other in zip(losses, expected, strict=True))


def compare_meshes(tiny: Tiny, specs: Sequence[str], num_steps: int) -> dict[str, Any]:
    """Returns the table of meshes; the first of `specs` is what the others are compared with."""
    found = {spec: run_on(make_mesh(spec=spec), tiny, num_steps) for spec in specs}
    first = found[specs[0]]
    return {
        spec: {
            "losses": one.losses,
            "largest relative difference": largest_difference(one.losses, first.losses),
            "largest difference of samples": int(np.abs(one.samples.astype(int) - first.samples).max()),
            "MB per device": {name: round(size, 4) for name, size in one.megabytes.items()},
            "collectives of a step": one.collectives,
        }
        for spec, one in found.items()
    }


def compiled_step(network: MMDiT) -> dict[str, float]:
    """Returns the processor's seconds in which a loss and its gradient are traced and compiled, and their megabytes."""
    shape = jax.ShapeDtypeStruct
    inputs = {
        "x_t": shape((4, 16, 16, 3), jnp.float32),
        "time": shape((4,), jnp.float32),
        "context": shape((4, 12, network.context_width), jnp.float32),
        "pooled": shape((4, network.pooled_width), jnp.float32),
    }
    params = jax.eval_shape(network.init, jax.random.key(0), **inputs)

    def loss(params: Any, inputs: Any) -> jax.Array:
        output: Any = network.apply(params, **inputs)
        return jnp.square(output).mean()

    begun = time.process_time()  # not the clock's: a machine has other work
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, inputs)
    traced = time.process_time()
    memory: Any = lowered.compile().memory_analysis()
    return {
        "seconds tracing": round(traced - begun, 2),
        "seconds compiling": round(time.process_time() - traced, 2),
        "MB of parameters": round(sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params)) / 1e6, 2),
        "MB of temporaries": round(memory.temp_size_in_bytes / 1e6, 2),
    }


def compare_depths(depths: Sequence[int]) -> dict[str, Any]:
    """Returns compile times and memory by depth, as a chain of blocks and as a loop over them."""
    network = MMDiT(width=64, num_heads=2, out_channels=3, context_width=32, pooled_width=32, table_size=8, base_size=8)
    compiled_step(network.clone(depth=1))  # what only the first compilation costs
    table: dict[str, Any] = {}
    for depth in depths:
        for name, switches in SWITCHES.items():
            table[f"depth {depth}, {name}"] = one = compiled_step(network.clone(depth=depth, **switches))
            print(f"depth {depth:>3}, {name:<12}", json.dumps(one), flush=True)
    return table


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--depths", default="6,12,24")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/meshes.json"))
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", NUM_DEVICES)
    meshes = compare_meshes(tiny_run(), MESHES, arguments.steps)
    for spec, row in meshes.items():
        print(f"{spec:<24}", json.dumps({name: value for name, value in row.items() if name != "losses"}), flush=True)
    depths = compare_depths([int(depth) for depth in arguments.depths.split(",")])
    write_results(arguments.out, {"steps": arguments.steps, "meshes": meshes, "depths": depths})


if __name__ == "__main__":
    main()
