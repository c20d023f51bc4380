"""What a network is trained on, and what that asks of the model: the types that all losses share.

A loss is given what was drawn of a batch (`Drawn`) and calls the network itself, as often and at such times as its
paper has it. `losses.py` has them by name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion import schedules
from diffusion.model.processes import Process, is_flow
from diffusion.training import Mean


class Drawn(NamedTuple):
    """What was drawn of a batch, and the network as a function.

    Attributes:
      x_0: clean images.
      eps: noise.
      key: for the loss's own draws, of times above all.
      network: (x, time, **told) -> output, told of each image's condition; every call has the same dropout.
      unconditional: the same, told of no condition.
      teacher: (x, time) -> x_0_hat of a trained model, guided, under the same conditions; where there is one.
      hidden: bool[B], of which images the condition is hidden from `network`.
      step: how many updates were made before, int32[B], for an objective that is `by_step`.
    """

    x_0: jax.Array
    eps: jax.Array
    key: jax.Array
    network: Callable[..., Any]
    unconditional: Callable[..., Any]
    teacher: Callable[..., Any]
    hidden: jax.Array
    step: jax.Array | None = None


Found = tuple[jax.Array, dict[str, Mean]]  # losses [B], and metrics


class Objective(NamedTuple):
    """A loss, and what it asks of the model.

    Attributes:
      compute: drawn -> (losses float32[B], metrics).
      prediction: what the network returns, one of `predictions.KINDS`.
      gives: what samplers can be given of the network: a denoiser ("denoise"), the jump to a next time ("jump"), or the
        end of the trajectory through a point ("end"), or the values of x_0 over a whole step ("policy").
      mean: whether x_0_hat is E[x_0 | x_t], of which the ODE and its likelihood are made.
      learned_variance: whether its output holds v beside the prediction (Nichol & Dhariwal 2021).
      two_times: whether the network is told where a step ends, too.
      by_step: whether the loss depends on how many updates were made.
      by_time: whether the loss differentiates the network by time.
      guided: whether the loss needs a condition.
      num_values: of x_0, for a whole step, how many the network returns.
      grids: those that it is trained to step on, a policy on no other; (): any.
      teacher: whether it learns from a trained model.
      teacher_scale: of that model's guidance; 0: its own.
    """

    compute: Callable[[Drawn], Found]
    prediction: str
    gives: tuple[str, ...] = ("denoise",)
    mean: bool = True
    learned_variance: bool = False
    two_times: bool = False
    by_step: bool = False
    by_time: bool = False
    guided: bool = False
    num_values: int = 1
    grids: tuple[schedules.Grid, ...] = ()
    teacher: bool = False
    teacher_scale: float = 0.0


def check_flow(process: Process, name: str) -> None:
    """Raises ValueError where a loss for a flow is asked of another process."""
    if not is_flow(process):
        raise ValueError(f"loss.name={name} follows a flow's straight lines: it needs process.name=flow")


def errors(error: jax.Array, u: jax.Array) -> dict[str, Mean]:
    """Returns the plain mean square [B], whole and by `u`: the loss of few steps is weighted by its own size."""
    return {"error": Mean(error, jnp.ones_like(error)), **mean_by_part("error", error, u)}


def mean_by_part(name: str, values: jax.Array, u: jax.Array, parts: int = 4) -> dict[str, Mean]:
    """Returns `values` [B] as one `Mean` for each of `parts` equal ranges of u in (0, 1), least noise first."""
    part = jnp.minimum((u * parts).astype(jnp.int32), parts - 1)
    inside = [part == i for i in range(parts)]
    return {  # chosen, not multiplied: a NaN remains in its own part
        f"{name}_part_{i + 1}_of_{parts}": Mean(jnp.where(inside[i], values, 0.0), inside[i].astype(jnp.float32))
        for i in range(parts)
    }
