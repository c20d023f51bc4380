"""The U-Net against diffusers' (a recorded golden), and its options against the plain network."""

import pathlib
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks.group_norm import by_axis, by_product, group_norm
from diffusion.networks.layers import Attention, Conv, GroupNorm, average_pool, sinusoidal_embedding, upsample
from diffusion.networks.unet import UNet
from diffusion.pretrained.unet import from_diffusers, to_diffusers

GOLDEN = pathlib.Path(__file__).parent / "golden" / "unet_tiny.npz"
TINY = UNet(
    channels=8,
    multipliers=(1, 2, 2),
    num_blocks=1,
    attention_resolutions=(4,),
    head_channels=8,
    num_classes=3,
    out_channels=2,
    num_groups=4,
    dropout=0.5,
)
# Has each kind of block, and compiles sooner.
ONE_LEVEL = TINY.clone(multipliers=(1,), attention_resolutions=(8,))


@pytest.fixture(scope="module")
def golden():
    arrays = dict(np.load(GOLDEN))
    arrays["weights"] = {key.removeprefix("weights/"): a for key, a in arrays.items() if key.startswith("weights/")}
    return arrays


@pytest.fixture(scope="module")
def inputs(golden):
    return jnp.asarray(golden["x_t"]), jnp.asarray(golden["time"]), jnp.asarray(golden["label"])


@pytest.fixture(scope="module")
def shapes(inputs):
    return jax.eval_shape(TINY.init, jax.random.key(0), *inputs)["params"]


@pytest.fixture(scope="module")
def params(golden, shapes):
    return from_diffusers(golden["weights"], shapes)


@pytest.fixture(scope="module")
def apply():
    """`apply(network, params, *inputs)`, compiled once for each network."""
    return jax.jit(lambda network, params, *inputs: network.apply({"params": params}, *inputs), static_argnums=0)


def count(network, size):
    x_t, time = jnp.zeros((1, size, size, 3)), jnp.zeros(1)
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(network.init, jax.random.key(0), x_t, time)))


def test_parameter_count_is_the_papers():
    assert count(UNet(), 32) == 35_746_307


def test_class_table_has_a_null_row():
    assert count(UNet(num_classes=10), 32) == 35_746_307 + 11 * 512


def test_equals_diffusers(golden, params, inputs, apply):
    # Outputs are of order 1 and pass about 60 float32 roundings of products: 1e-5 leaves a factor of ten.
    np.testing.assert_allclose(apply(TINY, params, *inputs), golden["output"], atol=1e-5)


def test_conversion_is_bit_for_bit(golden, params, shapes):
    weights = to_diffusers(params)
    assert weights.keys() == golden["weights"].keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight, golden["weights"][name], strict=True)
    chex.assert_trees_all_equal(from_diffusers(weights, shapes), params)


def test_conversion_reads_the_old_names_of_attention(golden, params, shapes):
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = dict(golden["weights"])
    for name in golden["weights"]:
        for new_part, old_part in old.items():
            if f".{new_part}." in name:
                renamed[name.replace(new_part, old_part)] = renamed.pop(name)
    assert renamed.keys() != golden["weights"].keys()
    chex.assert_trees_all_equal(from_diffusers(renamed, shapes), params)
    with pytest.raises(ValueError, match="twice"):
        from_diffusers(renamed | golden["weights"], shapes)


def test_conversion_is_strict(golden, shapes):
    key = "mid_block.resnets.0.conv1.weight"
    weights = golden["weights"]
    with pytest.raises(ValueError, match=f"missing .*{key}"):
        from_diffusers({name: weights[name] for name in weights if name != key}, shapes)
    with pytest.raises(ValueError, match=r"left over .*extra.bias"):
        from_diffusers(weights | {"extra.bias": weights["conv_out.bias"]}, shapes)
    with pytest.raises(ValueError, match=key):
        from_diffusers(weights | {key: weights[key][:, :-1]}, shapes)


def test_missing_label_is_the_null_class(params, inputs, apply):
    x_t, time, _ = inputs
    assert TINY.num_classes is not None
    null = jnp.full(time.shape, TINY.num_classes)
    np.testing.assert_array_equal(apply(TINY, params, x_t, time), apply(TINY, params, x_t, time, null))


