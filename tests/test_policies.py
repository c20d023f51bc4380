"""Policies against the ODE they solve, and teachers they can copy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from few_step import GOLDEN, make_gaussian, points
from scipy.integrate import solve_ivp

from diffusion import policies, schedules
from diffusion.randomness import fold_in
from diffusion.schedules import Grid, flow_grid

pytestmark = pytest.mark.usefixtures("float64")


def make_policy(r, t, count=5, shift=1.0, seed=3):
    values = np.random.default_rng(seed).standard_normal((len(t), count, 2))
    return policies.make_policy(jnp.asarray(values), r, t, shift)


def linear(a, b):
    """A teacher whose x_0_hat is linear in t, and where its ODE takes x from t to s.

    x / t falls by the integral of (a + b t) / t^2.
    """

    def teacher(x, t):
        return a + b * t[:, None]

    def exact(x, t, s):
        t, s = t[:, None], s[:, None]
        return s / t * x + a * (1 - s / t) + b * s * jnp.log(t / s)

    return teacher, exact


def straight_values(teacher, count):
    """The student that copies a teacher which does not look at x."""

    def student(x_t, t, r):
        times = jnp.linspace(r, t, count, axis=1)
        return jnp.stack([teacher(x_t, times[:, i]) for i in range(count)], axis=1)

    return student


def test_draw_interval():
    times = flow_grid(4).time
    for seed in range(5):
        r, t = policies.draw_interval(jax.random.key(seed), 8, times)
        np.testing.assert_allclose(t - r, 0.25)
        np.testing.assert_allclose(np.sort(t), [0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1, 1])
    starts = [float(policies.draw_interval(jax.random.key(seed), 1, times)[1][0]) for seed in range(20)]
    assert set(starts) == {0.25, 0.5, 0.75, 1.0}  # the batch's remainder is not always of the same intervals


def test_intervals_of_several_grids_are_drawn_equally_often():
    grids = [flow_grid(1).time, flow_grid(2).time]
    for seed in range(3):
        r, t = policies.draw_interval(jax.random.key(seed), 6, *grids)
        pairs = sorted(zip(np.asarray(t).tolist(), np.asarray(r).tolist(), strict=True))
        assert pairs == [(0.5, 0.0)] * 2 + [(1.0, 0.0)] * 2 + [(1.0, 0.5)] * 2
    alone = {tuple(float(end[0]) for end in policies.draw_interval(jax.random.key(i), 1, *grids)) for i in range(20)}
    assert alone == {(r, t) for t, r in pairs}


def test_draw_points():
    t = points()[2]
    r = t / 2
    drawn = policies.draw_points(jax.random.key(0), 4, r, t, window=0.01)
    assert drawn.shape == (4, len(t)) and len(np.unique(drawn)) == drawn.size
    part = (drawn - r - 0.01) / (t - r - 0.01)
    np.testing.assert_array_equal(jnp.floor(4 * part), jnp.broadcast_to(jnp.arange(4)[:, None], drawn.shape))
    short = policies.draw_points(jax.random.key(0), 4, t - 0.005, t, window=0.01)  # shorter than the window
    np.testing.assert_array_equal(short, jnp.broadcast_to(t, short.shape))


@pytest.mark.parametrize("shift", [1.0, 3.2])
def test_a_policy_is_rolled_out_along_its_own_velocity(shift):
    x, r, t, *_ = points()
    policy = make_policy(r, t, shift=shift)

    def velocity(time, x):
        now = r + (t - r) * time
        return ((t - r)[:, None] * policies.policy_velocity(policy, jnp.asarray(x.reshape(-1, 2)), now)).ravel()

    solution = solve_ivp(jax.jit(velocity), (1.0, 0.3), np.ravel(x), method="RK45", rtol=1e-11, atol=1e-11)
    s = r + 0.3 * (t - r)
    exact = policies.roll_out(policy, x, t, s)
    # Over kinks SciPy's error is up to 1,000 times its tolerance, and rounding decides where its steps end.
    np.testing.assert_allclose(exact, solution.y[:, -1].reshape(x.shape), atol=1e-8)
    np.testing.assert_allclose(policies.roll_out(policy, exact, s, r), policies.roll_out(policy, x, t, r), atol=1e-13)


def test_at_time_0_a_policy_ends_in_its_first_value():
    x, _, t, *_ = points()
    for count in (1, 2, 5):
        policy = make_policy(0 * t, t, count)
        end = jax.jit(policies.roll_out)(policy, x, t, 0 * t)
        np.testing.assert_allclose(end, policy.values[:, 0], atol=1e-14)
        gradient = jax.grad(
            lambda values, policy=policy: policies.roll_out(policy._replace(values=values), x, t, 0 * t).sum()
        )(policy.values)
        np.testing.assert_allclose(gradient[:, 0], 1, atol=1e-14)
        np.testing.assert_allclose(gradient[:, 1:], 0, atol=1e-14)


@pytest.mark.parametrize("window", [0.0, 3 / 128])
@pytest.mark.parametrize("count", [2, 5])
def test_a_teacher_that_is_linear_in_time_is_copied(window, count):
    x, r, t, x_0, eps = points()
    teacher, exact = linear(x_0, eps)
    student = straight_values(teacher, count)
    policy = policies.make_policy(student(x, t, r), r, t)
    np.testing.assert_allclose(policies.roll_out(policy, x, t, r), exact(x, t, r), atol=1e-13)
    drawn = policies.draw_points(jax.random.key(0), 3, r, t, window)
    loss, error = policies.imitation_loss(policy, teacher, x, r, t, drawn, window)
    # the policy's mean over the window is not quite the teacher's velocity at its start
    expected = jnp.zeros_like(t)
    for point in drawn:
        ahead, led = jnp.maximum(point - window, r), exact(x, t, point)
        velocity = (led - teacher(led, point)) / point[:, None]
        if window:
            velocity -= (led - exact(led, point, ahead)) / (point - ahead)[:, None]
            expected += jnp.mean(velocity**2, axis=1) / len(drawn)
    np.testing.assert_allclose(loss, expected, atol=1e-20)
    np.testing.assert_array_equal(loss, error)
    other = policies.make_policy(student(x, t, r) + 1, r, t)
    wrong, _ = policies.imitation_loss(other, teacher, x, r, t, drawn, 0.0)
    np.testing.assert_allclose(wrong, jnp.mean(drawn**-2.0, axis=0), rtol=1e-10)  # 1 of x_0 is 1 / t of the velocity


def test_losses_of_own_trajectories_are_those_of_each_interval_from_where_the_ones_before_led():
    """Of a student that is wrong, so that it does not lead where the teacher does."""
    x, *_, x_0, eps = points()
    teacher, _ = linear(x_0, eps)
    times, key = jnp.asarray([1.0, 0.7, 0.2, 0.0]), jax.random.key(3)
    wrong = lambda x, t, r: straight_values(teacher, 3)(x, t, r) + t[:, None, None]  # noqa: E731
    losses, error = policies.trajectory_loss(wrong, teacher, x, times, key, count=2, window=0.25)
    assert losses.shape == (3, len(x)) and np.all(losses > 1e-3)
    np.testing.assert_array_equal(losses, error)
    for number in range(3):
        t, r = (jnp.broadcast_to(times[number + i], x.shape[:1]) for i in range(2))
        drawn = policies.draw_points(fold_in(key, number), 2, r, t, jnp.minimum(0.25, t - r))
        policy = policies.make_policy(wrong(x, t, r), r, t)
        expected, _ = policies.imitation_loss(policy, teacher, x, r, t, drawn, 0.25)
        np.testing.assert_allclose(losses[number], expected, rtol=1e-12)
        x = policies.roll_out(policy, x, t, r)


def test_a_student_learns_of_each_interval_alone():
    """Where its own steps lead is given: no gradient flows from an interval to the ones before."""
    x, *_, x_0, eps = points()
    teacher, _ = linear(x_0, eps)
    student = straight_values(teacher, 3)

    def last(scales):
        wrong = lambda x, t, r: student(x, t, r) + jnp.where(t == 1, *scales)[:, None, None]  # noqa: E731
        times = jnp.asarray([1.0, 0.5, 0.0])
        return policies.trajectory_loss(wrong, teacher, x, times, jax.random.key(0))[0][1].sum()

    first, second = jax.grad(last)(jnp.asarray([0.1, 0.2]))
    assert first == 0 and second != 0


def test_a_gaussian_teacher_is_copied_to_the_second_order_of_the_values_distance():
    """Linear in x; along its trajectories x_0_hat is curved, and the policy is linear between its N values."""
    data, x = make_gaussian(), points()[0]
    exact = data.flow(x, (0.0, 1.0), (1.0, 0.0))

    def student(x_t, t, r, count):
        times = jnp.linspace(r, t, count, axis=1)
        values = []
        for i in range(count):
            s = times[:, i, None]
            x_s = data.flow(x_t, (1 - t[:, None], t[:, None]), (1 - s, s))
            values.append(data.posterior_mean(x_s, 1 - s, s))
        return jnp.stack(values, axis=1)

    # the value at t = 0 is the end itself, so that the middle of the trajectory is looked at
    grid = flow_grid(2)
    middle = Grid(*(field[:2] for field in grid))
    exact = data.flow(x, (0.0, 1.0), (0.5, 0.5))
    counts, errors = [9, 17, 33], []
    for count in counts:
        sample = policies.policy(partial(student, count=count), x, middle)
        errors.append(float(jnp.abs(sample - exact).max()))
    slope = -np.polyfit(np.log(np.asarray(counts) - 1), np.log(errors), 1)[0]
    assert abs(slope - 2) < 0.05, errors
    ends = jax.jit(lambda x: policies.policy(partial(student, count=33), x, grid))(x)
    np.testing.assert_allclose(ends, data.flow(x, (0.0, 1.0), (1.0, 0.0)), atol=10 * errors[-1])


def test_a_short_window_is_the_velocity_at_its_start():
    x, r, t, x_0, _ = points()
    teacher, _ = linear(x_0, x_0)
    losses = [
        policies.imitation_loss(make_policy(r, t), teacher, x, r, t, t[None], window)[0] for window in (0.0, 1e-7)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_the_gradient_reaches_the_student_alone_and_not_through_where_it_leads():
    x, r, t, x_0, _ = points()
    drawn = policies.draw_points(jax.random.key(0), 3, r, t)
    values = make_policy(r, t).values

    def loss(values, led_by, scale):
        policy = policies.make_policy(led_by, r, t)
        total = jnp.zeros_like(t)
        for point in drawn:
            led = policies.roll_out(policy, x, t, point)
            own = policies.policy_velocity(policies.make_policy(values, r, t), led, point)
            total = total + jnp.mean((own - (led - scale * x_0 * led) / point[:, None]) ** 2, axis=1)
        return (total / len(drawn)).sum()

    def ours(values, scale):
        teacher = lambda x, t: scale * x_0 * x  # noqa: E731
        policy = policies.make_policy(values, r, t)
        return policies.imitation_loss(policy, teacher, x, r, t, drawn, 0.0)[0].sum()

    gradient, of_teacher = jax.grad(ours, (0, 1))(values, 0.5)
    np.testing.assert_allclose(gradient, jax.grad(loss)(values, values, 0.5), atol=1e-12)
    assert of_teacher == 0


def test_the_policy_samples_segment_by_segment():
    x, _, _, x_0, eps = points()
    teacher, _exact = linear(x_0, eps)
    grid = flow_grid(3, shift=2.0)
    sample = partial(policies.policy, straight_values(teacher, 4), grid=grid)
    ends, values = sample(x, trajectory=True)
    np.testing.assert_allclose(ends, x_0, atol=1e-13)
    np.testing.assert_allclose(values, [x_0 + eps * time for time in grid.time[1:]], atol=1e-13)
    with pytest.raises(ValueError, match="use flow_grid"):
        policies.policy(straight_values(teacher, 4), x, schedules.karras_grid(3))


@pytest.mark.parametrize("name, shift", [("even", 1.0), ("shifted", 3.2)])
def test_the_policys_velocity_as_released(name, shift):
    """DX; with a shift at the values' own times, between which the released code is not linear in t."""
    velocities, x, x_t = (jnp.asarray(GOLDEN[f"policy/{key}"]) for key in ("velocities", "x", "x_t"))
    r, t, times = (jnp.asarray(GOLDEN[f"policy/{name}/{key}"]) for key in ("r", "t", "times"))
    values = x_t[:, None] - t[:, None, None, None, None] * velocities
    policy = policies.make_policy(values, r, t, shift)
    for i in range(times.shape[1]):
        own = policies.policy_velocity(policy, x, times[:, i])
        # at a kink the released code and this may round to either side; in float64 that is 1e-15 of a slope of some 10
        np.testing.assert_allclose(own, GOLDEN[f"policy/{name}/velocity"][:, i], atol=1e-11)
