"""How a trained model is sampled: samplers, grids and thresholds by name, guidance."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from diffusion import consistency, flow_map, grids, guidance, policies, samplers, schedules
from diffusion.model.choices import pick
from diffusion.model.config import Config
from diffusion.model.losses import make_objective
from diffusion.model.objectives import Objective
from diffusion.model.processes import Process, is_flow
from diffusion.samplers import Denoise


def uniform(process: Process, num_steps: int, *, shift: float = 1.0) -> schedules.Grid:
    """Returns steps even in time, of a flow shifted towards noise.

    Args:
      process: whose times they are.
      num_steps: of the sampler.
      shift: of a flow's times towards noise (Esser et al. 2024, eq. 23); 1: none.
    """
    return process.even(num_steps, 1.0, shift)


def quadratic(process: Process, num_steps: int) -> schedules.Grid:
    """Returns DDIM's quadratic spacing, closer together near the data."""
    return process.even(num_steps, 2.0, 1.0)


def log_snr(process: Process, num_steps: int) -> schedules.Grid:
    """Returns steps even in log-SNR."""
    return process.respaced(num_steps, math.inf)


def karras(process: Process, num_steps: int, *, rho: float = 7.0) -> schedules.Grid:
    """Returns Karras et al.'s spacing of noise / signal.

    Args:
      process: whose times they are.
      num_steps: of the sampler.
      rho: 1: steps even in noise / signal; the larger, the more of them near the data.
    """
    return process.respaced(num_steps, rho)


def consistency_levels(process: Process, num_steps: int, *, rho: float = 20.0) -> schedules.Grid:
    """Returns `karras` with one step more and without its last noise level, at which a consistency model is done.

    Of EDM's process 2 steps start at sigma 80 and, with rho = 20, at 0.8.
    """
    grid = process.respaced(num_steps + 1, rho)
    return schedules.Grid(*(jnp.asarray(np.delete(np.asarray(field), -2)) for field in grid))


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


def released_flow(process: Process, num_steps: int, *, shift: float = 1.0) -> schedules.Grid:
    """Returns the times of Stable Diffusion 3's released code and of diffusers (`grids.released_flow_grid`).

    Args:
      process: a flow.
      num_steps: of the sampler.
      shift: of the times towards noise.
    """
    check_flow(process, "released_flow")
    return grids.released_flow_grid(num_steps, shift)


def flux2(process: Process, num_steps: int) -> schedules.Grid:
    """Returns the times of FLUX.2's pipelines, which depend on the size of the picture (`grids.flux2_grid`)."""
    check_flow(process, "flux2")
    return grids.flux2_grid(num_steps, process.num_tokens)


def check_flow(process: Process, name: str) -> None:
    """Raises ValueError where a grid for a flow's straight lines from noise to data is asked of another process."""
    if not is_flow(process):
        raise ValueError(f"sampling.grid.name={name} has the times of a flow: it needs process.name=flow")


GRIDS = {
    "uniform": uniform,
    "quadratic": quadratic,
    "log_snr": log_snr,
    "karras": karras,
    "consistency": consistency_levels,
    "leading": leading,
    "trailing": trailing,
    "linspace": linspace,
    "released_flow": released_flow,
    "flux2": flux2,
}


SAMPLERS = {
    "ancestral": samplers.ancestral,
    "ddim": samplers.ddim,
    "euler": samplers.ddim,  # what it is on a flow's grid
    "heun": samplers.heun,
    "dpm_solver_pp": samplers.dpm_solver_pp,
    "unipc": samplers.unipc,
    "mean_flow": flow_map.mean_flow,
    "multistep_consistency": consistency.multistep_consistency,
    "policy": policies.policy,
}
ASKS = {
    "mean_flow": "jump",
    "multistep_consistency": "end",
    "policy": "policy",
}  # all others: "denoise"; see `Objective.gives`
THRESHOLDS = {"clip": guidance.clip, "dynamic": guidance.dynamic_threshold, "none": lambda denoise: denoise}


class Skip(NamedTuple):
    """Layers that guidance leads away from doing without; see `guidance.skip_layer`.

    Attributes:
      layers: their numbers.
      scale: of the guidance.
      first, last: time between which it acts.
    """

    layers: tuple[int, ...]
    scale: float
    first: float
    last: float


