"""Normalisation, SiLU and dropout by one kernel: values, gradients and forward mode are those of the formulas.

The kernel runs on GPUs; here Pallas interprets it.
"""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import norms
from diffusion.networks import fused_norm, norm_kernel
from diffusion.networks.fused_norm import fused
from diffusion.networks.group_norm import Plan, in_steps
from diffusion.networks.layers import Attention, FusedNorm, ResidualBlock
from diffusion.networks.unet import UNet
from diffusion.training import make_mesh
from diffusion.training.sharding import on_mesh

# Pixels: some whole turns of the kernel's loop, a part of one, less than one, and one pixel. Channels of a program: a
# power of two or not, all or a part. Dropout: of some, of none, of all.
SHAPES = [
    ((2, 128, 128), 32, 0.1),
    ((2, 49, 24), 4, 0.0),
    ((1, 100, 384), 32, 0.3),
    ((3, 16, 96), 8, 1.0),
    ((2, 1, 8), 2, 0.0),
]
EPS = 2.0**-24


@pytest.fixture
def kernel(as_on_gpu, monkeypatch):
    """XLA compiles the formulas for a CPU; the kernel is to be taken here, and counted."""
    calls = []

    def interpreted(name, function):
        def run(*arrays):
            calls.append(name)
            return function(*arrays, interpret=True)

        return run

    for name in ("forward", "gradients"):
        monkeypatch.setattr(norm_kernel, name, interpreted(name, getattr(norm_kernel, name)))
    monkeypatch.setattr(fused_norm, "has_kernels", lambda: True)
    jax.clear_caches()
    yield calls
    jax.clear_caches()


def arrays(shape, rate, dtype=jnp.float32):
    """x, shift, scale, bias, and what dropout lets pass; gradients by both outputs."""
    keys = jax.random.split(jax.random.key(0), 7)
    x = (5 + 3 * jax.random.normal(keys[0], shape)).astype(dtype)
    shift = jax.random.normal(keys[1], (shape[0], shape[2]))
    scale, bias = jax.random.normal(keys[2], (2, shape[2]))
    keep = (jax.random.bernoulli(keys[3], 1 - rate, shape).astype(jnp.uint8),) if rate else ()
    return (x, shift, scale, bias), keep, tuple(jax.random.normal(key, shape, dtype) for key in keys[4:6])


