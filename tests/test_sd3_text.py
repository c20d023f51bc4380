"""Texts as Stable Diffusion 3 reads them: diffusers' features, encoders absent or dropped, published folders."""

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_text import CLIP_LENGTH, ENCODERS, T5_LENGTH, TEXT, weights_of, write_text_folder
from safetensors.numpy import load_file, save_file

from diffusion.data import scenes, sentencepiece, text
from diffusion.data.captions import with_text
from diffusion.model import sd3_text
from diffusion.model.condition import Facts
from diffusion.model.joined_text import ENCODERS as NAMES
from diffusion.model.joined_text import Layout, keep
from diffusion.model.prompts import Text
from diffusion.pretrained.sd3_text import PARTS, read_tokenizer, read_towers, towers_of_file, write_towers

TEXTS = json.loads(str(TEXT["texts"]))
PROMPTS, NEGATIVES = TEXTS["prompts"], TEXTS["negatives"]
WIDTHS = {"clip_l": 12, "clip_g": 20, "t5": 40}
# float32 over four layers, whose sums have up to 48 terms; features are of size 1.
CLOSE: dict[str, Any] = dict(atol=2e-5, rtol=0)

pytestmark = pytest.mark.filterwarnings("ignore:a text of .* tokens is truncated")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return write_text_folder(tmp_path_factory.mktemp("sd3") / "folder")


@pytest.fixture
def copy(tmp_path):
    """A folder of the test's own, to be damaged."""
    return write_text_folder(tmp_path / "folder")


@pytest.fixture(scope="module")
def whole(published):
    return sd3_text.load_text(published, length=T5_LENGTH)


def encode(encoder, params, texts):
    return jax.jit(encoder.encode)(params, encoder.tokenize(texts))


def check(found, case):
    for name, array in found._asdict().items():
        golden = TEXT[f"{case}/{name}"]
        assert golden.std() > 0.5
        np.testing.assert_allclose(array, golden, **CLOSE)


# --- features


def test_ids_are_those_of_the_three_tokenizers_side_by_side(whole):
    encoder, _ = whole
    ids = encoder.tokenize(PROMPTS + NEGATIVES)
    parts = np.split(ids, [CLIP_LENGTH, 2 * CLIP_LENGTH], axis=1)
    for part, name in zip(parts, ("tokenizer", "tokenizer_2", "tokenizer_3"), strict=True):
        np.testing.assert_array_equal(part, TEXT[f"ids/{name}"])
    # CLIP-L pads with the end of text, bigG with token 0: their folders say so.
    assert parts[0][3, -1] == 520 and parts[1][3, -1] == 0


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize(("case", "leave_out"), [("all", ()), ("without_t5", ("t5",))])
def test_features_are_those_of_diffusers(published, case, leave_out, skip):
    encoder, params = sd3_text.load_text(
        published, length=T5_LENGTH, clip_skip=skip, leave_out=leave_out, widths={"t5": 40}
    )
    check(encode(encoder, params, PROMPTS), f"{case}/{skip}")
    assert (encoder.context_width, encoder.pooled_width) == (40, 30)
    if not skip:
        check(encode(encoder, params, NEGATIVES), f"{case}/negative")


@pytest.mark.parametrize("absent", [("clip_l",), ("clip_g",), ("clip_l", "clip_g"), ("clip_g", "t5")])
def test_an_encoder_that_is_absent_leaves_zeros_in_its_place(published, whole, absent):
    # bigG's pooled vector is not as wide as its features; an absent one is thought to be.
    widths = {**WIDTHS, "clip_g": 18} if "clip_g" in absent else WIDTHS
    encoder, params = sd3_text.load_text(published, length=T5_LENGTH, leave_out=absent, widths=widths)
    found, every = encode(encoder, params, PROMPTS), encode(whole[0], whole[1], PROMPTS)
    clip_length = 77 if {"clip_l", "clip_g"} <= set(absent) else CLIP_LENGTH
    assert found.context.shape == (2, clip_length + T5_LENGTH, 40) and found.pooled.shape == (2, 30)
    kept = jnp.array([[name not in absent for name in NAMES]] * 2)
    expected = keep(Layout(**whole[0].description["layout"]), every, kept)
    np.testing.assert_allclose(found.context[:, clip_length:], expected.context[:, CLIP_LENGTH:], **CLOSE)
    np.testing.assert_allclose(found.context[:, :CLIP_LENGTH], expected.context[:, :CLIP_LENGTH], **CLOSE)
    np.testing.assert_allclose(found.pooled, expected.pooled, **CLOSE)
    assert params.keys() == set(NAMES) - set(absent)


