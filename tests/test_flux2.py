"""FLUX.2's transformer against diffusers' and its authors' (recorded), its published files, options and grid."""

import json
import math
import pathlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden import record_flux2 as record
from safetensors.numpy import load_file, save_file

from diffusion.networks.flux2 import RULES, Flux2, rotate, rotations, token_ids
from diffusion.pretrained.flux2 import from_diffusers, load_flux2, network, save_flux2, shapes, to_diffusers
from diffusion.pretrained.flux2_config import network_of_config
from diffusion.pretrained.flux2_original import from_original, load_original, network_of_original, to_original
from diffusion.schedules import flux2_grid
from diffusion.training import batch_sharding, make_mesh, state_shardings

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "flux2_tiny.npz")
INPUTS = {name: jnp.asarray(array) for name, array in record.inputs().items()}
# The same products and sums, fused otherwise: some ten float32 roundings, one after the other, in each of four blocks.
FUSION_TOLERANCE = 4 * 10 * 2**-24


jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})  # compiled in half the time


def weights_of(case):
    sizes = [tuple(map(int, text.split())) for text in GOLDEN[f"{case}/shapes"]]
    return record.seeded(dict(zip(GOLDEN[f"{case}/names"].tolist(), sizes, strict=True)))


def config_of(case):
    return json.loads(str(GOLDEN[f"{case}/config"]))


def network_and_params(case):
    if case == "original":
        weights = weights_of(case)
        found = network_of_original(weights)
        return found, from_original(weights, shapes(found))
    found = network_of_config(config_of(case))
    return found, from_diffusers(weights_of(case), shapes(found))


def told(network, count) -> dict[str, Any]:
    given: dict[str, Any] = {name: INPUTS[name] for name in ("x_t", "time", "context")}
    given["references"] = tuple(INPUTS[f"reference_{i}"] for i in range(count))
    return given | ({"guidance": INPUTS["guidance"]} if network.guidance_embedding else {})


@pytest.fixture(scope="module")
def apply():
    """`apply(network, params, inputs)`, compiled once for each network."""
    return jit(lambda network, params, inputs: network.apply({"params": params}, **inputs), static_argnums=0)


@pytest.fixture
def published(tmp_path):
    """A pipeline with klein's tiny transformer as diffusers writes it, in bfloat16."""
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config_of("klein")))
    weights = {name: weight.astype(ml_dtypes.bfloat16) for name, weight in weights_of("klein").items()}
    save_file(weights, folder / "diffusion_pytorch_model.safetensors")
    return folder


@pytest.mark.parametrize(("case", "count"), [("klein", 0), ("klein", 2), ("dev", 1), ("original", 2)])
def test_equals_diffusers_and_the_authors_code(case, count, apply):
    network, params = network_and_params(case)
    output, expected = apply(network, params, told(network, count)), GOLDEN[f"{case}/output_{count}"]
    # Outputs are of order 1. Times and guidance are up to 1000 before their sine, which float32 holds to 6e-5.
    np.testing.assert_allclose(output, expected, atol=1e-4)
    np.testing.assert_allclose(output[0], expected[0], atol=1e-5)  # near time 0 roundings of products alone remain


def test_coordinates_are_the_published_ones():
    ids = [[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 1, 0], [10, 0, 0, 0], [20, 0, 0, 0], [20, 1, 0, 0]]
    np.testing.assert_array_equal(token_ids(2, [(1, 2), (1, 1), (2, 1)]), ids)


def test_what_attention_sees_of_coordinates_is_how_far_tokens_are_apart():
    ids, axes = token_ids(0, [(3, 3)]), (4, 2, 6, 4)
    random = np.random.RandomState(0)
    query, key = (jnp.asarray(np.broadcast_to(random.randn(16), (1, len(ids), 1, 16)), jnp.float32) for _ in range(2))
    rotation, moved = rotations(ids, axes, 2000.0), rotations(ids + np.array([30, 500, 7, 1]), axes, 2000.0)
    one, other = (
        jnp.einsum("blhc,bmhc->lm", rotate(query, *angles), rotate(key, *angles)) for angles in (rotation, moved)
    )
    np.testing.assert_allclose(one, other, atol=16 * 4 * 4 * 2**-24)  # 16 products of numbers up to 2, four roundings
    assert abs(one[0, 0] - one[0, 5]) > 0.1
    cosine, sine = rotation
    np.testing.assert_allclose(cosine[5, 2:6], np.cos([1, 2, 2 * 2000 ** (-1 / 3), 2 * 2000 ** (-2 / 3)]), atol=1e-7)
    assert (sine[:, :2] == 0).all() and (sine[:, 6:] == 0).all()


