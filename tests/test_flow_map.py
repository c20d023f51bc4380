"""MeanFlow against exact flow maps of Gaussian and mixture data, and against the released code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import Mixture
from few_step import (
    close_to_golden,
    gaussian_u,
    gaussian_velocity,
    golden,
    levels,
    make_gaussian,
    make_params,
    network,
    points,
    toy,
)
from scipy import stats

from diffusion import flow, flow_map
from diffusion.samplers import ddim
from diffusion.schedules import flow_grid

pytestmark = pytest.mark.usefixtures("float64")


def make_mixture():
    return Mixture(jnp.asarray([0.3, 0.7]), jnp.asarray([[0.8, 0.2], [-0.5, -0.1]]), jnp.asarray([0.3, 0.25]))


def mixture_velocity(z, t):
    return (z - make_mixture().posterior_mean(z, 1 - t, t)) / t[:, None]


def mixture_u(z, r, t, num_steps=100):
    """The average velocity of mixture data by the Runge-Kutta method of order 4, which jvp passes through."""
    h = (r - t) / num_steps

    def step(i, x):
        now = t + i * h
        a = mixture_velocity(x, now)
        b = mixture_velocity(x + h[:, None] / 2 * a, now + h / 2)
        c = mixture_velocity(x + h[:, None] / 2 * b, now + h / 2)
        d = mixture_velocity(x + h[:, None] * c, now + h)
        return x + h[:, None] / 6 * (a + 2 * b + 2 * c + d)

    return (jax.lax.fori_loop(0, num_steps, step, z) - z) / (r - t)[:, None]


def test_draw_times():
    size = 20_000
    r, t = flow_map.draw_times(jax.random.key(0), size, -0.4, 1.0, share=0.25)
    assert (r[: size // 4] == t[: size // 4]).all() and (r[size // 4 :] < t[size // 4 :]).all()
    # The greater of two draws has their distribution's square, the lesser the rest. Kolmogorov-Smirnov: sqrt(n) D
    # exceeds 2.2 with probability 1e-4, and the key is fixed.
    cdf = stats.norm(-0.4, 1.0).cdf

    def logit(x):
        return np.log(x) - np.log1p(-x)

    assert stats.kstest(logit(t), lambda x: cdf(x) ** 2).statistic < 2.2 / np.sqrt(size)
    rest = r[size // 4 :]
    assert stats.kstest(logit(rest), lambda x: 1 - (1 - cdf(x)) ** 2).statistic < 2.2 / np.sqrt(len(rest))


def test_draw_times_with_a_distribution_of_r():
    size = 20_000
    r, t = flow_map.draw_times(jax.random.key(0), size, -0.6, 1.6, share=0.0, lower=(-4.0, 1.6))

    def logit(x):
        return np.log(x) - np.log1p(-x)

    assert stats.kstest(logit(t), stats.norm(-0.6, 1.6).cdf).statistic < 2.2 / np.sqrt(size)

    # r = min(r, t): the logits are independent
    def below(x):
        return 1 - stats.norm(-4.0, 1.6).sf(x) * stats.norm(-0.6, 1.6).sf(x)

    assert (r <= t).all() and stats.kstest(logit(r), below).statistic < 2.2 / np.sqrt(size)


def test_the_exact_average_velocities_lead_along_the_flow():
    """The oracles themselves, against the closed form and against SciPy's solution."""
    z, r, t, *_ = points()
    exact = make_gaussian().flow(z, levels(t), levels(r))
    np.testing.assert_allclose(z - (t - r)[:, None] * gaussian_u(z, r, t), exact, atol=1e-14)
    r, t = jnp.full_like(t, 0.2), jnp.full_like(t, 0.9)
    exact = make_mixture().flow(z, (0.1, 0.9), (0.8, 0.2))
    # the error of 100 steps of order 4; with 200 it is 16 times less
    np.testing.assert_allclose(z - 0.7 * mixture_u(z, r, t), exact, atol=1e-7)
    # at r = t it is the velocity
    np.testing.assert_allclose(gaussian_u(z, t, t), gaussian_velocity(z, t), atol=1e-14)


