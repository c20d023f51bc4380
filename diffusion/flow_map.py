"""Flow maps: networks that jump from time t to an earlier r in one evaluation, as MeanFlow's do.

On rectified flow z_t = (1 - t) x_0 + t eps, with t = 1 for noise, the flow map is written as an average velocity u:

    z_r = z_t - (t - r) u(z_t, r, t)

- Every loss takes the network as a function, calls it, and returns (loss [B], error [B]). The loss may be weighted by
  its own size, so that its value says little; the error is the plain mean square, which is what to watch.
- Adaptive weights and norms are of sums over an image, as in the papers: their constants c grow with the image.
- One function must hold one key: the network's dropout is then the same in primal, tangent and target.
- Targets are of the live weights, with `stop_gradient`. Times are to be embedded as they are: a factor of 1000 on t is
  one on the time part of du/dt.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion.flow import logit_normal_time
from diffusion.schedules import Grid
from diffusion.stepping import Sampled, evaluate, solve, towards
from diffusion.types import Images, Keys, Scalars, per_example

FlowMap = Callable[[Array, Array, Array], Any]  # (z_t, r, t) -> u, or (u, v_hat) with a head for the velocity
Jump = Callable[[Array, Array, Array], Any]  # (x_t, time, next time) -> x_0_hat
Losses = tuple[Float[Array, " B"], Float[Array, " B"]]  # the loss, and the plain mean squared error


def draw_times(
    key: Keys,
    batch_size: int,
    mean: float = -0.4,
    std: float = 1.0,
    share: float = 0.75,
    lower: tuple[float, float] | None = None,
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Draws r <= t, both logit-normal; the first `share` of the batch has r = t, the same number in every batch.

    MeanFlow on ImageNet has the defaults, iMF a share of 0.5. On CIFAR-10 the share is 0.25, with mean -2 and std 2 in
    the paper and mean -0.6, std 1.6, lower (-4, 1.6) in the released code.

    Args:
      key: one key.
      batch_size: B, the global batch.
      mean: of the logit.
      std: of the logit.
      share: of the images with r = t, where the loss is flow matching's.
      lower: (mean, std) of r's logit. r is then the lesser of its own draw and t; without, t and r are the greater and
        the lesser of two equal draws.

    Source: Geng et al. 2025, "Mean Flows for One-step Generative Modeling", section 4.3.

    Example:
      >>> r, t = draw_times(jax.random.key(0), 4, share=0.5)
      >>> print(r == t, (r <= t).all())
      [ True  True False False] True
    """
    keys = jax.random.split(key)
    t = logit_normal_time(keys[0], batch_size, mean, std)
    r = logit_normal_time(keys[1], batch_size, *(lower or (mean, std)))
    if lower is None:
        t, r = jnp.maximum(t, r), jnp.minimum(t, r)
    return jnp.where(jnp.arange(batch_size) < round(share * batch_size), t, jnp.minimum(t, r)), t


def total_derivative(u: FlowMap, z_t: Images, r: Scalars, t: Scalars, tangent: Images) -> tuple[Any, Array]:
    """Returns u(z_t, r, t), all that the network returns, and du/dt = tangent . d_z u + d_t u.

    Source: Geng et al. 2025, eq. 8: one jvp, which costs the network about once more.

    Example:
      >>> u = lambda z, r, t: z * (t + r)[:, None]
      >>> z_t, half = jnp.ones((1, 1)), jnp.asarray([0.5])
      >>> print(*total_derivative(u, z_t, half, half, 2 * z_t))  # 2 (t + r) + z
      [[1.]] [[3.]]
    """
    z_t = jnp.asarray(z_t)
    r, t = (jnp.broadcast_to(jnp.asarray(time, z_t.dtype), z_t.shape[:1]) for time in (r, t))

    def both(z: Array, t: Array) -> tuple[Array, Any]:
        output = u(z, r, t)
        return (output[0] if isinstance(output, tuple) else output), output

    _, du_dt, output = jax.jvp(both, (z_t, t), (jnp.asarray(tangent, z_t.dtype), jnp.ones_like(t)), has_aux=True)
    return output, du_dt


