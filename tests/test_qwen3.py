"""Qwen3 as an encoder, its folders and its tokenizer, against transformers."""

import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden.clip_weights import weight_of
from safetensors.numpy import load_file, save_file

from diffusion.data import chat
from diffusion.networks.qwen3 import RULES, Qwen3
from diffusion.pretrained.qwen3 import load_qwen3, network, save_qwen3, shapes
from diffusion.training import make_mesh, state_shardings

HERE = Path(__file__).parent / "golden"
GOLDEN, TEXT = np.load(HERE / "qwen3_tiny.npz"), np.load(HERE / "qwen3_text.npz")
CONFIG, PROMPTS = json.loads(str(GOLDEN["config"])), json.loads(str(TEXT["prompts"]))
STATES = (1, 2, 3)
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"


def weights():
    found = {name: weight_of(name, tuple(shape)) for name, shape in json.loads(str(GOLDEN["names"])).items()}
    small = np.float32(2**-9)  # as recorded: the epsilon of the keys' normalisation counts
    return {name: weight * small if ".k_proj." in name else weight for name, weight in found.items()}


@pytest.fixture
def published(tmp_path):
    """A folder as transformers writes it."""
    folder = tmp_path / "qwen3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(weights(), folder / "model.safetensors")
    return folder


def change(folder, **fields):
    (folder / "config.json").write_text(json.dumps({**CONFIG, **fields}))


def run(encoder, params, length=None):
    """Returns states [B, places, states, width] of the recorded tokens."""
    found = jax.jit(encoder.apply)(
        params, jnp.asarray(GOLDEN["ids"])[:, :length], jnp.asarray(GOLDEN["real"])[:, :length]
    )
    return np.asarray(found).reshape(*found.shape[:2], len(STATES), -1)


def test_states_are_those_of_transformers_at_text_and_at_padding(published):
    encoder, params = load_qwen3(published, states=STATES)
    assert encoder.num_heads * encoder.head_width != encoder.width and encoder.num_kv_heads < encoder.num_heads
    padded = ~GOLDEN["real"][:, GOLDEN["places"]]
    assert GOLDEN["states"][padded].std() > 0.5 and padded.sum() > 50
    # float32 over three layers, whose sums have up to 200 terms; states are of size 1.
    found = run(encoder, params)[:, GOLDEN["places"]]
    np.testing.assert_allclose(found, GOLDEN["states"], atol=2e-5)


def test_the_epsilon_is_the_configs(published):
    change(published, rms_norm_eps=1e-5)
    encoder, params = load_qwen3(published, states=STATES)
    assert np.abs(run(encoder, params)[:, GOLDEN["places"]] - GOLDEN["states"]).max() > 0.01


def test_later_states_are_those_of_layers_between(published):
    encoder, params = load_qwen3(published, states=(1, 3))
    found = jax.jit(encoder.apply)(params, jnp.asarray(GOLDEN["ids"]), jnp.asarray(GOLDEN["real"]))
    found = np.asarray(found)[:, GOLDEN["places"]].reshape(*GOLDEN["states"].shape[:2], 2, -1)
    np.testing.assert_allclose(found, GOLDEN["states"][:, :, [0, 2]], atol=2e-5)


def test_padding_is_not_attended_and_what_follows_neither(published):
    encoder, params = load_qwen3(published, states=STATES)
    other = np.where(GOLDEN["real"], GOLDEN["ids"], 5)
    found = np.asarray(jax.jit(encoder.apply)(params, jnp.asarray(other), jnp.asarray(GOLDEN["real"])))
    whole = run(encoder, params)
    np.testing.assert_array_equal(found.reshape(whole.shape)[GOLDEN["real"]], whole[GOLDEN["real"]])
    np.testing.assert_allclose(run(encoder, params, 60), whole[:, :60], atol=2e-5)


