"""Samplers: from noise x_T along a grid to x_0, each one `lax.scan` over the grid's intervals.

- `denoise(x_t, time) -> x_0_hat` is all that a sampler needs of a network; `predictions.denoiser` makes it of any kind.
- x_T is at the grid's first point: `grid.noise[0]` times standard normal noise, plus `grid.signal[0]` times x_0 where
  sampling starts from an image.
- Every formula holds for any process x = signal * x_0 + noise * eps and is finite at signal = 0, where flow starts, and
  at noise = 0, where grids end.
- All samplers take `trajectory=True` and then return (x_0, x_0_hats[N, ...]), with the prediction of every step.
- They compute in the wider of x_T's float and the grid's, whatever float the network returns.
- Call them inside `jax.jit` (or jit `functools.partial(ddim, denoise, grid=grid)`): outside it a scan is compiled at
  every call.

A step goes from (s, n) to (s', n'); with lambda = log(s / n),

    h = lambda' - lambda,   r = exp(-h) = (n' s) / (n s').
"""

import jax.numpy as jnp
import numpy as np
from jax import lax

from diffusion.multistep import dpm_solver_pp, unipc
from diffusion.randomness import fold_in, normal_like
from diffusion.schedules import Grid
from diffusion.stepping import Sampled, evaluate, known, ratio, solve, towards
from diffusion.types import Denoise, Images, Keys

__all__ = ["Denoise", "ancestral", "ddim", "dpm_solver_pp", "heun", "unipc"]


