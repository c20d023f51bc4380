"""Compiles a train step for a machine that is not there, and reads of the program what a step there needs.

XLA's plugins for GPUs and TPUs compile without a driver or a device, for a described topology; JAX itself stays on the
CPU, and nothing runs. The program is the one that the machine would run, but for what XLA times on a device where it
has one, such as the choice among cuDNN's algorithms.
"""

import importlib
import importlib.util
import logging
import math
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from diffusion import compiler
from diffusion.extras import DISTRIBUTION
from diffusion.training.chips import Chip, Target, gpu_config
from diffusion.training.dry_run import jit_step
from diffusion.training.errors import RunError, one_line
from diffusion.training.experiment import Experiment, TrainState
from diffusion.training.flops import count_flops
from diffusion.training.loop import abstract_train_state
from diffusion.training.program import Collective, Program
from diffusion.training.settings import Settings, check_settings
from diffusion.training.sharding import batch_sharding, make_mesh

PLUGINS = {"cuda": ("jax_cuda12_plugin", "nvidia.cuda_nvcc"), "tpu": ("libtpu",)}
# libtpu looks for a cloud's machine, and waits for it, where these are not set.
NO_CLOUD = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_ACCELERATOR_TYPE": "none"}
MULTIPLIED = ("product", "convolution", "attention")  # kinds of kernels in which FLOPs are spent


class Times(NamedTuple):
    """What a step takes at least, in seconds, and of which parts: the roofline.

    Attributes:
      products: matrix products and convolutions at the chip's peak.
      memory: what the bytes read and written take beyond that, at the memory's bandwidth, as if nothing were cached.
      launches: what kernels too small for either take, each at least the chip's `launch`.
      links: collectives at the links' bandwidth, as rings.
      floor: the first three together, or the links where these take longer.
    """

    products: float
    memory: float
    launches: float
    links: float
    floor: float


class Ahead(NamedTuple):
    """A step compiled for a machine.

    Attributes:
      target: the machine.
      memory: bytes per device by part: "parameters", "averages", "optimizer", "batch", "counters", "temporaries".
      flops: of a step, by dtype, over all devices.
      program: kernels and collectives, per device.
      times: the least that a step takes.
      seconds: that tracing, and that compiling took.
      refused: why the compiler made no program, where it ran out of the chip's memory; then `program` is empty.
    """

    target: Target
    memory: dict[str, float]
    flops: Counter[str]
    program: Program | None
    times: Times | None
    seconds: tuple[float, float]
    refused: str = ""

    @property
    def needed(self) -> float:
        """Bytes per device in all."""
        return sum(self.memory.values())


def target_mesh(target: Target, spec: str = "") -> Mesh:
    """Returns the mesh of a machine that is not there. To be called before JAX is used, which it keeps on the CPU.

    Args:
      target: the machine.
      spec: sizes of axes, see `sharding.mesh_sizes`.

    Raises:
      RunError: the plugin that compiles for it is not installed, it has no such topology, or the mesh does not fit it.
    """
    chip, where = target.chip, f"--target={target.spec}"
    if missing := [name for name in PLUGINS[chip.platform] if not is_installed(name)]:
        raise RunError(
            f"{where}: {missing[0]}, which compiles for it, is not installed: pip install '{DISTRIBUTION}[aot]', "
            "best in an environment of its own"
        )
    for name, value in NO_CLOUD.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")
    # A program of another machine is neither read nor run here.
    jax.config.update("jax_enable_compilation_cache", False)
    options: dict[str, Any] = {}
    if chip.platform == "cuda":
        options = {"target_config": gpu_config(chip), "topology": target.topology}
    elif target.count == 1:
        options = {"chips_per_host_bounds": (1, 1, 1)}
    try:
        found = topologies.get_topology_desc(target.topology, platform=chip.platform, **options)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise RunError(f"{where}: {one_line(error, 300)}") from error
    trace_for(found.devices)
    return make_mesh(spec=spec, devices=found.devices)


def trace_for(devices: Sequence[Any]) -> None:
    """Has networks, and JAX's fused attention, choose by these devices where they would ask those of this machine.

    JAX has no setting for that. Where its function has moved, both go on asking this machine, which has no GPU: heads
    larger than an Ampere's kernel takes are then compiled without it, and a warning says so. TPUs have no such kernel.
    """
    if not all(hasattr(device, "compute_capability") for device in devices):
        return
    capabilities = [tuple(map(int, device.compute_capability.split("."))) for device in devices]
    name = "check_compute_capability"
    try:
        module = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
        getattr(module, name)
    except (ImportError, AttributeError):
        logging.warning(
            f"jax {jax.__version__} has no {name}: attention with heads over 128 is counted without kernels"
        )
        return
    setattr(module, name, lambda least: min(capabilities) >= tuple(map(int, least.split("."))))
    compiler.TARGET[:] = devices