def test_only_layers_that_are_run_are_read_unless_the_whole_is_asked_for(published):
    part, whole = (network(published, states=(1, 2), whole=whole) for whole in (False, True))
    assert sorted(shapes(part)) == ["layer_0", "layer_1", "token_embedding"]
    for encoder in (part, whole):
        ids = jax.ShapeDtypeStruct((1, 1), np.int32)
        assert shapes(encoder) == jax.eval_shape(encoder.init, jax.random.key(0), ids)["params"]
    later = {"head", "layer_2", "layer_3", "norm_out"}
    assert shapes(whole).keys() - shapes(part).keys() == later
    both = [load_qwen3(published, states=(1, 2), whole=encoder.whole)[1]["params"] for encoder in (part, whole)]
    assert all(
        np.array_equal(x, y)
        for x, y in zip(
            jax.tree.leaves(both[0]), jax.tree.leaves({name: both[1][name] for name in both[0]}), strict=True
        )
    )
    given = jnp.asarray(GOLDEN["ids"][:1, :5])
    found = [jax.jit(e.apply)({"params": p}, given) for e, p in zip((part, whole), both, strict=True)]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("sizes", "count", "read"),
    [
        ((1024, 28, 16, 8, 128, 3072), 596_049_920, None),
        ((2048, 28, 16, 8, 128, 6144), 1_720_574_976, None),
        ((2560, 36, 32, 8, 128, 9728), 4_022_468_096, 3_114_088_192),
        ((4096, 36, 32, 8, 128, 12288), 8_190_735_360, 5_831_883_520),
    ],
    ids=["0.6b", "1.7b", "4b", "8b"],
)
def test_counts_of_the_published_models(sizes, count, read):
    def counted(**options):
        return sum(x.size for x in jax.tree.leaves(shapes(Qwen3(151936, *sizes, **options))))

    assert counted(whole=True, tied=sizes[0] != 4096) == count
    if read:
        assert counted() == read
    if count == 4_022_468_096:
        assert shapes(Qwen3()) == shapes(Qwen3(151936, *sizes))


def test_bfloat16_keeps_the_states_and_float16_is_refused(published):
    encoder, params = load_qwen3(published, jnp.bfloat16, states=STATES, weights_dtype=ml_dtypes.bfloat16)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    found = run(encoder, params)[:, GOLDEN["places"]]
    assert found.dtype == np.float32
    # 8 bits, of weights and of some fifteen sums: 0.4% each, and softmax of logits that are several units apart.
    assert 1e-3 < np.sqrt(np.mean(np.square(found - GOLDEN["states"]))) < 0.05
    with pytest.raises(ValueError, match="compute in bfloat16 or float32"):
        encoder.clone(dtype=jnp.float16).apply(params, jnp.zeros((1, 2), jnp.int32))


@pytest.mark.parametrize("kind", ["one file", "shards", "without a head", "bfloat16"])
def test_folders_go_there_and_back_bit_for_bit(published, tmp_path, kind):
    dtype = ml_dtypes.bfloat16 if kind == "bfloat16" else np.float32
    theirs = {name: weight.astype(dtype) for name, weight in weights().items()}
    if kind == "without a head":
        theirs = {name.removeprefix("model."): weight for name, weight in theirs.items() if name != HEAD}
        change(published, architectures=["Qwen3Model"], tie_word_embeddings=True)
    save_file(theirs, published / "model.safetensors")
    encoder, params = load_qwen3(published, states=STATES, whole=True, weights_dtype=None)
    save_qwen3(tmp_path / "own", encoder, params, 20_000 if kind == "shards" else 2 * 10**9)
    files = sorted((tmp_path / "own").glob("*.safetensors"))
    assert (len(files) > 1) == (kind == "shards")
    found = {name: weight for file in files for name, weight in load_file(file).items()}
    if kind == "without a head":
        found = {name.removeprefix("model."): weight for name, weight in found.items()}
    assert found.keys() == theirs.keys()
    assert all(found[name].dtype == dtype and np.array_equal(found[name], theirs[name]) for name in theirs)
    again, _ = load_qwen3(tmp_path / "own", states=STATES, whole=True)
    assert again == encoder


def test_arrays_are_put_one_by_one(published):
    names = []

    def put(path, array):
        names.append(jax.tree_util.keystr(path, simple=True, separator="/"))
        return jnp.asarray(array)

    _, params = load_qwen3(published, states=(1, 2), put=put)
    assert len(names) == len(set(names)) == 23 and "layer_1/query/kernel" in names and "token_embedding" in names
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))


REFUSED = [
    (dict(model_type="qwen2"), "needed is that of a Qwen3ForCausalLM"),
    (dict(attention_bias=True), "has attention_bias=True"),
    (dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e6}), "rope_type=yarn: ours is the default"),
    (dict(rope_parameters={"rope_type": "default", "rope_theta": -1}), "rope_theta is -1, not a number above 0"),
    (dict(layer_types=["sliding_attention"] * 4), "layers of another kind than full_attention"),
    (dict(num_hidden_layers=3), "3 layers have no hidden states"),
    (dict(num_attention_heads=0), "num_attention_heads is 0, not a whole number"),
    (dict(intermediate_size=41), r"mlp.down_proj.weight has shape \[24, 40\], but this Qwen3 needs"),
]