def test_bfloat16_keeps_the_features(published):
    encoder, params = sd3_text.load_text(published, length=T5_LENGTH, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    found = encode(encoder, params, PROMPTS)
    assert found.context.dtype == found.pooled.dtype == jnp.float32
    for name, array in found._asdict().items():
        golden = TEXT[f"all/0/{name}"]
        # 8 bits, of weights and of some ten sums: 0.4% each.
        assert np.sqrt(np.mean(np.square(array - golden))) < 0.05 * golden.std()


def test_a_description_makes_the_encoder_again(published):
    encoder, params = sd3_text.load_text(
        published, length=T5_LENGTH, clip_skip=1, dtype="bfloat16", leave_out=["t5"], widths={"t5": 40}
    )
    stored = json.loads(json.dumps(encoder.description))
    again = sd3_text.restore(stored)
    assert again.description == encoder.description
    np.testing.assert_array_equal(again.tokenize(PROMPTS), encoder.tokenize(PROMPTS))
    for one, other in zip(encode(again, params, PROMPTS), encode(encoder, params, PROMPTS), strict=True):
        np.testing.assert_array_equal(one, other)
    # As a checkpoint is read: the tree and the dtypes of the stored weights.
    made = jax.eval_shape(again.init, jax.random.key(0))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    with pytest.raises(ValueError, match=r"not of condition\.name=sd3"):
        sd3_text.restore({"vocabulary": []})


def test_published_shapes_take_333_tokens_of_4096():
    layout = Layout(77, 256, 768, 1280, 4096, 768, 1280)
    found = jax.eval_shape(lambda: sd3_text.join(layout, 2, {}))
    assert found.context.shape == (2, 333, 4096) and found.pooled.shape == (2, 2048)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"length": 0}, r"0 tokens for T5: it has to read 1\.\.512"),
        ({"length": 513}, "513 tokens for T5"),
        ({"clip_skip": 3}, r"clip_skip is 3: it has to lie in 0\.\.2, for CLIPs of 3 layers"),
        ({"clip_skip": -1}, "clip_skip is -1"),
        (
            {"leave_out": ["t5"], "widths": {"t5": 31}},
            "12 and 20 wide, do not fit beside each other in a context of 31",
        ),
        ({"leave_out": ["clip"]}, "no text encoder is called clip: choose from clip_l, clip_g, t5"),
        ({"leave_out": NAMES}, "has no text encoder but clip_l, clip_g, t5"),
    ],
)
def test_settings_that_cannot_be(published, options, message):
    with pytest.raises(ValueError, match=message):
        sd3_text.load_text(published, **options)


def test_clips_of_different_lengths(published):
    towers = read_towers(published)
    short = towers["clip_g"]._replace(module=towers["clip_g"].module.clone(length=8))
    with pytest.raises(ValueError, match="the CLIPs read 8 and 9 tokens"):
        sd3_text.make_text_encoder({**towers, "clip_g": short})
    with pytest.raises(ValueError, match="give at least one of clip_l, clip_g, t5"):
        sd3_text.make_text_encoder({})


# --- the condition


def rows_of(captions):
    """A batch of training that says nothing but texts."""
    return {"label": np.zeros(len(captions), np.int32)}