def assert_close(found, expected, terms=1.0):
    """Errors of `terms` roundings of the largest number."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=terms * EPS * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize(("shape", "groups", "rate"), SHAPES)
def test_values_and_gradients_are_those_of_the_formulas(kernel, shape, groups, rate, silu):
    inputs, keep, (past, dy) = arrays(shape, rate)
    plan = Plan(groups, 1e-6, silu, rate, jnp.float32)
    y, pull = jax.vjp(lambda *inputs: in_steps(plan, *inputs, *keep), *inputs)
    (same, found), found_pull = jax.vjp(lambda *inputs: fused(plan, *inputs, *keep), *inputs)
    # Numbers up to 3 deviations from a mean of 5 / 3 of them: some roundings of 5, twice.
    assert_close((same, found), (inputs[0], y), terms=32)
    dx, *others = pull(dy)
    # Sums over B P elements of numbers as large as 10 in another order: sqrt(B P) roundings of them.
    assert_close(found_pull((past, dy)), (dx + past, *others), terms=64 * np.sqrt(shape[0] * shape[1]))
    assert kernel == ["forward", "gradients"]


def test_a_gradient_of_one_output_alone(kernel):
    inputs, keep, (past, dy) = arrays((2, 49, 24), 0.5)
    plan = Plan(4, 1e-6, True, 0.5, jnp.float32)
    expected = jax.vjp(lambda *inputs: in_steps(plan, *inputs, *keep), *inputs)[1](dy)
    found = jax.vjp(lambda *inputs: fused(plan, *inputs, *keep)[1], *inputs)[1](dy)
    assert_close(found, expected, terms=640)
    found = jax.vjp(lambda *inputs: fused(plan, *inputs, *keep)[0], *inputs)[1](past)
    assert_close(found, (past, *map(jnp.zeros_like, inputs[1:])), terms=0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_bfloat16_is_rounded_once(kernel, dtype):
    """The kernel's sums and products are float32's; only what it writes is rounded."""
    inputs, _, (_, dy) = arrays((2, 64, 64), 0.0, jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in inputs]
    y = in_steps(Plan(32, 1e-6, True, 0.0, jnp.float32), *exact)
    dx = jax.vjp(lambda x: in_steps(Plan(32, 1e-6, True, 0.0, jnp.float32), x, *exact[1:]), exact[0])[1](
        dy.astype(jnp.float32)
    )[0]
    plan = Plan(32, 1e-6, True, 0.0, dtype)
    (_, found), pull = jax.vjp(lambda x: fused(plan, x, *inputs[1:]), inputs[0])
    assert found.dtype == dtype
    half = 2.0**-8 if dtype == jnp.bfloat16 else 2.0**-20
    np.testing.assert_allclose(found.astype(jnp.float32), y, rtol=half, atol=1e-5)
    (found_dx,) = pull((jnp.zeros_like(inputs[0]), dy.astype(dtype)))
    assert found_dx.dtype == jnp.bfloat16
    np.testing.assert_allclose(found_dx.astype(jnp.float32), dx, rtol=2.0**-8, atol=1e-5)


def test_forward_mode_and_a_gradient_through_it(kernel):
    inputs, keep, _ = arrays((2, 49, 24), 0.5)
    plan = Plan(4, 1e-6, True, 0.5, jnp.float32)
    along = tuple(map(jnp.cos, inputs))
    expected = jax.jvp(lambda *inputs: in_steps(plan, *inputs, *keep), inputs, along)
    (_, y), (tangent_of_x, tangent) = jax.jvp(lambda *inputs: fused(plan, *inputs, *keep), inputs, along)
    assert_close((y, tangent), expected, terms=64)
    np.testing.assert_array_equal(tangent_of_x, along[0])

    def loss(function):
        def inner(x, weight):
            y, dy = jax.jvp(lambda x: function(x * weight), (x,), (jnp.sin(x),))
            return jnp.mean(y**2) + jnp.mean(dy**3)

        return jax.jit(jax.grad(inner, argnums=1))(inputs[0], 0.7)

    expected = loss(lambda x: in_steps(plan, x, *inputs[1:], *keep))
    found = loss(lambda x: fused(plan, x, *inputs[1:], *keep)[1])
    # Means of 2,352 numbers, each off by some 32 roundings: sqrt(2352) 32 2^-24.
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def with_gradient(layer, *inputs, dropout=False):
    """Of parameters and inputs, a loss of the layer's output, and its gradient by all of them."""
    rngs = {"dropout": jax.random.key(3)} if dropout else {}

    def loss(params, *inputs):
        y = layer.apply({"params": params}, *inputs, *([True] if dropout else []), rngs=rngs)
        return jnp.mean(jnp.square(y - jnp.cos(jnp.arange(y.size)).reshape(y.shape)))

    return jax.value_and_grad(loss, tuple(range(1 + len(inputs))))


def filled(layer, *inputs):
    """Parameters that let every layer's gradient through."""
    random = np.random.RandomState(0)
    shapes = jax.eval_shape(layer.init, jax.random.key(0), *inputs)["params"]
    return jax.tree.map(lambda s: jnp.asarray(0.3 * random.randn(*s.shape), jnp.float32), shapes)


