"""Samplers: from noise x_T along a grid to x_0, each one `lax.scan` over the grid's intervals.

`denoise(x_t, time) -> x_0_hat` is all a sampler knows of a network; `predictions.denoiser` makes it of any kind. x_T
is the image at the grid's first point: `grid.noise[0]` times standard normal noise (plus `grid.signal[0]` times x_0 to
start from an image). Every formula holds for any process x = signal * x_0 + noise * eps and is finite at signal = 0,
where flow starts, and at noise = 0, where every grid ends. A step goes from (s, n) to (s', n'); with lambda = log(s/n),

    h = lambda' - lambda,   r = exp(-h) = (n' s) / (n s').

All samplers take `trajectory=True` and then return (x_0, x_0_hats[N, ...]): what the network saw in x at every step.
They compute in the wider of x_T's float and the grid's, whatever float the network returns. Call them inside `jax.jit`
(or jit `functools.partial(ddim, denoise, grid=grid)`), as any scan is compiled anew at each call outside it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from diffusion.randomness import fold_in, normal_like
from diffusion.schedules import Grid
from diffusion.types import Denoise, Denoised, Images, Keys, denoised

Sampled = Any  # x_0, or with trajectory=True (x_0, x_0_hats)


def ancestral(
    denoise: Denoise, x_T: Images, grid: Grid, key: Keys, variance: str = "large", *, trajectory: bool = False
) -> Sampled:
    """Samples by DDPM's Algorithm 2, on any grid: x' ~ N(posterior mean of x' given x and x_0_hat, variance).

    `variance` is "small", the posterior's (n'^2 (1 - r^2), DDPM's beta tilde, right for x_0 a point); "large", the
    forward step's (n^2 (1 - r^2), DDPM's beta); or "learned": `denoise` returns (x_0_hat, v), and v, -1 for small to 1
    for large, interpolates their logarithms (Nichol & Dhariwal 2021, eq. 15). The last step, to n' = 0, adds no noise.
    On the full grid of a DDPM chain these are DDPM's eqs. 6-7 exactly. Raises ValueError where the variance is unknown,
    is beta's ("large", "learned") though the grid does not preserve variance, or is to be learned but `denoise` gives
    no v. `key` is one key or one an image.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"variance is {variance!r}: choose 'small', 'large' or 'learned'.")
    known = _known(grid)
    if known and variance != "small" and not np.allclose(known["signal"] ** 2 + known["noise"] ** 2, 1, atol=1e-3):
        raise ValueError(
            f"variance={variance!r} is DDPM's beta, and this grid is of no DDPM process (signal^2 + noise^2 is not 1): "
            "use variance='small'."
        )

    def step(x, _, interval):
        index, here, there = interval
        output = _evaluate(denoise, x, here)
        if variance != "learned":
            share = 0.0 if variance == "small" else 1.0
        elif output.v is not None:
            share = (output.v + 1) / 2
        else:
            raise ValueError("variance='learned' needs a denoise that returns (x_0_hat, v): use 'small' or 'large'.")
        r = _ratio(here, there)
        std = here.noise * jnp.power(there.noise / here.noise, 1 - share) * jnp.sqrt(1 - r**2)
        std = jnp.where(there.noise > 0, std, 0.0)
        x = _towards(x, output.x_0_hat, here, there, r) + std * normal_like(fold_in(key, index), x)
        return x, None, output.x_0_hat

    return _solve(step, x_T, None, grid, trajectory)