@pytest.mark.parametrize("case", record.CASES)
def test_conversion_is_bit_for_bit(case):
    _, params = network_and_params(case)
    weights, back = weights_of(case), to_diffusers(params)
    assert back.keys() == weights.keys()
    for name, weight in back.items():
        np.testing.assert_array_equal(weight, weights[name], strict=True)


def test_conversion_of_the_authors_file_is_bit_for_bit():
    network, params = network_and_params("original")
    weights, back = weights_of("original"), to_original(params)
    assert back.keys() == weights.keys()
    for name, weight in back.items():
        np.testing.assert_array_equal(weight, weights[name], strict=True)
    last = weights["final_layer.adaLN_modulation.1.weight"]
    np.testing.assert_array_equal(
        to_diffusers(params)["norm_out.linear.weight"], np.concatenate([last[32:], last[:32]])
    )
    assert (network.num_double, network.num_single, network.axes) == (2, 2, (4, 4, 4, 4))


def test_conversion_is_strict():
    found, _ = network_and_params("klein")
    weights, name = weights_of("klein"), "single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"
    renamed = {"other" if key == name else key: weight for key, weight in weights.items()}
    with pytest.raises(ValueError, match=rf"missing {name}, left over other"):
        from_diffusers(renamed, shapes(found))
    with pytest.raises(ValueError, match=rf"{name} has shape \[288, 31\].* needs \[288, 32\]"):
        from_diffusers({**weights, name: weights[name][:, 1:]}, shapes(found))
    with pytest.raises(ValueError, match=r"missing time_guidance_embed.guidance_embedder.linear_1"):
        from_diffusers(weights, shapes(found.clone(guidance_embedding=True)))
    weights = weights_of("original")
    del weights["final_layer.adaLN_modulation.1.weight"]
    with pytest.raises(ValueError, match=r"missing final_layer.adaLN_modulation.1.weight, left over none"):
        from_original(weights, shapes(network_and_params("original")[0]))


@pytest.mark.parametrize("largest", [10**9, 30_000])
def test_folders_go_there_and_back_bit_for_bit(published, tmp_path, largest):
    found, params = load_flux2(published.parent, weights_dtype=None)
    assert found == network(published) == network_of_config(config_of("klein"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    save_flux2(tmp_path / "ours", found, params, largest)
    again, same = load_flux2(tmp_path / "ours", weights_dtype=None)
    assert again == found
    jax.tree.map(np.testing.assert_array_equal, same, params)
    files = list((tmp_path / "ours").glob("*.safetensors"))
    arrays = [load_file(file) for file in files]
    stored = {name: array for part in arrays for name, array in part.items()}
    theirs = load_file(published / "diffusion_pytorch_model.safetensors")
    assert sum(map(len, arrays)) == len(theirs) and (len(files) > 1) == (largest < 10**6)
    assert all((stored[name] == array).all() and stored[name].dtype == array.dtype for name, array in theirs.items())
    own = max(array.nbytes for array in theirs.values())
    assert all(sum(array.nbytes for array in part.values()) <= max(largest, own) for part in arrays)
    with pytest.raises(ValueError, match="there already"):
        save_flux2(tmp_path / "ours", found, params)


def test_arrays_are_put_one_by_one(published):
    seen = []

    def put(path, array):
        seen.append("/".join(key.key for key in path))
        return jnp.asarray(array, jnp.bfloat16)

    _, params = load_flux2(published, put=put)
    assert len(seen) == len({*seen}) == len(jax.tree.leaves(params)) and "single_1/parallel_out/kernel" in seen
    _, expected = load_flux2(published, weights_dtype=None)
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_the_authors_file(tmp_path, prefix):
    path = tmp_path / "flux-2.safetensors"
    weights = {prefix + name: weight for name, weight in weights_of("original").items()}
    save_file(weights | ({"vae.conv": np.zeros(1, np.float32)} if prefix else {}), path)
    found, params = load_original(path, prefix=prefix)
    expected, same = network_and_params("original")
    assert found == expected
    jax.tree.map(np.testing.assert_array_equal, params["params"], same)
    with pytest.raises(ValueError, match=r"is FLUX's transformer in its authors' names: with prefix='other.' it holds"):
        load_original(path, prefix="other.")
    with pytest.raises(ValueError, match="no such file"):
        load_original(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "SD3Transformer2DModel"},
            "is the transformer of Stable Diffusion 3 .*needed is the folder of",
        ),
        ({"patch_size": 2}, "cannot honour patch_size=2"),
        ({"eps": 1e-5}, "cannot honour eps=1e-05"),
        ({"attention": "linear"}, "has no field attention"),
        ({"out_channels": 16}, "out_channels is 16: ours has those of in_channels"),
        ({"mlp_ratio": 2.5}, "mlp_ratio is 2.5: ours is a whole number"),
        ({"mlp_ratio": "3"}, "mlp_ratio is '3', not a number of at least 1"),
        ({"rope_theta": float("nan")}, "rope_theta is nan, not a number"),
        ({"num_layers": 0}, "num_layers is 0, not a whole number of at least 1"),
        ({"axes_dims_rope": [4, 4, 4, 2]}, r"axes_dims_rope is \[4, 4, 4, 2\], not four even numbers whose sum is"),
        ({"axes_dims_rope": [3, 3, 6, 4]}, "axes_dims_rope has 3, not an even number"),
        ({"axes_dims_rope": 16}, "axes_dims_rope is 16, not four even numbers"),
    ],
)
def test_settings_that_cannot_be_honoured_are_named(published, change, message):
    (published / "config.json").write_text(json.dumps({**config_of("klein"), **change}))
    with pytest.raises(ValueError, match=message):
        load_flux2(published.parent)


