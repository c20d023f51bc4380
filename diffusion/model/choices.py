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

from diffusion import guidance, predictions, samplers, schedules, weightings
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
      grid: (spacing, num_steps, shift) -> the grid that sampling follows.
      time_scale: factor on time in the network's embedding.
      schedule: DDPM's chain; None for a process that is none.
    """

    at: predictions.Process
    quantile: Callable[[jax.Array], jax.Array]
    grid: Callable[[str, int, float], schedules.Grid]
    time_scale: float
    schedule: schedules.Schedule | None = None


def fields_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the settings of a choice with their defaults: its keyword arguments, less those that are `GIVEN`."""
    parameters = inspect.signature(function).parameters.values()
    found = {one.name: one.default for one in parameters if one.default is not inspect.Parameter.empty}
    return {name: default for name, default in found.items() if name not in GIVEN | {"name"}}


def pick(table: Mapping[str, Callable[..., Any]], block: Mapping[str, Any], where: str) -> Callable[..., Any]:
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


def ddpm(*, beta: str = "linear", first: float = 1e-4, last: float = 0.02, num_steps: int = 1000) -> Process:
    """Returns DDPM's discrete chain (Ho et al. 2020); the network's time is t - 1."""
    tables = {
        "linear": lambda: schedules.linear_beta(num_steps, first, last),
        "cosine": lambda: schedules.cosine_beta(num_steps),
    }
    schedule = schedules.make_schedule(of_name(tables, beta, "process.beta")())
    even = partial(schedules.ddpm_grid, schedule)

    def quantile(u: jax.Array) -> jax.Array:
        return (weightings.step_quantile(u, num_steps) - 1).astype(jnp.float32)

    return Process(
        schedules.discrete_process(schedule), quantile, unshifted(partial(spaced, even, even(num_steps))), 1.0, schedule
    )


def vp() -> Process:
    """Returns the continuous variance-preserving process with the cosine log-SNR (Kingma et al. 2021)."""
    process = schedules.vp_process(schedules.cosine_log_snr())
    even = partial(schedules.process_grid, process)
    return Process(process, lambda u: u, unshifted(partial(spaced, even, even(1000))), time_scale=1000.0)


def flow(*, times: str = "uniform") -> Process:
    """Returns rectified flow with one of SD3's distributions over training times (Esser et al. 2024, section 3.1)."""
    process = schedules.flow_process

    def grid(spacing: str, num_steps: int, shift: float) -> schedules.Grid:
        def even(num_steps: int, power: float = 1.0) -> schedules.Grid:
            if power == 1.0:
                return schedules.flow_grid(num_steps, shift)
            return schedules.process_grid(process, num_steps, power)

        return spaced(even, schedules.flow_grid(1000), spacing, num_steps)

    quantiles = {
        "uniform": lambda u: u,
        "logit_normal": weightings.logit_normal_quantile,
        "mode": weightings.mode_quantile,
        "cosmap": weightings.cosmap_quantile,
    }
    return Process(process, of_name(quantiles, times, "process.times"), grid, time_scale=1000.0)


def edm() -> Process:
    """Returns EDM's variance-exploding process (Karras et al. 2022)."""
    rho = {"karras": 7.0, "log_snr": math.inf}

    def grid(spacing: str, num_steps: int) -> schedules.Grid:
        return schedules.karras_grid(num_steps, rho=of_name(rho, spacing, "sampling.grid of an edm process"))

    return Process(schedules.edm_process, weightings.log_normal_quantile, unshifted(grid), time_scale=1.0)


PROCESSES = {"ddpm": ddpm, "vp": vp, "flow": flow, "edm": edm}


def spaced(even: Callable[..., schedules.Grid], fine: schedules.Grid, spacing: str, num_steps: int) -> schedules.Grid:
    """Returns a grid of `num_steps`, `even` in time or picked from the points of `fine`, as `spacing` says."""
    grids = {
        "uniform": lambda: even(num_steps),
        "quadratic": lambda: even(num_steps, power=2.0),
        "log_snr": lambda: schedules.respace(fine, num_steps),
        "karras": lambda: schedules.respace(fine, num_steps, rho=7.0),
    }
    return of_name(grids, spacing, "sampling.grid")()


def unshifted(grid: Callable[[str, int], schedules.Grid]) -> Callable[[str, int, float], schedules.Grid]:
    """Returns the grids of a process whose times cannot be shifted."""

    def of(spacing: str, num_steps: int, shift: float) -> schedules.Grid:
        if shift != 1.0:
            raise ValueError(f"sampling.shift={shift:g} moves the times of a flow: it needs process.name=flow")
        return grid(spacing, num_steps)

    return of


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
      interval: (first, last) time at which guidance acts; empty: always.
      threshold: of x_0_hat, a Denoise -> Denoise.
    """

    sampler: Callable[..., Any]
    grid: schedules.Grid
    scale: float
    interval: tuple[float, ...]
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
      ValueError: an unknown name or field, a grid that the process does not have, or a variance that was not learned.
    """
    settings = config.sampling
    if settings.sampler.get("variance") == "learned" and not config.loss.learned_variance:
        raise ValueError(
            "sampling.sampler.variance=learned needs a network trained with loss.learned_variance=True: "
            "use large or small"
        )
    return Sampling(
        pick(SAMPLERS, settings.sampler, "sampling.sampler"),
        process.grid(settings.grid, settings.num_steps, settings.shift),
        float(settings.guidance),
        tuple(settings.guidance_interval),
        of_name(THRESHOLDS, settings.threshold, "sampling.threshold"),
    )
