"""Optimizers of the diffusion models, and their learning rate as a function of the step."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from diffusion.model.choices import pick
from diffusion.model.config import Config

LAYERS = ("block", "attention")  # in the names of modules between a network's first and last layer
SHARED = ("learning_rate", "schedule", "warmup_steps", "cooldown_steps", "clip_norm")  # fields of every optimizer
DECAYED = ("kernel", "A", "B")  # names of the parameters that are multiplied with; A and B are those of adapters
GIVEN = "given"  # name of an optimizer that a Python caller hands over: a config cannot hold it


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    """Returns the optimizer of `config.optimizer` behind a clip of the gradient's norm, and its learning rate.

    Of a run with an optimizer that was given from Python, which a config does not hold: none, and no rate.

    Raises:
      ValueError: an unknown name or field.
    """
    settings = config.optimizer
    if settings.name == GIVEN:
        return optax.identity(), None
    learning_rate = make_learning_rate(config)
    own = {name: value for name, value in settings.items() if name not in SHARED}
    update = pick(OPTIMIZERS, own, "optimizer")(learning_rate)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update), learning_rate


def make_learning_rate(config: Config) -> optax.Schedule:
    """Returns the learning rate after so many steps: it warms up along a line, then follows `optimizer.schedule`.

    Raises:
      ValueError: an unknown schedule, or a cooldown of one that has none.
    """
    settings, num_steps = config.optimizer, config.training.num_steps
    warm_up = max(settings.warmup_steps, 1)
    name = settings.schedule.name
    if settings.cooldown_steps and name in SCHEDULES and name != "wsd":
        raise ValueError(
            f"optimizer.cooldown_steps={settings.cooldown_steps} is read by optimizer.schedule=wsd alone, "
            f"not by {name}: set it to 0"
        )
    course = Course(num_steps, settings.warmup_steps, settings.cooldown_steps)
    share = pick(SCHEDULES, settings.schedule, "optimizer.schedule")(course)

    def learning_rate(step: Any) -> Any:
        # Neither the first update nor the last is lost to a rate of zero.
        return settings.learning_rate * jnp.minimum(jnp.minimum((step + 1) / warm_up, share(step)), 1.0)

    return learning_rate


class Course(NamedTuple):
    """The steps of a training that schedules are made of."""

    num_steps: int
    warmup_steps: int
    cooldown_steps: int


def wsd(course: Course) -> optax.Schedule:
    """Returns warm-up, stable, decay: 1, and in the last `cooldown_steps` steps a line to 0.

    Source: Hu et al. (2024), "MiniCPM", section 4.
    """
    cool_down = max(course.cooldown_steps, 1)
    return lambda step: (course.num_steps - step) / cool_down


def constant(course: Course) -> optax.Schedule:
    """Returns 1."""
    del course
    return lambda step: 1.0


def linear(course: Course, *, end: float = 0.0) -> optax.Schedule:
    """Returns a line from 1 after the warm-up to `end` after the last step.

    Args:
      course: the steps.
      end: share of the learning rate that is left after the last step.
    """
    begin = course.warmup_steps
    return optax.linear_schedule(1.0, share_of(end), decay_steps(course), transition_begin=begin)


def cosine(course: Course, *, end: float = 0.0) -> optax.Schedule:
    """Returns half a cosine from 1 after the warm-up to `end` after the last step.

    Args:
      course: the steps.
      end: share of the learning rate that is left after the last step.

    Source: Loshchilov & Hutter (2017), "SGDR", eq. 5.
    """
    falling = optax.cosine_decay_schedule(1.0, decay_steps(course), alpha=share_of(end))
    return lambda step: falling(jnp.maximum(step - course.warmup_steps, 0))


def decay_steps(course: Course) -> int:
    """Returns how many steps remain after the warm-up."""
    return max(course.num_steps - course.warmup_steps, 1)


def share_of(end: float) -> float:
    """Returns `end`. Raises ValueError where it is no share."""
    if not 0 <= end <= 1:
        raise ValueError(f"optimizer.schedule.end is {end:g}: it is a share of the learning rate, from 0 to 1")
    return end


SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "wsd": wsd,
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}


def adam(
    rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns Adam (Kingma & Ba 2015)."""
    return optax.adam(rate, b1=b1, b2=b2, eps=eps)


