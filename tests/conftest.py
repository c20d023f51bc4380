"""Eight simulated devices, and jaxtyping's shape annotations checked on every call of the tested code."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

install_import_hook("diffusion", "beartype.beartype")