def ancestral(
    denoise: Denoise, x_T: Images, grid: Grid, key: Keys, variance: str = "large", *, trajectory: bool = False
) -> Sampled:
    """Samples by DDPM's Algorithm 2, on any grid: x' ~ N(posterior mean of x' given x and x_0_hat, variance).

    On the full grid of a DDPM chain these are DDPM's eqs. 6-7 exactly. The last step, to n' = 0, adds no noise.

    Args:
      denoise: (x_t, time) -> x_0_hat, or `Denoised` with v.
      x_T: float[B, ...] at the grid's first point.
      grid: where to step.
      key: one key or one per image.
      variance: "small", the posterior's (n'^2 (1 - r^2), beta tilde, right for x_0 a point); "large", the forward
        step's (n^2 (1 - r^2), DDPM's beta); or "learned", where v, -1 for small to 1 for large, interpolates their
        logarithms.
      trajectory: also return x_0_hats.

    Source: Ho et al. 2020, Algorithm 2; Nichol & Dhariwal 2021, eq. 15.

    Raises:
      ValueError: an unknown variance, "large" or "learned" on a grid that does not preserve variance, or "learned"
        though `denoise` returns no v.

    Example:
      >>> from diffusion.schedules import flow_grid
      >>> x_T, key = jnp.ones((1, 2)), jnp.zeros(2, jnp.uint32)
      >>> print(ancestral(lambda x_t, time: 0.5 * jnp.ones_like(x_t), x_T, flow_grid(4), key, "small"))
      [[0.5 0.5]]
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"unknown variance {variance!r}: choose 'small', 'large' or 'learned'")
    values = known(grid)
    if values and variance != "small" and not np.allclose(values["signal"] ** 2 + values["noise"] ** 2, 1, atol=1e-3):
        raise ValueError(
            f"variance={variance!r} is DDPM's beta, and this grid is of no DDPM process (signal^2 + noise^2 is not 1): "
            "use variance='small'."
        )

    def step(x, _, interval):
        index, here, there = interval
        output = evaluate(denoise, x, here)
        if variance != "learned":
            share = 0.0 if variance == "small" else 1.0
        elif output.v is not None:
            share = (output.v + 1) / 2
        else:
            raise ValueError("variance='learned' needs a denoise that returns (x_0_hat, v): use 'small' or 'large'.")
        r = ratio(here, there)
        std = here.noise * jnp.power(there.noise / here.noise, 1 - share) * jnp.sqrt(1 - r**2)
        std = jnp.where(there.noise > 0, std, 0.0)
        x = towards(x, output.x_0_hat, here, there, r) + std * normal_like(fold_in(key, index), x)
        return x, None, output.x_0_hat

    return solve(step, x_T, None, grid, trajectory)


def ddim(
    denoise: Denoise,
    x_T: Images,
    grid: Grid,
    key: Keys | None = None,
    eta: float = 0.0,
    *,
    trajectory: bool = False,
) -> Sampled:
    """Samples by DDIM; on a flow grid this is Euler's method for the velocity.

    Args:
      denoise: (x_t, time) -> x_0_hat, or `Denoised`: where that has `unclipped`, eps_hat is taken from it.
      x_T: float[B, ...] at the grid's first point.
      grid: where to step.
      key: one key or one per image; needed if eta > 0.
      eta: 0 is deterministic; 1 draws as `ancestral` with the small variance.
      trajectory: also return x_0_hats.

    Source: Song et al. 2021, "Denoising Diffusion Implicit Models", eq. 12.

    Raises:
      ValueError: eta outside [0, 1], or above 0 without a key.

    Example:
      >>> from diffusion.schedules import flow_grid
      >>> print(ddim(lambda x_t, time: 0.5 * jnp.ones_like(x_t), jnp.ones((1, 2)), flow_grid(4)))
      [[0.5 0.5]]
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}: it has to lie in [0, 1].")
    if eta > 0 and key is None:
        raise ValueError("ddim with eta > 0 draws noise: give it a key.")

    def step(x, _, interval):
        index, here, there = interval
        x_0_hat, _, unclipped = evaluate(denoise, x, here)
        fresh = eta**2 * (1 - ratio(here, there) ** 2)  # the share of the noise' variance that is drawn anew
        kept = jnp.sqrt(1 - fresh)
        if unclipped is None:
            x = towards(x, x_0_hat, here, there, kept)
        else:
            x = towards(x, unclipped, here, there, kept) + there.signal * (x_0_hat - unclipped)
        if key is not None and eta > 0:
            x = x + there.noise * jnp.sqrt(fresh) * normal_like(fold_in(key, index), x)
        return x, None, x_0_hat

    return solve(step, x_T, None, grid, trajectory)


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
    """Samples by Heun's method, the trapezoidal rule for dx = x_0_hat ds + eps_hat dn: order 2, 2N - 1 evaluations.

    On EDM's grid this is Karras et al.'s Algorithm 2, and on a flow grid Heun's method for the velocity. The step to
    n' = 0 is Euler's.

    Args:
      denoise: (x_t, time) -> x_0_hat.
      x_T: float[B, ...] at the grid's first point.
      grid: where to step.
      key: one key or one per image; needed if s_churn > 0.
      s_churn: how much noise is added over all steps, on EDM's grids only.
      s_min: the lowest noise level at which it is added.
      s_max: the highest one.
      s_noise: the added noise's standard deviation.
      trajectory: also return x_0_hats.

    Source: Karras et al. 2022, Algorithm 2.

    Raises:
      ValueError: s_churn > 0 without a key, or on a grid other than EDM's, whose time for the raised noise level is not
        known.

    Example:
      >>> from diffusion.schedules import flow_grid
      >>> print(heun(lambda x_t, time: 0.5 * jnp.ones_like(x_t), jnp.ones((1, 2)), flow_grid(4)))
      [[0.5 0.5]]
    """
    num_steps = grid.signal.shape[0] - 1
    if s_churn > 0 and key is None:
        raise ValueError("heun with s_churn > 0 draws noise: give it a key.")
    values = known(grid)
    if values and s_churn > 0 and not np.allclose(np.exp(4 * values["time"]), values["noise"], rtol=1e-3):
        raise ValueError("s_churn raises the noise level, and only EDM's grids (karras_grid) can: use s_churn=0.")

    def step(x, _, interval):
        index, here, there = interval
        if key is not None and s_churn > 0:
            within = (s_min <= here.noise) & (here.noise <= s_max)
            gamma = jnp.where(within, min(s_churn / num_steps, 2**0.5 - 1), 0.0)
            raised = Grid(here.signal, here.noise * (1 + gamma), here.time + jnp.log1p(gamma) / 4)
            fresh = s_noise * here.noise * jnp.sqrt(gamma * (2 + gamma))
            x, here = x + fresh * normal_like(fold_in(key, index), x), raised
        x_0_hat = evaluate(denoise, x, here).x_0_hat
        eps_hat = (x - here.signal * x_0_hat) / here.noise
        euler = there.signal * x_0_hat + there.noise * eps_hat

        def corrected():
            x_0_there = evaluate(denoise, euler, there).x_0_hat
            eps_there = (euler - there.signal * x_0_there) / there.noise
            ds, dn = there.signal - here.signal, there.noise - here.noise
            return x + ds * (x_0_hat + x_0_there) / 2 + dn * (eps_hat + eps_there) / 2

        return lax.cond(there.noise > 0, corrected, lambda: euler), None, x_0_hat

    return solve(step, x_T, None, grid, trajectory)