def test_each_encoder_is_dropped_by_itself(whole):
    """Of 4000 examples; a share is known to 4 standard deviations of a binomial."""
    encoder, params = whole
    condition = sd3_text.joined_prompts(encoder, 0.463)
    ones = {"context": jnp.ones((4000, 25, 40)), "pooled": jnp.ones((4000, 30)), **rows_of(range(4000))}
    told = jax.jit(condition.of_batch)(params, ones, jax.random.key(0))
    context, pooled = map(np.asarray, (told["context"], told["pooled"]))
    clips, t5 = context[:, :CLIP_LENGTH], context[:, CLIP_LENGTH:]
    clip_l, clip_g = clips[..., :12], clips[..., 12:]
    kept = np.stack([part[:, 0, 0] for part in (clip_l, clip_g, t5)], axis=1)
    for column, part in zip(kept.T, (clip_l, clip_g, t5), strict=True):  # wholly there or wholly zero
        assert (part == column[:, None, None]).all()
    np.testing.assert_array_equal(pooled, np.repeat(kept[:, :2], [12, 18], axis=1))
    share, bound = 0.463, 4 * (0.25 / 4000) ** 0.5
    np.testing.assert_allclose(1 - kept.mean(0), share, atol=bound)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert abs(np.mean((kept[:, i] == 0) & (kept[:, j] == 0)) - share**2) < bound
    assert abs(np.mean(kept.sum(1) == 0) - share**3) < bound
    other = jax.jit(condition.of_batch)(params, ones, jax.random.key(1))["pooled"]
    assert 0.2 < np.mean(np.asarray(other)[:, 0] != pooled[:, 0]) < 0.8


def test_features_made_once_are_dropped_as_those_of_ids_are(whole):
    encoder, params = whole
    condition = sd3_text.joined_prompts(encoder, 0.5)
    captions = [*PROMPTS, *NEGATIVES] * 4
    of_batch, key = jax.jit(condition.of_batch), jax.random.key(3)
    of_ids = of_batch(params, {"text": condition.read(captions), **rows_of(captions)}, key)
    made = encode(encoder, params, captions)._asdict()
    once = of_batch(params, {**made, **rows_of(captions)}, key)
    for name in ("context", "pooled"):
        np.testing.assert_allclose(of_ids[name], once[name], **CLOSE)
        assert 0.1 < np.mean(np.asarray(once[name]) == 0) < 0.9


def test_nothing_is_dropped_at_zero_and_all_at_one(whole):
    encoder, params = whole
    batch: Any = {**encode(encoder, params, PROMPTS)._asdict(), "label": jnp.zeros(2, jnp.int32)}
    none = sd3_text.joined_prompts(encoder, 0.0).of_batch(params, batch, jax.random.key(0))
    check(Text(**none), "all/0")
    every = sd3_text.joined_prompts(encoder, 1.0).of_batch(params, batch, jax.random.key(0))
    assert not np.any(every["context"]) and not np.any(every["pooled"])
    with pytest.raises(ValueError, match=r"condition\.dropout is 1\.5"):
        sd3_text.joined_prompts(encoder, 1.5)


def test_no_condition_is_zeros_or_the_empty_prompt(whole):
    encoder, params = whole
    requests = [PROMPTS[0], None, ""]
    zeros, empty = (sd3_text.joined_prompts(encoder, null=null) for null in ("zeros", "empty"))
    assert zeros.kind == "prompts" and zeros.frozen and zeros.widths == {"context_width": 40, "pooled_width": 30}
    told = jax.jit(zeros.of_request)(params, zeros.read(requests))
    assert not np.any(told["context"][1]) and not np.any(told["pooled"][1])
    np.testing.assert_allclose(told["context"][0], TEXT["all/0/context"][0], **CLOSE)
    np.testing.assert_allclose(told["context"][2], TEXT["all/negative/context"][1], **CLOSE)
    rows = empty.read(requests)
    np.testing.assert_array_equal(rows[1], rows[2])
    with pytest.raises(ValueError, match=r"condition\.null is 'none': choose zeros or empty"):
        sd3_text.joined_prompts(encoder, null="none")


