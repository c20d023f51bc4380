"""A dry run: what a training run needs and whether its parts work, reported before hours are spent on it."""

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion.training.checkpoints import Checkpoints
from diffusion.training.errors import RunError
from diffusion.training.experiment import Experiment, TrainState, run_key
from diffusion.training.health import describe
from diffusion.training.loop import abstract_train_state, first_state, make_step
from diffusion.training.settings import Settings, check_settings
from diffusion.training.sharding import batch_sharding, describe_mesh, on_mesh, place_batch
from diffusion.training.step import parameter_groups

# A file by which the driver of an accelerator shows, and the extra with which JAX uses it.
DRIVERS = {"/proc/driver/nvidia/version": "cuda13 (or cuda12)", "/dev/accel0": "tpu"}


class Findings(NamedTuple):
    """What a dry run found.

    Attributes:
      lines: the report.
      warnings: what is likely to be wrong, one line each.
      state: after one step.
    """

    lines: list[str]
    warnings: list[str]
    state: TrainState


def dry_run(experiment: Experiment, settings: Settings, *, mesh: Mesh, num_examples: int, folder: Path) -> Findings:
    """Makes the state, compiles and runs one step, saves the state and restores it.

    Args:
      experiment: what is to be learned.
      settings: how.
      mesh: the devices.
      num_examples: of the data.
      folder: for the checkpoint; removed afterwards.

    Raises:
      RunError: settings that cannot run, or a checkpoint that cannot be saved or is restored with other bits.
    """
    check_settings(settings, experiment, mesh)
    devices = mesh.devices.ravel()
    lines = [f"devices      {len(devices)} x {devices[0].device_kind}, {jax.process_count()} process(es)"]
    lines.append(f"mesh         {describe_mesh(mesh)}")
    batches = experiment.batches(0)
    rows = next(batches)
    batches.close()
    batch = place_batch(mesh, rows)
    abstract = abstract_train_state(experiment, settings, mesh, batch)
    lines += parameter_lines(abstract) + sharding_lines(abstract)

    state = first_state(experiment, settings, abstract, batch)()
    alike = same_noise(experiment, state, rows, mesh)
    begun = time.perf_counter()
    step = jit_step(experiment, settings, mesh, abstract).lower(state, batch).compile()
    compiled = time.perf_counter()
    memory = step.memory_analysis()
    needed = memory_per_device(memory)
    lines.append(f"memory       {megabytes(needed)} per device in a step (the compiler's estimate)")
    state, report = jax.block_until_ready(step(state, batch))
    lines.append(
        f"one step     {time.perf_counter() - compiled:.2f} s after {compiled - begun:.1f} s of compiling: "
        f"loss {float(report.loss):.6g}, gradient norm {float(report.grad_norm):.6g}"
    )
    lines.append(f"checkpoint   {round_trip(state, abstract, folder)}")
    warnings = list(worries(experiment, settings, mesh, num_examples, needed))
    if alike:
        warnings.append(alike)
    if report.bad:
        warnings.append(f"the first step is bad: {describe(jax.device_get(report))}")
    return Findings(lines, warnings, state)


def jit_step(experiment: Experiment, settings: Settings, mesh: Mesh, abstract: TrainState) -> Any:
    """Returns the jitted train step of a run, (state, batch) -> (state, report), with the state donated."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    step = on_mesh(mesh, make_step(experiment, settings))
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def parameter_lines(state: TrainState) -> list[str]:
    """Returns a line with the number of parameters, in all and by group."""
    sizes = {name: sum(x.size for x in leaves) for name, leaves in parameter_groups(state.params).items()}
    largest = sorted(sizes, key=lambda name: -sizes[name])[:4]
    parts = ", ".join(f"{name} {sizes[name]:,}" for name in largest)
    return [f"parameters   {sum(sizes.values()):,} in {len(sizes)} groups; the largest: {parts}"]


def sharding_lines(state: TrainState) -> list[str]:
    """Returns a table: how the arrays of each part of the state are sharded, and their bytes per device."""
    lines = []
    for name, part in state._asdict().items():
        rows: dict[str, list[int]] = {}
        for leaf in jax.tree.leaves(part):
            split = [f"axis {axis} over {along}" for axis, along in enumerate(leaf.sharding.spec) if along is not None]
            row = rows.setdefault(f"split along {', '.join(split)}" if split else "whole", [0, 0])
            row[0] += 1
            row[1] += int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize
        for how, (count, size) in rows.items():
            lines.append(f"  {name:<10} {count:>5} arrays {how:<18} {megabytes(size):>10} per device")
    return ["state", *lines]


def same_noise(experiment: Experiment, state: TrainState, rows: dict[str, np.ndarray], mesh: Mesh) -> str | None:
    """Returns a warning where equal examples have equal losses on two devices: their noise is equal too."""
    rows = {name: np.broadcast_to(value[:1], value.shape).copy() for name, value in rows.items()}
    key = run_key(0, "check")
    loss = lambda params, batch: experiment.loss(params, batch, key)[0]  # noqa: E731
    losses = jax.jit(loss, out_shardings=batch_sharding(mesh))(state.params, place_batch(mesh, rows))
    parts = [shard for shard in losses.addressable_shards if shard.replica_id == 0]
    on_device = {shard.device.id: np.asarray(shard.data).tobytes() for shard in parts}
    first: dict[bytes, int] = {}
    for number, values in on_device.items():
        if first.setdefault(values, number) != number:
            return f"devices {first[values]} and {number} draw the same noise: give every example a key of its own"
    return None


def memory_per_device(memory: Any) -> int:
    """Returns the bytes per device of a compiled step: arguments, outputs and temporaries, donated buffers once."""
    kept = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return kept + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes


def round_trip(state: TrainState, abstract: TrainState, folder: Path) -> str:
    """Returns, after saving and restoring `state`, its size and how long that took.

    Raises:
      RunError: the restored bits differ.
    """
    begun = time.perf_counter()
    try:
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state, {"experiment": "check", "config": {}})
            checkpoints.wait()
            saved = time.perf_counter()
            back = jax.block_until_ready(checkpoints.restore(abstract))
        read = time.perf_counter()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    equal = all(
        np.array_equal(a.data, b.data, equal_nan=True)
        for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(back), strict=True)
        for a, b in zip(x.addressable_shards, y.addressable_shards, strict=True)
    )
    if not equal:
        raise RunError("a checkpoint was restored with other bits than were saved: do not train on this machine")
    return f"{megabytes(size)}, saved in {saved - begun:.1f} s, restored with the same bits in {read - saved:.1f} s"


def worries(experiment: Experiment, settings: Settings, mesh: Mesh, num_examples: int, needed: int) -> Iterator[str]:
    """Yields warnings of what goes wrong in practice and can be known before training."""
    device = mesh.devices.ravel()[0]
    if device.platform == "cpu":
        for driver, extra in DRIVERS.items():
            if Path(driver).exists():
                yield f"{driver} exists, but JAX found no accelerator: install JAX with the extra {extra}"
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit and needed > limit:
        yield f"a step needs {megabytes(needed)} per device, which has {megabytes(limit)}: raise training.accumulate"
    if num_examples < experiment.batch_size:
        yield f"the data has {num_examples} examples, fewer than a batch of {experiment.batch_size}"
    if settings.num_steps < 1 / (1 - settings.ema_decay):
        length = 1 / (1 - settings.ema_decay)
        yield f"the moving average is {length:.0f} steps long, the run {settings.num_steps}: lower training.ema_decay"


def megabytes(count: float) -> str:
    """Returns a number of bytes in megabytes, for people."""
    return f"{count / 1e6:,.1f} MB"