def test_every_class_matters(params, inputs, apply):
    x_t, time, _ = inputs
    same = jnp.broadcast_to(x_t[:1], x_t.shape), jnp.broadcast_to(time[:1], time.shape)
    outputs = np.asarray(apply(TINY, params, *same, jnp.arange(4)))
    distances = np.abs(outputs[:, None] - outputs[None]).max(axis=(2, 3, 4))
    assert np.all(distances[~np.eye(4, dtype=bool)] > 1e-2)


def test_starts_at_zero_and_every_block_at_the_identity():
    x_t, time = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([0.0, 7.0])
    output, _ = jax.jit(ONE_LEVEL.init_with_output)(jax.random.key(1), x_t, time)
    np.testing.assert_array_equal(output, 0.0)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    attention = Attention(head_channels=8, num_groups=4)
    np.testing.assert_array_equal(attention.init_with_output(jax.random.key(1), x)[0], x)


def test_dropout_draws_from_its_key_only_in_training(params, inputs):
    @jax.jit
    def train(key):
        return TINY.apply({"params": params}, *inputs, train=True, rngs={"dropout": key})

    first = train(jax.random.key(0))
    np.testing.assert_array_equal(first, train(jax.random.key(0)))
    assert np.abs(first - train(jax.random.key(1))).max() > 1e-2


def test_remat_changes_neither_outputs_gradients_nor_names(inputs):
    random = np.random.RandomState(0)
    shapes = jax.eval_shape(ONE_LEVEL.init, jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda x: jnp.asarray(random.randn(*x.shape) * 0.2, jnp.float32), shapes)

    def loss(network):
        def fn(params):
            output = network.apply({"params": params}, *inputs, train=True, rngs={"dropout": jax.random.key(0)})
            return jnp.mean(jnp.square(output)), output

        return jax.jit(jax.value_and_grad(fn, has_aux=True))(params)

    (_, output), gradient = loss(ONE_LEVEL)
    (_, remat_output), remat_gradient = loss(ONE_LEVEL.clone(remat=True))
    assert jnp.abs(output).max() > 0.1
    chex.assert_trees_all_close(remat_output, output, atol=1e-6)
    # Sums of 4 * 96 products, compiled in another order.
    scale = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient))
    chex.assert_trees_all_close(remat_gradient, gradient, atol=1e-5 * scale)


def test_bfloat16_is_close_and_keeps_float32_outside(params, inputs, apply):
    network = TINY.clone(dtype=jnp.bfloat16)
    output = apply(network, params, *inputs)
    exact = apply(TINY, params, *inputs)
    assert output.dtype == jnp.float32
    shapes = jax.eval_shape(network.init, jax.random.key(0), *inputs)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    # bfloat16 rounds to 2^-9 relative. The longest path has 8 blocks and 3 attentions of about 6 rounded steps each;
    # were all of them to push the same way the output would be off by 66 * 2^-9 of its size. Zero error means that
    # nothing was computed in bfloat16.
    error = np.sqrt(np.mean(np.square(output - exact)) / np.mean(np.square(exact)))
    assert 1e-4 < error < 66 * 2.0**-9


def test_bfloat16_network_tells_times_apart(params, inputs, apply):
    # 750 and 751 are both 752 in bfloat16.
    x_t = jnp.broadcast_to(inputs[0][:1], (4, *inputs[0].shape[1:]))
    output = apply(
        TINY.clone(dtype=jnp.bfloat16), params, x_t, jnp.array([750.0, 751.0, 752.0, 750.0]), inputs[2][:1].repeat(4)
    )
    assert np.all(output[0] == output[3])
    assert not np.all(output[0] == output[1])
    assert not np.all(output[1] == output[2])


def test_time_scale_scales_time(params, inputs, apply):
    x_t, time, label = inputs
    scaled = apply(TINY.clone(time_scale=1024.0), params, x_t, time / 1024.0, label)
    np.testing.assert_array_equal(scaled, apply(TINY, params, x_t, time, label))


def test_sinusoidal_embedding_against_float64():
    time = np.array([0.0, 0.5, 749.0, 750.0, 999.0], np.float32)
    angle = np.outer(time.astype(np.float64), 10_000.0 ** -(np.arange(64) / 63))
    expected = np.concatenate([np.sin(angle), np.cos(angle)], axis=-1)
    # An angle of 999 carries a float32 rounding of 999 * 2^-24 twice (frequency and product).
    for dtype in (jnp.float32, jnp.bfloat16):
        embedding = sinusoidal_embedding(jnp.asarray(time, dtype if dtype == jnp.float32 else jnp.float32), 128)
        np.testing.assert_allclose(embedding, expected, atol=2 * 999 * 2.0**-24)


