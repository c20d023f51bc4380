"""What the trainer is given (`Experiment`) and what it carries from step to step (`TrainState`)."""

import zlib
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion.training.errors import RunError

Params = Any  # a pytree of arrays
Batch = dict[str, Any]  # named arrays, [B, ...]
# (regular expression on an array's path, mesh axis or None per axis of the array), see `sharding.partition`.
Rules = Sequence[tuple[str, tuple[str | None, ...]]]


class Mean(NamedTuple):
    """A weighted mean as `total / count`, each summed apart.

    A loss returns both per example, [B]; the state holds their sums over examples and steps.
    """

    total: Any
    count: Any


Loss = Callable[[Params, Batch, jax.Array], tuple[jax.Array, dict[str, Mean]]]


class Experiment(NamedTuple):
    """All that the trainer is given. A new method is a new function here; the trainer is not edited for it.

    Attributes:
      init: key -> params.
      loss: (params, batch, key) -> (losses, metrics): float32[B], and named `Mean`s with [B] entries. The only mean
        over the batch is the trainer's.
      optimizer: an optax transformation; `learning_rate` (step -> rate) is only logged, None is not.
      batches: first step -> generator of this process's rows of the batches from that step on, NumPy arrays; the
        trainer closes it.
      batch_size: B, over all processes and devices.
      preview: params -> uint8[N, H, W, C], drawn as a picture while training; None for no pictures.
      num_shapes: how many shapes batches have; a step is compiled for each.
      frozen: names of the top-level groups of params that keep the values of `init`: no gradient, no moments, and not
        in the averages.
      rules: how the parameters are cut over the mesh beside the trainer's own cut over "fsdp".
      begun: top-level groups of params that a run which starts begins with in place of those of `init`, with the same
        shapes. The trainer takes them over: their memory becomes the state's, and they cannot be used afterwards.
    """

    init: Callable[[jax.Array], Params]
    loss: Loss
    optimizer: optax.GradientTransformation
    learning_rate: Callable[[Any], Any] | None
    batches: Callable[[int], Generator[dict[str, np.ndarray], None, None]]
    batch_size: int
    preview: Callable[[Params], jax.Array] | None = None
    num_shapes: int = 1
    frozen: tuple[str, ...] = ()
    rules: Rules = ()
    begun: dict[str, Params] | None = None


class TrainState(NamedTuple):
    """The whole state of a run: config and state determine every later step, bit for bit.

    Attributes:
      step: int32[], the number of updates made.
      params: the parameters.
      ema: the exponential moving average of those that are trained; see `averaged`.
      profiles: their power-function averages by sigma_rel, see `diffusion.averages`.
      opt_state: of the optimizer; None where the weights alone are read.
      metrics: sums since the last log line, so that a resumed run logs the same numbers; None as well.
    """

    step: jax.Array
    params: Params
    ema: Params
    profiles: dict[str, Params]
    opt_state: optax.OptState
    metrics: dict[str, Mean]


def trained(params: Params, frozen: Sequence[str]) -> Params:
    """Returns `params` without its frozen groups, the same tree where there are none."""
    return {name: group for name, group in params.items() if name not in frozen} if frozen else params


def averaged(params: Params, average: Params, frozen: Sequence[str]) -> Params:
    """Returns whole parameters: an average of the trained groups, and the frozen groups of `params`."""
    return {**average, **{name: params[name] for name in frozen}} if frozen else average


def check_seed(seed: int) -> int:
    """Returns `seed` if it is one: an integer that `jax.random.key` takes as it is, 0 to 2**32 - 1.

    A greater one, or a negative one, would silently be another seed modulo 2**32.

    Raises:
      RunError: it is out of that range.
    """
    if not 0 <= seed < 2**32:
        raise RunError(f"seed is {seed}: it must be 0 to {2**32 - 1}")
    return seed


def run_key(seed: int | jax.Array, purpose: str, index: int | jax.Array = 0) -> jax.Array:
    """Returns the key of one random draw; every draw of a run starts here.

    So each is a pure function of (seed, purpose, index): independent of devices, and of whether a run was resumed.

    Args:
      seed: of the run.
      purpose: "init", "train", "sample", ...
      index: of the draw for that purpose: a step, the number of an image.

    Raises:
      RunError: a seed, given as an integer, that is out of range, see `check_seed`.
    """
    if not isinstance(seed, jax.Array):
        check_seed(int(seed))
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))
    return jax.random.fold_in(key, index)


def init_state(
    experiment: Experiment,
    seed: int,
    batch: Batch,
    ema_profiles: Sequence[float] = (),
    begun: dict[str, Params] | None = None,
) -> TrainState:
    """Returns the state before the first step.

    Args:
      experiment: gives the parameters, the optimizer and the names of the loss's metrics.
      seed: of the run.
      batch: only its shapes are used; it may be abstract.
      ema_profiles: relative lengths of the power-function averages to carry along.
      begun: see `Experiment.begun`; an argument, for weights are not to become constants of a compiled program.
    """
    state = init_weights(experiment, seed, ema_profiles, begun)
    names = jax.eval_shape(experiment.loss, state.params, batch, run_key(seed, "train"))[1]
    metrics = {name: Mean(jnp.zeros(()), jnp.zeros(())) for name in ["loss", "grad_norm", *names]}
    opt_state = experiment.optimizer.init(trained(state.params, experiment.frozen))
    return state._replace(opt_state=opt_state, metrics=metrics)


def init_weights(
    experiment: Experiment, seed: int, ema_profiles: Sequence[float] = (), begun: dict[str, Params] | None = None
) -> TrainState:
    """Returns the state before the first step without what only training reads; see `init_state`."""
    params = jax.jit(experiment.init)(run_key(seed, "init"))  # traced once, for whoever asks for its shapes too
    params = {**params, **begun} if begun else params
    # One buffer cannot be donated under two names: the averages start as copies.
    learned = trained(params, experiment.frozen)
    copy = lambda: jax.tree.map(jnp.copy, learned)  # noqa: E731
    profiles = {f"{sigma_rel:g}": copy() for sigma_rel in ema_profiles}
    none: Any = None
    return TrainState(jnp.zeros((), jnp.int32), params, copy(), profiles, opt_state=none, metrics=none)
