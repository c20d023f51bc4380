"""Consistency models against exact consistency functions of Gaussian data, and against the released ECT."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_form import Gaussian
from few_step import (
    GOLDEN,
    close_to_golden,
    gaussian_u,
    gaussian_velocity,
    golden,
    make_gaussian,
    make_params,
    network,
    points,
    toy,
)

from diffusion import consistency, flow, flow_map
from diffusion.schedules import flow_grid, karras_grid

pytestmark = pytest.mark.usefixtures("float64")


def end(x, sigma):
    """The exact consistency function of Gaussian data at x_0 + sigma eps."""
    return make_gaussian().flow(x, (1.0, sigma[:, None]), (1.0, 0.0))


def test_consistency_time():
    t = jnp.asarray([1e-3, 0.1, 1.0, 80.0])
    for stage in range(8):
        r = consistency.consistency_time(t, stage)
        assert ((r >= 0) & (r < t)).all()
    np.testing.assert_allclose(consistency.consistency_time(t, 0)[:3], 0)  # denoising, but for the highest noise
    later = jnp.stack([consistency.consistency_time(t, stage) for stage in (4, 6, 8)])
    assert (jnp.diff(later, axis=0) > 0).all()
    # n(t) = 1 + 8 sigmoid(-t) is 1 for much noise: r = t (1 - 2^-(stage + 1))
    np.testing.assert_allclose(later[:, 3], 80 * (1 - 2.0 ** -np.asarray([5, 7, 9])), rtol=1e-15)


def test_a_consistency_function_is_constant_along_trajectories():
    """On the trajectory itself the loss of the exact function is 0: x_0 + sigma eps is one for data without spread."""
    z, r, t, x_0, eps = points()
    along = make_gaussian().flow(z, (1.0, t[:, None]), (1.0, r[:, None]))
    np.testing.assert_allclose(end(along, r), end(z, t), atol=1e-14)

    def point(x, sigma):
        return jnp.broadcast_to(x_0[:1], x.shape)

    loss, error = consistency.consistency_loss(point, jnp.broadcast_to(x_0[:1], eps.shape), eps, t, r)
    assert (loss < 1e-12).all() and (error == 0).all()
    gradient = jax.grad(lambda a: consistency.consistency_loss(lambda x, s: a * point(x, s), x_0, eps, t, r)[0].sum())
    assert np.isfinite(gradient(1.0))


def test_the_discrete_loss_tends_to_the_continuous_tangent():
    """(f_t - f_r) / (t - r) -> |df/dt| along x_0 + sigma eps, in the flow's coordinates that of continuous loss."""
    _, _, sigma, x_0, eps = points()
    f = partial(lambda params, x, sigma: network(params, x, sigma, sigma), make_params())
    _, slope = jax.jvp(f, (x_0 + sigma[:, None] * eps, sigma), (eps, jnp.ones_like(sigma)))
    loss, _ = consistency.consistency_loss(f, x_0, eps, sigma, sigma - 1e-6)
    np.testing.assert_allclose(loss, jnp.linalg.norm(slope, axis=1), rtol=1e-4)  # 1e-6 times f'' / f'

    def scaled(F):
        return lambda x, sigma: (x - sigma[:, None] * F(x, sigma)) / (1 + sigma[:, None])  # z = x / (1 + sigma)

    def F(z, t):
        return network(make_params(), z, t, t)

    f = scaled(lambda x, sigma: F(x / (1 + sigma[:, None]), sigma / (1 + sigma)))
    loss, _ = consistency.consistency_loss(f, x_0, eps, sigma, sigma - 1e-6)
    t = sigma / (1 + sigma)
    _, error = consistency.continuous_consistency_loss(F, flow.interpolate(x_0, eps, t), t, eps - x_0)
    np.testing.assert_allclose(loss * (1 + sigma) ** 2, jnp.sqrt(2 * error), rtol=1e-4)  # dt / dsigma = (1 + sigma)^-2


def test_the_first_stage_is_denoising():
    _, _, t, x_0, eps = points()

    def f(x, sigma):
        return jnp.where(sigma[:, None] > 0, 0.5 * x, jnp.nan)

    loss, error = consistency.consistency_loss(f, x_0, eps, t, 0 * t)
    distance = 0.5 * (x_0 + t[:, None] * eps) - x_0
    np.testing.assert_allclose(loss, jnp.linalg.norm(distance, axis=1) / t, rtol=1e-12)
    np.testing.assert_allclose(error, jnp.mean(distance**2, axis=1), rtol=1e-12)


def test_the_continuous_loss_is_zero_for_the_exact_function():
    z, _, t, *_ = points()

    def F(z, t):
        return gaussian_u(z, jnp.zeros_like(t), t)

    loss, error = consistency.continuous_consistency_loss(F, z, t, gaussian_velocity(z, t))
    assert (error < 1e-24).all() and (loss < 1e-20).all()
    # with warmup 0 it is flow matching's zero, of the velocity
    assert (consistency.continuous_consistency_loss(F, z, t, F(z, t), warmup=0.0)[1] < 1e-24).all()


