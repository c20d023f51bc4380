"""Multistep samplers: DPM-Solver++ and UniPC. Import the names from `samplers`.

Both take x' = n'/n x + s' sum_k w_k D_k over the newest x_0_hats D, where w_k integrates the polynomial through them
over an interval of log-SNR of length h.
"""

from collections.abc import Callable
from functools import partial

import jax.numpy as jnp
from jax import Array

from diffusion.schedules import Grid
from diffusion.stepping import Sampled, ends, evaluate, ratio, solve, widened
from diffusion.types import Denoise, Images, Keys


def dpm_solver_pp(
    denoise: Denoise,
    x_T: Images,
    grid: Grid,
    key: Keys | None = None,
    order: int = 2,
    *,
    solver_type: str = "midpoint",
    as_released: bool = False,
    trajectory: bool = False,
) -> Sampled:
    """Samples by multistep DPM-Solver++.

    The first steps have lower order for want of a history, and so have the last ones where the grid ends in n' = 0, as
    log-SNR is infinite there.

    Args:
      denoise: (x_t, time) -> x_0_hat.
      x_T: float[B, ...] at the grid's first point.
      grid: where to step.
      key: not used.
      order: 1 (which is DDIM), 2 or 3.
      solver_type: how steps of order 2 weigh the difference of x_0_hats: "midpoint" as in the paper's Algorithm 2,
        "heun" by the exact integral. Both are of order 2.
      as_released: repeat diffusers' samples: half of the second difference at order 3, which makes it a method of order
        2, and the last two steps of order 1 and 2 on every grid of fewer than 15 steps, else the last one at n' = 0.
      trajectory: also return x_0_hats.

    Source: Lu et al. 2022, "DPM-Solver++", Algorithm 2.

    Raises:
      ValueError: another order or solver_type.

    Example:
      >>> from diffusion.schedules import flow_grid
      >>> print(dpm_solver_pp(lambda x_t, time: 0.5 * jnp.ones_like(x_t), jnp.ones((1, 2)), flow_grid(4)))
      [[0.5 0.5]]
    """
    if solver_type not in ("midpoint", "heun"):
        raise ValueError(f"unknown solver_type {solver_type!r}: choose from midpoint, heun")
    num_steps = grid.signal.shape[0] - 1
    left = num_steps - jnp.arange(num_steps)  # 1 at the last step
    at_clean_data = grid.noise[-1] == 0
    if not as_released:
        largest = jnp.where(at_clean_data, left, order)
    elif num_steps < 15:
        largest = left
    else:
        largest = jnp.where(at_clean_data & (left == 1), 1, order)
    weigh = partial(_integration_weights, halve_1=solver_type == "midpoint", halve_2=as_released)
    return _multistep(denoise, x_T, grid, order, largest, weigh, False, trajectory)


def unipc(
    denoise: Denoise,
    x_T: Images,
    grid: Grid,
    key: Keys | None = None,
    order: int = 2,
    *,
    trajectory: bool = False,
) -> Sampled:
    """Samples by UniPC with B(h) = e^h - 1 in x_0's terms.

    Each step is DPM-Solver++'s; once x_0_hat at its end is evaluated, the step is repeated with that one too, at no
    further evaluation.

    Args:
      denoise: (x_t, time) -> x_0_hat.
      x_T: float[B, ...] at the grid's first point.
      grid: where to step.
      key: not used.
      order: 1, 2 or 3, lowered as in `dpm_solver_pp`.
      trajectory: also return x_0_hats.

    Source: Zhao et al. 2023, Algorithms 5 and 6.

    Raises:
      ValueError: another order.

    Example:
      >>> from diffusion.schedules import flow_grid
      >>> print(unipc(lambda x_t, time: 0.5 * jnp.ones_like(x_t), jnp.ones((1, 2)), flow_grid(4)))
      [[0.5 0.5]]
    """
    num_steps = grid.signal.shape[0] - 1
    largest = jnp.where(grid.noise[-1] > 0, order, num_steps - jnp.arange(num_steps))
    weigh = partial(_integration_weights, halve_1=True, halve_2=False)
    return _multistep(denoise, x_T, grid, order, largest, weigh, True, trajectory)