@pytest.mark.parametrize("u, velocity", [(gaussian_u, gaussian_velocity), (mixture_u, mixture_velocity)])
def test_mean_flows_identity_and_its_zero_loss(u, velocity):
    z, r, t, *_ = points()
    v = velocity(z, t)
    output, du_dt = jax.jit(partial(flow_map.total_derivative, u))(z, r, t, v)
    np.testing.assert_allclose(output + (t - r)[:, None] * du_dt, v, atol=1e-6)
    loss, error = flow_map.mean_flow_loss(u, z, r, t, v, p=0.0)
    assert (loss < 1e-12).all() and (error < 1e-12).all()  # 1e-6 squared
    wrong, _ = flow_map.mean_flow_loss(lambda z, r, t: u(z, r, t) + 0.1, z, r, t, v, p=0.0)
    np.testing.assert_allclose(wrong, 2 * 0.1**2, rtol=1e-4)  # of 2 dimensions: du/dt is unchanged


def test_the_jvp_is_a_central_difference():
    z, r, t, x_0, eps = points()
    u = partial(network, make_params())
    tangent, h = eps - x_0, 1e-4
    output, du_dt = flow_map.total_derivative(u, z, r, t, tangent)
    difference = (u(z + h * tangent, r, t + h) - u(z - h * tangent, r, t - h)) / (2 * h)
    np.testing.assert_allclose(du_dt, difference, atol=1e-6)  # h^2 = 1e-8 times a third derivative of some 10
    np.testing.assert_array_equal(output, u(z, r, t))


@pytest.mark.parametrize("predicted", [False, True], ids=["conditional tangent", "predicted tangent"])
@pytest.mark.parametrize("p", [0.0, 1.0])
def test_the_loss_is_the_v_loss_of_the_compound_velocity(predicted, p):
    """iMF's form: gradient and value."""
    z, r, t, x_0, eps = points()
    v = eps - x_0

    def ours(params):
        u = partial(network, params)
        loss, _ = flow_map.mean_flow_loss(u, z, r, t, v, u(z, t, t) if predicted else None, p=p, c=0.1)
        return loss.mean()

    def v_form(params):
        u = partial(network, params)
        tangent = jax.lax.stop_gradient(u(z, t, t)) if predicted else v
        u_t, du_dt = jax.jvp(u, (z, r, t), (tangent, jnp.zeros_like(r), jnp.ones_like(t)))
        error = jnp.sum((u_t + (t - r)[:, None] * jax.lax.stop_gradient(du_dt) - v) ** 2, axis=1)
        return jnp.mean(error / jax.lax.stop_gradient(error + 0.1) ** p)

    for own, other in zip(
        *(jax.tree.leaves(jax.value_and_grad(f)(make_params())) for f in (ours, v_form)), strict=True
    ):
        np.testing.assert_allclose(own, other, atol=1e-12)


def test_at_r_equal_t_the_loss_is_flow_matchings():
    z, _, t, x_0, eps = points()
    v, params = eps - x_0, make_params()

    def loss(params):
        return flow_map.mean_flow_loss(partial(network, params), z, t, t, v, p=0.0)[0].sum()

    def matching(params):
        return jnp.sum((network(params, z, t, t) - v) ** 2)

    for own, other in zip(*(jax.tree.leaves(jax.grad(f)(params)) for f in (loss, matching)), strict=True):
        np.testing.assert_allclose(own, other, atol=1e-12)


def test_conditional_velocities_pull_the_exact_network_nowhere_on_average():
    """The target is linear in v, tangent and all, so that the posterior's mean of it is the exact u."""
    z, r, t, *_ = points()
    v, spread = gaussian_velocity(z, t), jnp.asarray(np.random.default_rng(1).standard_normal(z.shape))

    def pull(v):
        def moved(params, z, r, t):
            return gaussian_u(z, r, t) + network(params, z, r, t)

        none = jax.tree.map(jnp.zeros_like, make_params()) | {"in": make_params()["in"]}
        return jax.grad(lambda p: flow_map.mean_flow_loss(partial(moved, p), z, r, t, v, p=0.0)[0].sum())(none)["out"]

    assert abs(pull(v + spread)).max() > 0.1
    np.testing.assert_allclose(pull(v + spread) + pull(v - spread), 0, atol=1e-12)


def test_two_jumps_are_one():
    z, r, t, *_ = points()
    s = (r + t) / 2

    def jump(z, r, t):
        return z - (t - r)[:, None] * gaussian_u(z, r, t)

    np.testing.assert_allclose(jump(jump(z, s, t), r, s), jump(z, r, t), atol=1e-14)


