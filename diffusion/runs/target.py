"""--mode=check --target=h100:8: whether a run fits a machine that is not there, and what bounds its step.

    python -m experiments.cifar10 --mode=check --target=h100 --config.data.image_size=32
    python -m experiments.captions --mode=check --target=v5e:4x4 --config.training.mesh=fsdp:16 --config.data.dir=DIR

The run's own train step is compiled for it, which takes XLA's plugins (the extra `aot`) and no accelerator. Neither
weights nor images are read: of data that are not there, pictures of data.image_size are assumed. The report's numbers
are in check/TARGET.json of the work folder too.
"""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
from absl import flags

from diffusion.data.pictures import height_width
from diffusion.data.sources import Source
from diffusion.files import replacing
from diffusion.model.config import Config, make_settings
from diffusion.model.experiment import abstract_batch, make_learner
from diffusion.model.model import Model, init
from diffusion.runs.begin import asked_origin
from diffusion.runs.call import TRAIN, Call
from diffusion.runs.train import describe
from diffusion.training import Experiment, RunError
from diffusion.training.ahead import Ahead, compile_step
from diffusion.training.chips import parse_target
from diffusion.training.errors import one_line
from diffusion.training.program import by_kind, heaviest
from diffusion.training.sharding import describe_mesh

RESERVED = 0.06  # of a GPU's memory, for its driver, the program and what is freed late: 5 of 80 GB
SHARE = 0.75  # of a GPU's memory that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says more
SHOWN = 8  # origins of the most bytes


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flag of a machine to compile for."""
    flags.DEFINE_string(
        "target", None, "check: compile for this machine, as h100:8, h200, a100, v5e:4x4, v5p:2x2x2", flag_values=values
    )


def is_asked(call: Call) -> bool:
    """Returns whether a command names another machine."""
    return "target" in call.flags and call.flags.target is not None


def check_target(call: Call) -> None:
    """Reports what a diffusion model's training needs on the machine that --target names."""
    config = call.config
    source, notes = source_of(call)
    origin = None if call.stored else asked_origin(call.flags, call.config)
    vocabulary = [] if call.stored else list(call.task.vocabulary(config, source))
    model, _ = describe(call.task.name, config, source, call.stored, vocabulary, origin)
    report_target(call, make_learner(config, model), training_batch(config, model), notes)


def source_of(call: Call) -> tuple[Source, list[str]]:
    """Returns the training images, or, where they cannot be read, a stand-in of data.image_size and a note of it."""
    config = call.config
    try:
        return call.task.read(config, TRAIN), []
    except (RunError, ValueError, OSError) as error:
        size, channels = config.data.get("image_size"), config.data.get("channels") or 3
        if not size:
            hint = "give --config.data.image_size=SIDE to do without images"
            raise RunError(f"{one_line(error, 300)} ({hint})") from error
        height, width = height_width(size)
        shape = (height, width, channels)
        captions = ("",) if config.condition.name not in ("nothing", "classes") else ()
        stand_in = Source("none", TRAIN, config.data.batch_size, shape, None, lambda indices: {}, "", captions)
        return stand_in, [f"no data: images of {height}x{width}x{channels} are assumed ({one_line(error, 120)})"]


def training_batch(config: Config, model: Model) -> dict[str, Any]:
    """Returns the shapes of a global batch as training reads it: latents and features where they are made before."""
    batch: dict[str, Any] = dict(abstract_batch(config, model))
    params = jax.eval_shape(partial(init, model), jax.random.key(0))
    if model.space.precomputed is not None:
        batch |= jax.eval_shape(model.space.precomputed, params["space"], batch.pop("image"))
    if "text" in batch and config.condition.get("precomputed"):
        batch |= jax.eval_shape(model.condition.of_request, params["text"], batch.pop("text"))
    return batch


def report_target(call: Call, experiment: Experiment, batch: dict[str, Any], notes: list[str]) -> None:
    """Compiles an experiment's train step for the machine of --target and reports what it needs."""
    target = parse_target(call.flags.target)
    found = compile_step(experiment, make_settings(call.config), target, call.mesh, batch)
    print("\n".join(report(found, describe_mesh(call.mesh), experiment.batch_size, notes)))
    path = call.workdir / "check" / f"{target.spec.replace(':', '_')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(to_json(found, experiment.batch_size), indent=2) + "\n")


def report(found: Ahead, mesh: str, batch_size: int, notes: list[str]) -> list[str]:
    """Returns the lines of a report, the last of which says whether the step fits."""
    target, chip = found.target, found.target.chip
    lines = [f"target       {target.count} x {chip.kind}, mesh {mesh}; compiled here, not run"]
    lines += [f"             {note}" for note in notes]
    lines.append(f"compiled     in {found.seconds[1]:.1f} s, after {found.seconds[0]:.1f} s of tracing")
    lines.append("memory       per device")
    lines += [f"  {name:<16} {amount(size):>12}" for name, size in found.memory.items()]
    lines.append(f"  {'in all':<16} {amount(found.needed):>12} of {amount(chip.memory)}")
    if found.program is not None:
        lines += [*work_lines(found, batch_size), *time_lines(found, batch_size)]
    return [*lines, verdict(found)]