LAYERS = {
    "block": (ResidualBlock(8, dropout=0.5, num_groups=4), (8, 4, 4, 8), (8, 12)),
    "block of other channels": (ResidualBlock(8, dropout=0.0, num_groups=4), (8, 4, 4, 12), (8, 12)),
    "attention": (Attention(head_channels=8, num_groups=4), (8, 4, 4, 8)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_with_fused_norms_is_the_layer(kernel, name):
    """Names of parameters, output, dropout's draws, and the gradients by parameters and inputs."""
    layer, *sizes = LAYERS[name]
    inputs = [jnp.cos(jnp.arange(np.prod(size), dtype=jnp.float32).reshape(size)) for size in sizes]
    params, dropout = filled(layer, *inputs), getattr(layer, "dropout", 0.0) > 0
    other = layer.clone(fused=True)
    chex.assert_trees_all_equal_shapes(filled(other, *inputs), params)
    expected, found = (jax.jit(with_gradient(one, *inputs, dropout=dropout))(params, *inputs) for one in (layer, other))
    assert {"forward", "gradients"} <= set(kernel)
    # Sums over at most 1,024 numbers, each off by some 5 roundings: sqrt(1024) 5 2^-24.
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5 * scale)


def test_devices_normalise_their_own_images(kernel):
    """The kernel's gradient on 8 devices is that on one, and no device gathers a batch."""
    layer, *sizes = LAYERS["block"]
    layer, mesh = layer.clone(fused=True), make_mesh(8)
    inputs = [jnp.cos(jnp.arange(np.prod(size), dtype=jnp.float32).reshape(size)) for size in sizes]
    params, step = filled(layer, *inputs), with_gradient(layer, *inputs, dropout=True)
    placed = jax.device_put(inputs, NamedSharding(mesh, PartitionSpec("data")))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    compiled = jax.jit(on_mesh(mesh, step)).lower(whole, *placed).compile()
    assert "all-gather" not in (compiled.as_text() or "")
    expected, found = jax.jit(step)(params, *inputs), compiled(whole, *placed)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5 * scale)


def test_dropouts_rate_and_what_it_lets_pass_are_given_together():
    layer, x = FusedNorm(num_groups=4), jnp.ones((1, 4, 4, 8))
    variables = {"params": filled(layer, x)}
    for rate, keep in ((0.5, None), (0.0, jnp.ones(x.shape, bool))):
        with pytest.raises(ValueError, match="are given together, or neither"):
            layer.apply(variables, x, None, rate, keep)


def test_a_batch_that_devices_do_not_share_evenly_is_left_to_the_formulas(kernel):
    layer = FusedNorm(num_groups=4)
    x = jnp.ones((3, 4, 4, 8))
    params = filled(layer, x[:1])
    kernel.clear()
    on_mesh(make_mesh(8), layer.apply)({"params": params}, x)
    assert kernel == []


def test_a_network_with_fused_norms_is_the_network(monkeypatch):
    """By the formulas, as on a machine without GPUs: every norm of it, dropout's draws, and all gradients."""
    monkeypatch.setattr(fused_norm, "has_kernels", lambda: False)
    network = UNet(channels=8, multipliers=(1,), num_blocks=1, attention_resolutions=(8,), num_groups=4, dropout=0.5)
    fused_norms = network.clone(fused_norms=True)
    x, time = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.linspace(1, 100, 2)
    params = filled(network, x, time)

    def loss(network):
        def squares(params):
            y = network.apply({"params": params}, x, time, train=True, rngs={"dropout": jax.random.key(3)})
            return jnp.mean(jnp.square(y - x))

        return jax.jit(jax.value_and_grad(squares))(params)

    expected, found = loss(network), loss(fused_norms)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5 * scale)
    count = str(jax.make_jaxpr(lambda p: fused_norms.apply({"params": p}, x, time))(params)).count(" rsqrt ")
    assert count == str(jax.make_jaxpr(lambda p: network.apply({"params": p}, x, time))(params)).count(" rsqrt ")


