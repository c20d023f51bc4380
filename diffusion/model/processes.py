"""Processes by name, with the training times and the loss weights that belong to them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import chains, grids, predictions, schedules, weightings
from diffusion.model.choices import of_name, pick
from diffusion.model.config import Config


class Process(NamedTuple):
    """A process x_t = signal * x_0 + noise * eps, and the times and grids that belong to it.

    Attributes:
      at: time -> (signal, noise); time is what the network is given.
      quantile: u in (0, 1) -> time, monotonous; training draws u evenly.
      even: (num_steps, power, shift) -> steps at even times, raised to a power, or shifted towards noise.
      respaced: (num_steps, rho) -> steps in Karras' spacing of noise / signal; rho = inf: even in log-SNR.
      time_scale: factor on time in the network's embedding.
      schedule: DDPM's chain; None for a process that is none.
      time_of: noise / signal -> time; None for a process without it.
      num_tokens: positions of one x_0, for grids that depend on them; 0: not known.
      sized: num_tokens -> the quantile function, where it depends on them.
    """

    at: predictions.Process
    quantile: Callable[[jax.Array], jax.Array]
    even: Callable[[int, float, float], schedules.Grid]
    respaced: Callable[[int, float], schedules.Grid]
    time_scale: float
    schedule: schedules.Schedule | None = None
    time_of: Callable[[jax.Array], jax.Array] | None = None
    num_tokens: int = 0
    sized: Callable[[int], Callable[[jax.Array], jax.Array]] | None = None


def make_process(config: Config) -> Process:
    """Returns the process of `config.process`.

    Raises:
      ValueError: an unknown name or field, or a number that cannot be.
    """
    return pick(PROCESSES, config.process, "process")()


def ddpm(
    *,
    beta: str = "linear",
    first: float = 1e-4,
    last: float = 0.02,
    num_steps: int = 1000,
    zero_terminal_snr: bool = False,
    table: tuple[float, ...] = (),
) -> Process:
    """Returns DDPM's discrete chain (Ho et al. 2020); the network's time is t - 1.

    Args:
      beta: linear, linear_for_steps (scaled by 1000 / T), sqrt_linear, cosine, sigmoid, or table.
      first: beta_1 of linear, sqrt_linear and sigmoid.
      last: beta_T of these.
      num_steps: T.
      zero_terminal_snr: rescale the betas so that x_T is noise alone (Lin et al. 2023, Algorithm 1).
      table: beta_1, ..., beta_T of beta=table.
    """
    tables = {
        "linear": lambda: chains.linear_beta(num_steps, first, last),
        "linear_for_steps": lambda: chains.linear_beta_for(num_steps),
        "sqrt_linear": lambda: chains.sqrt_linear_beta(num_steps, first, last),
        "cosine": lambda: chains.cosine_beta(num_steps),
        "sigmoid": lambda: chains.sigmoid_beta(num_steps, first, last),
        "table": lambda: np.asarray(table, np.float64),
    }
    values = of_name(tables, beta, "process.beta")()
    if len(values) != num_steps:
        raise ValueError(f"process.table holds {len(values)} betas, and process.num_steps is {num_steps}")
    schedule = chains.make_schedule(chains.rescale_zero_terminal_snr(values) if zero_terminal_snr else values)
    even = partial(schedules.ddpm_grid, schedule)

    def quantile(u: jax.Array) -> jax.Array:
        return (weightings.step_quantile(u, num_steps) - 1).astype(jnp.float32)

    respaced = partial(schedules.respace, even(num_steps))
    return Process(chains.discrete_process(schedule), quantile, unshifted(even), respaced, 1.0, schedule)


def vp() -> Process:
    """Returns the continuous variance-preserving process with the cosine log-SNR (Kingma et al. 2021)."""
    process = schedules.vp_process(schedules.cosine_log_snr())
    even = partial(schedules.process_grid, process)
    return Process(process, lambda u: u, unshifted(even), partial(schedules.respace, even(1000)), time_scale=1000.0)


def flow(*, times: str = "uniform", shift: float = 1.0, time_scale: float = 1000.0) -> Process:
    """Returns rectified flow with one of SD3's distributions over training times (Esser et al. 2024).

    Args:
      times: uniform, logit_normal, mode or cosmap (section 3.1).
      shift: of these times towards noise (eq. 23); 1: none; 0: FLUX's, by the size of images.
      time_scale: factor on time in the network's embedding; 1 for losses that differentiate the network by time.
    """
    process = schedules.flow_process
    if shift < 0:
        raise ValueError(f"process.shift is {shift}: it has to be positive, or 0 for FLUX's by the size of images")

    def even(num_steps: int, power: float, shift: float) -> schedules.Grid:
        if power == 1.0:
            return schedules.flow_grid(num_steps, shift)
        return schedules.process_grid(process, num_steps, power)

    quantiles = {
        "uniform": lambda u: u,
        "logit_normal": weightings.logit_normal_quantile,
        "mode": weightings.mode_quantile,
        "cosmap": weightings.cosmap_quantile,
    }
    drawn = of_name(quantiles, times, "process.times")
    respaced = partial(schedules.respace, schedules.flow_grid(1000))
    found = Process(process, shifted(drawn, shift or 1.0), even, respaced, time_scale)
    found = found._replace(time_of=lambda sigma: sigma / (1 + sigma))
    return found if shift else found._replace(sized=lambda num_tokens: shifted(drawn, grids.flux2_shift(num_tokens)))


def is_flow(process: Process) -> bool:
    """Returns whether a process goes along straight lines from noise to data, with time its noise."""
    return bool(np.isclose(sum(map(float, process.at(jnp.float32(0.25)))), 1))


def of_size(process: Process, num_tokens: int) -> Process:
    """Returns the process of images of so many positions."""
    quantile = process.sized(num_tokens) if process.sized else process.quantile
    return process._replace(num_tokens=num_tokens, quantile=quantile)


def shifted(quantile: Callable[[jax.Array], jax.Array], shift: float) -> Callable[[jax.Array], jax.Array]:
    """Returns the quantile function of a flow's times after their shift towards noise."""
    return quantile if shift == 1.0 else lambda u: schedules.shift_time(quantile(u), shift)