def test_adms_embedding_has_cosines_first_and_ends_short_of_the_longest_period():
    time = np.array([0.0, 3.0, 999.0], np.float32)
    angle = np.outer(time.astype(np.float64), 10_000.0 ** -(np.arange(64) / 64))
    expected = np.concatenate([np.cos(angle), np.sin(angle)], axis=-1)
    embedding = sinusoidal_embedding(jnp.asarray(time), 128, freq_shift=0, flip_sin_to_cos=True)
    np.testing.assert_allclose(embedding, expected, atol=2 * 999 * 2.0**-24)


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("outlier", [0.0, 100.0])
def test_group_norm_against_float64(mean, outlier):
    """Also where the pixel that differences are taken from is far off all others."""
    rng = np.random.RandomState(0)
    x = (mean + rng.randn(2, 16, 16, 12) * rng.uniform(0.5, 2.0, 12)).astype(np.float32)
    x[:, 0, 0] += outlier
    layer = GroupNorm(num_groups=4)
    scale, bias = rng.randn(2, 12).astype(np.float32)
    groups = x.astype(np.float64).reshape(2, 256, 4, 3)
    deviation = np.sqrt(groups.var((1, 3), keepdims=True) + 1e-6)
    expected = (groups - groups.mean((1, 3), keepdims=True)) / deviation
    largest = np.abs(expected).max()
    expected = expected.reshape(x.shape) * scale + bias
    actual: Any = layer.apply({"params": {"scale": jnp.asarray(scale), "bias": jnp.asarray(bias)}}, jnp.asarray(x))
    # A mean of n float32 is off by at most sqrt(n) 2^-24 of its size, for the 768 of a group; a variance by as much of
    # E[d^2], of which at least 1 / n is left for the n = 256 of a channel, half of it without an outlier.
    of_means = 28 * mean / deviation.min()
    of_variance = (256 if outlier else 2) * 28 / 2 * largest
    np.testing.assert_allclose(actual, expected, atol=(of_means + of_variance + 4) * 2.0**-24 * np.abs(scale).max())


def test_both_ways_of_group_norm_are_the_same(float64):
    """In float64, where 1 / groups and the groups' means are off by some units of 2^-53; derivatives, too."""
    rng = np.random.RandomState(0)
    arrays = [rng.randn(2, 1, 1, 24), rng.uniform(0.5, 2.0, (2, 1, 1, 24)), rng.randn(24), rng.randn(24)]
    arrays = list(map(jnp.asarray, arrays))
    weights = rng.randn(2, 2, 1, 1, 24)

    def value(way: Any, *arrays: Any) -> Any:
        return jnp.sum(jnp.stack(way(8, 1e-6, *arrays)) * weights)

    for function in (lambda way: partial(way, 8, 1e-6), lambda way: jax.grad(partial(value, way), (0, 1, 2, 3))):
        for one, other in zip(function(by_axis)(*arrays), function(by_product)(*arrays), strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-13)


def test_only_cpus_take_group_means_as_products():
    x, scale = jnp.ones((2, 4, 4, 8)), jnp.ones(8)
    step = jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(group_norm(x, scale, scale, 4, 1e-6))))).trace(x)
    products = {
        name: step.lower(lowering_platforms=(name,)).as_text().count("dot_general") for name in ("cpu", "cuda", "tpu")
    }
    assert products == {"cpu": 4, "cuda": 0, "tpu": 0}


def test_group_norm_of_channels_without_variance_is_the_bias():
    scale, bias = np.random.RandomState(0).randn(2, 12).astype(np.float32)
    layer = GroupNorm(num_groups=12)
    actual: Any = layer.apply({"params": {"scale": scale, "bias": bias}}, jnp.full((2, 16, 16, 12), 5.0))
    # Two terms of the size 5 |scale| / sqrt(epsilon) cancel.
    assert np.all(np.abs(actual - bias) <= 4 * 2.0**-24 * 5e3 * np.abs(scale).max())


