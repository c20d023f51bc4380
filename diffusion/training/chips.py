"""Accelerators that programs are compiled for without having one: what data sheets say of them.

Sources, per chip and dense (without structured sparsity):
  - NVIDIA H100, H200 and A100 data sheets (SXM): rates, memory's bandwidth, NVLink; DGX H100 and A100: one network
    adapter per GPU, 400 and 200 Gbit/s.
  - What XLA asks of a GPU, among it the memory that programs see: openxla/xla, xla/backends/gpu/target_config/specs,
    h100_sxm, h200 and a100_sxm_80.
  - Cloud TPU documentation, "TPU v5e", "v5p", "v6e": rates, memory, bandwidth; a chip's links in both directions.

Float32 is the rate that JAX's default precision multiplies at: TF32 on GPUs, one pass of bfloat16 on TPUs. The cost of
a launch is an assumption, of a size that profiles of small kernels show; a TPU runs a step as one program.
"""

import math
import re
from typing import NamedTuple

from diffusion.training.errors import RunError


class Chip(NamedTuple):
    """One accelerator; rates in FLOP/s, memory in bytes, bandwidths in bytes/s and per direction.

    Attributes:
      kind: "NVIDIA H100 SXM".
      platform: "cuda" or "tpu", as JAX names plugins.
      bf16, f32: peak rates of matrix products.
      memory: that programs see.
      bandwidth: of the memory.
      links: of a chip to the others of its host or its pod.
      network: of a chip to other hosts; of a TPU its links.
      launch: seconds that a kernel takes at least.
      per_host: the most chips that one host has.
      gpu: what XLA asks of a GPU: compute capability, cores, FPUs per core, shared memory per core, L2 cache, GHz.
      sides: dimensions of a TPU's torus.
    """

    kind: str
    platform: str
    bf16: float
    f32: float
    memory: float
    bandwidth: float
    links: float
    network: float
    launch: float
    per_host: int
    gpu: tuple[int, int, int, int, int, float] | None = None
    sides: int = 0


LAUNCH = 2e-6
HOPPER = (9, 132, 128, 233_472, 52_428_800, 1.98)
AMPERE = (8, 108, 64, 167_936, 41_943_040, 1.41)
CHIPS = {  # kind, platform, bf16, f32, memory, bandwidth, links, network, launch, per_host, and gpu or sides
    "h100": Chip(
        "NVIDIA H100 SXM 80GB", "cuda", 989e12, 495e12, 84_942_979_072, 3.35232e12, 450e9, 50e9, LAUNCH, 8, HOPPER
    ),
    "h200": Chip(
        "NVIDIA H200 SXM 141GB", "cuda", 989e12, 495e12, 151_397_597_184, 4.8e12, 450e9, 50e9, LAUNCH, 8, HOPPER
    ),
    "a100": Chip(
        "NVIDIA A100 SXM 80GB", "cuda", 312e12, 156e12, 85_100_068_864, 2.03904e12, 300e9, 25e9, LAUNCH, 8, AMPERE
    ),
    "v5e": Chip("TPU v5e", "tpu", 197e12, 197e12, 16e9, 0.819e12, 200e9, 200e9, 0.0, 4, sides=2),
    "v5p": Chip("TPU v5p", "tpu", 459e12, 459e12, 95e9, 2.765e12, 600e9, 600e9, 0.0, 4, sides=3),
    "v6e": Chip("TPU v6e", "tpu", 918e12, 918e12, 32e9, 1.638e12, 400e9, 400e9, 0.0, 4, sides=2),
}
EXAMPLE = "write h100:8, a number of GPUs, or v5e:4x4, the sides of a slice"


class Target(NamedTuple):
    """A machine that a program is compiled for.

    Attributes:
      spec: as it was asked for, "h100:8".
      chip: of `CHIPS`.
      count: of chips.
      topology: as XLA's plugin names it.
    """

    spec: str
    chip: Chip
    count: int
    topology: str


def parse_target(spec: str) -> Target:
    """Returns the machine of a name: a chip, and after a colon how many, or the sides of a TPU's slice.

    Raises:
      RunError: an unknown chip, or a number or sides that it is not sold in.

    Example:
      parse_target("h100:16").topology  # "1x2x8": two hosts of 8
    """
    name, _, size = spec.partition(":")
    where = f"--target={spec}"
    if name not in CHIPS:
        raise RunError(f"{where}: no chip {name!r} is known: choose from {', '.join(CHIPS)}; {EXAMPLE}")
    chip = CHIPS[name]
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size or "1"):
        raise RunError(f"{where}: {size!r} is no size: {EXAMPLE}")
    sides = [int(side) for side in (size or "1").split("x")]
    count = math.prod(sides)
    if chip.platform == "cuda":
        if len(sides) > 1:
            raise RunError(f"{where}: GPUs have no sides: write {name}:{count}")
        if count > chip.per_host and count % chip.per_host:
            raise RunError(f"{where}: more than {chip.per_host} GPUs are whole hosts of {chip.per_host}")
        hosts = -(-count // chip.per_host)
        return Target(spec, chip, count, f"1x{hosts}x{count // hosts}")
    if len(sides) != chip.sides:
        raise RunError(f"{where}: a slice of {name} has {chip.sides} sides, as {name}:{'x'.join('2' * chip.sides)}")
    if count > 1 and any(side % 2 for side in sides[:2]):
        raise RunError(f"{where}: hosts hold 2x2 chips: the first two sides of a slice of several chips are even")
    return Target(spec, chip, count, spec)


def gpu_config(chip: Chip) -> str:
    """Returns what XLA's compiler asks of a GPU, as the text of its message `GpuTargetConfigProto`."""
    assert chip.gpu is not None
    major, cores, fpus, shared, cache, clock = chip.gpu
    feature = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared}
  threads_per_core_limit: 2048
  core_count: {cores}
  fpus_per_core: {fpus}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f}
  l2_cache_size: {cache}
  clock_rate_ghz: {clock}
  device_memory_size: {chip.memory:.0f}
  shared_memory_per_block_optin: {shared - 1024}
  cuda_compute_capability {{ major: {major} feature_extension: {feature} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{chip.kind}"
"""
