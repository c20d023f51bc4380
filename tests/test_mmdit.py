"""The MM-DiT against diffusers' (recorded goldens), its published sizes, and its options against the plain network."""

import importlib.util
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks.mmdit import RULES, MMDiT, position_table
from diffusion.pretrained.mmdit import from_diffusers, shapes, to_diffusers
from diffusion.training import batch_sharding, make_mesh, state_shardings

FOLDER = pathlib.Path(__file__).parent / "golden"
_spec = importlib.util.spec_from_file_location("record_mmdit", FOLDER / "record_mmdit.py")
assert _spec is not None and _spec.loader is not None
record = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(record)

TINY = MMDiT(
    width=32, depth=3, num_heads=4, out_channels=3, context_width=10, pooled_width=7, table_size=9, base_size=6
)
VARIANTS = {
    "sd3": TINY,
    "sd3_5_large": TINY.clone(qk_norm=True),
    "sd3_5_medium": TINY.clone(qk_norm=True, dual_attention=2),
}
# The same products and sums, fused otherwise: some ten float32 roundings, one after the other, in each of three blocks.
SCAN_TOLERANCE = 3 * 10 * 2**-24
INPUTS = {name: jnp.asarray(array) for name, array in record.inputs().items()}


@pytest.fixture(scope="module")
def golden():
    return np.load(FOLDER / "mmdit_tiny.npz")


@pytest.fixture(scope="module")
def weights_of(golden):
    def weights(variant):
        sizes = [tuple(map(int, text.split())) for text in golden[f"{variant}/shapes"]]
        given = dict(zip(golden[f"{variant}/names"].tolist(), sizes, strict=True))
        table = given.pop("pos_embed.pos_embed")
        assert golden["table"].shape == table
        return {**record.seeded_weights(given), "pos_embed.pos_embed": golden["table"]}

    return weights


@pytest.fixture(scope="module")
def params(weights_of):
    return from_diffusers(VARIANTS["sd3_5_medium"], weights_of("sd3_5_medium"))


@pytest.fixture(scope="module")
def apply():
    """`apply(network, params, **inputs)`, compiled once for each network."""
    return jax.jit(lambda network, params, inputs: network.apply({"params": params}, **inputs), static_argnums=0)


def count(network):
    """Parameters of a network, told from one of three blocks: its blocks are of three kinds."""
    num_dual = network.dual_attention
    tree = shapes(network.clone(depth=3, dual_attention=min(num_dual, 1)))
    size = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in tree.items()}
    plain, first = size["block_1"], size["block_0"]
    return sum(size.values()) - plain - first + num_dual * first + (network.depth - 1 - num_dual) * plain


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_diffusers(variant, golden, weights_of, apply):
    network = VARIANTS[variant]
    params = from_diffusers(network, weights_of(variant))
    output, expected = apply(network, params, INPUTS), golden[f"{variant}/output"]
    # Outputs are of order 1. At time 1 the embedding's angles are up to 1000, which float32 holds to 6e-5.
    np.testing.assert_allclose(output, expected, atol=1e-4)
    np.testing.assert_allclose(output[0], expected[0], atol=1e-5)  # at time 0.001 roundings of products alone remain


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversion_is_bit_for_bit(variant, weights_of):
    network, weights = VARIANTS[variant], weights_of(variant)
    back = to_diffusers(network, from_diffusers(network, weights))
    assert back.keys() == weights.keys()
    # Theirs rounds positions to float32 before the sine: at most 6 * 2^-24.
    np.testing.assert_allclose(back.pop("pos_embed.pos_embed"), weights["pos_embed.pos_embed"], atol=1e-6)
    for name, weight in back.items():
        np.testing.assert_array_equal(weight, weights[name], strict=True)


def test_conversion_is_strict(weights_of):
    weights, name = weights_of("sd3"), "transformer_blocks.1.attn.to_k.weight"
    with pytest.raises(ValueError, match=rf"missing {re.escape(name)}, left over other"):
        from_diffusers(TINY, {"other" if key == name else key: weight for key, weight in weights.items()})
    with pytest.raises(ValueError, match=re.escape(name) + r".*\(?\[?32, 31.*32, 32"):
        from_diffusers(TINY, {**weights, name: weights[name][:, 1:]})
    with pytest.raises(ValueError, match="base_size=7"):
        from_diffusers(TINY.clone(base_size=7), weights)
    with pytest.raises(ValueError, match=r"missing transformer_blocks.0.attn.norm_added_k.weight"):
        from_diffusers(VARIANTS["sd3_5_large"], weights)


# The counts of diffusers' modules in the published configs, the stored position table (a constant) not counted.
@pytest.mark.parametrize(
    "network, expected",
    [
        (MMDiT(), 2.03e9),
        (MMDiT(table_size=384, qk_norm=True, dual_attention=13), 2.24e9),
        (MMDiT(width=2432, depth=38, num_heads=38, qk_norm=True), 8.06e9),
    ],
    ids=["medium", "3.5-medium", "3.5-large"],
)
def test_published_sizes(network, expected):
    assert abs(count(network) / expected - 1) < 0.003  # what three digits can tell


def test_the_output_starts_at_zero():
    network = TINY.clone(depth=1)
    np.testing.assert_array_equal(jax.jit(network.init_with_output)(jax.random.key(0), **INPUTS)[0], 0)