def test_a_time_of_another_scale_has_no_published_form(tmp_path):
    found, params = network_and_params("klein")
    with pytest.raises(ValueError, match="multiplies time by 1000, and this network by 1"):
        save_flux2(tmp_path / "ours", found.clone(time_scale=1.0), {"params": params})
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, 3_875_544_576),
        (dict(num_double=8, num_single=24, num_heads=32, context_width=12288), 9_078_581_248),
        (
            dict(num_double=8, num_single=48, num_heads=48, context_width=15360, guidance_embedding=True),
            32_223_281_152,
        ),
    ],
    ids=["klein-4B", "klein-9B", "dev"],
)
def test_counts_of_the_published_models(sizes, expected):
    """Told from one block of each kind."""
    found = Flux2(**sizes)
    tree = shapes(found.clone(num_double=1, num_single=1))
    size = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in tree.items()}
    more = (found.num_double - 1) * size["double_0"] + (found.num_single - 1) * size["single_0"]
    assert sum(size.values()) + more == expected


def test_blocks_start_as_the_identity_and_the_output_at_zero():
    found = network_of_config(config_of("klein"))

    def start(key):
        params = found.init(key, **told(found, 0))["params"]
        return {name: part for name, part in params.items() if name == "image_out" or "modulation" in name}

    started = jax.tree.leaves(jit(start)(jax.random.key(0)))
    assert len(started) == 5 and not any(map(np.any, started))


def test_bfloat16_is_near(apply):
    network, params = network_and_params("klein")
    plain = apply(network, params, told(network, 0))
    half = apply(network.clone(dtype=jnp.bfloat16), params, told(network, 0))
    assert half.dtype == jnp.float32
    # bfloat16 keeps 8 bits; some 40 roundings one after the other, and outputs of size 1.2.
    assert 0 < np.abs(half - plain).mean() < 40**0.5 * 2**-8


def test_scanned_blocks_give_the_same(apply):
    network, params = network_and_params("klein")
    expected, found = (apply(network.clone(scan=scan), params, told(network, 0)) for scan in (False, True))
    np.testing.assert_allclose(found, expected, atol=FUSION_TOLERANCE * np.abs(expected).max())


def test_scanned_and_recomputed_blocks_have_the_same_gradient():
    network, params = network_and_params("klein")
    network, blocks = network.clone(num_double=0), {name: params[name] for name in ("single_0", "single_1")}

    def gradient(network):
        def loss(blocks):
            return jnp.square(network.apply({"params": {**params, **blocks}}, **told(network, 0))).mean()

        return jax.tree.leaves(jit(jax.grad(loss))(blocks))

    expected, found = gradient(network), gradient(network.clone(scan=True, remat=True))
    assert all(map(np.any, expected))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=2 * FUSION_TOLERANCE * np.abs(other).max())  # through all and back