def _multistep(
    denoise: Denoise,
    x_T: Images,
    grid: Grid,
    order: int,
    largest: Array,
    weigh: Callable[[Array, list[Array]], list[Array]],
    corrected: bool,
    trajectory: bool,
) -> Sampled:
    """Steps with the order of each step at most `largest` [N]; `weigh(h, nodes)` returns w."""
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}: it has to be 1, 2 or 3.")
    here, there = ends(grid)
    r = ratio(here, there)
    h = -jnp.log(jnp.maximum(r, jnp.finfo(r.dtype).tiny))
    num_steps = h.shape[0]
    orders = jnp.minimum(jnp.minimum(order, jnp.arange(num_steps) + 1), largest)

    lengths = [jnp.concatenate([jnp.ones(k, h.dtype), h])[:num_steps] / h for k in (1, 2)]  # of the intervals before
    nodes = [jnp.zeros_like(h), -lengths[0], -lengths[0] - lengths[1]]

    def weights(ahead: list[Array]) -> Array:
        """Weights [N, ...] of x and the D at `ahead` and `nodes`; 0 where an interval's order leaves a node out."""
        table = jnp.zeros((num_steps, len(ahead) + order), h.dtype)
        for k in range(1, order + 1):
            chosen = jnp.stack(weigh(h, ahead + nodes[:k]), axis=1)
            table = table.at[:, : len(ahead) + k].add(jnp.where(orders[:, None] == k, chosen, 0.0))
        return jnp.concatenate([(there.noise / here.noise)[:, None], there.signal[:, None] * table], axis=1)

    predictor = weights([])
    # x at a point is corrected one scan step after it was predicted: when x_0_hat has been evaluated there.
    corrector = jnp.roll(weights([jnp.ones_like(h)]), 1, axis=0) if corrected else None

    def step(x, memory, interval, predictor, corrector):
        index, here, _ = interval
        x_before, history = memory
        x_0_hat = evaluate(denoise, x, here).x_0_hat
        if corrector is not None:
            x = jnp.where(index > 0, _combine(corrector, (x_before, x_0_hat, *history)), x)
        history = (x_0_hat, *history[:-1])
        return _combine(predictor, (x, *history)), (x, history), x_0_hat

    x_T = widened(x_T, grid)
    memory = (x_T, (jnp.zeros_like(x_T),) * order)
    return solve(step, x_T, memory, grid, trajectory, predictor, corrector)


def _integration_weights(h: Array, nodes: list[Array], halve_1: bool, halve_2: bool) -> list[Array]:
    """Returns w_k such that sum_k w_k f(node_k) is the integral of h exp(-h (1 - u)) f(u) over u in [0, 1].

    Exact for the polynomial f through the nodes, except that with `halve_1` two nodes take half the 0th moment for the
    1st, as DPM-Solver++(2M) and UniPC do, and with `halve_2` three take half the 2nd.
    """
    moments = [-jnp.expm1(-h)]
    for j in range(1, len(nodes)):
        moments.append(1 - j * moments[-1] / h)
    if len(nodes) == 2 and halve_1:
        moments[1] = moments[0] / 2
    if len(nodes) == 3 and halve_2:
        moments[2] = moments[2] / 2
    weights = []
    for k, node in enumerate(nodes):
        lagrange = [jnp.ones_like(h)]  # the coefficients of the polynomial that is 1 at this node, 0 at the others
        for other in nodes[:k] + nodes[k + 1 :]:
            shifted = zip([0.0, *lagrange], [*lagrange, 0.0], strict=True)
            lagrange = [(low - other * high) / (node - other) for low, high in shifted]
        weights.append(sum(c * m for c, m in zip(lagrange, moments, strict=True)))
    return weights


def _combine(weights: Array, values: tuple[Array, ...]) -> Array:
    return sum((weight * value for weight, value in zip(weights, values, strict=True)), jnp.zeros_like(values[0]))
