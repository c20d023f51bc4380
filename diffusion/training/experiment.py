"""What the trainer is given (`Experiment`) and what it carries from step to step (`TrainState`)."""

import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

Params = Any  # a pytree of arrays
Batch = dict[str, Any]  # named arrays, [B, ...]


class Mean(NamedTuple):
    """A weighted mean in the making: `total / count`. Per example inside a loss ([B] each), summed in the state."""

    total: Any
    count: Any


Loss = Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, Mean]]]


class Experiment(NamedTuple):
    """Everything the trainer needs to know.

    A new idea is a new function in one of these places; the trainer is not edited for it.

    Attributes:
      init: key -> params.
      loss: (params, batch, key) -> (float32[B], named `Mean`s with [B] entries). The trainer takes the only mean.
      optimizer: an optax transformation; `learning_rate` (step -> rate) is only logged.
      batches: first step -> generator of this process's rows of the batches from that step on, NumPy arrays; the
        trainer closes it.
      batch_size: B, over all processes and devices.
      preview: params -> uint8[N, H, W, C], drawn as a picture while training; None for no pictures.
    """

    init: Callable[[jax.Array], Params]
    loss: Loss
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any]
    batches: Callable[[int], Generator[dict[str, np.ndarray], None, None]]
    batch_size: int
    preview: Callable[[Params], jax.Array] | None = None


class TrainState(NamedTuple):
    """The whole state of a run: with (config, state) the future is determined, bit for bit.

    The metrics since the last log line are part of it, so that a resumed run also logs the same numbers.
    """

    step: jax.Array  # int32[], the number of updates made
    params: Params
    ema: Params
    profiles: dict[str, Params]  # power-function averages by their sigma_rel, see `diffusion.averages`
    opt_state: optax.OptState
    metrics: dict[str, Mean]


def run_key(seed: int | jax.Array, purpose: str, index: int | jax.Array = 0) -> jax.Array:
    """Returns the key for `purpose` ("init", "train", "sample", ...) at `index` (a step, an image number).

    Every random draw of a run starts here, so it is a pure function of (seed, purpose, index).
    """
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(key, index)


def init_state(experiment: Experiment, seed: int, batch: Batch, ema_profiles: Sequence[float] = ()) -> TrainState:
    """Returns the state before the first step; `batch` only gives shapes (and may be abstract)."""
    params = experiment.init(run_key(seed, "init"))
    names = jax.eval_shape(experiment.loss, params, batch, run_key(seed, "train"))[1]
    # One buffer cannot be donated under two names: the averages start as copies.
    copy = lambda: jax.tree.map(jnp.copy, params)  # noqa: E731
    profiles = {f"{sigma_rel:g}": copy() for sigma_rel in ema_profiles}
    metrics = {name: Mean(jnp.zeros(()), jnp.zeros(())) for name in ["loss", "grad_norm", *names]}
    opt_state = experiment.optimizer.init(params)
    return TrainState(jnp.zeros((), jnp.int32), params, copy(), profiles, opt_state, metrics)