@pytest.mark.parametrize(("size", "stride", "padding"), [(1, 1, None), (3, 1, None), (3, 2, None), (3, 2, 1)])
def test_convolution_against_float64(size, stride, padding):
    rng = np.random.RandomState(0)
    x, kernel, bias = rng.randn(2, 6, 8, 5), rng.randn(size, size, 5, 7), rng.randn(7)
    before = (size - 1) // 2 if stride == 1 or padding else 0
    padded = np.pad(x, ((0, 0), (before, size - 1 - before), (before, size - 1 - before), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), axis=(1, 2))[:, ::stride, ::stride]
    expected = np.einsum("bhwcij,ijco->bhwo", windows, kernel) + bias
    layer = Conv(7, size=size, stride=stride, padding=padding)
    variables = {"params": {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.asarray(bias, jnp.float32)}}
    actual: Any = layer.apply(variables, jnp.asarray(x, jnp.float32))
    # Sums of at most 46 products of size up to 10.
    np.testing.assert_allclose(actual, expected, atol=46 * 10 * 2.0**-24)


def test_upsample_repeats_pixels():
    x = np.arange(2 * 3 * 5 * 2, dtype=np.float32).reshape(2, 3, 5, 2)
    np.testing.assert_array_equal(upsample(jnp.asarray(x)), x.repeat(2, axis=1).repeat(2, axis=2))


def test_average_pool_undoes_upsample_and_keeps_the_mean():
    x = jnp.arange(2 * 4 * 6 * 2, dtype=jnp.float32).reshape(2, 4, 6, 2)
    np.testing.assert_array_equal(average_pool(upsample(x)), x)  # integers: every sum of four is exact
    np.testing.assert_array_equal(average_pool(x).mean((1, 2)), x.mean((1, 2)))
    np.testing.assert_array_equal(average_pool(x)[0, 0, 1, 0], (4 + 6 + 16 + 18) / 4)


def test_heads_of_one_width_per_level(params, inputs, apply):
    # Attention is at the second of three levels and in the middle: 16 channels both.
    expected = apply(TINY, params, *inputs)
    np.testing.assert_array_equal(apply(TINY.clone(head_channels=(1, 8, 8)), params, *inputs), expected)
    assert np.abs(apply(TINY.clone(head_channels=(1, 4, 8)), params, *inputs) - expected).max() > 1e-2


def test_explicit_widths_and_attention_on_one_side(params, inputs, apply):
    # The same widths named one by one, and the same heights on both sides, are the same network.
    same = TINY.clone(multipliers=(), widths=(8, 16, 16), up_attention_resolutions=(4,))
    np.testing.assert_array_equal(apply(same, params, *inputs), apply(TINY, params, *inputs))
    # A config has no None: 0 means the same.
    zeros = TINY.clone(widths=0, up_attention_resolutions=0, middle_groups=0)
    np.testing.assert_array_equal(apply(zeros, params, *inputs), apply(TINY, params, *inputs))
    one_sided = TINY.clone(up_attention_resolutions=(), middle_attention=False)
    names = jax.eval_shape(one_sided.init, jax.random.key(0), *inputs)["params"]
    assert {name for name in params if "attention" in name} - {name for name in names if "attention" in name} == {
        "middle_attention",
        "up_1_attention_0",
        "up_1_attention_1",
    }


def test_centred_images(params, inputs, apply):
    x_t, time, label = inputs
    centred = apply(TINY.clone(center_input_sample=True), params, x_t, time, label)
    np.testing.assert_array_equal(centred, apply(TINY, params, 2 * x_t - 1, time, label))


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, (8, 10), "image size 8x10 .* 3 levels.* multiples of 4"),
        ({}, (9, 8), "image size 9x8"),
        ({"num_groups": 3}, (8, 8), "3 groups do not divide 8 channels"),
        ({"head_channels": 6}, (8, 8), "heads of 6 channels do not divide 16"),
        ({"attention_resolutions": (16, 4)}, (8, 8), r"\[16\] are at no level .*\[8, 4, 2\]"),
        ({"channels": 5}, (8, 8), "even width"),
        ({"num_classes": None}, (8, 8), "labels were given .* set num_classes"),
        ({"up_attention_resolutions": (16,)}, (8, 8), r"\[16\] are at no level"),
        ({"fused_norms": True, "scale_shift": True}, (8, 8), "no kernel for the blocks of scale_shift"),
        ({"head_channels": (8, 8)}, (8, 8), r"head_channels \[8, 8\] must be one width, or 3"),
    ],
)
def test_bad_input_is_one_clear_line(changes, size, message):
    network = TINY.clone(**changes)
    with pytest.raises(ValueError, match=message) as error:
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, *size, 3)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    assert "\n" not in str(error.value)