def test_the_condition_of_a_run_starts_from_a_folder_and_goes_on_from_its_description(published):
    started = sd3_text.sd3_text(Facts(None, {}, ()), folder=str(published), length=T5_LENGTH)
    assert started.init is not None and started.description is not None
    params = started.init(jax.random.key(0))
    stored = json.loads(json.dumps(started.description))
    resumed = sd3_text.sd3_text(Facts(None, stored, ()))
    assert resumed.init is not None
    shapes = jax.eval_shape(resumed.init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    check(Text(**jax.jit(resumed.of_request)(params, resumed.read(PROMPTS))), "all/0")
    source = with_text(scenes.scenes("train", 16, 4), resumed.read)
    assert source.read(np.arange(4))["text"].shape == (4, 2 * CLIP_LENGTH + T5_LENGTH)
    with pytest.raises(ValueError, match=r"name its folder, --config\.condition\.folder=DIR"):
        sd3_text.sd3_text(Facts(None, {}, ()))


# --- folders and files


def test_folders_go_there_and_back_bit_for_bit(published, tmp_path):
    towers = read_towers(published, weights_dtype=None)
    out = tmp_path / "out"
    out.mkdir()
    index = write_towers(out, towers)
    theirs = json.loads((published / "model_index.json").read_text())
    (out / "model_index.json").write_text(json.dumps({**theirs, **index}))
    for part in ENCODERS:
        found = load_file(out / part / "model.safetensors")
        expected = weights_of(part)
        assert found.keys() == expected.keys()
        assert all((found[name] == array).all() for name, array in expected.items())
    again = read_towers(out)
    for name, tower in towers.items():
        assert again[name].module == tower.module and again[name].padding == tower.padding
        assert again[name].tokenizer.get_vocab() == tower.tokenizer.get_vocab()
        jax.tree.map(np.testing.assert_array_equal, again[name].params, tower.params)
    encoder, params = sd3_text.load_text(out, length=T5_LENGTH)
    check(encode(encoder, params, PROMPTS), "all/0")


def test_a_vocabulary_of_ones_own_and_an_absent_encoder_are_written_too(published, tmp_path):
    towers = read_towers(published, leave_out=["clip_g", "t5"])
    own = text.train_tokenizer(["a red cat"], 260)
    module = towers["clip_l"].module.clone(end_of_text=1)
    index = write_towers(tmp_path, {"clip_l": towers["clip_l"]._replace(module=module, tokenizer=own, padding=1)})
    assert index["text_encoder_2"] == index["tokenizer_3"] == [None, None]
    assert index["tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusion3Pipeline", **index}))
    (again,) = read_towers(tmp_path).values()
    assert again.tokenizer.encode("a red cat").ids == [0, *own.encode("a red cat").ids, 1] and again.padding == 1


def test_the_single_file_gives_the_same_encoders(published):
    """Its CLIP-L is read without a projection, whatever it holds: with the identity."""
    arrays = {
        f"{prefix}{key}": array
        for (_, _, prefix), part in zip(PARTS.values(), ENCODERS, strict=True)
        for key, array in weights_of(part).items()
    }
    arrays |= {"model.diffusion_model.x_embedder.proj.bias": np.zeros(3)}
    words = {name: read_tokenizer(name, published / f"tokenizer{suffix}") for name, (suffix, *_) in PARTS.items()}
    found, folder = towers_of_file(arrays, words), read_towers(published)
    assert found["t5"].module == folder["t5"].module
    for name in ("clip_l", "clip_g"):
        heads = folder[name].module.num_heads  # not 64 wide, as the published ones
        assert found[name].module.clone(num_heads=heads) == folder[name].module
    assert (found["clip_l"].params["params"].pop("projection")["kernel"] == np.eye(12)).all()
    folder["clip_l"].params["params"].pop("projection")
    for name, tower in folder.items():
        jax.tree.map(np.testing.assert_array_equal, found[name].params, tower.params)
    with pytest.raises(
        ValueError, match=r"the file has no text_encoders\.t5xxl\.transformer\.\*: read t5 from another"
    ):
        towers_of_file({key: array for key, array in arrays.items() if "t5xxl" not in key}, words)
    with pytest.raises(ValueError, match=r"lack text_model\.embeddings\.position_embedding$"):
        towers_of_file({key: array for key, array in arrays.items() if "position_embedding" not in key}, words)
    with pytest.raises(ValueError, match="the tokenizer of clip_g: the tokenizer has no token"):
        towers_of_file(arrays, {"clip_g": words["t5"]})


