"""Eight simulated devices, jaxtyping's shapes checked on every call of the tested code, and trained runs for all tests.

Fixtures that any test may use:

- `real`: the images and labels of both splits of the digits.
- `kinds`: kinds of runs by name, digits, digits_classes, cifar10, scenes, captions; see `helpers.Kind`.
- `trained(name)`: the folder of a run of that kind after six steps, made once; write nothing there.
- `pairs`: the folder of a dozen captioned pictures.
- `float64`: JAX computes in float64.
- `copied(name)`: a copy of that folder, in `tmp_path`.
- `refused(message, work)`: checks that work() is refused in a line, and changes no file.
- `untrained`: what would train raises `helpers.Begun` instead.
"""

import gc
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

# Compiling is most of what the tests cost. Programs so small gain nothing from being cut up to be compiled in parallel,
# nor from the emitters of fusions through MLIR, which later versions of JAX always use.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else "",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
    ]
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Several tests compile the same small networks, and so does the next run of them.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parent.parent / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

from jaxtyping import install_import_hook

# Imports and traces make many objects that live on; looking through them after every 700 was a fifth of the CPU time.
gc.set_threshold(20_000, 10, 10)
# An int may stand where a float is annotated (PEP 484's numeric tower), as everywhere in Python.
install_import_hook("diffusion", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# Files whose every test is among those of ./launch.sh test --quick; single tests elsewhere are marked themselves.
# fmt: off
QUICK = (
    "architecture", "averages", "chains", "consistency", "contrastive", "distillation", "editing", "fields", "flow",
    "flow_map", "gaussian", "grids", "guidance", "likelihood", "losses", "metrics", "policies", "predictions",
    "randomness", "released_samplers", "samplers", "schedules", "stepping", "weightings",
)
# fmt: on
# But these, of 10 seconds and more with all their cases, which would be a third of it.
SLOW = (
    "test_inpainting_draws_from_the_conditional_distribution",
    "test_moments_of_stochastic_samplers",
    "test_the_bound_from_a_few_steps_is_the_bound_on_average",
    "test_the_terms_gradient_is_finite_at_every_step",
    "test_a_perfect_network_costs_only_the_decoders_term",
)

# Files that compile whole runs or networks, of which they run a few steps: without LLVM's optimizations. All that use
# `trained` are among them, as a run has the bits of another only where both were compiled alike.
# fmt: off
UNOPTIMIZED = (
    "attention", "autoencoder_experiment", "benchmarks", "buckets", "by_hand", "captions_experiment", "checked_first",
    "clip", "clip_weights", "demo_api", "demo_engine", "demo_page", "demo_requests", "demo_server", "distilled",
    "docs", "edit", "emoji", "evaluation_command", "experiments", "few_step_runs", "field_values", "flux2_pipeline",
    "flux2_training", "formats", "fused_norm", "hidden_words", "image_shapes", "keep", "lora", "meshes", "mmdit",
    "modes", "not_finite", "own_training", "policies", "pretrained_sd3", "prompts", "provenance", "refusals",
    "reports", "run", "scenes_experiment", "sd3", "sd3_text", "second_time", "space", "spine", "sweeps", "traps",
    "unet", "vae", "warm_start", "warnings", "weights",
)
# fmt: on
# The dearest, of 30 and more seconds of CPU time: they come first, for one that came last would leave a core idle.
# fmt: off
DEAREST = (
    "modes", "spine", "flux2_training", "weights", "samplers", "experiments", "likelihood", "run", "docs", "sd3",
    "buckets", "lecture", "refusals", "autoencoder_experiment", "few_step_runs", "warm_start", "editing", "edit",
    "flux2_pipeline", "space", "lora", "emoji", "demo_page",
)
# fmt: on


def pytest_configure(config):
    """Keeps the order of the files where pytest-xdist (>= 3.7) would begin with those of many tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Puts the dearest files first, and marks the tests of the quick files."""
    place = {f"test_{name}": number for number, name in enumerate(DEAREST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))
    for item in items:
        if item.path.stem.removeprefix("test_") in QUICK and item.originalname not in SLOW:
            item.add_marker(pytest.mark.quick)


@pytest.fixture(scope="session")
def shared(tmp_path_factory):
    """A folder that all processes of pytest-xdist share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def cache(shared):
    """Keeps what the code caches out of the home of whoever runs the tests, and out of the next run of them."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("XDG_CACHE_HOME", str(shared / "cache"))
        yield


@pytest.fixture(scope="module", autouse=True)
def optimized(request):
    """Compiles as the file is to be, in this process and in those it starts."""
    import jax

    unoptimized = request.path.stem.removeprefix("test_") in UNOPTIMIZED
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = str(int(unoptimized))
    if jax.config.read("jax_disable_most_optimizations") != unoptimized:
        jax.config.update("jax_disable_most_optimizations", unoptimized)
        jax.clear_caches()  # of what another file compiled otherwise


@pytest.fixture(scope="session")
def real():
    """The digits: {"train", "test"} -> {"image", "label"}."""
    import numpy as np

    from diffusion.data import digits

    return {split: digits(split).read(np.arange(digits(split).num_examples)) for split in ("train", "test")}


@pytest.fixture(scope="session")
def kinds(shared):
    """Kinds of runs by name."""
    import helpers  # here, for tests of the papers alone need no machinery

    def write():
        for split, count in (("train", 48), ("test", 24)):
            helpers.write_pairs(shared / "pairs" / split, "train" if split == "train" else "held_out", count)

    return helpers.kinds(helpers.once(shared / "pairs", write))


@pytest.fixture(scope="session")
def trained(shared, kinds):
    """trained(name) -> the folder of a trained run, made once for all tests; write nothing there."""
    import helpers

    def folder(name):
        path = shared / "runs" / name
        return helpers.once(path, lambda: kinds[name].do(path, *kinds[name].flags))

    return folder


@pytest.fixture
def copied(trained, tmp_path):
    """copied(name) -> a copy of that folder, of this test alone."""
    return lambda name: Path(shutil.copytree(trained(name), tmp_path / name))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The folder of a dozen captioned pictures."""
    import helpers

    return helpers.write_pairs(tmp_path_factory.mktemp("data") / "pairs", "train", 12)


@pytest.fixture
def float64():
    """JAX computes in float64."""
    import jax

    with jax.enable_x64(True):
        yield


@pytest.fixture
def as_on_gpu(monkeypatch):
    """Programs take what is for GPUs where they have something for each platform."""
    import jax

    def on_gpu(*arrays, default, cuda=None, cpu=None):
        return (cuda or default)(*arrays)

    monkeypatch.setattr(jax.lax, "platform_dependent", on_gpu)


@pytest.fixture
def refused(tmp_path):
    """refused(message, work) checks that work() is refused in a line of that message, and that no file changes."""
    from diffusion.training import RunError

    def listing():
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    def one(message, work):
        before = listing()
        with pytest.raises((RunError, ValueError), match=message) as error:
            work()
        assert "\n" not in str(error.value) and len(str(error.value)) < 600
        assert listing() == before

    return one


@pytest.fixture
def untrained(monkeypatch):
    """What would train raises `helpers.Begun` instead, after the check of its settings."""
    from helpers import Begun

    from diffusion import training
    from diffusion.training import settings

    def train(experiment, given, *, mesh, **more):
        settings.check_settings(given, experiment, mesh)
        begun = Begun()
        begun.settings, begun.experiment = given, experiment
        raise begun

    monkeypatch.setattr(training, "train", train)
