"""Imitation of a flow model in a few evaluations, by policies: pi-Flow (Chen et al. 2025).

The student returns a policy for a whole interval [r, t] at once: N values of x_0 at N times. The policy's velocity at
any x and time in it is (x - x_0(time)) / time, with x_0 linear between the values, so that it is rolled out without the
network; and exactly, as the ODE is linear:

    x_s = s / t x_t + sum_n w_n(t, s) X_n,   w_n = s * integral over [s, t] of hat_n(tau) / tau^2

Every loss takes the networks as functions and returns (loss [B], error [B]), as in `flow_map`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jaxtyping import Array, Float

from diffusion.flow import shift_time
from diffusion.flow_map import Losses
from diffusion.losses import weighted_mse
from diffusion.randomness import fold_in
from diffusion.schedules import Grid
from diffusion.stepping import Sampled, known, solve
from diffusion.types import Denoise, Images, Keys, Scalars, denoised, per_example
from diffusion.weightings import uniform

Student = Callable[[Array, Array, Array], Array]  # (x_t, t, r) -> N values of x_0 [B, N, ...], from r to t


class Policy(NamedTuple):
    """What pi-Flow's student returns for an interval.

    Attributes:
      times: of the values, rising: [B, N].
      values: x_0 there, [B, N, ...].
    """

    times: Array
    values: Array


def draw_interval(
    key: Keys, batch_size: int, *times: Float[Array, " _"]
) -> tuple[Float[Array, " B"], Float[Array, " B"]]:
    """Draws one interval of one of several grids per image and returns its lower and its upper time (r, t).

    Each of all N intervals is drawn B / N times, but for one.

    Args:
      key: of which comes first.
      batch_size: B.
      times: of each grid, falling.

    Example:
      >>> r, t = draw_interval(jax.random.key(0), 3, jnp.asarray([1.0, 0.5, 0.0]), jnp.asarray([1.0, 0.0]))
      >>> print((t - r).sum(), (t + r).sum())
      2.0 3.0
    """
    starts, ends = (jnp.concatenate([grid[part] for grid in times]) for part in (slice(-1), slice(1, None)))
    number = (jax.random.randint(key, (), 0, len(starts)) + jnp.arange(batch_size)) % len(starts)
    return ends[number], starts[number]


def draw_points(
    key: Keys, count: int, r: Float[Array, " B"], t: Float[Array, " B"], window: Scalars = 0.0
) -> Float[Array, "count B"]:
    """Draws `count` times in each [r + window, t], one in each of as many equal parts.

    Example:
      >>> print(jnp.floor(4 * draw_points(jax.random.key(0), 4, jnp.zeros(1), jnp.ones(1)))[:, 0])
      [0. 1. 2. 3.]
    """
    u = jax.vmap(lambda i: uniform(fold_in(key, i), r.shape[0]))(jnp.arange(count))
    low = jnp.minimum(r + window, t)
    return low + (t - low) * (jnp.arange(count)[:, None] + u) / count


def make_policy(
    values: Float[Array, "B N *shape"], r: Float[Array, " B"], t: Float[Array, " B"], shift: float = 1.0
) -> Policy:
    """Returns the policy with these values of x_0, the first at r and the last at t, evenly spaced before the shift.

    A network of the velocity that returns N of them has the values x_t - t * velocity. Between the values x_0 is linear
    in t; in the released code it is linear in the time before the shift, which is the same without one.

    Source: Chen et al. 2025, "pi-Flow: Policy-Based Few-Step Generation via Imitation Distillation", section 3.2 (DX).

    Example:
      >>> print(make_policy(jnp.zeros((1, 3, 2)), jnp.zeros(1), jnp.ones(1), shift=3.0).times)
      [[0.   0.75 1.  ]]
    """
    raw = jnp.linspace(shift_time(r, 1 / shift), shift_time(t, 1 / shift), values.shape[1], axis=1)
    times = shift_time(raw, shift).at[:, 0].set(r)
    return Policy(times.at[:, -1].set(t), values)


def policy_velocity(policy: Policy, x_t: Images, t: Float[Array, " B"]) -> Float[Array, "B *shape"]:
    """Returns the policy's velocity (x_t - x_0(t)) / t.

    Example:
      >>> policy = make_policy(jnp.asarray([[[0.0], [1.0]]]), jnp.zeros(1), jnp.ones(1))
      >>> print(policy_velocity(policy, jnp.ones((1, 1)), jnp.asarray([0.5])))  # (1 - 0.5) / 0.5
      [[1.]]
    """
    hats = jnp.eye(policy.times.shape[1], dtype=policy.times.dtype)
    weights = jax.vmap(lambda t, times: jax.vmap(lambda hat: jnp.interp(t, times, hat))(hats))(t, policy.times)
    return jnp.asarray(x_t - _combine(weights, policy.values)) / per_example(t, x_t)


def roll_out(policy: Policy, x_t: Images, t: Float[Array, " B"], s: Float[Array, " B"]) -> Float[Array, "B *shape"]:
    """Returns x_s, where the policy takes x_t from t to s < t within its times; exactly, without the network.

    The released code takes 128 steps of Euler's method over [0, 1] instead.

    Example:
      >>> policy = make_policy(jnp.asarray([[[0.0], [1.0]]]), jnp.zeros(1), jnp.ones(1))
      >>> print(roll_out(policy, jnp.ones((1, 1)), jnp.ones(1), jnp.zeros(1)))  # ends in the first value
      [[0.]]
    """
    times = policy.times
    kept = s / t
    if times.shape[1] == 1:
        return per_example(kept, x_t) * x_t + _combine((1 - kept)[:, None], policy.values)
    low, high = times[:, :-1], times[:, 1:]
    s, t = s[:, None], t[:, None]
    first, last = jnp.clip(s, low, high), jnp.clip(t, low, high)  # the part of [s, t] between each two values
    # s times the integrals of 1 / tau^2 and 1 / tau over that part; at s = 0 their limits.
    divisor = jnp.where(first > 0, first, 1)
    inverse_square = jnp.where(first > 0, s / divisor, 1) - s / last
    inverse = xlogy(s, last / divisor)
    weights = jnp.zeros_like(times)
    weights = weights.at[:, :-1].add((high * inverse_square - inverse) / (high - low))
    weights = weights.at[:, 1:].add((inverse - low * inverse_square) / (high - low))
    return per_example(kept, x_t) * x_t + _combine(weights, policy.values)


def imitation_loss(
    policy: Policy,
    teacher: Denoise,
    x_t: Images,
    r: Float[Array, " B"],
    t: Float[Array, " B"],
    points: Float[Array, "count B"],
    window: float = 3 / 128,
) -> Losses:
    """Returns the mean square of policy's minus teacher's velocity, where the policy itself leads (without gradient).

    One evaluation of the teacher per point. The policy's velocity is its mean over `window`, which sees more than one
    of its values and is finite near t = 0.

    Args:
      policy: of [r, t], by `make_policy` of what the student returns at x_t; the student's last layer may begin as N
        copies of the teacher's.
      teacher: (x, t) -> x_0_hat of a flow model, guided as it is to be imitated.
      x_t: images at t: `interpolate(x_0, eps, t)`.
      r: where the interval ends.
      t: where it starts.
      points: times between r + window and t: `draw_points`.
      window: length in time; 0 takes the velocity at the point. At most t - r.

    Source: Chen et al. 2025, Algorithm 1.

    Example:
      >>> policy = make_policy(jnp.zeros((1, 3, 2)), jnp.zeros(1), jnp.ones(1))
      >>> ends, points = (jnp.zeros(1), jnp.ones(1)), jnp.full((2, 1), 0.5)
      >>> print(*imitation_loss(policy, lambda x, t: 0 * x, jnp.ones((1, 2)), *ends, points))
      [0.] [0.]
    """
    x_t = jnp.asarray(x_t)
    detached = jax.lax.stop_gradient(policy)

    def at(point: Array) -> Array:
        x = roll_out(detached, x_t, t, point)
        target = jax.lax.stop_gradient((x - denoised(teacher(x, point)).x_0_hat) / per_example(point, x))
        if window == 0:
            velocity = policy_velocity(policy, x, point)
        else:
            ahead = point - jnp.minimum(window, t - r)
            velocity = (x - roll_out(policy, x, point, ahead)) / per_example(point - ahead, x)
        return weighted_mse(1.0, target, velocity)

    loss = jax.vmap(at)(points).mean(axis=0)
    return loss, loss


def trajectory_loss(
    student: Student,
    teacher: Denoise,
    x_T: Images,
    times: Float[Array, " N_plus_1"],
    key: Keys,
    count: int = 2,
    window: float = 3 / 128,
    shift: float = 1.0,
) -> tuple[Float[Array, "N B"], Float[Array, "N B"]]:
    """Returns `imitation_loss` of each interval of a grid, each from where the student's own steps before it led.

    A student of data is trained where data is; a guided teacher leads elsewhere. This one needs no data, and as many
    evaluations for N intervals of an image as `imitation_loss` for N images.

    Args:
      student: (x_t, t, r) -> x_0's values [B, N, ...].
      teacher: as that of `imitation_loss`.
      x_T: noise, at times[0].
      times: of the grid, falling.
      key: of the points.
      count: of points in an interval.
      window: of `imitation_loss`, at most an interval.
      shift: of `make_policy`.

    Source: Chen et al. 2025, the variant without data.

    Example:
      >>> zeros = lambda x_t, t, r: jnp.zeros((1, 3, *x_t.shape[1:]))
      >>> times = jnp.asarray([1.0, 0.5, 0.0])
      >>> print(trajectory_loss(zeros, lambda x, t: 0 * x, jnp.ones((1, 2)), times, jax.random.key(0))[0].shape)
      (2, 1)
    """

    def step(x_t: Array, interval: tuple[Array, Array, Array]) -> tuple[Array, Losses]:
        t, r = (jnp.broadcast_to(time, x_t.shape[:1]) for time in interval[1:])
        points = draw_points(fold_in(key, interval[0]), count, r, t, jnp.minimum(window, t - r))
        policy = make_policy(student(x_t, t, r), r, t, shift)
        losses = imitation_loss(policy, teacher, x_t, r, t, points, window)
        return roll_out(jax.lax.stop_gradient(policy), x_t, t, r), losses

    intervals = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    # Unrolled: XLA runs convolutions in a loop on one core of a CPU, without oneDNN.
    return jax.lax.scan(step, jnp.asarray(x_T), intervals, unroll=True)[1]


def policy(
    student: Student,
    x_T: Images,
    grid: Grid,
    key: Keys | None = None,
    *,
    shift: float = 1.0,
    trajectory: bool = False,
) -> Sampled:
    """Samples by pi-Flow's policy, one evaluation per interval of a flow's grid.

    Args:
      student: (x_t, time, next time) -> x_0's values [B, N, ...].
      x_T: float[B, ...] at the grid's first point.
      grid: the intervals, those of the training.
      key: not used.
      shift: of `make_policy`.
      trajectory: also return x_0_hats: of each interval the value at its end.

    Source: Chen et al. 2025, section 3.1.

    Raises:
      ValueError: a grid of another process.

    Example:
      >>> from diffusion.schedules import flow_grid
      >>> halves = lambda x_t, time, next_time: jnp.full((1, 3, 2), 0.5)
      >>> print(policy(halves, jnp.ones((1, 2)), flow_grid(2)))
      [[0.5 0.5]]
    """
    values = known(grid)
    if values and not np.allclose(values["signal"] + values["time"], 1, atol=1e-6):
        raise ValueError("a policy is rolled out along a flow's straight path: use flow_grid.")

    def step(x, _, interval):
        _, here, there = interval
        t, r = (jnp.broadcast_to(point.time, x.shape[:1]).astype(x.dtype) for point in (here, there))
        values = student(x, t, r).astype(x.dtype)
        return roll_out(make_policy(values, r, t, shift), x, t, r), None, values[:, 0]

    return solve(step, x_T, None, grid, trajectory)


def _combine(weights: Float[Array, "B N"], values: Float[Array, "B N *shape"]) -> Array:
    return jnp.einsum("bn,bn...->b...", weights, values, precision="highest")
