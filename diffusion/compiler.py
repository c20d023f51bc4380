"""What XLA is asked for on CPUs, for every program of a process that imports `diffusion`.

XLA hands parts of a program to YNNPACK there. Convolutions it computes slower than XLA's own: DDPM's U-Net trains in
0.9 of the time without. And in some releases it returns wrong sums, without an error: `jax.jit` of
`jnp.sum(jnp.broadcast_to(jnp.ones((1024, 1)), (2, 1024, 1024)))` returns another number every time (XNNPACK's pull
request 11243), and of `jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2))` the sums of other rows (JAX's issue 39103).
Installing the package excludes these releases; where one is there all the same, XLA does without YNNPACK.
"""

import importlib
import importlib.util
import os
import sys
import warnings
from typing import Any

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
KNOWN = ("0.10.", "0.11.", "0.12.")  # XLA ends a process for a flag that it does not know
WRONG = ("0.10.2", "0.11.0", "0.11.1", "0.11.2")
NOISY = ("0.10.0", "0.10.1")
CUDA_PLUGINS = ("jax_cuda12_plugin", "jax_cuda13_plugin")
TARGET: list[Any] = []  # devices that are not here, which this process compiles for (training.ahead); [] for its own


def cpu_flags(version: str) -> str:
    """Returns what a version of jaxlib is to be asked for in XLA_FLAGS; "" for one that is not known yet."""
    if not version.startswith(KNOWN):
        return ""
    return f"{FLAG}={'' if version in WRONG else '-individual_convolution'}"


def run_once(platform: str) -> dict[str, Any] | None:
    """Returns XLA's options for a program that runs once, such as that of the initial weights.

    On CPUs it is optimized less, so that it is compiled in half of the time; its results have the same bits.
    """
    return {"xla_backend_optimization_level": 1} if platform == "cpu" else None


def set_cpu_flags() -> None:
    """Appends `cpu_flags` to XLA_FLAGS, unless the flag is there; XLA reads them before its first computation.

    Warns where a release returns wrong sums all the same: JAX computed before, or the flag that is there asks for it.
    """
    from jaxlib.version import __version__ as version

    flags = os.environ.get("XLA_FLAGS", "")
    if FLAG not in flags:
        os.environ["XLA_FLAGS"] = flags = f"{flags} {cpu_flags(version)}".strip()
    bridge = sys.modules.get("jax._src.xla_bridge")
    late = bridge is not None and bridge.backends_are_initialized()
    if version in WRONG and (late or f"{FLAG}=" not in flags.split()):
        cause, remedy = (
            ("JAX computed before that could be turned off", "import diffusion first")
            if late
            else (f"XLA_FLAGS has another {FLAG} than none", f"give {FLAG}=")
        )
        line = f"jaxlib {version} returns wrong sums on CPUs, and {cause}: {remedy}, or install another jaxlib"
        warnings.warn(line, RuntimeWarning, stacklevel=2)


def hush_cache() -> None:
    """Keeps off the terminal what XLA reports of every program that it loads from the cache, and that is no error.

    It takes `prefer-no-gather`, a preference of its own compiler, for an instruction that this machine lacks (openxla's
    issue 44565), and reports that at length, as an error. Where there is a GPU, XLA's other errors are worth more.
    """
    from jaxlib.version import __version__ as version

    if version in NOISY and not any(map(importlib.util.find_spec, (*CUDA_PLUGINS, "jax_rocm7_plugin"))):
        importlib.import_module("jaxlib.utils").absl_set_min_log_level(3)  # fatal ones alone