def index_of(folder, **parts):
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **parts}))


def refused(folder, message):
    with pytest.raises(ValueError, match=message) as error:
        read_towers(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("part", [None, [None, None]])
def test_an_encoder_may_be_null_in_the_index(copy, part):
    index_of(copy, text_encoder_3=part, tokenizer_3=part)
    assert list(read_towers(copy)) == ["clip_l", "clip_g"]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"_class_name": "FluxPipeline"},
            r"is a FLUX\.1 pipeline .*; needed is the folder of a StableDiffusion3Pipeline",
        ),
        (
            {"text_encoder": ["transformers", "CLIPTextModel"]},
            "text_encoder is a CLIPTextModel, needed is a CLIPTextModelW",
        ),
        ({"text_encoder_3": "t5"}, "text_encoder_3 is not a library and a class"),
        ({"tokenizer_2": [None, None]}, "has text_encoder_2 and no tokenizer_2: copy the published folder whole"),
    ],
)
def test_an_index_that_cannot_be(copy, parts, message):
    index_of(copy, **parts)
    refused(copy, message)


def test_folders_that_lack_a_part(copy, tmp_path):
    refused(tmp_path / "none", "is no file or folder; needed is the folder of a StableDiffusion3Pipeline")
    (copy / "text_encoder_3" / "model.safetensors").unlink()
    refused(copy, r"model\.safetensors cannot be read")
    (copy / "text_encoder_3").rename(copy / "elsewhere")
    refused(copy, r"lacks text_encoder_3: copy it there, or make it null in model_index\.json")


def test_a_tokenizer_of_another_model_is_refused_before_weights_are_read(copy):
    for part in ENCODERS:
        (copy / part / "model.safetensors").write_bytes(b"not read")
    (copy / "tokenizer_3" / "spiece.model").rename(copy / "tokenizer_2" / "spiece.model")
    refused(copy, r"tokenizer_3 holds no tokenizer of T5")
    (copy / "tokenizer_3" / "tokenizer.json").write_text(text.to_json(text.train_tokenizer(["a"], 258)))
    refused(copy, r"tokenizer_3/tokenizer\.json: a tokenizer of type BPE: T5's is Unigram")
    (copy / "tokenizer_3" / "tokenizer.json").unlink()
    (copy / "tokenizer_2" / "spiece.model").rename(copy / "tokenizer_3" / "spiece.model")
    config = json.loads((copy / "text_encoder_3" / "config.json").read_text())
    (copy / "text_encoder_3" / "config.json").write_text(json.dumps({**config, "vocab_size": 499}))
    refused(copy, r"tokenizer_3: the tokenizer has 500 tokens, the T5 a vocabulary of 499")
    vocabulary = json.loads((copy / "tokenizer_2" / "vocab.json").read_text())
    (copy / "tokenizer_2" / "vocab.json").write_text(json.dumps({**vocabulary, "more": 521}))
    refused(copy, r"tokenizer_2: the tokenizer has 522 tokens .* the weights have 521")
    t5 = sentencepiece.to_json(read_tokenizer("t5", copy / "tokenizer_3")[0])
    for name in ("vocab.json", "merges.txt"):
        (copy / "tokenizer" / name).unlink()
    (copy / "tokenizer" / "tokenizer.json").write_text(t5)
    refused(copy, re.escape("no token <|startoftext|>: it is not one of CLIP's"))


def test_variants_and_dtypes(copy):
    for part in ENCODERS:
        half = {name: array.astype(np.float16) for name, array in weights_of(part).items()}
        (copy / part / "model.safetensors").unlink()
        save_file(half, copy / part / "model.fp16.safetensors")
    cases: Any = (({}, "float32"), ({"weights_dtype": None}, "float16"), ({"variant": "fp16"}, "float32"))
    for options, dtype in cases:
        towers = read_towers(copy, **options)
        assert {leaf.dtype.name for tower in towers.values() for leaf in jax.tree.leaves(tower.params)} == {dtype}
    with pytest.raises(ValueError, match=r"model\.bf16\.safetensors cannot be read"):
        read_towers(copy, variant="bf16")