def test_every_norm_of_a_network_is_timed_by_steps_and_by_each_cut_of_the_kernel():
    network = UNet(channels=8, multipliers=(1,), num_blocks=1, attention_resolutions=(), num_groups=4, fused_norms=True)
    cases = norms.norms_of(network, 4)
    # Of five blocks, attention in the middle and the end; the blocks of the way up read the joined skips.
    assert cases == {
        norms.Case(16, 8, 4, True, 0.0): 3 + 1,
        norms.Case(16, 16, 4, True, 0.0): 2,
        norms.Case(16, 8, 4, True, 0.1): 5,
        norms.Case(16, 8, 4, False, 0.0): 1,
    }
    before = norms.norm_kernel.FORWARD
    found = norms.measure(cases, batch=2, settings=[(8, 1, 2)], count=2, rounds=1)
    assert before == norms.norm_kernel.FORWARD
    for what in ("forward", "training"):
        assert set(found[what]["a step"]) == {"steps", "kernel", "kernel 8, 1, 2"}
        total = sum(row["number"] * row["milliseconds"]["steps"] for row in found[what]["norms"])
        assert found[what]["a step"]["steps"] == pytest.approx(total, abs=12 * 1e-4)


def test_the_instructions_of_sigmoid_and_of_x_y_plus_z():
    """What interpretation leaves out: the kernel has them in the GPU's own instructions, which are computed here."""
    x = np.linspace(-120, 120, 4801, dtype=np.float32)
    with np.errstate(over="ignore", under="ignore"):
        found = run_assembly(norm_kernel.SIGMOID, x)
        expected = 1 / (1 + np.exp(-x.astype(np.float64)))
    # Of -x log2(e), of 2 to its power, of the sum and of its inverse, each rounded, the last two of approximations that
    # are off by 2 in the last place (PTX's manual), and numbers below 2^-126 are 0.
    np.testing.assert_array_less(np.abs(found - expected), expected * EPS * (8 + 2 * np.abs(x)) + 2.0**-126)
    rows = np.random.default_rng(0).normal(size=(3, 100)).astype(np.float32)
    np.testing.assert_allclose(run_assembly(norm_kernel.FMA, *rows), rows[0] * rows[1] + rows[2], rtol=1e-5, atol=1e-6)


def run_assembly(text, *inputs):
    """Returns $0 of a few instructions of PTX, computed in float32 with numbers below 2^-126 as 0."""
    flush = lambda x: np.where(np.abs(x) < 2.0**-126, 0, x).astype(np.float32)  # noqa: E731
    operations = {
        "mul.f32": np.multiply,
        "add.f32": np.add,
        "ex2.approx.ftz.f32": lambda x: flush(np.exp2(x)),
        "rcp.approx.ftz.f32": lambda x: flush(np.float32(1) / x),
        "fma.rn.f32": lambda x, y, z: (x.astype(np.float64) * y + z).astype(np.float32),
    }
    values = {f"${i}": x for i, x in enumerate(inputs, 1)}
    for line in re.sub(r"//.*|[{}]", "", text).split(";"):
        if not (line := line.strip()) or line.startswith(".reg"):
            continue
        name, _, operands = line.partition(" ")
        out, *arguments = (operand.strip() for operand in operands.split(","))
        numbers = [
            values[a] if a in values else np.array(int(a[2:], 16), np.uint32).view(np.float32) for a in arguments
        ]
        values[out] = operations[name](*numbers)
    return values["$0"]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_kernels_are_made_for_gpus_without_one(dtype):
    """Triton's part of the way that interpretation leaves out, of one turn of the loop and of several."""
    for pixels in (16, 128):
        plan, x, row = Plan(32, 1e-6, True, 0.1, dtype), jnp.zeros((1, pixels, 64), dtype), jnp.zeros((1, 64))
        keep, channel = jnp.ones(x.shape, jnp.uint8), jnp.ones(64)
        forward = jax.jit(lambda *arrays, plan=plan: norm_kernel.forward(plan, *arrays))
        gradient = jax.jit(lambda *arrays, plan=plan: norm_kernel.gradients(plan, True, *arrays))
        programs = (
            forward.trace(x, row, channel, channel, keep),
            gradient.trace(x, row, channel, channel, row, row, x, keep, x),
        )
        for name, program in zip(("forward_kernel", "gradient_kernel"), programs, strict=True):
            assert name in program.lower(lowering_platforms=("cuda",)).as_text()