def edm() -> Process:
    """Returns EDM's variance-exploding process (Karras et al. 2022)."""

    def even(num_steps: int, power: float, shift: float) -> schedules.Grid:
        raise ValueError("an edm process has no steps even in time: choose sampling.grid.name=karras or log_snr")

    def respaced(num_steps: int, rho: float) -> schedules.Grid:
        return schedules.karras_grid(num_steps, rho=rho)

    found = Process(schedules.edm_process, weightings.log_normal_quantile, even, respaced, time_scale=1.0)
    return found._replace(time_of=lambda sigma: jnp.log(sigma) / 4)


PROCESSES = {"ddpm": ddpm, "vp": vp, "flow": flow, "edm": edm}


def unshifted(even: Callable[..., schedules.Grid]) -> Callable[[int, float, float], schedules.Grid]:
    """Returns the even steps of a process whose times cannot be shifted."""

    def of(num_steps: int, power: float, shift: float) -> schedules.Grid:
        if shift != 1.0:
            raise ValueError(f"sampling.grid.shift={shift:g} moves the times of a flow: it needs process.name=flow")
        return even(num_steps, power=power)

    return of


def make_draw(name: str) -> Callable[[jax.Array, int], jax.Array]:
    """Returns (key, batch size) -> u in (0, 1): "uniform", or "stratified" over the batch."""
    return of_name({"uniform": weightings.uniform, "stratified": weightings.stratified}, name, "loss.draw")


def make_weight(name: str, kind: str, process: Process) -> Callable[[jax.Array], Any]:
    """Returns time -> the weight of the mean squared error of what a network returns.

    Args:
      name: none, simple, min_snr, p2, edm or vlb.
      kind: of the network's prediction.
      process: of the times.

    Raises:
      ValueError: an unknown name, or one that this process does not have.
    """
    schedule = process.schedule

    def by_level(weight: Callable[..., jax.Array]) -> Callable[[jax.Array], Any]:
        return lambda time: weight(kind, *process.at(time))

    def vlb(time: jax.Array) -> Any:
        assert schedule is not None
        return weightings.vlb(kind, schedule, time.astype(jnp.int32) + 1)

    weights = {
        "none": lambda time: 1.0,
        "simple": by_level(weightings.simple),
        "min_snr": by_level(weightings.min_snr),
        "p2": by_level(weightings.p2),
        "edm": by_level(weightings.edm),
        "vlb": vlb,
    }
    if name == "vlb" and schedule is None:
        raise ValueError("loss.weighting=vlb weighs the steps of a chain: it needs process.name=ddpm")
    return of_name(weights, name, "loss.weighting")
