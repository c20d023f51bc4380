"""Eight simulated devices, and jaxtyping's shape annotations checked on every call of the tested code."""

import os
from pathlib import Path

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Several tests compile the same small networks, and so does the next run of them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

from jaxtyping import install_import_hook

# An int may stand where a float is annotated (PEP 484's numeric tower), as everywhere in Python.
install_import_hook("diffusion", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")