def adamw(
    rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 0.01
) -> optax.GradientTransformation:
    """Returns Adam with decoupled weight decay.

    Args:
      rate: of the learning.
      b1, b2: decays of the running means.
      eps: added to the root of the second.
      weight_decay: share of a kernel, times the learning rate, that each step takes away; others keep theirs.

    Source: Loshchilov & Hutter (2019), Algorithm 2.
    """
    return optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=decayed)


def radam(
    rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns Adam whose first steps, of which it knows too few gradients, are rectified: it needs no warm-up.

    Source: Liu et al. (2020), "On the Variance of the Adaptive Learning Rate and Beyond", Algorithm 2.
    """
    return optax.radam(rate, b1, b2, eps)


def lion(
    rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.99, weight_decay: float = 0.1
) -> optax.GradientTransformation:
    """Returns Lion, whose learning rate is a tenth to a third of Adam's.

    Args:
      rate: of the learning.
      b1, b2: decays of the running mean, where it is used and where it is kept.
      weight_decay: as AdamW's, three to ten times as large.

    Source: Chen et al. (2023), Algorithm 2.
    """
    return optax.lion(rate, b1, b2, weight_decay=weight_decay, mask=decayed)


def sgd(rate: optax.Schedule, *, momentum: float = 0.9, nesterov: bool = False) -> optax.GradientTransformation:
    """Returns stochastic gradient descent with momentum.

    Args:
      rate: of the learning.
      momentum: decay of the sum of gradients.
      nesterov: whether the step looks ahead.
    """
    return optax.sgd(rate, momentum, nesterov)


def muon(
    rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, muon_rate: float = 3.0
) -> optax.GradientTransformation:
    """Returns Muon for the matrices of the inner layers and Adam with Nesterov's momentum for all else.

    Muon's updates have the size of Adam's (Liu et al. 2025, section 2.2), times `muon_rate`.

    Args:
      rate: of the learning.
      b1, b2: decays of Adam's running means.
      muon_rate: learning rate of the matrices, in learning rates.

    Source: Jordan et al. (2024), "Muon".
    """
    return optax_muon(
        lambda step: muon_rate * rate(step),
        consistent_rms=0.2,
        muon_weight_dimension_numbers=lambda params: jax.tree_util.tree_map_with_path(matrix_axes, params),
        adam_b1=b1,
        adam_b2=b2,
        adam_learning_rate=rate,
    )


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": adam,
    "adamw": adamw,
    "radam": radam,
    "muon": muon,
    "sgd": sgd,
    "lion": lion,
}


def decayed(params: Any) -> Any:
    """Returns which parameters decay: kernels and adapters; not biases, gains of norms, embeddings and tables.

    By their names: the biases of queries, keys and values of several heads have as many axes as kernels.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: names_of(path)[-1] in DECAYED, params)


def names_of(path: Any) -> list[str]:
    """Returns the keys of the dicts on the path to a parameter."""
    return [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]


def matrix_axes(path: Any, parameter: Any) -> MuonDimensionNumbers | None:
    """Returns which axes of a parameter are a matrix's rows (summed over) and which its columns; None for no matrix.

    Kernels sum over all axes but the last; those that make queries, keys and values of several heads over the first.
    """
    names = names_of(path)
    if names[-1] != "kernel" or not any(layer in name for name in names for layer in LAYERS):
        return None
    axes = tuple(range(parameter.ndim))
    rows = 1 if names[-2].endswith("_qkv") else parameter.ndim - 1
    return MuonDimensionNumbers(axes[:rows], axes[rows:])