def test_the_continuous_gradient_is_mean_flows_at_r_0_divided_by_the_tangents_length():
    z, _, t, x_0, eps = points(batch_size=1)
    v, zero = eps - x_0, jnp.zeros_like(t)

    def F(params):
        return lambda z, t: network(params, z, jnp.zeros_like(t), t)

    own = jax.grad(lambda p: consistency.continuous_consistency_loss(F(p), z, t, v, c=0.1)[0].sum())(make_params())

    def whole(p):
        return flow_map.mean_flow_loss(partial(network, p), z, zero, t, v, p=0.0)

    length = jnp.sqrt(2 * whole(make_params())[1][0])  # of two dimensions' mean
    other = jax.grad(lambda p: whole(p)[0].sum())(make_params())
    for a, b in zip(jax.tree.leaves(own), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b / 2 / (length + 0.1), atol=1e-13)


def test_trig_flows_tangent_has_the_same_direction():
    """The same f at x = cos t x_0 + sin t sigma_d eps, sCM's coordinates, differs in units of time alone."""
    z, _, t, x_0, eps = points()
    sigma_d, v = 0.5, eps - x_0

    def F(z, t):
        return network(make_params(), z, jnp.zeros_like(t), t)

    def f(x, angle):
        ratio = sigma_d * jnp.tan(angle)  # noise / signal, t / (1 - t) of the flow
        z = x / jnp.cos(angle)[:, None] / (1 + ratio)[:, None]
        time = ratio / (1 + ratio)
        return z - time[:, None] * F(z, time)

    angle = jnp.arctan(t / (1 - t) / sigma_d)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    path = (cos * x_0 + sin * sigma_d * eps, angle)
    _, df_dt = jax.jvp(f, path, (cos * sigma_d * eps - sin * x_0, jnp.ones_like(angle)))
    step = jax.grad(
        lambda d: consistency.continuous_consistency_loss(lambda z, t: F(z, t) + d, z, t, v, c=0.0)[0].sum()
    )
    g = -step(jnp.zeros_like(z))  # -2 / D g / ||g||, D = 2
    np.testing.assert_allclose(g, df_dt / jnp.linalg.norm(df_dt, axis=1, keepdims=True), atol=1e-12)


def test_an_adaptive_weight_rests_where_it_levels_the_loss():
    z, _, t, x_0, eps = points()

    def loss(w):
        return consistency.continuous_consistency_loss(lambda z, t: z, z, t, eps - x_0, w=w)[0]

    plain = loss(jnp.zeros_like(t))
    rest = -jnp.log(plain)  # d/dw (e^w L - w) = 0
    np.testing.assert_allclose(jax.grad(lambda w: loss(w).sum())(rest), 0, atol=1e-12)


def test_multistep_consistency_keeps_the_datas_moments():
    # 1% is 3 standard errors of the mean, and 4.5 of the std, of 100,000 values.
    data, key = Gaussian(jnp.asarray(0.3), jnp.asarray(0.6)), jax.random.key(0)
    for grid, process in [(flow_grid(3), lambda t: (1 - t, t)), (karras_grid(3), lambda t: (1.0, jnp.exp(4 * t)))]:

        def f(x, time, process=process):
            return data.flow(x, process(time), (1.0, 0.0))

        mean, std = data.marginal(grid.signal[0], grid.noise[0])
        x_T = mean + std * jax.random.normal(key, (100_000,))
        x_0 = jax.jit(partial(consistency.multistep_consistency, f))(x_T, grid, jax.random.key(1))
        assert abs(jnp.mean(x_0) - data.mean) < 0.01 * data.std and abs(jnp.std(x_0) / data.std - 1) < 0.01
        # The noise is fresh in each step: x_0 is known by x_T as far as each level between knows the next.
        between = grid.signal[1:-1], grid.noise[1:-1]
        known = jnp.prod(between[0] * data.std / data.marginal(*between)[1])
        assert abs(jnp.corrcoef(x_0, x_T)[0, 1] - known) < 0.01


def test_one_step_of_consistency_is_the_network_and_an_image_has_its_own_noise():
    z, grid = points()[0], flow_grid(1)
    keys = jax.random.split(jax.random.key(0), len(z))

    def f(x, time):
        return 0.5 * x

    np.testing.assert_array_equal(consistency.multistep_consistency(f, z, grid, keys), 0.5 * z)
    sample = partial(consistency.multistep_consistency, f, grid=flow_grid(3))
    np.testing.assert_array_equal(sample(z, key=keys)[2:4], sample(z[2:4], key=keys[2:4]))


@pytest.mark.parametrize("name", ["first", "third", "late", "hour"])
def test_easy_consistency_tuning_as_released(name):
    stage, q, c = {"first": (0, 2, 0.0), "third": (2, 2, 0.0), "late": (7, 2, 0.03), "hour": (0, 256, 0.0)}[name]
    x_0, eps, t = (jnp.asarray(GOLDEN[f"ect/{key}"]) for key in ("x_0", "eps", "t"))
    r = consistency.consistency_time(t, stage, q)
    np.testing.assert_allclose(r, GOLDEN[f"ect/{name}/r"], atol=1e-14)

    def loss(weights):
        return consistency.consistency_loss(lambda x, sigma: toy(weights, x, sigma), x_0, eps, t, r, c)[0]

    weights = golden("ect/weights/")
    gradient = jax.grad(lambda weights: loss(weights).mean())(weights)
    close_to_golden((loss(weights), gradient), f"ect/{name}/")
