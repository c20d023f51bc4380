"""Names to functions: processes, sampling grids, weights, distributions of times, samplers, thresholds.

A choice that has settings of its own (`PROCESSES`, `SAMPLERS`) is a function whose keyword arguments with a default are
its fields in a config; `call` passes them and refuses all others. A new one is a new function in its table.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import chains, grids, guidance, predictions, samplers, schedules, weightings
from diffusion.model.config import Config
from diffusion.samplers import Denoise

# What the house gives to a chosen function or network; never a field of a config.
GIVEN = {"denoise", "x_T", "grid", "key", "trajectory", "parent"}
GIVEN |= {"out_channels", "num_classes", "time_scale", "context_width", "pooled_width"}


class Process(NamedTuple):
    """A process x_t = signal * x_0 + noise * eps, and the times and grids that belong to it.

    Attributes:
      at: time -> (signal, noise); time is what the network is given.
      quantile: u in (0, 1) -> time, monotonous; training draws u evenly.
      even: (num_steps, power, shift) -> steps at even times, raised to a power, or shifted towards noise.
      respaced: (num_steps, rho) -> steps in Karras' spacing of noise / signal; rho = inf: even in log-SNR.
      time_scale: factor on time in the network's embedding.
      schedule: DDPM's chain; None for a process that is none.
    """

    at: predictions.Process
    quantile: Callable[[jax.Array], jax.Array]
    even: Callable[[int, float, float], schedules.Grid]
    respaced: Callable[[int, float], schedules.Grid]
    time_scale: float
    schedule: schedules.Schedule | None = None


def fields_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the settings of a choice with their defaults: its keyword arguments, less those that are `GIVEN`."""
    parameters = inspect.signature(function).parameters.values()
    found = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return {name: default for name, default in found.items() if name not in GIVEN | {"name"}}


def pick(table: Mapping[str, Callable[..., Any]], block: Any, where: str) -> Callable[..., Any]:
    """Returns the function that `block["name"]` names, with the other fields of the block as its arguments.

    Args:
      table: the functions by name.
      block: a config's block: "name" and the fields of that name.
      where: the block's place in the config, for messages.

    Raises:
      ValueError: an unknown name, or a field that the function does not have.
    """
    fields = dict(block)
    name = fields.pop("name")
    if name not in table:
        raise ValueError(f"{where}.name is {name!r}: choose from {', '.join(table)}")
    known = fields_of(table[name])
    if unknown := sorted(fields.keys() - known.keys()):
        has = f"it has {', '.join(known)}" if known else "it has no fields"
        raise ValueError(f"{where}.{unknown[0]} is not a field of {name}: {has}")
    return partial(table[name], **fields)


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


def flow(*, times: str = "uniform") -> Process:
    """Returns rectified flow with one of SD3's distributions over training times (Esser et al. 2024, section 3.1)."""
    process = schedules.flow_process

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
    respaced = partial(schedules.respace, schedules.flow_grid(1000))
    return Process(process, of_name(quantiles, times, "process.times"), even, respaced, time_scale=1000.0)


def edm() -> Process:
    """Returns EDM's variance-exploding process (Karras et al. 2022)."""

    def even(num_steps: int, power: float, shift: float) -> schedules.Grid:
        raise ValueError("an edm process has no steps even in time: choose sampling.grid.name=karras or log_snr")

    def respaced(num_steps: int, rho: float) -> schedules.Grid:
        return schedules.karras_grid(num_steps, rho=rho)

    return Process(schedules.edm_process, weightings.log_normal_quantile, even, respaced, time_scale=1.0)


PROCESSES = {"ddpm": ddpm, "vp": vp, "flow": flow, "edm": edm}


def unshifted(even: Callable[..., schedules.Grid]) -> Callable[[int, float, float], schedules.Grid]:
    """Returns the even steps of a process whose times cannot be shifted."""

    def of(num_steps: int, power: float, shift: float) -> schedules.Grid:
        if shift != 1.0:
            raise ValueError(f"sampling.grid.shift={shift:g} moves the times of a flow: it needs process.name=flow")
        return even(num_steps, power=power)

    return of


def uniform(process: Process, num_steps: int, *, shift: float = 1.0) -> schedules.Grid:
    """Returns steps even in time, of a flow shifted towards noise."""
    return process.even(num_steps, 1.0, shift)


def quadratic(process: Process, num_steps: int) -> schedules.Grid:
    """Returns DDIM's quadratic spacing, closer together near the data."""
    return process.even(num_steps, 2.0, 1.0)


def log_snr(process: Process, num_steps: int) -> schedules.Grid:
    """Returns steps even in log-SNR."""
    return process.respaced(num_steps, math.inf)


def karras(process: Process, num_steps: int, *, rho: float = 7.0) -> schedules.Grid:
    """Returns Karras et al.'s spacing of noise / signal."""
    return process.respaced(num_steps, rho)


def leading(
    process: Process, num_steps: int, *, steps_offset: int = 0, final: str = "zero", skip_last: bool = False
) -> schedules.Grid:
    """Returns the steps that diffusers' "leading" schedulers visit (`grids.spaced_grid`)."""
    return grids.spaced_grid(chain_of(process, "leading"), num_steps, "leading", steps_offset, final, skip_last)


def trailing(process: Process, num_steps: int, *, final: str = "zero") -> schedules.Grid:
    """Returns the steps that diffusers' "trailing" schedulers visit (`grids.spaced_grid`)."""
    return grids.spaced_grid(chain_of(process, "trailing"), num_steps, "trailing", final=final)