def mean_flow_loss(
    u: FlowMap,
    z_t: Images,
    r: Scalars,
    t: Scalars,
    v: Images,
    tangent: Images | None = None,
    p: float = 1.0,
    c: float = 1e-2,
) -> Losses:
    """Returns MeanFlow's loss: the adaptively weighted ||u - sg(v - (t - r) du/dt)||^2, with one jvp.

    It is iMF's v-loss ||V - sg(v)||^2 of V = u + (t - r) sg(du/dt) too: the same number and the same gradient. What iMF
    changes are its arguments: the tangent is a predicted velocity, and a second head is trained on v.

    Args:
      u: (z_t, r, t) -> u, or (u, v_hat), with v_hat the head's prediction of v, whose loss is then added.
      z_t: the noisy images.
      r: where the jump ends.
      t: where it starts; at r = t the loss is flow matching's.
      v: what is regressed on: eps - x_0, or `guided_velocity`.
      tangent: dz/dt in du/dt; None: v, as in MeanFlow. For iMF a prediction of the velocity, as u(z_t, t, t).
      p: exponent of the adaptive weight 1 / (||.||^2 + c)^p; 0 leaves the loss as it is.
      c: its constant; 1e-2 on ImageNet's latents, with p = 0.75 1e-3 on CIFAR-10.

    Source: Geng et al. 2025, eqs. 9-11 and 22; Geng et al. 2025, "Improved Mean Flows".

    Example:
      >>> v = jnp.ones((1, 2))
      >>> print(*mean_flow_loss(lambda z, r, t: 3 * v, v, jnp.zeros(1), jnp.ones(1), v, p=0.0))  # sum, mean
      [8.] [4.]
    """
    v, z_t = jnp.asarray(v), jnp.asarray(z_t)
    output, du_dt = total_derivative(u, z_t, r, t, jax.lax.stop_gradient(v if tangent is None else tangent))
    u_t, *head = output if isinstance(output, tuple) else (output,)
    target = jax.lax.stop_gradient(v - per_example(jnp.asarray(t) - r, z_t) * du_dt)
    error = sum_of_squares(u_t - target)
    loss = _adaptive(error, p, c)
    for v_hat in head:
        loss = loss + _adaptive(sum_of_squares(v_hat - jax.lax.stop_gradient(v)), p, c)
    return loss, error / z_t[0].size


def guided_velocity(
    v: Images, uncond: Images, cond: Images, omega: Scalars, kappa: Scalars
) -> Float[Array, "B *shape"]:
    """Returns what a network is trained on in place of v to be guided in one evaluation, without gradient.

    Args:
      v: eps - x_0.
      uncond: u(z_t, t, t) without the condition.
      cond: u(z_t, t, t) with it.
      omega: with kappa, the scale: omega / (1 - kappa). Where no guidance is to act, at a dropped condition for
        instance, omega = 1 and kappa = 0, which is v.
      kappa: the share of the network's own guided velocity. iMF's v + (1 - 1 / w) (cond - uncond) is omega = 1,
        kappa = 1 - 1 / w; w may be drawn, and told to the network.

    Source: Geng et al. 2025, "Mean Flows", eq. 21; "Improved Mean Flows".

    Example:
      >>> v = jnp.ones((1, 1))
      >>> print(guided_velocity(v, 0 * v, 2 * v, omega=1.0, kappa=0.5))  # 2 = cond: scale 2 is where it rests
      [[2.]]
    """
    omega, kappa = (per_example(jnp.asarray(number), v) for number in (omega, kappa))
    return jax.lax.stop_gradient(omega * v + (1 - omega - kappa) * uncond + kappa * cond)


def straight(u: FlowMap) -> Jump:
    """Returns the `Jump` of an average velocity: x_0_hat = z_t - t u(z_t, r, t), to which the jump is straight.

    Guidance and thresholds act on it as on any other x_0_hat; at r = 0 it is where the jump ends.

    Example:
      >>> print(straight(lambda z, r, t: z)(jnp.ones((1, 1)), jnp.asarray([0.25]), jnp.asarray([0.0])))
      [[0.75]]
    """

    def jump(x_t: Array, time: Array, next_time: Array) -> Array:
        time, next_time = (jnp.broadcast_to(t, x_t.shape[:1]) for t in (time, next_time))
        output = u(x_t, next_time, time)
        return x_t - per_example(time, x_t) * (output[0] if isinstance(output, tuple) else output)

    return jump


def mean_flow(jump: Jump, x_T: Images, grid: Grid, key: Keys | None = None, *, trajectory: bool = False) -> Sampled:
    """Samples by a flow map, one evaluation per interval: `ddim` whose network is also given where the step ends.

    Args:
      jump: (x_t, time, next time) -> x_0_hat such that the straight step towards it ends on the trajectory.
      x_T: float[B, ...] at the grid's first point.
      grid: where to step, as `flow_grid`; its last time is given to the network too.
      key: not used.
      trajectory: also return x_0_hats.

    Source: Geng et al. 2025, eq. 12.

    Example:
      >>> from diffusion.schedules import flow_grid
      >>> print(mean_flow(lambda x_t, time, next_time: 0.5 * jnp.ones_like(x_t), jnp.ones((1, 2)), flow_grid(1)))
      [[0.5 0.5]]
    """

    def step(x, _, interval):
        _, here, there = interval
        x_0_hat = evaluate(lambda x, time: jump(x, time, there.time), x, here).x_0_hat
        return towards(x, x_0_hat, here, there, jnp.ones_like(here.noise)), None, x_0_hat

    return solve(step, x_T, None, grid, trajectory)


def sum_of_squares(x: Images) -> Float[Array, " B"]:
    """Returns ||x||^2 per image, in float32 or wider.

    Example:
      >>> print(sum_of_squares(jnp.ones((1, 2))))
      [2.]
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jnp.square(x).reshape(x.shape[0], -1).sum(axis=1)


def _adaptive(error: Array, p: float, c: float) -> Array:
    return error / jax.lax.stop_gradient((error + c) ** p)
