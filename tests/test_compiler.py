"""What XLA is asked for on CPUs: sums are right here, are made so where they are not, and flags are kept."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.requirements import Requirement

from diffusion import compiler
from diffusion.networks.unet import UNet

ROOT = Path(__file__).parent.parent


def test_sums_of_broadcasts_are_right_every_time():
    ones = jnp.ones((1024, 1))
    total = jax.jit(lambda x: jnp.sum(jnp.broadcast_to(x, (2, 1024, 1024))))
    assert {float(total(ones)) for _ in range(20)} == {2.0**21}


@pytest.mark.parametrize("count", [32768, 32769, 33143, 100001])
def test_sums_of_squared_products_are_those_of_their_own_row(count):
    rows = np.random.RandomState(0).randn(count, 3).astype(np.float32)
    matrix = jnp.eye(3)
    squares = jax.jit(jax.vmap(lambda row: jnp.sum((matrix @ row) ** 2)))(rows)
    # All terms are positive: each is rounded once, and so are two sums; the products with ones and zeros are exact.
    np.testing.assert_allclose(squares, np.sum(rows.astype(np.float64) ** 2, axis=1), rtol=4 * 2.0**-24)


def test_convolutions_are_xlas_own():
    program = jax.jit(lambda x, kernel: jax.lax.conv(x, kernel, (1, 1), "SAME"))
    text = program.lower(jnp.ones((2, 32, 16, 16)), jnp.ones((32, 32, 3, 3))).compile().as_text() or ""
    assert " convolution(" in text and "ynn" not in text


@pytest.mark.parametrize("version", ["0.10.0", "0.10.1", "0.12.0.1"])
def test_right_releases_do_without_ynnpacks_convolutions(version):
    assert compiler.cpu_flags(version) == f"{compiler.FLAG}=-individual_convolution"


@pytest.mark.parametrize("version", compiler.WRONG)
def test_wrong_releases_do_without_ynnpack_and_are_not_installed(version):
    assert compiler.cpu_flags(version) == f"{compiler.FLAG}="
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    (jax_itself,) = [one for one in map(Requirement, needed) if one.name == "jax"]
    assert not jax_itself.specifier.contains(version)


def test_a_release_that_is_not_known_is_asked_for_nothing():
    assert compiler.cpu_flags("0.13.0") == ""


@pytest.mark.parametrize(
    "given, found",
    [(None, [compiler.FLAG]), ("--xla_a=1", ["--xla_a", compiler.FLAG]), (f"{compiler.FLAG}=reduce", [compiler.FLAG])],
)
def test_a_users_flags_are_kept(given, found):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    if given is not None:
        environment["XLA_FLAGS"] = given
    code = "import diffusion, os; print(os.environ['XLA_FLAGS'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert re.findall(r"(--\w+)=", done.stdout) == found
    assert given is None or done.stdout.startswith(given)


@pytest.mark.parametrize(
    "given, late, reported",
    [
        ("", True, "JAX computed before that could be turned off: import diffusion first"),
        (f"{compiler.FLAG}=-individual_convolution", False, "XLA_FLAGS has another"),
        ("", False, None),
        (f"{compiler.FLAG}=", False, None),
    ],
)
def test_a_wrong_release_that_stays_wrong_is_reported(given, late, reported, monkeypatch, recwarn):
    monkeypatch.setattr("jaxlib.version.__version__", compiler.WRONG[0])
    monkeypatch.setattr("jax._src.xla_bridge.backends_are_initialized", lambda: late)
    monkeypatch.setenv("XLA_FLAGS", given)
    compiler.set_cpu_flags()
    found = [str(warning.message) for warning in recwarn]
    assert len(found) == bool(reported)
    if reported:
        assert f"jaxlib 0.10.2 returns wrong sums on CPUs, and {reported}" in found[0]
    assert os.environ["XLA_FLAGS"] == (given or f"{compiler.FLAG}=")


CACHED = """
import os
import jax
from diffusion.compiler import hush_cache

jax.config.update("jax_compilation_cache_dir", os.environ["FOLDER"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
hush_cache()
jax.block_until_ready(jax.jit(lambda x: jax.numpy.sin(x) @ x.T)(jax.numpy.ones((64, 64))))
"""


def test_a_program_is_loaded_from_the_cache_without_a_word(tmp_path):
    environment = {**os.environ, "FOLDER": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", CACHED], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert list(tmp_path.glob("jit__lambda*"))


def test_a_program_that_runs_once_has_the_same_bits():
    network = UNet(channels=16, multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), num_groups=8)
    arguments = jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1)
    lowered = jax.jit(network.init).lower(*arguments)
    assert compiler.run_once("gpu") is None
    once, often = (lowered.compile(options)(*arguments) for options in (compiler.run_once("cpu"), None))
    chex.assert_trees_all_equal(once, often)