def is_installed(name: str) -> bool:
    """Returns whether a module can be found."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package that it would be in
        return False


def compile_step(
    experiment: Experiment, settings: Settings, target: Target, mesh: Mesh, batch: dict[str, Any]
) -> Ahead:
    """Compiles the train step of an experiment.

    Args:
      experiment: its `batches` are not read.
      settings: of the run.
      target: the machine.
      mesh: of its devices.
      batch: shapes and dtypes of a global batch.

    Raises:
      RunError: settings that cannot run there.
    """
    check_settings(settings, experiment, mesh)
    sharding = batch_sharding(mesh)
    batch = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding) for name, x in batch.items()}
    state = abstract_train_state(experiment, settings, mesh, batch)
    memory = state_memory(state, batch)
    begun = time.perf_counter()
    traced = jit_step(experiment, settings, mesh, state).trace(state, batch)
    flops = count_flops(traced.jaxpr)
    lowered = traced.lower()
    compiling = time.perf_counter()
    try:
        compiled = compile_untimed(lowered)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        seconds = (compiling - begun, time.perf_counter() - compiling)
        return Ahead(target, memory, flops, None, None, seconds, one_line(error, 300))
    seconds = (compiling - begun, time.perf_counter() - compiling)
    found = compiled.memory_analysis()
    # What the state and the batch do not explain are outputs beside the donated state, and the program itself.
    memory["temporaries"] = (
        found.temp_size_in_bytes
        + found.generated_code_size_in_bytes
        + found.output_size_in_bytes
        - found.alias_size_in_bytes
    )
    program = Program(compiled.as_text())
    return Ahead(target, memory, flops, program, roofline(program, flops, target), seconds)


def compile_untimed(lowered: Any) -> Any:
    """Returns the compiled program, its products by cuBLAS where XLA's own have no tiles for a shape.

    On a device XLA times both and takes the faster; without one it takes its own, and fails where that has none.
    """
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "output tile sizes" not in str(error):
            raise
        return lowered.compile(compiler_options={"xla_gpu_enable_triton_gemm": False})


def state_memory(state: TrainState, batch: dict[str, Any]) -> dict[str, float]:
    """Returns the bytes per device of a state and of a batch, by part, of abstract arrays with shardings."""

    def size(tree: Any) -> float:
        shards = ((x.sharding.shard_shape(x.shape), x.dtype.itemsize) for x in jax.tree.leaves(tree))
        return float(sum(math.prod(shape) * itemsize for shape, itemsize in shards))

    return {
        "parameters": size(state.params),
        "averages": size((state.ema, state.profiles)),
        "optimizer": size(state.opt_state),
        "batch": size(batch),
        "counters": size((state.step, state.metrics)),
    }


def roofline(program: Program, flops: Counter[str], target: Target) -> Times:
    """Returns what a step takes at least on the target; the devices share its FLOPs evenly."""
    chip = target.chip
    products = sum(count / rate_of(chip, dtype) for dtype, count in flops.items()) / target.count
    traffic, launches = {True: 0.0, False: 0.0}, 0.0
    for kernel in program.kernels:
        if kernel.kind != "collective":
            seconds = (kernel.read + kernel.written) / chip.bandwidth
            traffic[kernel.kind in MULTIPLIED] += seconds * kernel.times
            launches += max(0.0, chip.launch - seconds) * kernel.times
    memory = traffic[False] + max(0.0, traffic[True] - products)
    links = sum(link_seconds(one, chip) * one.times for one in program.collectives)
    return Times(products, memory, launches, links, max(products + memory + launches, links))


def rate_of(chip: Chip, dtype: str) -> float:
    """Returns the peak rate of products of a dtype."""
    return chip.bf16 if re.fullmatch("bfloat16|float16", dtype) else chip.f32


def link_seconds(one: Collective, chip: Chip) -> float:
    """Returns what a collective takes at least: the bytes that a device sends in a ring, over its links."""
    others = one.group - 1
    sent = {"all-reduce": 2 * others / one.group, "reduce-scatter": others, "collective-permute": 1.0}
    bandwidth = chip.links if one.group <= chip.per_host else chip.network
    return sent.get(one.kind, others / one.group) * one.bytes / bandwidth
