"""A compiled training step, and compiled sampling, of a config on random data: for the benchmarks that time them."""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from diffusion.model.condition import rows_away
from diffusion.model.config import Config
from diffusion.model.experiment import abstract_batch, make_learner, make_model
from diffusion.model.fields import change, load
from diffusion.model.model import Model, make_generate
from diffusion.model.sampling import make_sampling
from diffusion.training import init_state, make_train_step, on_mesh, place_batch

# Of each case its shape of images, and its number of classes.
CASES: dict[str, tuple[tuple[int, int, int], int | None]] = {"digits": ((8, 8, 1), 10), "scenes": ((16, 16, 3), None)}
VOCABULARY = [f"word{i}" for i in range(30)]


class Timed(NamedTuple):
    """A compiled program.

    Attributes:
      run: count -> seconds of one run, the mean of so many.
      temporary_bytes: that it needs beside its arguments and results.
    """

    run: Callable[[int], float]
    temporary_bytes: int


def model_of(case: str, spec: str, changes: Mapping[str, Any]) -> tuple[Config, Model]:
    """Returns the config that `spec` names, changed, and its model for the images of a case."""
    shape, num_classes = CASES[case]
    config = change(load(spec, Path("experiments/configs"))[0], changes)
    return config, make_model(config, shape, num_classes, None, VOCABULARY)


def training(case: str, spec: str, changes: Mapping[str, Any], mesh: Mesh) -> Timed:
    """Returns the training step of a config on random images, compiled and run once."""
    config, model = model_of(case, spec, changes)
    learner = make_learner(config, model)
    random = np.random.default_rng(0)

    def fill(of: jax.ShapeDtypeStruct) -> np.ndarray:
        largest = {"uint8": 256, "int32": 10}[of.dtype.name]
        return random.integers(0, largest, of.shape).astype(of.dtype)

    batch = place_batch(mesh, jax.tree.map(fill, abstract_batch(config, model)))
    state = jax.jit(on_mesh(mesh, lambda: init_state(learner, 0, batch)))()
    step = on_mesh(mesh, make_train_step(learner, seed=0, ema_decay=0.999))
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    kept = {"state": state}

    def run(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            kept["state"], report = compiled(kept["state"], batch)
        jax.block_until_ready((kept["state"], report))
        return (time.perf_counter() - begun) / count

    run(1)
    return Timed(run, temporary_bytes(compiled))


def sampling(case: str, spec: str, changes: Mapping[str, Any], mesh: Mesh, num_images: int) -> Timed:
    """Returns the drawing of `num_images` images in one batch, compiled and run once."""
    config, model = model_of(case, spec, changes)
    learner = make_learner(config, model)
    params = jax.jit(learner.init)(jax.random.key(0))
    generate: Any = make_generate(model, make_sampling(config, model.process), mesh)
    rows = model.condition.read([asked_of(model)] * num_images)
    away = rows_away(model.condition, rows)
    arguments = params, rows, away, np.uint32(0), np.arange(num_images)
    compiled = generate.lower(*arguments).compile()

    def run(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            image, _ = compiled(*arguments)
        jax.block_until_ready(image)
        return (time.perf_counter() - begun) / count

    run(1)
    return Timed(run, temporary_bytes(compiled))


def asked_of(model: Model) -> str | int | None:
    """Returns a condition that an image may be asked for under."""
    return {"prompts": VOCABULARY[0], "classes": 0}.get(model.condition.kind)


def temporary_bytes(compiled: Any) -> int:
    """Returns the temporary memory of a compiled program; 0 where it is not known."""
    analysis = compiled.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis else 0