def ddim(
    denoise: Denoise,
    x_T: Images,
    grid: Grid,
    key: Keys | None = None,
    eta: float = 0.0,
    *,
    trajectory: bool = False,
) -> Sampled:
    """Samples by DDIM (Song et al. 2021, eq. 12); on a flow grid this is Euler's method for the velocity.

    eta = 0 is deterministic; eta = 1 draws as `ancestral` with the small variance. `key` is one key or one an image.
    Raises ValueError where eta is outside [0, 1], or above 0 without a key.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it has to lie in [0, 1].")
    if eta > 0 and key is None:
        raise ValueError("ddim with eta > 0 draws noise: give it a key.")

    def step(x, _, interval):
        index, here, there = interval
        x_0_hat = _evaluate(denoise, x, here).x_0_hat
        fresh = eta**2 * (1 - _ratio(here, there) ** 2)  # the share of the noise' variance that is drawn anew
        x = _towards(x, x_0_hat, here, there, jnp.sqrt(1 - fresh))
        if key is not None and eta > 0:
            x = x + there.noise * jnp.sqrt(fresh) * normal_like(fold_in(key, index), x)
        return x, None, x_0_hat

    return _solve(step, x_T, None, grid, trajectory)


def heun(
    denoise: Denoise,
    x_T: Images,
    grid: Grid,
    key: Keys | None = None,
    *,
    s_churn: float = 0.0,
    s_min: float = 0.0,
    s_max: float = float("inf"),
    s_noise: float = 1.0,
    trajectory: bool = False,
) -> Sampled:
    """Samples by Heun's method, the trapezoidal rule for dx = x_0_hat ds + eps_hat dn; order 2, 2N - 1 evaluations.

    On EDM's grid this is Karras et al. 2022, Algorithm 2 with their `s_churn`, `s_min`, `s_max` and `s_noise`, and on a
    flow grid Heun's method for the velocity. The step to n' = 0 is Euler's. Raises ValueError where s_churn is above 0
    without a key, or on a grid other than EDM's, whose time for the raised noise level is not known.
    """
    num_steps = grid.signal.shape[0] - 1
    if s_churn > 0 and key is None:
        raise ValueError("heun with s_churn > 0 draws noise: give it a key.")
    known = _known(grid)
    if known and s_churn > 0 and not np.allclose(np.exp(4 * known["time"]), known["noise"], rtol=1e-3):
        raise ValueError("s_churn raises the noise level, and only EDM's grids (karras_grid) can: use s_churn=0.")

    def step(x, _, interval):
        index, here, there = interval
        if key is not None and s_churn > 0:
            within = (s_min <= here.noise) & (here.noise <= s_max)
            gamma = jnp.where(within, min(s_churn / num_steps, 2**0.5 - 1), 0.0)
            raised = Grid(here.signal, here.noise * (1 + gamma), here.time + jnp.log1p(gamma) / 4)
            fresh = s_noise * here.noise * jnp.sqrt(gamma * (2 + gamma))
            x, here = x + fresh * normal_like(fold_in(key, index), x), raised
        x_0_hat = _evaluate(denoise, x, here).x_0_hat
        eps_hat = (x - here.signal * x_0_hat) / here.noise
        euler = there.signal * x_0_hat + there.noise * eps_hat

        def corrected():
            x_0_there = _evaluate(denoise, euler, there).x_0_hat
            eps_there = (euler - there.signal * x_0_there) / there.noise
            ds, dn = there.signal - here.signal, there.noise - here.noise
            return x + ds * (x_0_hat + x_0_there) / 2 + dn * (eps_hat + eps_there) / 2

        return lax.cond(there.noise > 0, corrected, lambda: euler), None, x_0_hat

    return _solve(step, x_T, None, grid, trajectory)


def dpm_solver_pp(
    denoise: Denoise,
    x_T: Images,
    grid: Grid,
    key: Keys | None = None,
    order: int = 2,
    *,
    as_released: bool = False,
    trajectory: bool = False,
) -> Sampled:
    """Samples by multistep DPM-Solver++ of order 1 (which is DDIM), 2 or 3 (Lu et al. 2022, Algorithm 2).

    The first steps have lower order for want of a history, and so have the last ones where the grid ends in n' = 0, as
    log-SNR is infinite there. The authors' and diffusers' code takes half of the second difference at order 3, which
    makes it a method of order 2: `as_released=True` does so too, to repeat their samples. Raises ValueError where order
    is not 1, 2 or 3.
    """
    return _exponential_multistep(denoise, x_T, grid, order, False, trajectory, as_released)


def unipc(
    denoise: Denoise,
    x_T: Images,
    grid: Grid,
    key: Keys | None = None,
    order: int = 2,
    *,
    trajectory: bool = False,
) -> Sampled:
    """Samples by UniPC of order 1, 2 or 3 with B(h) = e^h - 1 in x_0's terms (Zhao et al. 2023, Algorithms 5 and 6).

    DPM-Solver++'s step, then, once x_0_hat is known at its end, the same step again with that one too, at no further
    evaluation. Raises ValueError where order is not 1, 2 or 3.
    """
    return _exponential_multistep(denoise, x_T, grid, order, True, trajectory)


def _exponential_multistep(
    denoise: Denoise, x_T: Images, grid: Grid, order: int, corrected: bool, trajectory: bool, halve: bool = False
) -> Sampled:
    """x' = n'/n x + s' sum_k w_k D_k over the newest x_0_hats D: w_k integrates the polynomial through them over h."""
    if order not in (1, 2, 3):
        raise ValueError(f"order is {order}: it has to be 1, 2 or 3.")
    here, there = _ends(grid)
    r = _ratio(here, there)
    h = -jnp.log(jnp.maximum(r, jnp.finfo(r.dtype).tiny))
    num_steps = h.shape[0]
    index = jnp.arange(num_steps)
    orders = jnp.minimum(order, index + 1)
    orders = jnp.where(grid.noise[-1] > 0, orders, jnp.minimum(orders, num_steps - index))

    lengths = [jnp.concatenate([jnp.ones(k, h.dtype), h])[:num_steps] / h for k in (1, 2)]  # of the intervals before
    nodes = [jnp.zeros_like(h), -lengths[0], -lengths[0] - lengths[1]]

    def weights(ahead: list[Array]) -> Array:
        """Weights [N, ...] of x and the D at `ahead` and `nodes`; 0 where an interval's order leaves a node out."""
        table = jnp.zeros((num_steps, len(ahead) + order), h.dtype)
        for k in range(1, order + 1):
            chosen = jnp.stack(_integration_weights(h, ahead + nodes[:k], halve), axis=1)
            table = table.at[:, : len(ahead) + k].add(jnp.where(orders[:, None] == k, chosen, 0.0))
        return jnp.concatenate([(there.noise / here.noise)[:, None], there.signal[:, None] * table], axis=1)

    predictor = weights([])
    # x at a point is corrected one scan step after it was predicted: when x_0_hat is known there.
    corrector = jnp.roll(weights([jnp.ones_like(h)]), 1, axis=0) if corrected else None

    def step(x, memory, interval, predictor, corrector):
        index, here, _ = interval
        x_before, history = memory
        x_0_hat = _evaluate(denoise, x, here).x_0_hat
        if corrector is not None:
            x = jnp.where(index > 0, _combine(corrector, (x_before, x_0_hat, *history)), x)
        history = (x_0_hat, *history[:-1])
        return _combine(predictor, (x, *history)), (x, history), x_0_hat

    x_T = _widened(x_T, grid)
    memory = (x_T, (jnp.zeros_like(x_T),) * order)
    return _solve(step, x_T, memory, grid, trajectory, predictor, corrector)


