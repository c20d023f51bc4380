"""One step of training: gradient, update, moving averages; a pure function of (state, batch)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from diffusion.averages import power_exponent, power_rate
from diffusion.training.experiment import Batch, Experiment, Mean, Params, TrainState, averaged, run_key, trained


class Report(NamedTuple):
    """What one step reports; the host reads the rest only if it is `bad`.

    Attributes:
      bad: bool[], the loss or the gradient is not finite, or the loss is a spike.
      loss: float32[], the mean over the batch.
      grad_norm: float32[], the norm of the whole gradient.
      usual_loss: float32[], the mean loss of the steps before, since the last log line; nan where there are none.
      group_norms: the norm of the gradient of each group of parameters, see `parameter_groups`.
      metrics: of this step, as sums over its examples.
    """

    bad: jax.Array
    loss: jax.Array
    grad_norm: jax.Array
    usual_loss: jax.Array
    group_norms: dict[str, jax.Array]
    metrics: dict[str, Mean]


def parameter_groups(params: Params) -> dict[str, list[Any]]:
    """Returns the leaves of each top-level module by its name; Flax's outer "params" does not count as a level."""
    groups: dict[str, list[Any]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [name for name in jax.tree_util.keystr(keys, simple=True, separator="/").split("/") if name != "params"]
        groups.setdefault(names[0] if names else "params", []).append(leaf)
    return groups


def ema_decay_at(step: int | jax.Array, decay: float) -> jax.Array:
    """Returns min(decay, (1 + step) / (10 + step)): a warm-up, so that the average forgets the initial weights.

    Args:
      step: the number of updates before this one.
      decay: its limit.

    Source: the rule of TensorFlow's `ExponentialMovingAverage(num_updates=step)`.
    """
    step = jnp.asarray(step, jnp.float32)
    return jnp.minimum(decay, (1.0 + step) / (10.0 + step))


def starts_interval(step: Any, log_every: int) -> Any:
    """Returns whether metrics are summed anew after `step` updates (int or int32[]): at multiples of `log_every`.

    With `log_every` 0 the whole run is one interval.
    """
    return step % log_every == 0 if log_every else step == 0


def average(old: Params, new: Params, rate: jax.Array) -> Params:
    """Returns (1 - rate) old + rate new."""
    return jax.tree.map(lambda old, new: old + rate * (new - old), old, new)


def make_train_step(
    experiment: Experiment,
    *,
    seed: int,
    ema_decay: float,
    accumulate: int = 1,
    log_every: int = 1,
    skip_bad_steps: bool = False,
    spike_factor: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Report]]:
    """Returns train_step(state, batch) -> (state, report), to be jitted with the state donated.

    Args:
      experiment: its loss is called with the key of (seed, "train", step).
      seed: of the run.
      ema_decay: of the moving average of the parameters, see `ema_decay_at`.
      accumulate: number of micro-batches, computed one after the other in the memory of B / accumulate examples; the
        gradient is their mean. Micro-batch i holds the rows i, i + accumulate, ...: every row stays on its device.
      log_every: `state.metrics` are sums since the last multiple of it, see `starts_interval`.
      skip_bad_steps: a step whose report is `bad` changes nothing but `step`; its metrics do not count.
      spike_factor: a loss over so many times `usual_loss` is bad too; 0: no bound.
    """

    def mean_loss(learned, params, batch, key):
        losses, metrics = experiment.loss(averaged(params, learned, experiment.frozen), batch, key)
        count = jnp.float32(losses.shape[0])
        metrics = {"loss": Mean(losses, jnp.ones_like(losses)), **metrics}
        return losses.sum() / count, jax.tree.map(lambda x: jnp.sum(x, dtype=jnp.float32), metrics)

    gradient = jax.value_and_grad(mean_loss, has_aux=True)

    def accumulated_gradient(params, batch, key):
        learned = trained(params, experiment.frozen)
        if accumulate == 1:
            return gradient(learned, params, batch, key)
        parts = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1), batch
        )

        def add(total, part):
            index, batch = part
            found = gradient(learned, params, batch, jax.random.fold_in(key, index))
            return jax.tree.map(jnp.add, total, found), None

        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradient, learned, params, first, key)
        zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        ((loss, metrics), grads), _ = jax.lax.scan(add, zero, (jnp.arange(accumulate), parts))
        return (loss / accumulate, metrics), jax.tree.map(lambda g: g / accumulate, grads)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Report]:
        key = run_key(seed, "train", state.step)
        (loss, metrics), grads = accumulated_gradient(state.params, batch, key)
        grad_norm = optax.global_norm(grads)
        before = state.metrics["loss"]
        usual_loss = before.total / before.count
        bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
        if spike_factor:
            bad |= loss > spike_factor * usual_loss  # false where usual_loss is nan, the mean of nothing
        group_norms = {name: optax.global_norm(leaves) for name, leaves in parameter_groups(grads).items()}
        report = Report(bad, loss, grad_norm, usual_loss, group_norms, metrics)
        learned = trained(state.params, experiment.frozen)
        updates, opt_state = experiment.optimizer.update(grads, state.opt_state, learned)
        learned = optax.apply_updates(learned, updates)
        ema = average(state.ema, learned, 1.0 - ema_decay_at(state.step, ema_decay))
        profiles = {
            sigma_rel: average(profile, learned, power_rate(state.step + 1, power_exponent(float(sigma_rel))))
            for sigma_rel, profile in state.profiles.items()
        }
        fresh = starts_interval(state.step, log_every)
        old_metrics = jax.tree.map(lambda old: jnp.where(fresh, 0.0, old), state.metrics)
        metrics = {**metrics, "grad_norm": Mean(grad_norm, jnp.ones_like(grad_norm))}
        metrics = jax.tree.map(jnp.add, old_metrics, metrics)
        params = averaged(state.params, learned, experiment.frozen)
        new = TrainState(state.step + 1, params, ema, profiles, opt_state, metrics)
        if skip_bad_steps:
            unchanged = state._replace(step=new.step, metrics=old_metrics)
            new = jax.tree.map(lambda old, new: jnp.where(bad, old, new), unchanged, new)
        return new, report

    return train_step
