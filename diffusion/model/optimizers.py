"""Optimizers of the diffusion models, and their learning rate as a function of the step."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers
from optax.contrib import muon as optax_muon

from diffusion.model.choices import pick
from diffusion.model.config import Config

LAYERS = ("block", "attention")  # in the names of modules between a network's first and last layer
SHARED = ("learning_rate", "warmup_steps", "cooldown_steps", "clip_norm")  # fields of every optimizer


def make_optimizer(config: Config) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of `config.optimizer` behind a clip of the gradient's norm, and its learning rate.

    The rate warms up along a line, and in the last `cooldown_steps` steps falls along one (Hu et al. 2024, section 4).

    Raises:
      ValueError: an unknown name or field.
    """
    settings = config.optimizer
    warm_up, cool_down = max(settings.warmup_steps, 1), max(settings.cooldown_steps, 1)

    def learning_rate(step: Any) -> Any:
        # Neither the first update nor the last is lost to a rate of zero.
        share = jnp.minimum((step + 1) / warm_up, (config.training.num_steps - step) / cool_down)
        return settings.learning_rate * jnp.minimum(share, 1.0)

    own = {name: value for name, value in settings.items() if name not in SHARED}
    update = pick(OPTIMIZERS, own, "optimizer")(learning_rate)
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), update), learning_rate


def adam(
    rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8
) -> optax.GradientTransformation:
    """Returns Adam (Kingma & Ba 2015)."""
    return optax.adam(rate, b1=b1, b2=b2, eps=eps)


def muon(
    rate: optax.Schedule, *, b1: float = 0.9, b2: float = 0.999, muon_rate: float = 3.0
) -> optax.GradientTransformation:
    """Returns Muon for the matrices of the inner layers and Adam with Nesterov's momentum for all else.

    Muon's updates have the size of Adam's (Liu et al. 2025, section 2.2), times `muon_rate`.

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


OPTIMIZERS = {"adam": adam, "muon": muon}


def matrix_axes(path: Any, parameter: Any) -> MuonDimensionNumbers | None:
    """Returns which axes of a parameter are a matrix's rows (summed over) and which its columns; None for no matrix.

    Kernels sum over all axes but the last; those that make queries, keys and values of several heads over the first.
    """
    names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)]
    if names[-1] != "kernel" or not any(layer in name for name in names for layer in LAYERS):
        return None
    axes = tuple(range(parameter.ndim))
    rows = 1 if names[-2].endswith("_qkv") else parameter.ndim - 1
    return MuonDimensionNumbers(axes[:rows], axes[rows:])