@pytest.mark.parametrize(("fields", "line"), REFUSED)
def test_configs_that_ours_cannot_be_are_refused(published, fields, line):
    change(published, **fields)
    with pytest.raises(ValueError, match=line) as caught:
        load_qwen3(published, states=STATES)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "shape", "line"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, "missing model.layers.1.mlp.up_proj.weight"),
        ("model.layers.1.mlp.bias", (3,), "left over model.layers.1.mlp.bias"),
        ("model.layers.3.mlp.bias", (3,), "left over model.layers.3.mlp.bias"),
        ("model.layers.3.mlp.up_proj.weight", (2, 3), r"up_proj.weight has shape \[2, 3\]"),
    ],
)
def test_weights_that_do_not_fit_are_refused(published, name, shape, line):
    theirs = weights()
    theirs.pop(name, None)
    if shape:
        theirs[name] = np.zeros(shape, np.float32)
    save_file(theirs, published / "model.safetensors")
    with pytest.raises(ValueError, match=line):
        load_qwen3(published, states=(1, 2))


def test_a_head_that_should_be_the_table_is_compared(published):
    change(published, tie_word_embeddings=True)
    with pytest.raises(ValueError, match="differ, and config"):
        load_qwen3(published, states=STATES, whole=True)
    save_file(weights() | {HEAD: weights()[TABLE]}, published / "model.safetensors")
    load_qwen3(published, states=STATES, whole=True)


def test_a_part_is_not_published(published, tmp_path):
    encoder, params = load_qwen3(published, states=STATES)
    with pytest.raises(ValueError, match="read the published folder with whole=True"):
        save_qwen3(tmp_path / "own", encoder, params)
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (dict(states=()), "numbers that rise, from 1 to 35"),
        (dict(states=(3, 3)), "numbers that rise"),
        (dict(states=(36,)), "numbers that rise"),
        (dict(num_kv_heads=5), "num_kv_heads has to divide num_heads"),
    ],
)
def test_networks_that_cannot_be(changes, line):
    with pytest.raises(ValueError, match=line):
        shapes(Qwen3(**changes))


def test_a_mesh_cuts_every_large_parameter():
    found = shapes(Qwen3(600, 64, 3, 4, 2, 32, 128, states=(1, 2)))
    mesh = make_mesh(2, "tensor:2")
    cut = state_shardings(mesh, found, RULES)
    names = {
        jax.tree_util.keystr(path[-2:], simple=True, separator="/")
        for path, one in jax.tree_util.tree_leaves_with_path(cut)
        if "tensor" in one.spec
    }
    assert names == {f"{name}/kernel" for name in ("query", "key", "value", "out", "mlp_gate", "mlp_1", "mlp_2")}


def tiny_folder(path):
    (path / "tokenizer.json").write_bytes(TEXT["tokenizer"].tobytes())
    (path / "tokenizer_config.json").write_bytes(TEXT["tokenizer_config"].tobytes())
    return path


def check_ids(kind, tokenizer, padding):
    ids = json.loads(str(TEXT[f"{kind}/ids"]))
    own = chat.encode(tokenizer, PROMPTS, max(map(len, ids)))
    assert [row[row >= 0].tolist() for row in own] == ids
    with pytest.warns(UserWarning, match=r"truncated to 24; not read: .* more of \d+ texts\)"):
        own = chat.encode(tokenizer, PROMPTS, 24)
    np.testing.assert_array_equal(own >= 0, TEXT[f"{kind}/real"])
    np.testing.assert_array_equal(np.where(own >= 0, own, padding), TEXT[f"{kind}/padded"])


def test_ids_are_those_of_transformers(tmp_path):
    tokenizer, padding = chat.read_tokenizer(tiny_folder(tmp_path))
    check_ids("tiny", tokenizer, padding)
    check_ids("tiny", chat.from_json(tokenizer.to_str()), padding)
    assert padding in chat.encode(tokenizer, ["<|endoftext|>"], 30)  # read, though it is what pads
    chat.check_vocabulary(tokenizer, 626)
    with pytest.raises(ValueError, match="the tokenizer has 626 tokens, the weights 625"):
        chat.check_vocabulary(tokenizer, 625)


def test_ids_of_the_published_tokenizer():
    folder = os.environ.get("QWEN3_TOKENIZER")
    if not folder:
        pytest.skip("QWEN3_TOKENIZER does not name a folder with Qwen3's tokenizer.json, which is 11 MB")
    tokenizer, padding = chat.read_tokenizer(folder)
    assert padding == 151643
    check_ids("qwen", tokenizer, padding)


def test_tokenizers_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"copy tokenizer.json there"):
        chat.read_tokenizer(tmp_path)
    tiny_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    with pytest.raises(ValueError, match="padding_side=left: ours pads behind the text"):
        chat.read_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(TEXT["tokenizer"].tobytes().decode().replace("<think>", "<thought>"))
    with pytest.raises(ValueError, match="no token <think>: it is not Qwen3's"):
        chat.read_tokenizer(tmp_path)
