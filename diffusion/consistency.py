"""Consistency models: from any point of a trajectory to its end x_0. ECT and iCT in pairs of times, sCM in one.

The consistency function is a network's x_0_hat: any diffusion model is a start, and any sampler can draw with it. As in
`flow_map`, each loss calls the network itself, returns (loss [B], error [B]), the second being the plain mean square,
and takes norms over all of an image; one function holds one key, so that dropout is the same in network and target.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.flow_map import Losses, sum_of_squares, total_derivative
from diffusion.randomness import fold_in, normal_like
from diffusion.schedules import Grid
from diffusion.stepping import Sampled, evaluate, solve
from diffusion.types import Denoise, Images, Keys, Scalars, per_example


def consistency_time(t: Scalars, stage: Scalars, q: float = 2.0, k: float = 8.0, b: float = 1.0) -> Float[Array, "..."]:
    """Returns ECT's noise level r < t: 0 at first, which is denoising, and closer to t with every stage.

    r = t (1 - q^-(stage + 1) (1 + k sigmoid(-b t))), at least 0.

    Source: Geng et al. 2024, "Consistency Models Made Easy", section 3.2; q is 256 in its run of an hour.

    Example:
      >>> print(np.asarray(consistency_time(jnp.asarray([0.1, 10.0]), stage=1)).round(2))
      [0.  7.5]
    """
    t = jnp.asarray(t)
    return jnp.maximum(t * (1 - q ** -(stage + 1.0) * (1 + k * jax.nn.sigmoid(-b * t))), 0)


def consistency_loss(f: Denoise, x_0: Images, eps: Images, t: Scalars, r: Scalars, c: float = 0.0) -> Losses:
    """Returns ||f(x_0 + t eps, t) - sg(f(x_0 + r eps, r))|| / (t - r), as a Pseudo-Huber norm if c > 0.

    - In EDM's coordinates: t and r are noise levels sigma, and f(x, sigma) is any network's x_0_hat there. Of a flow it
      is denoise(x / (1 + sigma), sigma / (1 + sigma)), of EDM's process denoise(x, ln(sigma) / 4).
    - Where r = 0 the target is x_0, and the network is not trusted with it.

    Args:
      f: (x, sigma) -> x_0_hat.
      x_0: clean images.
      eps: noise, the same at both levels.
      t: the noise level; ECT draws ln t ~ N(-1.1, 2^2).
      r: the lower one: `consistency_time` (ECT), or the next of a grid (iCT).
      c: of sqrt(||.||^2 + c^2) - c; 0 in ECT, 0.00054 sqrt(size of an image) in iCT.

    Source: Geng et al. 2024, eqs. 12-14; Song & Dhariwal 2023, "Improved Techniques for Training Consistency Models".

    Example:
      >>> x_0, eps, level = jnp.zeros((1, 4)), jnp.ones((1, 4)), jnp.asarray([2.0])
      >>> print(*consistency_loss(lambda x, sigma: x / 2, x_0, eps, level, level / 2))  # |1 - 1/2| sqrt(4) / 1
      [1.] [0.25]
    """
    x_0, eps = jnp.asarray(x_0), jnp.asarray(eps)
    t, r = (jnp.broadcast_to(jnp.asarray(level, x_0.dtype), x_0.shape[:1]) for level in (t, r))
    known = per_example(r > 0, x_0)
    level = jnp.where(r > 0, r, t)
    below = f(x_0 + per_example(level, x_0) * eps, level)
    target = jax.lax.stop_gradient(jnp.where(known, below, x_0))
    error = sum_of_squares(f(x_0 + per_example(t, x_0) * eps, t) - target)
    # The root's slope is infinite at 0, where a network that is right would make the gradient NaN.
    norm = jnp.sqrt(jnp.maximum(error + c**2, jnp.finfo(error.dtype).tiny)) - c
    return norm / (t - r), error / x_0[0].size


def continuous_consistency_loss(
    F: Denoise,
    z_t: Images,
    t: Scalars,
    v: Images,
    warmup: Scalars = 1.0,
    c: float = 0.1,
    w: Scalars = 0.0,
) -> Losses:
    """Returns sCM's loss e^w / D ||F - sg(F + g / (||g|| + c))||^2 - w, in the flow's coordinates, with one jvp.

    f(z, t) = z - t F(z, t) is the consistency function and g = df/dt = v - F - t dF/dt. F is a network of the velocity:
    any flow model is a start, f is its x_0_hat, and but for the norm this is MeanFlow's loss at r = 0. sCM's TrigFlow
    is the same path in other units, x_trig = sigma_d z_t / sqrt(t^2 + (1 - t)^2 sigma_d^2), where df/dt has the same
    direction; as its length is divided out, the two differ in how times are weighted. sCM's times, ln sigma ~ N(-1,
    1.4^2), are logit-normal times of a flow.

    Args:
      F: (z_t, t) -> velocity.
      z_t: the noisy images.
      t: the time.
      v: dz/dt: eps - x_0 (sCT), or a teacher's velocity (sCD).
      warmup: factor on t dF/dt, from 0, which is flow matching, to 1 over the first 10,000 steps.
      c: of the tangent's norm.
      w: an adaptive weight, a learned function of t.

    Source: Lu & Song 2024, "Simplifying, Stabilizing and Scaling Continuous-Time Consistency Models", Algorithm 1.

    Example:
      >>> v, t = jnp.ones((1, 4)), jnp.asarray([0.5])
      >>> print(*continuous_consistency_loss(lambda z, t: 3 * v, v, t, v, c=0.0))  # g / ||g|| has length 1
      [0.25] [4.]
    """
    z_t, v = jnp.asarray(z_t), jax.lax.stop_gradient(jnp.asarray(v))
    F_t, dF_dt = total_derivative(lambda z, _, t: F(z, t), z_t, 0.0, t, v)
    g = jax.lax.stop_gradient(v - F_t - per_example(jnp.asarray(warmup) * t, z_t) * dF_dt)
    error = sum_of_squares(g)
    step = g / per_example(jnp.sqrt(error) + c, z_t)
    size = z_t[0].size
    loss = sum_of_squares(F_t - jax.lax.stop_gradient(F_t) - step) / size
    return jnp.exp(jnp.asarray(w)) * loss - w, error / size


def multistep_consistency(f: Denoise, x_T: Images, grid: Grid, key: Keys, *, trajectory: bool = False) -> Sampled:
    """Samples by a consistency model: each step goes to x_0_hat, and back to the next noise level with fresh noise.

    Args:
      f: (x_t, time) -> x_0_hat, the end of the trajectory through x_t.
      x_T: float[B, ...] at the grid's first point.
      grid: the noise levels, of any process.
      key: one key or one per image.
      trajectory: also return x_0_hats.

    Source: Song et al. 2023, "Consistency Models", Algorithm 1.

    Example:
      >>> from diffusion.schedules import flow_grid
      >>> half, key = lambda x_t, time: 0.5 * jnp.ones_like(x_t), jnp.zeros(2, jnp.uint32)
      >>> print(multistep_consistency(half, jnp.ones((1, 2)), flow_grid(2), key))
      [[0.5 0.5]]
    """

    def step(x, _, interval):
        index, here, there = interval
        x_0_hat = evaluate(f, x, here).x_0_hat
        return there.signal * x_0_hat + there.noise * normal_like(fold_in(key, index), x), None, x_0_hat

    return solve(step, x_T, None, grid, trajectory)