def test_scanned_blocks_have_the_same_parameters_and_are_compiled_once():
    def num_products(network):
        inputs = told(network, 1)
        program = jax.make_jaxpr(lambda params: network.apply({"params": params}, **inputs))(shapes(network))
        return str(program).count("dot_general[")

    shallow = network_of_config(config_of("klein"))
    deep = shallow.clone(num_double=3, num_single=4)
    assert shapes(deep) == shapes(deep.clone(scan=True))
    assert num_products(shallow) < num_products(deep)
    assert num_products(shallow.clone(scan=True)) == num_products(deep.clone(scan=True)) < num_products(shallow)


def test_tensor_parallel_gives_the_same(apply):
    network, params = network_and_params("klein")
    inputs = told(network, 0)
    mesh = make_mesh(6, "data:3,tensor:2")
    placed = jax.device_put(params, state_shardings(mesh, params, RULES))
    pieces = jax.tree.map(lambda leaf: leaf.addressable_shards[0].data.shape, placed)
    assert pieces["double_0"]["image_qkv"]["kernel"] == (32, 3, 1, 16)
    assert pieces["double_1"]["text_out"]["kernel"] == (1, 16, 32)
    assert pieces["double_0"]["image_mlp_1"]["kernel"] == (32, 2, 48)
    assert pieces["double_0"]["text_mlp_2"]["kernel"] == (48, 32)
    assert pieces["single_0"]["parallel_in"]["kernel"] == (32, 9, 1, 16)
    assert pieces["single_1"]["parallel_out"]["kernel"] == (4, 1, 16, 32)
    found = apply(network, placed, jax.device_put(inputs, batch_sharding(mesh)))
    # Sums over two parts in another order: float32 roundings of outputs of order 1.
    np.testing.assert_allclose(found, apply(network, params, inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "inputs", "message"),
    [
        ({"axes": (8, 8)}, {}, r"axes are \(8, 8\): give four even numbers whose sum is head_width=16"),
        ({"axes": (4, 4, 4, 2)}, {}, "give four even numbers whose sum is head_width=16"),
        ({}, {"x_t": jnp.zeros((3, 4, 6, 16))}, "latents of 16 channels, where the network's out_channels is 8"),
        ({}, {"references": (jnp.zeros((3, 2, 2, 32)),)}, "a reference of 32 channels, where"),
        ({"context_width": 12}, {}, "gives width 10 where the network's context_width is 12"),
        ({"guidance_embedding": True}, {}, "told its guidance: give guidance, one number per image"),
        ({}, {"guidance": jnp.ones(3)}, "not told its guidance: leave guidance out"),
    ],
)
def test_bad_input_is_named(change, inputs, message):
    found = network_of_config(config_of("klein"))
    given: Any = {**told(found, 0), "references": (), **inputs}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: found.clone(**change).init(jax.random.key(0), **given))


@pytest.mark.parametrize(("num_tokens", "num_steps"), record.TOKENS_AND_STEPS)
def test_the_grid_is_that_of_diffusers(num_tokens, num_steps):
    grid, expected = flux2_grid(num_steps, num_tokens), GOLDEN[f"grids/{num_tokens}/{num_steps}"]
    np.testing.assert_allclose(grid.time, expected, rtol=4 * 2**-24)  # theirs are float32
    np.testing.assert_array_equal(grid.noise, grid.time)
    np.testing.assert_allclose(grid.signal, 1 - expected, atol=4 * 2**-24)


def test_the_grid_of_few_steps_by_hand():
    """mu of 1440^2 pixels does not depend on steps: exp(mu) / (exp(mu) + 1 / sigma - 1) at sigma = 3 / 4."""
    shift = math.exp(0.00016927 * 8100 + 0.45666666)
    assert float(flux2_grid(4, 8100).time[1]) == pytest.approx(shift / (shift + 1 / 3), rel=1e-6)
    with pytest.raises(ValueError, match="num_tokens is 0"):
        flux2_grid(4, 0)
    with pytest.raises(ValueError, match="at least 1"):
        flux2_grid(0, 64)