def test_guided_velocity_rests_at_the_scale_it_names():
    z, _, _, x_0, eps = points()
    v, uncond = eps - x_0, z
    for omega, kappa in [(1.0, 0.5), (1.5, 0.25), (jnp.linspace(1, 2, 6), jnp.linspace(0, 0.9, 6))]:
        scale = flow_map.per_example(jnp.asarray(omega / (1 - kappa)), z)
        rest = uncond + scale * (v - uncond)
        np.testing.assert_allclose(flow_map.guided_velocity(v, uncond, rest, omega, kappa), rest, atol=1e-12)
    np.testing.assert_array_equal(flow_map.guided_velocity(v, uncond, z, 1.0, 0.0), v)


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_exact_map_samples_exactly_in_any_number_of_steps(num_steps):
    z = points()[0]
    grid = flow_grid(num_steps, shift=2.0)
    x_0, x_0_hats = flow_map.mean_flow(flow_map.straight(gaussian_u), z, grid, trajectory=True)
    np.testing.assert_allclose(x_0, make_gaussian().flow(z, (0.0, 1.0), (1.0, 0.0)), atol=1e-14)
    np.testing.assert_allclose(x_0_hats[-1], x_0, atol=1e-14)


def test_a_map_that_does_not_look_ahead_is_eulers_method():
    z, grid = points()[0], flow_grid(5)

    def velocity(z, r, t):
        return gaussian_u(z, t, t)

    def denoise(x, time):
        return make_gaussian().posterior_mean(x, 1 - time, time)

    np.testing.assert_allclose(
        flow_map.mean_flow(flow_map.straight(velocity), z, grid), ddim(denoise, z, grid), atol=1e-13
    )


@pytest.mark.parametrize("name", ["cifar10", "guided", "omega"])
def test_mean_flow_as_released(name):
    drawn, num_classes = golden("mean_flow/drawn/"), 3
    x_0, eps, r, t, y = (drawn[key] for key in ("x_0", "eps", "r", "t", "labels"))
    z_t, p, c = (
        flow.interpolate(x_0, eps, t),
        *{"cifar10": (0.75, 1e-3), "guided": (1.0, 1e-2), "omega": (0.0, 1e-2)}[name],
    )

    def loss(weights):
        def u(y):
            return lambda z, r, t: toy(weights, z, t, t - r, y)

        v = flow.velocity(x_0, eps)
        if name != "cifar10":
            null, own = (u(label)(z_t, t, t) for label in (jnp.full_like(y, num_classes), y))
            v = flow_map.guided_velocity(v, null, own, *{"guided": (1.0, 0.5), "omega": (2.0, 0.0)}[name])
        return flow_map.mean_flow_loss(u(y), z_t, r, t, v, p=p, c=c)[0].mean()

    close_to_golden(jax.value_and_grad(loss)(golden("mean_flow/weights/")), f"mean_flow/{name}/")


def test_improved_mean_flow_as_released():
    """With a head for the velocity, its prediction as the tangent, and guidance of drawn scale and interval."""
    drawn, num_classes = golden("imf/drawn/"), 3
    x_0, eps, r, t, y = (drawn[key] for key in ("x_0", "eps", "r", "t", "labels"))
    omega, first, last = (drawn[key] for key in ("omega", "first", "last"))
    z_t = flow.interpolate(x_0, eps, t)

    def loss(weights):
        def heads(z, *numbers):
            inputs = jnp.concatenate([z.reshape(len(z), -1), *(number[:, None] for number in numbers)], axis=1)
            outputs = (jnp.tanh(inputs @ weights["in"]) @ weights["out"]).reshape(len(z), 2, *z.shape[1:])
            return outputs[:, 0], outputs[:, 1]

        ones, zeros = jnp.ones_like(t), jnp.zeros_like(t)
        scale = jnp.where((first <= t) & (t <= last), omega, 1.0)
        own = heads(z_t, t, zeros, scale, zeros, ones, y)[1]
        null = heads(z_t, t, zeros, ones, zeros, ones, jnp.full_like(y, num_classes))[1]
        v = flow_map.guided_velocity(flow.velocity(x_0, eps), null, own, 1.0, 1 - 1 / scale)

        def u(z, r, t):
            return heads(z, t, t - r, omega, first, last, y)

        return flow_map.mean_flow_loss(u, z_t, r, t, v, own, p=1.0, c=1e-2)[0].mean()

    close_to_golden(jax.value_and_grad(loss)(golden("imf/weights/")), "imf/")