class Sampling(NamedTuple):
    """How a trained model is sampled.

    Attributes:
      sampler: (denoise, x_T, grid, key) -> x_0.
      grid: where it steps.
      scale: of classifier-free guidance; 1 is none.
      interval: (first, last) time, as the network is given it, at which guidance acts; None: always.
      threshold: of x_0_hat, a Denoise -> Denoise.
      skip: layers that are skipped for guidance; None: none are.
      asks: what the sampler is given in place of a denoiser, see `Objective.gives`.
    """

    sampler: Callable[..., Any]
    grid: schedules.Grid
    scale: float
    interval: tuple[float, float] | None
    threshold: Callable[[Denoise], Denoise]
    skip: Skip | None = None
    asks: str = "denoise"

    def guide(self, conditional: Denoise, pair: Callable[..., Any], without: Denoise | None = None) -> Denoise:
        """Returns `conditional` guided, with its x_0_hat bounded; `pair` and `without` are those of `skip_layer`."""
        if self.scale == 1.0:
            return self.threshold(conditional)
        denoise = guidance.classifier_free_pair(pair, self.scale)
        if self.skip and without:
            led = guidance.skip_layer(pair, without, self.scale, self.skip.scale)
            denoise = guidance.limited_interval(led, denoise, self.skip.first, self.skip.last)
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
    objective = make_objective(config, process)
    if settings.sampler.get("variance") == "learned" and not objective.learned_variance:
        raise ValueError(
            "sampling.sampler.variance=learned needs a network trained with loss.learned_variance=True: "
            "use large or small"
        )
    if not math.isfinite(settings.guidance):
        raise ValueError(f"sampling.guidance is {settings.guidance}: give a finite number (1 is no guidance)")
    if settings.batch_size < 1:
        raise ValueError(f"sampling.batch_size is {settings.batch_size}: it has to be at least 1")
    grid = pick(GRIDS, settings.grid, "sampling.grid")(process, settings.num_steps)
    if objective.prediction == "eps" and grid.signal[0] == 0:
        raise ValueError(
            "loss.prediction=eps holds no image where sampling begins, for there the signal is 0: predict v, velocity "
            "or x_0"
        )
    sampler = pick(SAMPLERS, settings.sampler, "sampling.sampler")
    asks = ASKS.get(settings.sampler.name, "denoise")
    if asks not in objective.gives:
        fit = [name for name in SAMPLERS if ASKS.get(name, "denoise") in objective.gives]
        raise ValueError(
            f"sampling.sampler.name={settings.sampler.name} does not draw with what loss.name={config.loss.name} "
            f"trains: choose from {', '.join(fit)}"
        )
    if asks == "policy":
        check_policy(config, grid, objective)
    return Sampling(
        sampler,
        grid,
        float(settings.guidance),
        guided_times(grid, tuple(settings.guidance_interval)),
        pick(THRESHOLDS, settings.threshold, "sampling.threshold"),
        skipped(config, grid),
        asks,
    )


def is_trained_on(objective: Objective, grid: schedules.Grid) -> bool:
    """Returns whether a grid is one of those whose steps the network was trained to take."""
    trained = [np.asarray(one.time) for one in objective.grids]
    return any(len(time) == len(grid.time) and np.allclose(time, grid.time, atol=1e-6) for time in trained)


def check_policy(config: Config, grid: schedules.Grid, objective: Objective) -> None:
    """Raises ValueError where a policy is to be drawn with otherwise than it was trained."""
    settings, loss = config.sampling, config.loss
    if not is_trained_on(objective, grid):
        raise ValueError(
            f"sampling.num_steps={settings.num_steps} on this grid: the policy was trained for "
            f"{' or '.join(map(str, loss.num_steps))} steps of sampling.grid.name=uniform with shift {loss.shift:g}"
        )
    if settings.sampler.shift != loss.shift:
        raise ValueError(
            f"sampling.sampler.shift={settings.sampler.shift:g}: the policy was trained with loss.shift={loss.shift:g}"
        )
    if settings.guidance != 1.0:
        raise ValueError(f"sampling.guidance={settings.guidance:g}: a policy has its teacher's already, leave it at 1")


def skipped(config: Config, grid: schedules.Grid) -> Skip | None:
    """Returns what `config.sampling` says of skipped layers; None where there are none.

    Raises:
      ValueError: the network has no such layers, or no step is within their interval.
    """
    settings = config.sampling
    layers = settings.get("skip_layers", ())
    if not layers:
        return None
    if config.network.name != "mmdit" or not all(layer in range(config.network.depth) for layer in layers):
        raise ValueError(f"sampling.skip_layers={tuple(layers)}: this network has no such blocks")
    if len(settings.skip_interval) != 2:
        raise ValueError(f"sampling.skip_interval is {settings.skip_interval}: give two shares of the steps")
    (first, last), time = settings.skip_interval, np.asarray(grid.time)[:-1]
    within = time[[first * len(time) < i < last * len(time) for i in range(len(time))]]
    if not len(within):
        raise ValueError(
            f"sampling.skip_interval={tuple(settings.skip_interval)}: no step of {len(time)} is within, leave out "
            "skip_layers or widen it"
        )
    return Skip(tuple(layers), float(settings.skip_scale), float(within.min()), float(within.max()))


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
