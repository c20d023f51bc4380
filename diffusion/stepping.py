"""What the samplers share: the scan over a grid's intervals, and the parts of a step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffusion.schedules import Grid
from diffusion.types import Denoise, Denoised, Images, denoised

Sampled = Any  # x_0, or with trajectory=True (x_0, x_0_hats)


def solve(
    step: Callable[..., tuple[Array, Any, Array]], x_T: Images, memory: Any, grid: Grid, trajectory: bool, *inputs: Any
) -> Sampled:
    """Scans step(x, memory, (index, here, there), *inputs) -> (x', memory', x_0_hat) over the grid's intervals."""
    here, there = ends(grid)
    index = jnp.arange(here.signal.shape[0])

    def body(carry, inputs):
        x, memory, x_0_hat = step(*carry, *inputs)
        return (x, memory), x_0_hat if trajectory else None

    (x_0, _), x_0_hats = lax.scan(body, (widened(x_T, grid), memory), ((index, here, there), *inputs))
    return (x_0, x_0_hats) if trajectory else x_0


def ends(grid: Grid) -> tuple[Grid, Grid]:
    """Returns where the grid's intervals begin, and where they end.

    Raises:
      ValueError: noise / signal does not fall, or there is no interval.
    """
    values = known(grid)
    if values and not np.all(np.diff(values["noise"] / np.maximum(values["signal"], 1e-30)) < 0):
        raise ValueError("noise / signal has to fall from each point of the grid to the next: choose fewer steps.")
    if grid.signal.shape[0] < 2:
        raise ValueError("the grid has no step: it needs at least 2 points.")
    return Grid(*(field[:-1] for field in grid)), Grid(*(field[1:] for field in grid))


def ratio(here: Grid, there: Grid) -> Array:
    """Returns r = exp(-h): 0 where the step starts from pure noise or ends in clean data."""
    return (there.noise * here.signal) / (here.noise * there.signal)


def towards(x: Array, x_0_hat: Array, here: Grid, there: Grid, kept: Array) -> Array:
    """Returns s' x_0_hat + kept n' eps_hat, with eps_hat = (x - s x_0_hat) / n."""
    scale = kept * there.noise / here.noise
    return scale * x + (there.signal - scale * here.signal) * x_0_hat


def evaluate(denoise: Denoise, x: Array, point: Grid) -> Denoised:
    """Returns what denoise returns for x at a point of the grid, in x's float."""
    return jax.tree.map(lambda field: field.astype(x.dtype), denoised(denoise(x, point.time)))


def widened(x_T: Images, grid: Grid) -> Array:
    """Returns x_T in the wider of its float and the grid's."""
    return jnp.asarray(x_T, jnp.promote_types(x_T.dtype, grid.signal.dtype))


def known(grid: Grid) -> dict[str, np.ndarray]:
    """Returns the grid's values, to check them; nothing where the grid is itself an argument of a jitted function."""
    if any(isinstance(field, jax.core.Tracer) for field in grid):
        return {}
    return {name: np.asarray(field, np.float64) for name, field in grid._asdict().items()}
