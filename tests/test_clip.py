"""CLIP's towers against recorded outputs of transformers, its folders, its experiment on tiny scenes."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden.clip_weights import weight_of
from helpers import CONFIGS, make_call
from PIL import Image
from safetensors.numpy import load_file, save_file

from diffusion.data import captions, scenes, text
from diffusion.data.samples import load_samples
from diffusion.evaluation import clip_features
from diffusion.model import clip as model
from diffusion.model.fields import change, load
from diffusion.networks.clip import CLIP, ImageTower, TextTower, unit
from diffusion.pretrained.clip import from_transformers, load_clip, load_text_tower, save_clip, to_transformers
from diffusion.runs.run import open_run
from diffusion.runs.train import stored_in
from diffusion.training import RunError, make_mesh, place_batch, run_key
from experiments import clip as experiment
from experiments.captions import load_judge

ROOT = Path(__file__).parent.parent


def apply(module, params, *inputs, method=None) -> Any:
    return jax.jit(lambda params, *x: module.apply(params, *x, method=method))(params, *map(jnp.asarray, inputs))


@pytest.fixture(scope="module")
def golden():
    with np.load(ROOT / "tests" / "golden" / "clip_tiny.npz") as arrays:
        found = dict(arrays)
    return found | {name: json.loads(str(found[name])) for name in ("config", "names", "text_names")}


@pytest.fixture(scope="module")
def published(golden, tmp_path_factory):
    """Folders as transformers writes them: the whole CLIP, and a text tower alone, in half precision."""
    folder = tmp_path_factory.mktemp("published")
    for name, names in (("clip", golden["names"]), ("text", golden["text_names"])):
        (folder / name).mkdir()
        weights = {key: weight_of(key, tuple(shape)) for key, shape in names.items()}
        save_file(weights, folder / name / "model.safetensors")
    config = golden["config"]
    (folder / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", **config}))
    old = {**config["text_config"], "hidden_act": "gelu", "eos_token_id": 2, "projection_dim": 12}
    (folder / "text" / "config.json").write_text(json.dumps(old))
    return folder


def test_both_towers_are_transformers(golden, published):
    clip, params = load_clip(published / "clip")
    see = apply(clip, params, golden["image"], method="see")
    read = apply(clip, params, golden["ids"], method="read")
    found = {
        "image_embedding": unit(see.embedding),
        "text_embedding": unit(read.embedding),
        "image_features": see.embedding,
        "text_tokens": read.tokens,
        **{f"image_hidden_{i}": x for i, x in enumerate(see.hidden)},
        **{f"text_hidden_{i}": x for i, x in enumerate(read.hidden)},
    }
    assert len(found) == 4 + 3 + 3 and len(golden["ids"]) > len(golden["image"])
    image, caption, scale, bias = apply(clip, params, golden["image"], golden["ids"])
    found["logits"] = scale * image @ caption.T + bias
    for name, value in found.items():
        assert golden[name].std() > 0.05, name
        # float32 over two layers; activations are of size 1.
        np.testing.assert_allclose(value, golden[name], atol=2e-5, err_msg=name)


def test_towers_alone_with_an_exact_gelu_and_the_old_kind_of_config(golden, published):
    tower, params = load_text_tower(published / "text")
    assert tower.end_of_text == 49 and tower.activation == "gelu"
    read = apply(tower, params, golden["ids"])
    np.testing.assert_allclose(read.embedding, golden["gelu_text_embedding"], atol=2e-5)
    np.testing.assert_allclose(np.stack(read.hidden), golden["gelu_text_hidden"], atol=2e-5)
    whole, all_params = load_clip(published / "clip")
    vision = whole.image.clone(activation="gelu")
    see = apply(vision, {"params": all_params["params"]["image"]}, golden["image"])
    np.testing.assert_allclose(see.embedding, golden["gelu_image_embedding"], atol=2e-5)
    np.testing.assert_allclose(np.stack(see.hidden), golden["gelu_image_hidden"], atol=2e-5)


def test_bfloat16_and_remat(golden, published):
    clip, params = load_clip(published / "clip", jnp.bfloat16)
    remat = clip.clone(image=clip.image.clone(remat=True), text=clip.text.clone(remat=True))
    image, caption, *_ = apply(remat, params, golden["image"], golden["ids"])
    assert image.dtype == caption.dtype == jnp.float32
    # bfloat16 has 8 bits: 0.4% of each of some ten sums.
    np.testing.assert_allclose(image, golden["image_embedding"], atol=0.05)
    np.testing.assert_allclose(caption, golden["text_embedding"], atol=0.05)
    features = apply(remat, params, golden["ids"], method="read")
    assert {x.dtype for x in features.hidden} == {jnp.dtype(jnp.bfloat16)}


def test_what_follows_the_end_is_not_seen(published):
    clip, params = load_clip(published / "clip")
    ids = np.array([[3, 7, 49, 49, 49], [3, 7, 49, 8, 0], [3, 8, 49, 49, 49]])
    one, padded, other = apply(clip, params, ids, method="read").embedding
    np.testing.assert_allclose(one, padded, atol=1e-5)
    assert np.abs(one - other).max() > 0.05


def test_weights_go_to_transformers_and_back(golden, published, tmp_path):
    clip, params = load_clip(published / "clip")
    weights = to_transformers(params["params"])
    assert {name: list(x.shape) for name, x in weights.items()} == golden["names"]
    tokenizer = text.train_tokenizer(["a red three"], 258)
    save_clip(tmp_path / "mine", clip, params, text.to_json(tokenizer))
    again, same = load_clip(tmp_path / "mine")
    assert again == clip and text.read_tokenizer(tmp_path / "mine").get_vocab() == tokenizer.get_vocab()
    jax.tree.map(np.testing.assert_array_equal, params, same)
    with pytest.raises(ValueError, match="there already"):
        save_clip(tmp_path / "mine", clip, params, "")
    with pytest.raises(ValueError, match="has no bias"):
        save_clip(tmp_path / "sigmoid", clip.clone(bias=-10.0), params, "")


def test_weights_that_do_not_fit(published, tmp_path):
    _, params = load_clip(published / "clip")
    weights = load_file(published / "clip" / "model.safetensors")
    extra = {"text_model.embeddings.position_ids": np.arange(9)}  # old files hold it
    from_transformers(weights | extra, params["params"])
    with pytest.raises(ValueError, match="missing none, left over more"):
        from_transformers(weights | {"more": np.zeros(1)}, params["params"])
    short = {name: x for name, x in weights.items() if name != "logit_scale"}
    with pytest.raises(ValueError, match="missing logit_scale, left over none"):
        from_transformers(short, params["params"])
    with pytest.raises(ValueError, match=r"text_projection\.weight has shape \[3, 2\], but this CLIP needs \[12, 16\]"):
        from_transformers(weights | {"text_projection.weight": np.zeros((3, 2))}, params["params"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks text_config"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match=r"model.safetensors cannot be read"):
        load_text_tower(tmp_path)
    (tmp_path / "config.json").write_text('{"hidden_act": "relu"}')
    with pytest.raises(ValueError, match="asks for relu"):
        load_text_tower(tmp_path)


def test_published_shapes():
    """Counts of transformers' models: B/32, L/14, and SD3's text towers CLIP-L and OpenCLIP bigG."""

    def count(module, *inputs):
        shapes: Any = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        return sum(x.size for x in jax.tree.leaves(shapes))

    ids = jnp.zeros((1, 77), jnp.int32)
    assert count(CLIP(ImageTower(), TextTower()), jnp.zeros((1, 224, 224, 3)), ids) == 151_277_313
    large: Any = dict(width=768, num_heads=12, mlp_width=3072, projection=768)
    vision: Any = dict(patch_size=14, width=1024, num_layers=24, num_heads=16, mlp_width=4096, projection=768)
    assert count(CLIP(ImageTower(**vision), TextTower(**large)), jnp.zeros((1, 224, 224, 3)), ids) == 427_616_513
    assert count(TextTower(**large), ids) == 123_650_304
    big: Any = dict(width=1280, num_layers=32, num_heads=20, mlp_width=5120, projection=1280, activation="gelu")
    assert count(TextTower(**big), ids) == 694_659_840


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ImageTower(32, 8).init(jax.random.key(0), jnp.zeros((1, 32, 24, 3))), "32x24 pixels: this tower sees"),
        (lambda: ImageTower(32, 5).init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))), "5 pixels do not divide"),
        (lambda: TextTower(length=8).init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32)), "of 9 tokens"),
        (lambda: TextTower(num_heads=7).init(jax.random.key(0), jnp.zeros((1, 9), jnp.int32)), "7 heads do not divide"),
        (lambda: TextTower(activation="relu").init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32)), "quick_gelu or"),
    ],
)
def test_what_a_tower_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- training


SMALL = {
    f"network.{tower}.{field}": size
    for tower in ("image", "text")
    for field, size in (("width", 32), ("num_layers", 1), ("mlp_width", 64))
}


@pytest.fixture(scope="module")
def parts():
    """The experiment of the config, its batches small and its towers of one layer, on 8 devices and 1."""
    config, _ = load("clip", CONFIGS)
    config = change(config, {**SMALL, "data.batch_size": 64, "data.num_examples": 50, "loss.rows": 16})
    captioned = scenes.scenes("train", 16, 300)
    tokenizer = text.train_tokenizer(captioned.captions)
    clip = model.make_clip(config, tokenizer)
    source = captions.with_text(captioned, lambda texts: text.encode(tokenizer, texts, config.text.length))
    return config, clip, tokenizer, source


def test_loss_starts_at_log_batch_and_is_the_same_on_one_and_eight_devices(parts):
    config, clip, _, source = parts
    experiment = model.make_contrast(config, clip, source)
    params = jax.jit(experiment.init)(run_key(0, "init"))
    rows = source.read(np.arange(64))

    def mean(params, batch):
        return experiment.loss(params, batch, run_key(0, "train"))[0].mean()

    gradient = jax.jit(jax.value_and_grad(mean))
    one, eight = (gradient(params, place_batch(make_mesh(number), rows)) for number in (1, 8))
    assert abs(float(one[0]) / math.log(64) - 1) < 0.01
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(one[1]))
    assert largest > 1e-3
    # The same float32 sums in another order.
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-5 * largest)


def test_the_scale_stays_below_a_hundred():
    limit = model.at_most("logit_scale", math.log(100))
    params = {"logit_scale": jnp.float32(4.6), "kernel": jnp.float32(4.6)}
    updates: Any
    down: Any
    updates, _ = limit.update({"logit_scale": jnp.float32(0.5), "kernel": jnp.float32(0.5)}, limit.init(params), params)
    assert float(updates["kernel"]) == 0.5
    assert float(params["logit_scale"] + updates["logit_scale"]) == pytest.approx(math.log(100))
    down, _ = limit.update({"logit_scale": jnp.float32(-0.5), "kernel": jnp.float32(0)}, limit.init(params), params)
    assert float(down["logit_scale"]) == -0.5


def test_sigmoid_loss_is_a_switch_and_what_cannot_be_is_named(parts):
    config, _, tokenizer, source = parts
    other = change(config, {"loss.name": "sigmoid"})
    made = model.make_contrast(other, model.make_clip(other, tokenizer), source)
    params = jax.jit(made.init)(run_key(0, "init"))["params"]
    assert float(params["logit_bias"]) == -10 and float(params["logit_scale"]) == pytest.approx(math.log(10))
    for field, value, message in (
        ("loss.name", "hinge", "softmax or sigmoid"),
        ("loss.rows", 7, "7 rows at a time do not divide"),
        ("training.accumulate", 2, "over the whole batch"),
        ("data.name", "nothing", "folder or tfds:NAME"),
    ):
        wrong = change(config, {field: value})
        with pytest.raises(ValueError, match=message):
            experiment.read(wrong, "train")
            model.make_contrast(wrong, model.make_clip(wrong, tokenizer), source)


def run_clip(folder, *arguments):
    """Does what the command line of experiments.clip asks for."""
    modes: Any = {"modes": experiment.MODES, "define_flags": experiment.define_flags}
    call = make_call(experiment.TASK, "clip", folder, *arguments, **modes)
    experiment.MODES[call.flags.mode](call)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("clip") / "run"
    sizes = [f"--config.{field}={size}" for field, size in SMALL.items()]
    sizes += ["--config.data.num_examples=200", "--config.data.batch_size=32", "--config.training.num_steps=4"]
    sizes += ["--config.evaluation.num_examples=60", "--config.evaluation.num_candidates=10"]
    sizes += ["--config.evaluation.num_single=20", "--config.training.log_every=2"]
    run_clip(folder, *sizes)
    return folder


def test_the_experiment_reports_scores_and_opens(trained, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = json.loads((trained / "report.json").read_text())
    names = [one["name"] for one in report["measurements"]]
    assert "retrieval among 10, held_out" in names and "zero-shot accuracy of the colour, test" in names
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    run_clip(trained, "--mode=score", "--images=a.png", "--prompts=a red three;a blue four")
    out = capsys.readouterr().out
    assert "prompt 2: a blue four" in out and "a.png" in out.splitlines()[-1]
    with pytest.raises(ValueError, match=r"give --images=a\.png,b\.png and --prompts"):
        run_clip(trained, "--mode=score", "--images=a.png")
    opened = model.open_clip(trained)
    assert opened.step == 4 and opened.encoder.text(["a red three"]).shape == (1, 512)
    stored: Any = stored_in(trained)
    assert text.to_json(opened.tokenizer) == stored["vocabulary"]
    assert load_judge(str(trained)).name == opened.encoder.name


@pytest.mark.parametrize("flag", ["--steps=3", "--sampler=ddim"])
def test_flags_of_sampling_are_refused_in_one_line(trained, flag):
    with pytest.raises(RunError, match="sampling") as refused:
        run_clip(trained, "--mode=evaluate", flag)
    assert "\n" not in str(refused.value)


def test_text_to_image_keeps_the_tower_in_its_own_checkpoint(kinds, trained, tmp_path):
    """Prompts read by a CLIP: its features are made once, and its folder is needed only where a run starts."""
    clip, folder, out = tmp_path / "clip", tmp_path / "run", tmp_path / "a.npz"
    shutil.copytree(trained, clip)
    small = [flag for flag in kinds["scenes"].flags if not flag.startswith("--config.condition.")]
    kind = kinds["scenes"]._replace(config="scenes:clip", flags=(*small, "--config.training.num_previews=0"))
    flags = (*kind.flags, "--config.optimizer.name=adam", "--config.optimizer.cooldown_steps=0")
    flags = (*flags, f"--config.condition.folder={clip}")
    kind.do(folder, *flags, "--config.training.num_steps=2")
    shutil.rmtree(clip)
    kind.do(folder, *flags, "--config.training.num_steps=4")
    kind.do(folder, "--mode=sample", "--prompt=a red two", f"--out={out}", "--num_samples=1")
    run = open_run(folder, num_devices=1)
    tower = model.open_clip(trained).params["params"]["text"]
    assert run.step == 4 and load_samples(out).shape == (1, 16, 16, 3)
    jax.tree.map(np.testing.assert_array_equal, run.params["text"]["params"], tower)


# --- CLIP as a judge


def test_scores_and_classes():
    """An encoder that knows colours: its embedding of a picture is the mean colour, of a prompt its colour's."""
    words = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
    encoder = clip_features.Encoder(
        lambda image: image.mean(axis=(1, 2)) / 255,
        lambda prompts: np.array([words[prompt.split()[-1]] for prompt in prompts], float),
        10.0,
    )
    image = np.zeros((3, 4, 4, 3), np.uint8)
    image[0, ..., 2] = image[1, ..., 0] = image[2, ..., 0] = image[2, ..., 1] = 200
    np.testing.assert_allclose(
        clip_features.clip_score(encoder, image, ["all blue", "all green", "all red"]), [100, 0, 100 / 2**0.5]
    )
    found = clip_features.zero_shot(encoder, image[:2], [["red"], ["a green", "the green"], ["blue"]])
    assert found.tolist() == [2, 0]
    with pytest.raises(ValueError, match="3 images and 1 prompts: one prompt per image is needed"):
        clip_features.clip_score(encoder, image, ["red"])


def test_recall():
    similarity = np.array([[3.0, 2.0, 1.0], [2.0, 1.0, 0.0], [5.0, 5.0, 5.0]])
    assert clip_features.recall(similarity, 1) == pytest.approx(1 / 3)
    assert clip_features.recall(similarity, 2) == pytest.approx(2 / 3)
    assert clip_features.recall(similarity, 3) == 1.0  # a tie with all three: third at worst


def test_pictures_are_cropped_to_their_middle_square(published):
    clip, params = load_clip(published / "clip")
    image = np.zeros((1, 12, 36, 3), np.uint8)
    image[:, :, 12:24] = np.random.RandomState(0).randint(0, 256, (12, 12, 3))
    assert (clip_features.fit(image, 12) == image[:, :, 12:24]).all()
    tokenizer = text.train_tokenizer(["a"], 258)
    with pytest.raises(ValueError, match="tokenizer has 258 tokens"):
        clip_features.make_encoder(clip, params, tokenizer)
    with pytest.raises(ValueError, match="1 channels: repeat"):
        clip_features.fit(image[..., :1], 12)