def work_lines(found: Ahead, batch_size: int) -> Iterator[str]:
    """Yields what a step does: FLOPs, kernels with the bytes they move, collectives."""
    assert found.program is not None
    yield f"work         per device and step, {batch_size} examples in all"
    for dtype, count in found.flops.most_common():
        yield f"  {dtype:<16} {count / found.target.count / 1e12:>12,.3f} TFLOP in products"
    yield f"  {'kernels':<16} {'number':>12} {'read':>12} {'written':>12}"
    kinds = by_kind(found.program.kernels)
    for name, row in {**kinds, "in all": totals(kinds)}.items():
        yield f"  {name:<16} {row['count']:>12,.0f} {amount(row['read']):>12} {amount(row['written']):>12}"
    for name, (count, size) in collectives(found).items():
        yield f"  {name:<16} {count:>12,} {'':>12} {amount(size):>12} of results"
    if found.program.open_loops:
        yield f"  {found.program.open_loops} loops turn a number of times that is not known: they count once"
    yield f"most bytes   of the {SHOWN} first operations of the traced step"
    for name, count, size in heaviest(found.program.kernels, SHOWN):
        yield f"  {name.removeprefix('jit(train_step)/')[-66:]:<66} {count:>6,} {amount(size):>12}"


def time_lines(found: Ahead, batch_size: int) -> Iterator[str]:
    """Yields the roofline's floor, in ms, and its parts."""
    times = found.times
    assert times is not None
    parts = {
        "products": (times.products, "at the peak rate"),
        "memory": (times.memory, "beyond that, without caches"),
        "launches": (times.launches, f"at {found.target.chip.launch * 1e6:g} us a kernel at least"),
    }
    yield "time         per step, at least"
    for name, (seconds, what) in parts.items():
        yield f"  {name:<16} {1e3 * seconds:>9.2f} ms {seconds / times.floor:>8.0%} {what}"
    yield f"  {'links':<16} {1e3 * times.links:>9.2f} ms {'':>8} beside the others, as rings"
    yield f"  {'floor':<16} {1e3 * times.floor:>9.2f} ms          {batch_size / times.floor:,.0f} images/s at most"


def verdict(found: Ahead) -> str:
    """Returns the sentence that says whether a step fits, and by how much."""
    chip, needed = found.target.chip, found.needed
    if found.refused:
        return f"does not fit: XLA made no program ({found.refused})"
    usable = chip.memory * (1 - RESERVED if chip.platform == "cuda" else 1)
    if needed > usable:
        return (
            f"does not fit: {amount(needed - usable)} too much per device; raise training.accumulate, lower "
            "data.batch_size, or cut over fsdp"
        )
    line = f"fits: {amount(usable - needed)} are left per device"
    if chip.platform == "cuda" and needed > SHARE * chip.memory:
        line += f", with XLA_PYTHON_CLIENT_MEM_FRACTION={1 - RESERVED:.2f}"
    return line


def totals(kinds: dict[str, dict[str, float]]) -> dict[str, float]:
    """Returns the sums over kinds of kernels."""
    return {name: sum(row[name] for row in kinds.values()) for name in ("count", "read", "written")}


def collectives(found: Ahead) -> dict[str, tuple[int, float]]:
    """Returns, by kind, how many collectives run and the bytes of their results per device."""
    rows: dict[str, tuple[int, float]] = {}
    for one in found.program.collectives if found.program else ():
        count, size = rows.get(one.kind, (0, 0.0))
        rows[one.kind] = count + one.times, size + one.bytes * one.times
    return rows


def to_json(found: Ahead, batch_size: int) -> dict[str, Any]:
    """Returns what was found as plain JSON, in bytes, FLOPs and seconds."""

    def whole(row: dict[str, float]) -> dict[str, int]:
        return {name: round(value) for name, value in row.items()}

    result: dict[str, Any] = {
        "target": found.target.spec,
        "chip": found.target.chip.kind,
        "batch_size": batch_size,
        "fits": verdict(found),
        "memory_per_device": whole({**found.memory, "in all": found.needed}),
        "flops": dict(found.flops),
        "seconds": {"tracing": round(found.seconds[0], 1), "compiling": round(found.seconds[1], 1)},
    }
    if found.program is None or found.times is None:
        return result
    kinds = by_kind(found.program.kernels)
    return result | {
        "kernels": {name: whole(row) for name, row in {**kinds, "in all": totals(kinds)}.items()},
        "collectives": {
            name: whole({"count": count, "bytes": size}) for name, (count, size) in collectives(found).items()
        },
        "milliseconds_at_least": {name: round(1e3 * value, 3) for name, value in found.times._asdict().items()},
        "most_bytes": [
            {"operation": name, "kernels": count, "bytes": round(size)}
            for name, count, size in heaviest(found.program.kernels, 24)
        ],
    }


def amount(count: float) -> str:
    """Returns a number of bytes, for people."""
    return f"{count / 1e9:,.2f} GB" if count >= 1e9 else f"{count / 1e6:,.2f} MB"
