"""FLUX.2 [klein] as a whole: an imported pipeline draws and edits as diffusers does, from the same noise."""

import json
from itertools import combinations
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS, make_call
from PIL import Image
from published_flux2 import ASKED, FILES, GOLDEN, REFERENCES, noise, picture, weights_of, write_pipeline
from safetensors.numpy import load_file

from diffusion.data import chat
from diffusion.model import flux2_text, pipelines
from diffusion.model.autoencoders import restore
from diffusion.model.experiment import check_references, make_model
from diffusion.model.fields import change, load
from diffusion.model.loss import make_loss
from diffusion.model.model import init, make_generate, parts, steered
from diffusion.model.sampling import make_sampling
from diffusion.pretrained import flux2, klein, qwen3, vae
from diffusion.runs import sample, weights
from diffusion.runs.pictures import fit_reference
from diffusion.runs.run import model_of, open_run
from experiments import flux2 as experiment

CELL = 4  # of the tiny autoencoder; 16 of the published one
TINY = (
    "--config.network.dtype=float32",
    "--config.condition.dtype=float32",
    f"--config.condition.length={ASKED['length']}",
    f"--config.condition.states={tuple(ASKED['states'])}",
    "--config.sampling.size=(16, 16)",
)


def import_into(folder: Path, published: Path, *flags: str) -> Path:
    call = make_call(experiment.TASK, "flux2", folder, "--mode=import", f"--weights={published}", *TINY, *flags)
    weights.import_weights(call)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The folder of a tiny pipeline, distilled."""
    return write_pipeline(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    """Runs with the files of the distilled pipeline and of the base one."""
    base = write_pipeline(tmp_path_factory.mktemp("published"), distilled=False)
    folder = tmp_path_factory.mktemp("runs")
    steps = f"--config.sampling.num_steps={ASKED['steps']['base']}"
    return {
        "distilled": import_into(folder / "distilled", published),
        "base": import_into(folder / "base", base, steps),
    }


class Drawing:
    """Draws the recorded prompts from the recorded noise; what cases share is compiled and computed once."""

    def __init__(self, folders):
        run = open_run(folders["distilled"])
        self.folders, self.model, self.params = folders, run.model, run.params
        self.space, text = parts(run.model, run.params).space, parts(run.model, run.params).text
        tell = jax.jit(run.model.condition.of_request)
        self.told, self.fro = (
            tell(text, run.model.condition.read(prompts)) for prompts in (ASKED["prompts"], [None, None])
        )
        encode = jax.jit(lambda space, image: run.model.space.encode(space, image, None))
        fitted = [fit_reference(image, CELL) for image in REFERENCES]
        self.seen = [encode(self.space, np.stack([image] * 2)) for image in fitted]
        codec = restore(run.model.space.description or {})
        self.decode = jax.jit(lambda space, z: codec.decode(space["autoencoder"], z / space["scale"] + space["shift"]))

    def __call__(self, kind, count, height, width):
        """Returns pictures as floats in [0, 1]."""
        run = open_run(self.folders[kind], changes={"sampling.size": (height, width)})
        sampling = make_sampling(run.config, run.model.process)
        assert (sampling.scale, len(sampling.grid.time) - 1) == ((1.0, 4) if kind == "distilled" else (4.0, 6))
        seen = {"references": tuple(self.seen[:count])}

        @jax.jit
        def sampled(params, told, fro, x_T):
            return sampling.sampler(steered(run.model, sampling, params, told, fro), x_T, sampling.grid)

        x_T = jnp.asarray(noise(height, width))
        x_0 = sampled(self.params, {**self.told, **seen}, {**self.fro, **seen}, x_T)
        return np.clip(np.asarray(self.decode(self.space, x_0)) / 2 + 0.5, 0, 1)


@pytest.fixture(scope="module")
def draw(imported):
    return Drawing(imported)


CASES = [name.split("/") for name in GOLDEN.files if name.split("/")[0] in ASKED["steps"]]


@pytest.mark.parametrize(("kind", "count", "size"), [case for case in CASES if case[:2] != ["base", "1"]])
def test_pictures_are_those_of_diffusers(draw, kind, count, size):
    found = draw(kind, int(count), *map(int, size.split("x")))
    np.testing.assert_allclose(found, GOLDEN[f"{kind}/{count}/{size}"], atol=1e-3)


def test_a_run_draws_that_too(imported):
    """A case by `make_generate`, which encodes and tells references to both sides of guidance."""
    run = open_run(imported["base"], num_devices=1)
    x_T, codec = jnp.asarray(noise(16, 16)), restore(run.model.space.description or {})

    def decode(space, x_0):
        return jnp.clip(codec.decode(space["autoencoder"], x_0 / space["scale"] + space["shift"]) / 2 + 0.5, 0, 1)

    def use(sampler, denoise, grid, keys, eps):
        return sampler(denoise, x_T, grid, keys)

    model = run.model._replace(space=run.model.space._replace(decode=decode))
    generate = make_generate(model, make_sampling(run.config, model.process), run.mesh, use)
    rows, away = (model.condition.read(prompts) for prompts in (ASKED["prompts"], [None, None]))
    seen = [np.stack([fit_reference(REFERENCES[0], CELL)] * 2)]
    image, finite = generate(run.params, rows, away, np.uint32(0), np.arange(2), references=seen)
    np.testing.assert_allclose(image, GOLDEN["base/1/16x16"], atol=1e-3)
    assert finite.all()


def test_what_is_told_changes_the_recorded_pictures():
    """By far more than the tolerance: guidance, and each reference."""
    pictures = [GOLDEN["/".join(case)] for case in CASES if case[2] == "16x24"]
    assert len(pictures) == 4 and {tuple(case[:2]) for case in CASES} == {(k, n) for k in ASKED["steps"] for n in "012"}
    assert all(np.abs(a - b).max() > 0.02 for a, b in combinations(pictures, 2))


def test_references_are_fitted_as_diffusers_does():
    for name in GOLDEN.files:
        if name.startswith("cropped/"):
            height, width = map(int, name.removeprefix("cropped/").split("x"))
            fitted = fit_reference(picture(2, height, width), 16)
            assert fitted.shape[0] % 16 == fitted.shape[1] % 16 == 0
            np.testing.assert_array_equal(fitted[::37, ::31], GOLDEN[name])


@pytest.mark.parametrize("shape", [(63, 80, 3), (64, 513, 3), (513, 64, 3), (64, 64, 1), (64, 64)])
def test_references_that_flux2_does_not_take(shape):
    with pytest.raises(ValueError, match="a picture to edit"):
        fit_reference(np.zeros(shape, np.uint8), 16)


def save_references(folder):
    paths = [folder / f"{i}.png" for i in range(len(REFERENCES))]
    for path, image in zip(paths, REFERENCES, strict=True):
        Image.fromarray(image).save(path)
    return paths


def test_pictures_are_as_large_as_the_first_reference_unless_a_size_is_asked_for(imported, tmp_path):
    given = ("--mode=sample", f"--images={save_references(tmp_path)[1]}", "--config.sampling.size=()")
    call, references = sample.with_references(make_call(experiment.TASK, "flux2", imported["distilled"], *given))
    assert call.config.sampling.size == tuple(GOLDEN["size of the reference"]) == (68, 64)
    np.testing.assert_array_equal(references[0], fit_reference(REFERENCES[1], CELL))
    call, _ = sample.with_references(make_call(experiment.TASK, "flux2", imported["distilled"], *given[:2]))
    assert call.config.sampling.size == (16, 16)


def test_the_command_draws_edits_and_says_of_what(imported, tmp_path):
    paths, out = save_references(tmp_path), tmp_path / "edited.npz"
    given = ("--mode=sample", "--prompt=a red fox", "--num_samples=3", "--config.sampling.batch_size=2", "--steps=1")
    call = make_call(experiment.TASK, "flux2", imported["distilled"], *given, f"--images={paths[0]}", f"--out={out}")
    sample.sample(call)
    made = np.load(out)["arr_0"]
    run = open_run(imported["distilled"], changes={"sampling.num_steps": 1})
    own = {"prompts": ["a red fox"], "num_samples": 2}
    np.testing.assert_array_equal(made[:2], run.sample(**own, references=REFERENCES[:1]))
    plain = run.sample(**own)
    assert made.shape == (3, 16, 16, 3) and np.abs(made[:2].astype(int) - plain).max() > 2
    note = json.loads(out.with_suffix(".json").read_text())
    assert note["references"] == [sample.pixels_digest(fit_reference(REFERENCES[0], CELL))]
    assert sample.pixels_digest(REFERENCES[0]) != sample.pixels_digest(REFERENCES[0][::-1])


def test_references_that_cannot_be_read_or_are_not_told(imported, tmp_path):
    (tmp_path / "small.png").write_bytes(b"no picture")
    call = make_call(experiment.TASK, "flux2", imported["distilled"], "--mode=sample", f"--images={tmp_path}/small.png")
    with pytest.raises(ValueError, match=r"--images=.*small.png: .* cannot be read"):
        sample.with_references(call)
    config = load("digits", CONFIGS)[0]
    with pytest.raises(ValueError, match=r"--images: network.name=unet is not told of pictures to edit, as flux2 is"):
        check_references(config)


def test_an_import_takes_the_pipelines_steps_unless_others_are_asked_for(published, tmp_path):
    def settings(folder):
        sampling = open_run(folder).config.sampling
        return sampling.num_steps, sampling.guidance, sampling.grid.name, sampling.sampler.name

    base = write_pipeline(tmp_path / "published", distilled=False)
    assert settings(import_into(tmp_path / "1", base)) == (50, 4.0, "flux2", "euler")
    assert settings(import_into(tmp_path / "2", published, "--steps=8", "--sampler=heun")) == (8, 1.0, "flux2", "heun")
    asked = "--config.sampling.guidance=2.5"
    assert settings(import_into(tmp_path / "3", base, asked)) == (50, 2.5, "flux2", "euler")


def test_a_run_without_a_size_draws_megapixels(published, imported, tmp_path):
    stored = json.loads((imported["distilled"] / "published.json").read_text())
    assert stored["image_shape"] == [1024, 1024, 3] and stored["frozen"] == ["text", "space"]
    assert stored["distilled"] and not json.loads((imported["base"] / "published.json").read_text())["distilled"]
    config = open_run(imported["distilled"]).config
    model = model_of(change(config, {"sampling.size": ()}), stored)
    assert model.space.shape == (256, 256, 16) and model.process.num_tokens == 256**2


def test_the_text_is_a_condition_with_no_pooled_vector(published):
    encoder, params = flux2_text.load_text(published, states=tuple(ASKED["states"]), length=ASKED["length"])
    again = flux2_text.restore(json.loads(json.dumps(encoder.description)))
    assert again.description == encoder.description and encoder.pooled_width == 0 and encoder.context_width == 72
    ids = encoder.tokenize(["a cat", ""])
    np.testing.assert_array_equal(ids, again.tokenize(["a cat", ""]))
    assert (ids[1] == chat.UNREAD).sum() == ASKED["length"] - 14
    text = jax.eval_shape(again.encode, params, ids)
    assert text.context.shape == (2, ASKED["length"], 72) and text.pooled.shape == (2, 0)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, jax.eval_shape(encoder.init, jax.random.key(0)))
    for length in (14, 513):
        with pytest.raises(ValueError, match=f"{length} tokens for Qwen3: it has to read 15..512"):
            flux2_text.load_text(published, states=(1,), length=length, weights=False)


def edit(path, **fields):
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({**stored, **fields}))


SCHEDULER = "scheduler/scheduler_config.json"
REFUSED = [
    ("model_index.json", dict(_class_name="Flux2Pipeline"), "is a FLUX.2 pipeline"),
    (
        "model_index.json",
        dict(text_encoder=["transformers", "Mistral3"]),
        "text_encoder is .*Mistral3.*, needed is a Qwen3",
    ),
    ("model_index.json", dict(vae=[None, None]), "vae is .*, needed is a AutoencoderKLFlux2"),
    ("model_index.json", dict(is_distilled="yes"), "is_distilled is yes, neither true nor false"),
    (SCHEDULER, dict(use_dynamic_shifting=False), "use_dynamic_shifting=False"),
    (SCHEDULER, dict(time_shift_type="linear"), "time_shift_type='linear'"),
    (SCHEDULER, dict(shift_terminal=0.02), "shift_terminal=0.02"),
    ("transformer/config.json", dict(in_channels=12), "has shape"),
    ("transformer/config.json", dict(joint_attention_dim=80), "has shape"),
    ("text_encoder/config.json", dict(num_hidden_layers=3), "3 layers have no hidden states"),
    ("text_encoder/config.json", dict(vocab_size=600), "the tokenizer has 626 tokens, the weights 600"),
    ("tokenizer/tokenizer_config.json", dict(padding_side="left"), "padding_side=left"),
]


@pytest.mark.parametrize(("file", "fields", "line"), REFUSED)
def test_pipelines_that_ours_cannot_be_are_refused(tmp_path, file, fields, line):
    folder = write_pipeline(tmp_path / "published")
    edit(folder / file, **fields)
    config = make_call(experiment.TASK, "flux2", tmp_path / "run", *TINY, "--mode=import").config
    with pytest.raises(ValueError, match=line) as caught, config.unlocked():
        pipelines.describe_klein(folder, config)
    assert "\n" not in str(caught.value)


def test_parts_of_different_pipelines_are_refused(published, tmp_path):
    flags = (*TINY[:-2], "--config.condition.states=(1, 2)", "--mode=import")
    config = make_call(experiment.TASK, "flux2", tmp_path / "run", *flags).config
    with (
        pytest.raises(ValueError, match=r"give widths \(48, 16\), and the transformer reads \(72, 16\)"),
        config.unlocked(),
    ):
        pipelines.describe_klein(published, config)


def test_pipelines_go_there_and_back_bit_for_bit(published, tmp_path):
    network, params = flux2.load_flux2(published)
    encoder, of_text = qwen3.load_qwen3(published / "text_encoder", states=(1,), whole=True)
    words = chat.read_tokenizer(published / "tokenizer")
    whole = klein.Klein(network, params, vae.load_vae(published), encoder, of_text, *words, True)
    klein.save_pipeline(tmp_path / "own", whole)
    for part, file in FILES.items():
        ours, theirs = load_file(tmp_path / "own" / part / file), weights_of(part)
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert klein.read_index(tmp_path / "own") is True
    tokenizer, padding = chat.read_tokenizer(tmp_path / "own" / "tokenizer")
    prompts = ["a cat", "<|endoftext|> \n"]
    np.testing.assert_array_equal(chat.encode(tokenizer, prompts, 40), chat.encode(words[0], prompts, 40))
    assert padding == words[1]


def test_the_network_learns_from_captions_by_the_frozen_encoder(published):
    config = change(
        load("flux2", CONFIGS)[0],
        {
            **{f"network.{name}": 1 for name in ("num_double", "num_single", "num_heads")},
            **{"network.head_width": 8, "network.axes": (2, 2, 2, 2), "network.dtype": "float32"},
            **{f"{part}.folder": str(published) for part in ("condition", "space")},
            **{"condition.states": (1, 2, 3), "condition.length": 48, "condition.dtype": "float32"},
            "condition.dropout": 0.5,
        },
    )
    model = make_model(config, (16, 16, 3))
    assert model.frozen == ("text", "space") and model.space.shape == (4, 4, 16)
    key = jax.random.key(0)
    params = jax.jit(lambda: init(model, key))()
    ids = model.condition.read(["a cat", "a dog"] * 4)
    image, label = jnp.zeros((8, 16, 16, 3), jnp.uint8), jnp.zeros(8, jnp.int32)
    batch = {"image": image, "label": label, "text": jnp.asarray(ids)}
    loss = make_loss(model)
    gradients = jax.jit(jax.grad(lambda params: loss(params, batch, key)[0].mean()))(params)
    assert all(not leaf.any() for part in model.frozen for leaf in jax.tree.leaves(gradients[part]))
    assert np.abs(gradients["network"]["params"]["image_out"]["kernel"]).max() > 0.01