def linspace(process: Process, num_steps: int, *, final: str = "zero", skip_last: bool = False) -> schedules.Grid:
    """Returns the steps that diffusers' "linspace" schedulers visit (`grids.spaced_grid`)."""
    return grids.spaced_grid(chain_of(process, "linspace"), num_steps, "linspace", 0, final, skip_last)


def chain_of(process: Process, spacing: str) -> schedules.Schedule:
    """Returns the chain of a process. Raises ValueError where it is none."""
    if process.schedule is None:
        raise ValueError(f"sampling.grid.name={spacing} spaces the steps of a chain: it needs process.name=ddpm")
    return process.schedule


GRIDS = {
    "uniform": uniform,
    "quadratic": quadratic,
    "log_snr": log_snr,
    "karras": karras,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
}


def of_name(table: Mapping[str, Any], name: str, where: str) -> Any:
    """Returns `table[name]`. Raises ValueError, naming the choices, where there is none."""
    if name not in table:
        raise ValueError(f"{where} is {name!r}: choose from {', '.join(table)}")
    return table[name]


def make_draw(config: Config) -> Callable[[jax.Array, int], jax.Array]:
    """Returns (key, batch size) -> u in (0, 1), as `config.loss.draw` says."""
    return of_name({"uniform": weightings.uniform, "stratified": weightings.stratified}, config.loss.draw, "loss.draw")


def make_weight(config: Config, process: Process) -> Callable[[jax.Array], Any]:
    """Returns time -> the weight of the mean squared error of the network's output, as `config.loss.weighting` says.

    Raises:
      ValueError: an unknown name, or one that this process does not have.
    """
    kind, schedule = config.loss.prediction, process.schedule

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
    if config.loss.weighting == "vlb" and schedule is None:
        raise ValueError("loss.weighting=vlb weighs the steps of a chain: it needs process.name=ddpm")
    return of_name(weights, config.loss.weighting, "loss.weighting")


SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "euler": samplers.ddim,  # what it is on a flow's grid
    "heun": samplers.heun,
    "dpm_solver_pp": samplers.dpm_solver_pp,
    "unipc": samplers.unipc,
}
THRESHOLDS = {"clip": guidance.clip, "dynamic": guidance.dynamic_threshold, "none": lambda denoise: denoise}


class Sampling(NamedTuple):
    """How a trained model is sampled.

    Attributes:
      sampler: (denoise, x_T, grid, key) -> x_0.
      grid: where it steps.
      scale: of classifier-free guidance; 1 is none.
      interval: (first, last) time, as the network is given it, at which guidance acts; None: always.
      threshold: of x_0_hat, a Denoise -> Denoise.
    """

    sampler: Callable[..., Any]
    grid: schedules.Grid
    scale: float
    interval: tuple[float, float] | None
    threshold: Callable[[Denoise], Denoise]

    def guide(self, conditional: Denoise, unconditional: Denoise) -> Denoise:
        """Returns `conditional` led away from `unconditional`, with its x_0_hat bounded."""
        denoise = guidance.classifier_free(conditional, unconditional, self.scale)
        if self.interval:
            denoise = guidance.limited_interval(denoise, conditional, *self.interval)
        return self.threshold(denoise)


def make_sampling(config: Config, process: Process) -> Sampling:
    """Returns what `config.sampling` says.

    Raises:
      ValueError: an unknown name or field, a number that cannot be, a grid that the process does not have, a variance
        that was not learned, or a prediction that holds no image where the grid begins.
    """
    settings = config.sampling
    if settings.sampler.get("variance") == "learned" and not config.loss.learned_variance:
        raise ValueError(
            "sampling.sampler.variance=learned needs a network trained with loss.learned_variance=True: "
            "use large or small"
        )
    if not math.isfinite(settings.guidance):
        raise ValueError(f"sampling.guidance is {settings.guidance}: give a finite number (1 is no guidance)")
    if settings.batch_size < 1:
        raise ValueError(f"sampling.batch_size is {settings.batch_size}: it has to be at least 1")
    grid = pick(GRIDS, settings.grid, "sampling.grid")(process, settings.num_steps)
    if config.loss.prediction == "eps" and grid.signal[0] == 0:
        raise ValueError(
            "loss.prediction=eps holds no image where sampling begins, for there the signal is 0: predict v, velocity "
            "or x_0"
        )
    return Sampling(
        pick(SAMPLERS, settings.sampler, "sampling.sampler"),
        grid,
        float(settings.guidance),
        guided_times(grid, tuple(settings.guidance_interval)),
        pick(THRESHOLDS, settings.threshold, "sampling.threshold"),
    )


def guided_times(grid: schedules.Grid, interval: tuple[float, ...]) -> tuple[float, float] | None:
    """Returns the least and largest time of the grid at which noise / signal is within `interval`; None: everywhere.

    The unit of the interval is the same for every process: sigma, as in Kynkäänniemi et al. (2024).

    Raises:
      ValueError: it is no pair of numbers that rise, or no step of the grid is within it.
    """
    if not interval:
        return None
    if len(interval) != 2 or not interval[0] < interval[1]:
        raise ValueError(
            f"sampling.guidance_interval is {interval}: give the least and the largest noise / signal, as (0.3, 5.0), "
            "or () for no limit"
        )
    signal, noise, time = (np.asarray(field, np.float64)[:-1] for field in grid)
    with np.errstate(divide="ignore"):
        sigma = noise / signal
    within = time[(interval[0] <= sigma) & (sigma <= interval[1])]
    if not len(within):
        raise ValueError(
            f"sampling.guidance_interval={interval}: no step of the grid has noise / signal within it, they have "
            f"{sigma.min():.3g} to {sigma.max():.3g}"
        )
    return float(within.min()), float(within.max())