def _integration_weights(h: Array, nodes: list[Array], halve: bool) -> list[Array]:
    """w_k such that sum_k w_k f(node_k) is the integral of h exp(-h (1 - u)) f(u) over u in [0, 1].

    Exact for the polynomial f through the nodes, but that two nodes take half the 0th moment for the 1st, as
    DPM-Solver++(2M) and UniPC do, and, asked to `halve`, three take half the 2nd.
    """
    moments = [-jnp.expm1(-h)]
    for j in range(1, len(nodes)):
        moments.append(1 - j * moments[-1] / h)
    if len(nodes) == 2:
        moments[1] = moments[0] / 2
    if len(nodes) == 3 and halve:
        moments[2] = moments[2] / 2
    weights = []
    for k, node in enumerate(nodes):
        lagrange = [jnp.ones_like(h)]  # the coefficients of the polynomial that is 1 at this node, 0 at the others
        for other in nodes[:k] + nodes[k + 1 :]:
            shifted = zip([0.0, *lagrange], [*lagrange, 0.0], strict=True)
            lagrange = [(low - other * high) / (node - other) for low, high in shifted]
        weights.append(sum(c * m for c, m in zip(lagrange, moments, strict=True)))
    return weights


def _solve(
    step: Callable[..., tuple[Array, Any, Array]], x_T: Images, memory: Any, grid: Grid, trajectory: bool, *inputs: Any
) -> Sampled:
    """Scans step(x, memory, (index, here, there), *inputs) -> (x', memory', x_0_hat) over the grid's intervals."""
    here, there = _ends(grid)
    index = jnp.arange(here.signal.shape[0])

    def body(carry, inputs):
        x, memory, x_0_hat = step(*carry, *inputs)
        return (x, memory), x_0_hat if trajectory else None

    (x_0, _), x_0_hats = lax.scan(body, (_widened(x_T, grid), memory), ((index, here, there), *inputs))
    return (x_0, x_0_hats) if trajectory else x_0


def _ends(grid: Grid) -> tuple[Grid, Grid]:
    """Where the grid's intervals begin, and where they end. Raises ValueError where noise / signal does not fall."""
    known = _known(grid)
    if known and not np.all(np.diff(known["noise"] / np.maximum(known["signal"], 1e-30)) < 0):
        raise ValueError("noise / signal has to fall from each point of the grid to the next: choose fewer steps.")
    if grid.signal.shape[0] < 2:
        raise ValueError("the grid has no step: it needs at least 2 points.")
    return Grid(*(field[:-1] for field in grid)), Grid(*(field[1:] for field in grid))


def _ratio(here: Grid, there: Grid) -> Array:
    """r = exp(-h): 0 where the step starts from pure noise or ends in clean data."""
    return (there.noise * here.signal) / (here.noise * there.signal)


def _towards(x: Array, x_0_hat: Array, here: Grid, there: Grid, kept: Array) -> Array:
    """s' x_0_hat + kept n' eps_hat, with eps_hat = (x - s x_0_hat) / n."""
    scale = kept * there.noise / here.noise
    return scale * x + (there.signal - scale * here.signal) * x_0_hat


def _evaluate(denoise: Denoise, x: Array, point: Grid) -> Denoised:
    """Returns what denoise returns for x at a point of the grid, in x's float."""
    return jax.tree.map(lambda field: field.astype(x.dtype), denoised(denoise(x, point.time)))


def _combine(weights: Array, values: tuple[Array, ...]) -> Array:
    return sum((weight * value for weight, value in zip(weights, values, strict=True)), jnp.zeros_like(values[0]))


def _widened(x_T: Images, grid: Grid) -> Array:
    return jnp.asarray(x_T, jnp.promote_types(x_T.dtype, grid.signal.dtype))


def _known(grid: Grid) -> dict[str, np.ndarray]:
    """The grid's values, to check them; nothing where the grid is itself an argument of a jitted function."""
    if any(isinstance(field, jax.core.Tracer) for field in grid):
        return {}
    return {name: np.asarray(field, np.float64) for name, field in grid._asdict().items()}
