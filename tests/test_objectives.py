"""Objectives on functions and data whose answers are known: what they give the papers' losses, and what they learn."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from closed_form import Gaussian

from diffusion.flow_map import draw_times, straight
from diffusion.flow_map import mean_flow as jumps
from diffusion.model.losses import LOSSES
from diffusion.model.objectives import Drawn
from diffusion.model.processes import PROCESSES
from diffusion.predictions import diffuse
from diffusion.samplers import ddim
from diffusion.schedules import flow_grid

FLOW, EDM = PROCESSES["flow"](), PROCESSES["edm"]()
DATA = Gaussian(jnp.asarray([1.5, -1.0]), jnp.asarray([0.7, 0.05]))


def make_drawn(network, batch_size=8, **fields):
    """Returns what is drawn of a batch of two numbers each."""
    x_0, eps = jax.random.normal(jax.random.key(0), (2, batch_size, 2))
    hidden = jnp.zeros(batch_size, bool)
    drawn = Drawn(x_0, eps, jax.random.key(1), network, network, network, hidden, jnp.zeros(batch_size, jnp.int32))
    return drawn._replace(**fields)


def linear(x, time, next_time=None):
    """A network whose answer depends on all that it is told."""
    end = time if next_time is None else next_time
    return x * (1 + time + 0.5 * end)[:, None]


def test_guidance_is_trained_in_only_where_the_condition_is_shown():
    hidden = jnp.arange(8) % 2 == 0
    drawn = make_drawn(linear, hidden=hidden, unconditional=lambda x, time, **more: 0.5 * x)
    plain, guided = (
        LOSSES["mean_flow"](FLOW, p=0.0, **fields).compute(drawn)[0] for fields in ({}, {"omega": 2.0, "kappa": 0.3})
    )
    np.testing.assert_allclose(guided[hidden], plain[hidden], rtol=1e-5)
    assert np.all(np.abs(guided - plain)[~hidden] > 1e-3 * plain[~hidden])


@pytest.mark.parametrize("share", [0.0, 0.75, 1.0])
def test_a_mean_flow_is_told_where_its_steps_end(share):
    drawn = make_drawn(linear)
    losses, _ = LOSSES["mean_flow"](FLOW, share=share, p=0.0).compute(drawn)
    r, t = (np.asarray(time, np.float64)[:, None] for time in draw_times(drawn.key, 8, share=share))
    assert np.sum(r == t) == round(8 * share)
    v = np.asarray(drawn.eps - drawn.x_0, np.float64)
    z = np.asarray(drawn.x_0, np.float64) + t * v
    slope = 1 + t + 0.5 * r
    expected = np.sum((z * slope - v + (t - r) * (v * slope + z)) ** 2, axis=1)
    np.testing.assert_allclose(losses, expected, rtol=1e-5, atol=1e-5)  # some 10 roundings of float32 numbers below 10


def test_the_tangent_is_the_networks_own_where_it_is_to_be_predicted():
    drawn = make_drawn(lambda x, time, next_time=None: -x)
    share = {"share": 0.0, "p": 0.0}
    losses = {name: LOSSES["mean_flow"](FLOW, tangent=name, **share).compute(drawn)[0] for name in TANGENTS}
    assert np.all(np.abs(losses["conditional"] - losses["predicted"]) > 1e-4)
    exact = drawn._replace(network=lambda x, time, next_time=None: drawn.eps - drawn.x_0)  # it predicts v itself
    same = [LOSSES["mean_flow"](FLOW, tangent=name, **share).compute(exact)[0] for name in TANGENTS]
    np.testing.assert_allclose(same[0], same[1], atol=1e-10)


TANGENTS = ("conditional", "predicted")


@pytest.mark.parametrize("process", [FLOW, EDM], ids=["flow", "edm"])
def test_consistency_is_given_the_same_levels_on_every_process(process):
    """A network that returns x_0 / 2 whatever its input has the same error at each level of either process."""
    drawn = make_drawn(None, step=jnp.full(8, 5, jnp.int32))
    seen = []

    def network(x, time):
        signal, noise = process.at(time)
        seen.append(noise / signal)
        # The time's rounding is worth 1e-7 (1 + sigma) of x, and sigma is below 30 here.
        np.testing.assert_allclose(x, diffuse(drawn.x_0, drawn.eps, signal, noise), atol=1e-5 * np.abs(x).max())
        return 0.5 * drawn.x_0

    objective = LOSSES["consistency"](process, prediction="x_0", stage_steps=2, num_stages=8)
    losses, metrics = objective.compute(drawn._replace(network=network))
    below, above = seen
    sigma = jnp.exp(-1.1 + 2 * jax.random.normal(drawn.key, (8,)))
    np.testing.assert_allclose(above, sigma, rtol=1e-4)
    assert np.all(below <= above * (1 + 1e-6)) and np.all(np.isfinite(losses)) and "error" in metrics


def test_consistency_comes_closer_in_stages_which_end():
    objective = LOSSES["consistency"](FLOW, prediction="velocity", stage_steps=10, num_stages=3)
    gaps = []

    def network(x, time):
        gaps.append(time)
        return x

    for step in (0, 9, 10, 25, 10_000):
        objective.compute(make_drawn(network, step=jnp.full(8, step, jnp.int32)))
    distances = [np.asarray(above - below) for below, above in zip(gaps[::2], gaps[1::2], strict=True)]
    np.testing.assert_array_equal(distances[0], distances[1])
    np.testing.assert_array_equal(distances[3], distances[4])
    known = distances[3] > 0  # elsewhere the lower level is 0, and the network is not asked
    assert known.any() and np.all(distances[3][known] < 1)


def test_the_tangent_of_continuous_consistency_is_warmed_up():
    losses = [
        LOSSES["continuous_consistency"](FLOW, warmup_steps=10)
        .compute(make_drawn(lambda x, time: 3 * time[:, None] * x, step=jnp.full(8, step, jnp.int32)))[1]["error"]
        .total
        for step in (0, 10, 20)
    ]
    assert np.all(np.abs(losses[0] - losses[1]) > 1e-4)
    np.testing.assert_array_equal(losses[1], losses[2])
    at_once = LOSSES["continuous_consistency"](FLOW, warmup_steps=0)
    first = at_once.compute(make_drawn(lambda x, time: 3 * time[:, None] * x))[1]["error"].total
    np.testing.assert_array_equal(first, losses[1])


def test_a_policy_that_is_its_linear_teacher_has_no_loss():
    """The teacher's x_0_hat is the same everywhere, and so are the policy's values."""
    constant = jnp.asarray([0.3, -0.2])
    objective = LOSSES["imitation"](FLOW, num_steps=(1, 2, 4), num_values=3)

    def network(x, t, next_time):
        assert next_time.shape == t.shape
        return jnp.tile((x - constant) / t[:, None], 3)

    drawn = make_drawn(network, batch_size=14, teacher=lambda x, time: jnp.broadcast_to(constant, x.shape))
    np.testing.assert_allclose(objective.compute(drawn)[0], 0, atol=1e-9)


def test_progressive_distillation_of_a_straight_teacher_is_the_teacher():
    constant = jnp.asarray([0.3, -0.2])
    objective = LOSSES["progressive"](FLOW, num_steps=4)
    drawn = make_drawn(
        lambda x, time: (x - constant) / time[:, None], teacher=lambda x, time: jnp.broadcast_to(constant, x.shape)
    )
    np.testing.assert_allclose(objective.compute(drawn)[0], 0, atol=1e-8)


@pytest.mark.parametrize(
    ("name", "process", "fields", "message"),
    [
        ("mean_flow", EDM, {}, "loss.name=mean_flow follows a flow's straight lines: it needs process.name=flow"),
        ("mean_flow", FLOW, {"tangent": "none"}, "loss.tangent is 'none': choose from conditional, predicted"),
        ("mean_flow", FLOW, {"share": 2.0}, "loss.share is 2.0"),
        ("mean_flow", FLOW, {"kappa": 1.0}, "loss.kappa is 1.0"),
        ("mean_flow", FLOW, {"lower": (1.0,)}, "loss.lower is"),
        ("consistency", PROCESSES["ddpm"](), {}, "loss.name=consistency draws noise levels: it needs process.name=edm"),
        ("consistency", FLOW, {"stage_steps": 0}, "loss.stage_steps is 0"),
        ("continuous_consistency", EDM, {}, "it needs process.name=flow"),
        ("continuous_consistency", FLOW, {"warmup_steps": -1}, "loss.warmup_steps is -1"),
        ("imitation", EDM, {}, "it needs process.name=flow"),
        ("imitation", FLOW, {"num_values": 1}, "loss.num_values is 1"),
        ("imitation", FLOW, {"num_steps": ()}, "loss.num_steps is"),
        ("imitation", FLOW, {"window": 2.0}, "loss.window is 2.0"),
        ("progressive", FLOW, {"guidance": -1.0}, "loss.guidance is -1.0"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_a_line(name, process, fields, message):
    with pytest.raises(ValueError, match=message) as refused:
        LOSSES[name](process, **fields)
    assert "\n" not in str(refused.value)


def mlp(params, x, time, next_time=None):
    """A network of points."""
    end = time if next_time is None else next_time
    h = jnp.concatenate([x, time[:, None], (time - end)[:, None]], axis=1)
    for layer in params[:-1]:
        h = jax.nn.silu(h @ layer["w"] + layer["b"])
    return h @ params[-1]["w"] + params[-1]["b"]


def train(objective, num_steps=3000, batch_size=256, width=64):
    """Returns an `mlp` trained on the Gaussian `DATA`."""
    sizes = (4, width, width, 2)
    keys = jax.random.split(jax.random.key(0), 3)
    params = [
        {"w": jax.random.normal(key, (a, b)) / a**0.5, "b": jnp.zeros(b)}
        for key, a, b in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, num_steps))

    def loss(params, key):
        data_key, eps_key, own_key = jax.random.split(key, 3)
        x_0 = DATA.mean + DATA.std * jax.random.normal(data_key, (batch_size, 2))
        eps = jax.random.normal(eps_key, x_0.shape)
        network = partial(mlp, params)
        drawn = Drawn(x_0, eps, own_key, network, network, network, jnp.zeros(batch_size, bool))
        return objective.compute(drawn)[0].mean()

    def step(carry, key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, key), state)
        return (optax.apply_updates(params, updates), state), None

    steps = jax.random.split(jax.random.key(1), num_steps)
    return jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), steps)[0][0])(params)


def test_two_jumps_of_mean_flow_are_nearer_to_the_flow_than_two_euler_steps():
    eps = jax.random.normal(jax.random.key(2), (2000, 2))
    exact = DATA.mean + DATA.std * eps  # where the ODE of Gaussian data ends
    grid = flow_grid(2)
    flow = train(LOSSES["denoising"](FLOW, prediction="velocity", weighting="none"))
    mean_flow = train(LOSSES["mean_flow"](FLOW, share=0.5))
    euler = ddim(lambda x, t: x - t * mlp(flow, x, jnp.broadcast_to(t, len(x))), eps, grid)
    jumped = jumps(straight(lambda z, r, t: mlp(mean_flow, z, t, r)), eps, grid)
    errors = [float(jnp.sqrt(jnp.mean((x - exact) ** 2))) for x in (euler, jumped)]
    assert errors[1] < 0.5 * errors[0], errors
    # And where the next time is the same, it is the velocity, by which ordinary samplers draw.
    many = flow_grid(100)
    ordinary = ddim(lambda x, t: x - t * mlp(mean_flow, x, jnp.broadcast_to(t, len(x))), eps, many)
    assert float(jnp.sqrt(jnp.mean((ordinary - exact) ** 2))) < 0.5 * errors[0]
