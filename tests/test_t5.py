"""T5's encoder against recorded outputs of transformers, its published shapes and its folders."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden.clip_weights import weight_of
from safetensors.numpy import load_file, save_file

from diffusion.networks.t5 import RULES, T5Encoder, relative_buckets
from diffusion.pretrained.t5 import encoder_of, from_transformers, load_t5, network, save_t5, shapes, to_transformers
from diffusion.training import make_mesh, state_shardings

GOLDEN = np.load(Path(__file__).parent / "golden" / "t5_tiny.npz")
CONFIG = json.loads(str(GOLDEN["config"]))
TABLE, TIED = "shared.weight", "encoder.embed_tokens.weight"


def weights():
    return {name: weight_of(name, tuple(shape)) for name, shape in json.loads(str(GOLDEN["names"])).items()}


def apply(encoder, params, ids):
    return np.asarray(jax.jit(encoder.apply)(params, jnp.asarray(ids)))


@pytest.fixture
def published(tmp_path):
    """A folder as transformers writes it."""
    folder = tmp_path / "t5"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), folder / "model.safetensors")
    return folder


def change(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))


def test_it_is_transformers_at_all_places_and_at_those_of_padding(published):
    encoder, params = load_t5(published)
    assert encoder.num_heads * encoder.head_width != encoder.width
    ids = GOLDEN["ids"]
    assert (ids == 0).sum() > 300 and GOLDEN["output"][ids[:, ::5] == 0].std() > 0.5
    # float32 over three layers, whose sums have up to 200 terms; features are of size 1.
    np.testing.assert_allclose(apply(encoder, params, ids)[:, GOLDEN["places"]], GOLDEN["output"], atol=2e-5)
    np.testing.assert_allclose(apply(encoder, params, ids[:, :16]), GOLDEN["short"], atol=2e-5)


def test_padding_is_attended(published):
    encoder, params = load_t5(published)
    ids = np.array([[5, 9, 1, 0, 0, 0]])
    assert np.abs(apply(encoder, params, ids)[0, :3] - apply(encoder, params, ids[:, :3])[0]).max() > 0.1


@pytest.mark.parametrize(("number", "distance"), [(32, 128), (8, 20), (16, 1000)])
def test_buckets_are_those_of_the_released_code(number, distance):
    found = relative_buckets(300, number, distance)
    np.testing.assert_array_equal(found[150], GOLDEN[f"buckets/{number}/{distance}"])
    assert found.max() == number - 1 and found.min() == 0
    np.testing.assert_array_equal(found[1:, 1:], found[:-1, :-1])  # only the difference of places counts


def test_buckets_that_cannot_be():
    with pytest.raises(ValueError, match="num_buckets has to be a multiple of 4"):
        relative_buckets(3, 6, 128)
    with pytest.raises(ValueError, match="max_distance larger than a quarter of it"):
        relative_buckets(3, 32, 8)


@pytest.mark.parametrize(
    ("sizes", "count"),
    [
        ((512, 8, 6, 64, 1024), 35_332_800),
        ((768, 12, 12, 64, 2048), 109_628_544),
        ((1024, 24, 16, 64, 2816), 341_231_104),
        ((2048, 24, 32, 64, 5120), 1_223_527_424),
        ((4096, 24, 64, 64, 10240), 4_762_310_656),
    ],
    ids=["small", "base", "large", "xl", "xxl"],
)
def test_counts_of_the_published_models(sizes, count):
    found = shapes(T5Encoder(32128, *sizes))
    assert sum(x.size for x in jax.tree.leaves(found)) == count
    if count == 4_762_310_656:
        assert shapes(T5Encoder()) == found


def test_bfloat16_keeps_the_features_and_float16_is_refused(published):
    encoder, params = load_t5(published, jnp.bfloat16, weights_dtype=ml_dtypes.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    found = apply(encoder, params, GOLDEN["ids"][:, :16])
    assert found.dtype == np.float32
    # 8 bits, of weights and of some ten sums: 0.4% each, and softmax of logits that are several units apart.
    error = np.sqrt(np.mean(np.square(found - GOLDEN["short"])))
    assert 1e-3 < error < 0.05 * GOLDEN["short"].std()
    with pytest.raises(ValueError, match="overflow float16: compute in bfloat16 or float32"):
        encoder.clone(dtype=jnp.float16).apply(params, jnp.zeros((1, 2), jnp.int32))


def test_what_is_added_to_the_residual_is_not_rounded():
    """Of a block in bfloat16 that adds 1 + 2^-12 to zero: bfloat16 would make it 1."""
    encoder = T5Encoder(8, 8, 1, 1, 8, 8, dtype=jnp.bfloat16)
    params = {"params": jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes(encoder))}
    block = params["params"]["block_0"]
    ones = {"scale": np.ones(8, np.float32)}
    params["params"] |= {"token_embedding": np.ones((8, 8), np.float32), "norm_out": ones}
    block |= {"norm_1": ones, "norm_2": ones}
    block["value"] = {"kernel": np.eye(8, dtype=np.float32)}
    block["out"] = {"kernel": np.zeros((8, 8), np.float32)}
    block["out"]["kernel"][:2, 0] = 1, 2**-12
    found = apply(encoder, params, np.zeros((1, 2), np.int32))[0, 0]
    assert found[0] / found[1] == pytest.approx(2 + 2**-12, abs=2**-14)


def test_ids_outside_the_vocabulary_are_seen(published):
    encoder, params = load_t5(published)
    assert np.isnan(apply(encoder, params, [[encoder.vocab_size, 1]])).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_folders_go_there_and_back_bit_for_bit(published, tmp_path, dtype):
    theirs = {name: x.astype(dtype) for name, x in weights().items()}
    save_file(theirs, published / "model.safetensors")
    encoder, params = load_t5(published, weights_dtype=None)
    save_t5(tmp_path / "ours", encoder, params)
    found = load_file(tmp_path / "ours" / "model.safetensors")
    assert found.keys() == theirs.keys()
    assert all(found[name].dtype == dtype and (found[name] == theirs[name]).all() for name in theirs)
    again, same = load_t5(tmp_path / "ours", weights_dtype=None)
    assert again == encoder
    jax.tree.map(np.testing.assert_array_equal, same, params)
    with pytest.raises(ValueError, match="there already"):
        save_t5(tmp_path / "ours", encoder, params)


def test_shards_variants_and_both_names_of_the_table(published):
    _, expected = load_t5(published)
    arrays = weights()
    (published / "model.safetensors").unlink()
    arrays[TIED] = arrays.pop(TABLE)
    names = sorted(arrays)
    files = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in files.items():
        save_file({name: arrays[name] for name in part}, published / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (published / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    jax.tree.map(np.testing.assert_array_equal, load_t5(published)[1], expected)
    (published / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"lacks model-00002-of-00002\.safetensors of 2 shards: download them again"):
        load_t5(published)
    (published / "model.safetensors.index.json").unlink()
    half = {name: x.astype(np.float16) for name, x in (arrays | {TABLE: arrays[TIED]}).items()}
    save_file(half, published / "model.fp16.safetensors")
    found = load_t5(published, variant="fp16")[1]
    assert (found["params"]["token_embedding"] == half[TABLE]).all()
    save_file(half | {TIED: half[TIED] + 1}, published / "model.fp16.safetensors")
    with pytest.raises(ValueError, match="differ, and ours is one table"):
        load_t5(published)


def test_arrays_are_placed_one_by_one(published):
    seen = []
    _, params = load_t5(published, put=lambda path, x: seen.append(jax.tree_util.keystr(path)) or jnp.asarray(x))
    assert len(seen) == len(set(seen)) == len(weights())
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


def test_weights_that_do_not_fit(published):
    like = shapes(load_t5(published)[0])
    arrays = weights()
    name = "encoder.block.1.layer.1.DenseReluDense.wi_0.weight"
    with pytest.raises(ValueError, match=r"missing none, left over lm_head\.weight"):
        from_transformers(arrays | {"lm_head.weight": np.zeros(1)}, like)
    with pytest.raises(ValueError, match=rf"missing {name}, left over none"):
        from_transformers({key: x for key, x in arrays.items() if key != name}, like)
    with pytest.raises(ValueError, match=r"has shape \[2, 2\], but this T5 encoder needs \[40, 24\]"):
        from_transformers(arrays | {name: np.zeros((2, 2))}, like)
    with pytest.raises(ValueError, match=r"missing shared\.weight"):
        from_transformers({key: x for key, x in arrays.items() if key != TABLE}, like)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"feed_forward_proj": "relu"}, "has feed_forward_proj=relu: ours is a T5 v1.1 encoder, with gated-gelu"),
        ({"layer_norm_epsilon": 1e-5}, "has layer_norm_epsilon=1e-05"),
        ({"model_type": "umt5"}, "has model_type=umt5"),
        ({"num_heads": 2.0}, r"num_heads is 2\.0, not a whole number"),
        ({"d_ff": 0}, "d_ff is 0, not a whole number"),
        ({"num_layers": 2}, r"missing none, left over encoder\.block\.2\."),
    ],
)
def test_configs_of_others(published, fields, message):
    change(published, **fields)
    with pytest.raises(ValueError, match=message) as error:
        load_t5(published)
    assert "\n" not in str(error.value)


def test_other_folders_are_named(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match=r"is a FLUX\.1 pipeline .*; needed is that of a T5EncoderModel"):
        network(tmp_path)


def test_shapes_alone_say_which_encoder_it_is(published):
    encoder, params = load_t5(published)
    arrays = to_transformers(params["params"])
    assert encoder_of(arrays) == encoder
    arrays[TIED] = arrays.pop(TABLE)
    assert encoder_of(arrays) == encoder
    with pytest.raises(ValueError, match=r"not the weights of a T5 v1\.1 encoder"):
        encoder_of({TABLE: arrays[TIED]})


def test_a_mesh_cuts_heads_and_hidden_units(published):
    encoder, params = load_t5(published)
    mesh = make_mesh(4, "tensor:4")
    shardings: Any = state_shardings(mesh, params, RULES)
    block = shardings["params"]["block_0"]
    assert [block[name]["kernel"].spec for name in ("query", "mlp_gate", "out", "mlp_2")] == [
        *[jax.sharding.PartitionSpec(None, "tensor")] * 2,
        *[jax.sharding.PartitionSpec("tensor", None)] * 2,
    ]
    placed = jax.device_put(params, shardings)
    np.testing.assert_allclose(apply(encoder, placed, GOLDEN["ids"][:, :16]), GOLDEN["short"], atol=2e-5)