def test_remat_has_the_same_gradient(params):
    network = VARIANTS["sd3_5_medium"].clone(depth=1, dual_attention=0)
    params = {name: part for name, part in params.items() if "block" not in name} | {"block_0": params["block_2"]}

    def gradient(network):
        def loss(x_t, params):
            return jnp.square(network.apply({"params": params}, **{**INPUTS, "x_t": x_t})).mean()

        return jax.jit(jax.grad(loss))(INPUTS["x_t"], params)

    # Recomputed in another fusion: float32 roundings of gradients of order 1e-2.
    plain = gradient(network)
    np.testing.assert_allclose(gradient(network.clone(remat=True)), plain, atol=1e-6)
    assert np.abs(plain).max() > 1e-3


def test_bfloat16_is_near(params, apply):
    network = VARIANTS["sd3_5_medium"]
    plain = apply(network, params, INPUTS)
    half = apply(network.clone(dtype=jnp.bfloat16), params, INPUTS)
    assert half.dtype == jnp.float32
    # bfloat16 keeps 8 bits; some 30 roundings one after the other, and outputs of size 1.2.
    assert 0 < np.abs(half - plain).mean() < 30**0.5 * 2**-8


def test_position_table_is_the_middle_of_the_larger():
    whole = position_table(9, 9, 16, 9, 6).reshape(9, 9, 16)
    np.testing.assert_array_equal(position_table(4, 6, 16, 9, 6).reshape(4, 6, 16), whole[2:6, 1:7])


def test_tensor_parallel_and_fsdp_give_the_same(params, apply):
    network = VARIANTS["sd3_5_medium"]
    inputs = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), INPUTS)  # four, that two devices divide
    mesh = make_mesh(spec="fsdp:2,tensor:4")
    placed = jax.device_put(params, state_shardings(mesh, params, RULES))
    block = placed["block_0"]
    assert block["image_qkv"]["kernel"].addressable_shards[0].data.shape == (32, 3, 1, 8)
    assert block["text_out"]["kernel"].addressable_shards[0].data.shape == (1, 8, 32)
    assert block["image_mlp_1"]["bias"].addressable_shards[0].data.shape == (32,)
    assert block["image_mlp_1"]["kernel"].addressable_shards[0].data.shape == (16, 32)
    assert block["image_mlp_2"]["kernel"].addressable_shards[0].data.shape == (32, 16)
    assert block["image_modulation"]["kernel"].addressable_shards[0].data.shape == (32, 144)
    inputs_there = jax.device_put(inputs, batch_sharding(mesh))
    # Sums over four parts in another order: float32 roundings of outputs of order 1.
    np.testing.assert_allclose(apply(network, placed, inputs_there), apply(network, params, inputs), atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_scanned_blocks_give_the_same(variant, weights_of, apply):
    network = VARIANTS[variant]
    params = from_diffusers(network, weights_of(variant))
    expected, found = (apply(network.clone(scan=scan), params, INPUTS) for scan in (False, True))
    np.testing.assert_allclose(found, expected, atol=SCAN_TOLERANCE * np.abs(expected).max())


def test_scanned_and_recomputed_blocks_have_the_same_gradient(params):
    def gradient(network):
        def loss(blocks):
            return jnp.square(network.apply({"params": {**params, **blocks}}, **INPUTS)).mean()

        return jax.device_get(jax.jit(jax.grad(loss))({name: params[name] for name in ("block_0", "block_1")}))

    network = VARIANTS["sd3_5_medium"]
    expected, found = gradient(network), gradient(network.clone(scan=True, remat=True))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=2 * SCAN_TOLERANCE * np.abs(other).max())  # through all and back
    assert all(np.any(layer["kernel"]) for block in expected.values() for layer in block.values() if "kernel" in layer)


def test_scanned_blocks_have_the_same_parameters_and_are_compiled_once():
    def params_of(network):
        return jax.eval_shape(network.init, jax.random.key(0), **INPUTS)

    def num_products(network):
        program = jax.make_jaxpr(lambda params: network.apply(params, **INPUTS))(params_of(network))
        return str(program).count("dot_general[")

    shallow, deep = TINY.clone(depth=3), TINY.clone(depth=5)
    assert params_of(deep) == params_of(deep.clone(scan=True))
    assert num_products(shallow) < num_products(deep)
    assert num_products(shallow.clone(scan=True)) == num_products(deep.clone(scan=True)) < num_products(shallow)


@pytest.mark.parametrize(
    "change, shape, message",
    [
        ({}, (3, 8, 11, 3), "image size 8x11 is not whole patches of 2x2: use multiples of 2"),
        ({}, (3, 8, 20, 3), r"larger than the position table's 9\^2 patches"),
        ({"context_width": 12}, (3, 8, 12, 3), "gives width 10 where the network's context_width is 12"),
        ({"pooled_width": 5}, (3, 8, 12, 3), "gives width 7 where the network's pooled_width is 5"),
        ({"num_heads": 5}, (3, 8, 12, 3), "width 32 must be a multiple of 5 heads"),
    ],
)
def test_bad_input_is_named(change, shape, message):
    inputs: Any = {**INPUTS, "x_t": jnp.zeros(shape)}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: TINY.clone(**change).init(jax.random.key(0), **inputs))
