"""What a network is trained on: losses by name, each with what it asks of the model that it trains.

A loss is given what was drawn of a batch (`Drawn`) and calls the network itself, as often and at such times as its
paper has it. The plain denoising loss is one of them; a new one is a new function in `LOSSES`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from diffusion import losses, predictions
from diffusion.model.choices import pick
from diffusion.model.config import Config
from diffusion.model.processes import Process, make_draw, make_weight
from diffusion.training import Mean


class Drawn(NamedTuple):
    """What was drawn of a batch, and the network as a function.

    Attributes:
      x_0: clean images.
      eps: noise.
      key: for the loss's own draws, of times above all.
      network: (x, time, **told) -> output, told of each image's condition; every call has the same dropout.
    """

    x_0: jax.Array
    eps: jax.Array
    key: jax.Array
    network: Callable[..., Any]


Found = tuple[jax.Array, dict[str, Mean]]  # losses [B], and metrics


class Objective(NamedTuple):
    """A loss, and what it asks of the model.

    Attributes:
      compute: drawn -> (losses float32[B], metrics).
      prediction: what the network returns, one of `predictions.KINDS`.
      learned_variance: whether its output holds v beside the prediction (Nichol & Dhariwal 2021).
    """

    compute: Callable[[Drawn], Found]
    prediction: str
    learned_variance: bool = False


def make_objective(config: Config, process: Process) -> Objective:
    """Returns the objective of `config.loss`.

    Raises:
      ValueError: an unknown name or field, or a process that the loss does not have.
    """
    return pick(LOSSES, config.loss, "loss")(process)


def denoising(
    process: Process,
    *,
    prediction: str = "eps",
    weighting: str = "simple",
    draw: str = "uniform",
    learned_variance: bool = False,
    vlb_weight: float = 1e-3,
) -> Objective:
    """Returns DDPM's Algorithm 1, for any process: the weighted mean square of the network's prediction at one time.

    Args:
      process: of x_t.
      prediction: what the network returns.
      weighting: of noise levels, a name of `make_weight`.
      draw: of training times, a name of `make_draw`.
      learned_variance: the network also returns the variance of a chain's ancestral steps.
      vlb_weight: of the bound in L_hybrid; with learned_variance.
    """
    if learned_variance and process.schedule is None:
        raise ValueError("loss.learned_variance is that of a chain's steps: it needs process.name=ddpm")
    weight, draw_u = make_weight(weighting, prediction, process), make_draw(draw)

    def compute(drawn: Drawn) -> Found:
        x_0, eps = drawn.x_0, drawn.eps
        u = draw_u(drawn.key, len(x_0))
        time = process.quantile(u)
        signal, noise = process.at(time)
        x_t = predictions.diffuse(x_0, eps, signal, noise)
        output = drawn.network(predictions.network_input(prediction, x_t, signal, noise), time)
        output, *v = output if learned_variance else (output,)
        total = losses.weighted_mse(weight(time), predictions.target(prediction, x_0, eps, signal, noise), output)
        if v and process.schedule is not None:
            t = time.astype(jnp.int32) + 1
            x_0_hat = predictions.to_x_0(prediction, output, x_t, signal, noise)
            total = losses.hybrid_loss(total, process.schedule, x_0, x_t, t, x_0_hat, v[0], vlb_weight)
        return total, mean_by_part("loss", total, u)

    return Objective(compute, prediction, learned_variance)


def mean_by_part(name: str, values: jax.Array, u: jax.Array, parts: int = 4) -> dict[str, Mean]:
    """Returns `values` [B] as one `Mean` for each of `parts` equal ranges of u in (0, 1), least noise first."""
    part = jnp.minimum((u * parts).astype(jnp.int32), parts - 1)
    inside = [part == i for i in range(parts)]
    return {  # chosen, not multiplied: a NaN remains in its own part
        f"{name}_part_{i + 1}_of_{parts}": Mean(jnp.where(inside[i], values, 0.0), inside[i].astype(jnp.float32))
        for i in range(parts)
    }


LOSSES: dict[str, Callable[..., Objective]] = {"denoising": denoising}
