"""A tiny FLUX.2 [klein], fine-tuned whole or by adapters, with and without pictures to edit, and exported."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import do_call, make_call, write_pairs
from PIL import Image
from published_flux2 import REFERENCES, noise, write_pipeline
from published_vaes import TAEF2
from safetensors.numpy import load_file, save_file
from test_flux2_pipeline import ASKED, CELL, import_into

from diffusion.data.captions import caption_folder
from diffusion.data.images import to_uint8
from diffusion.data.pictures import decode
from diffusion.model import lora
from diffusion.model.autoencoders import describe, open_autoencoder, restore, with_preview
from diffusion.model.fields import change
from diffusion.model.lora import LoRA
from diffusion.model.loss import make_loss
from diffusion.model.model import make_generate, parts
from diffusion.model.sampling import make_sampling
from diffusion.networks.flux2 import RULES, Flux2
from diffusion.networks.tiny_vae import TinyAutoencoder
from diffusion.networks.vae import Autoencoder, unfold
from diffusion.pretrained import tiny_vae
from diffusion.pretrained.flux2 import shapes
from diffusion.pretrained.lora import FILE, save_lora
from diffusion.runs.adapters import with_lora
from diffusion.runs.draw import draw as draw_pictures
from diffusion.runs.export import export_weights
from diffusion.runs.pictures import fit_reference
from diffusion.runs.run import open_run
from diffusion.training.sharding import partition
from experiments.flux2 import TASK

FLAGS = (
    "--config.network.dtype=float32",
    "--config.condition.dtype=float32",
    "--config.data.image_size=16",
    "--config.data.batch_size=8",
    "--config.optimizer.learning_rate=1e-3",
    "--config.optimizer.warmup_steps=1",
    "--config.training.num_steps=6",
    "--config.training.checkpoint_every=4",
    "--config.training.log_every=3",
    "--config.training.ema_decay=0.9",
    "--config.training.num_previews=0",
)
GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "lora_flux2.npz")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The folder of a run with the files of a tiny distilled pipeline."""
    published = write_pipeline(tmp_path_factory.mktemp("published"))
    return import_into(tmp_path_factory.mktemp("run") / "klein", published)


@pytest.fixture(scope="module")
def base(imported):
    return open_run(imported, num_devices=1)


def tune(imported, folder, pairs, *flags):
    """Trains a run that begins with the imported one, and returns it."""
    do_call(TASK, "flux2", folder, f"--init_from={imported}", f"--config.data.dir={pairs}", *FLAGS, *flags)
    return open_run(folder, num_devices=1)


def export(folder, published):
    """Writes what a run is published as."""
    call = make_call(TASK, "flux2", folder, "--mode=export", f"--weights={published}", num_devices=1)
    export_weights(call)
    return published


@pytest.fixture(scope="module")
def tuned(imported, pairs, tmp_path_factory):
    """A run whose network was trained whole."""
    return tune(imported, tmp_path_factory.mktemp("tuned") / "mine", pairs)


@pytest.fixture(scope="module")
def exported(tuned, tmp_path_factory):
    """The published folder of that run."""
    return export(tuned.workdir, tmp_path_factory.mktemp("exported") / "klein")


def draw(run, references=REFERENCES[:1]):
    """Returns pictures of the recorded prompts from the recorded noise, floats in [0, 1]."""
    x_T, codec = jnp.asarray(noise(16, 16)), restore(run.model.space.description)

    def decode(space, x_0):
        return jnp.clip(codec.decode(space["autoencoder"], x_0 / space["scale"] + space["shift"]) / 2 + 0.5, 0, 1)

    model = run.model._replace(space=run.model.space._replace(decode=decode))
    use = lambda sampler, denoise, grid, keys, eps: sampler(denoise, x_T, grid, keys)  # noqa: E731
    generate = make_generate(model, make_sampling(run.config, model.process), run.mesh, use)
    rows, away = (model.condition.read(prompts) for prompts in (ASKED["prompts"], [None, None]))
    seen = [np.stack([fit_reference(image, CELL)] * 2) for image in references]
    return np.asarray(generate(run.params, rows, away, np.uint32(0), np.arange(2), references=seen)[0])


def test_adapters_of_diffusers_draw_its_picture(base, tmp_path):
    file = tmp_path / "peer" / FILE
    file.parent.mkdir()
    file.write_bytes(GOLDEN["adapters"].tobytes())
    adapted = with_lora(base, file.parent)
    assert set(adapted.params["lora"]["double_0"]) == {
        "image_qkv", "image_out", "text_qkv", "text_out", "image_mlp_1", "image_mlp_2"
    }  # fmt: skip
    assert set(adapted.params["lora"]["single_1"]) == {"parallel_in"}
    images = draw(adapted)
    np.testing.assert_allclose(images, GOLDEN["picture"], atol=1e-3)
    # For `record_lora_flux2.py FOLDER`, by which diffusers draws what we do with the file that we write.
    written = save_lora(tmp_path / "ours", base.model.network, adapted.params["lora"], 1.0)
    np.save(written.with_name("picture.npy"), images)
    assert load_file(file).keys() <= load_file(written).keys()


def test_a_mesh_cuts_adapters_as_the_kernels_beside_them():
    network = Flux2(1, 1, num_heads=2, head_width=16, axes=(4, 4, 4, 4), out_channels=16, context_width=8)
    params = {"params": shapes(network)}
    targets = ("image_qkv", "image_out", "text_mlp_1", "text_mlp_2", "parallel_in", "parallel_out")
    pairs = jax.eval_shape(lambda key: lora.init(LoRA(2, 1.0, targets), params, key), jax.random.key(0))
    assert {name: set(block) for name, block in pairs.items()} == {
        "double_0": set(targets[:4]),
        "single_0": set(targets[4:]),
    }

    def cut(name, shape, rules):
        spec = partition(name, shape, {"data": 1, "fsdp": 1, "tensor": 2}, rules)
        return (*spec, *[None] * (len(shape) - len(spec)))

    for block, modules in pairs.items():
        for module, pair in modules.items():
            kernel = params["params"][block][module]["kernel"].shape
            a, b = (cut(f"lora/{block}/{module}/{name}", pair[name].shape, lora.RULES) for name in ("A", "B"))
            joined = (a[0], None, *b[2:]) if module.endswith("_qkv") else (*a[:-1], *b[1:])
            assert joined == cut(f"network/params/{block}/{module}/kernel", kernel, RULES)
            assert "tensor" in joined


def test_each_picture_has_references_of_its_own(base):
    seen = [image[:64, :64] for image in REFERENCES]
    both, first, second = (
        draw_pictures(base.painter, ["a", "b"], np.arange(2), 0, references=[given])
        for given in (np.stack(seen), *seen)
    )
    np.testing.assert_array_equal(both, np.stack([first[0], second[1]]))
    assert np.any(first[0] != second[0])


def test_only_the_network_changes_and_it_is_sampled_as_before(tuned, base):
    assert tuned.model.frozen == ("text", "space") and tuned.step == 6
    for group in tuned.model.frozen:
        jax.tree.map(np.testing.assert_array_equal, tuned.params[group], base.params[group])
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), tuned.params["network"], base.params["network"])
    assert all(jax.tree.leaves(changed))
    sampling = tuned.config.sampling
    assert (sampling.num_steps, sampling.guidance) == (4, 1.0)
    # 4 x 4 positions: exp(0.00016927 * 16 + 0.45666666).
    np.testing.assert_allclose(tuned.model.process.quantile(np.float32(0.5)), 1.583 / 2.583, rtol=1e-3)


def test_a_base_model_remains_one(pairs, tmp_path):
    published = write_pipeline(tmp_path / "published", distilled=False)
    imported = import_into(tmp_path / "base", published)
    flags = ("--mode=check", f"--init_from={imported}", f"--config.data.dir={pairs}", *FLAGS)
    sampling = make_call(TASK, "flux2", tmp_path / "mine", *flags).config.sampling
    assert (sampling.num_steps, sampling.guidance) == (50, 4.0)
    sampling = make_call(TASK, "flux2", tmp_path / "mine", *flags, "--steps=8").config.sampling
    assert (sampling.num_steps, sampling.guidance) == (8, 4.0)


def test_a_tuned_run_is_exported_and_read_back_bit_for_bit(tuned, exported, tmp_path):
    again = open_run(import_into(tmp_path / "again", exported), num_devices=1)
    jax.tree.map(np.testing.assert_array_equal, again.params, tuned.params)
    assert (again.config.sampling.num_steps, again.config.sampling.guidance) == (4, 1.0)
    np.testing.assert_array_equal(draw(again), draw(tuned))
    # For `record_lora_flux2.py FOLDER`, by which diffusers draws what we do with the folder.
    np.save(exported / "picture.npy", draw(tuned))


EDITS = ("--config.data.references=1",)


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    """Pictures, each of which is to be made of one of two others."""
    folder = write_pairs(tmp_path_factory.mktemp("data") / "edits", "train", 12)
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["references"] = [f"before_{i % 2}.png"]
    for i, image in enumerate(REFERENCES):
        Image.fromarray(image).save(folder / f"before_{i}.png")
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def losses_of(run, edits, count, **others):
    """Returns the losses of the first pairs of EDITS, at fixed times and noise; `others` replace what is read."""
    config = change(run.config, {"data.dir": str(edits), "data.references": 1, "data.image_size": 16})
    source = TASK.read(config, "train")
    batch = source.read(np.arange(count))
    batch["text"] = run.model.condition.read([source.captions[label] for label in batch["label"]])
    loss = jax.jit(lambda params, batch: make_loss(run.model)(params, batch, jax.random.key(0))[0])
    return np.asarray(loss(run.params, {**batch, **others}))


def test_the_network_is_told_of_references_in_training(base, edits):
    source = TASK.read(
        change(base.config, {"data.dir": str(edits), "data.references": 1, "data.image_size": 16}), "train"
    )
    batch = source.read(np.arange(4))
    seen = batch["reference_image"]
    assert seen.shape == (4, 1, 16, 16, 3) and not np.array_equal(seen[0], seen[1])
    np.testing.assert_array_equal(seen[0], seen[2])
    np.testing.assert_array_equal(seen[0, 0], decode(edits / "before_0.png", channels=3, size=16))
    told = losses_of(base, edits, 4)
    swapped = losses_of(base, edits, 4, reference_image=seen[::-1])
    assert (np.abs(told - swapped) > 1e-4).all()
    # Latents made before give what pictures give.
    encode = jax.jit(base.model.space.precomputed)
    z = encode(base.params["space"], seen[:, 0])["latent"][:, None]
    latent = encode(base.params["space"], batch["image"])["latent"]
    np.testing.assert_allclose(losses_of(base, edits, 4, latent=latent, reference_latent=z), told, rtol=1e-4)


def test_an_edit_is_learned_resumed_bit_for_bit_and_exported_as_adapters(imported, base, edits, tmp_path):
    lora = ("--config.lora.rank=2", "--config.training.num_previews=2", "--config.training.preview_every=6")
    flags = (*EDITS, *lora, "--config.optimizer.learning_rate=1e-2", "--config.training.num_steps=30")
    flags += ("--config.training.checkpoint_every=28",)
    mine = tune(imported, tmp_path / "mine", edits, *flags)
    assert set(mine.params["lora"]["single_1"]) == {"parallel_in", "parallel_out"}
    assert losses_of(mine, edits, 12).mean() < losses_of(base, edits, 12).mean()
    shutil.copytree(tmp_path / "mine", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "30")
    do_call(TASK, "flux2", tmp_path / "again", f"--config.data.dir={edits}", *FLAGS, *flags)
    again = open_run(tmp_path / "again", num_devices=1)
    jax.tree.map(np.testing.assert_array_equal, again.params, mine.params)
    adapted = with_lora(base, export(mine.workdir, tmp_path / "out"))
    one, other = (parts(run.model, run.params).network for run in (mine, adapted))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_references_that_do_not_fit_are_refused(imported, edits, tmp_path):
    given = ("--mode=check", f"--init_from={imported}", *FLAGS)
    with pytest.raises(ValueError, match=r"line 1: 1 references, where data.references=2 is asked of every line"):
        caption_folder(edits, 16, references=2)
    lines = (edits / "captions.jsonl").read_text().replace("before_1.png", "none.png")
    (tmp_path / "edits").mkdir()
    for picture in edits.glob("*.png"):
        shutil.copy(picture, tmp_path / "edits")
    (tmp_path / "edits" / "captions.jsonl").write_text(lines)
    with pytest.raises(ValueError, match=r"line 2: a caption without its reference, there is no .*none.png"):
        caption_folder(tmp_path / "edits", 16, references=1)
    (tmp_path / "edits" / "none.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"line .*none.png cannot be read"):
        caption_folder(tmp_path / "edits", 16, references=1)
    kept = caption_folder(tmp_path / "edits", 16, references=1, skip_broken=True)
    assert kept.num_examples == 6 and kept.read(np.arange(6))["reference_image"].shape == (6, 1, 16, 16, 3)
    (tmp_path / "edits" / "captions.jsonl").write_text('{"image": "0.png", "caption": "a", "references": "b.png"}')
    with pytest.raises(ValueError, match="references are a list of pictures to edit"):
        caption_folder(tmp_path / "edits", 16, references=1)
    flip = ("--config.data.flip=True", "--config.space.precomputed=False", f"--config.data.dir={edits}")
    with pytest.raises(ValueError, match="references are not mirrored"):
        do_call(TASK, "flux2", tmp_path / "run", *given[1:], *EDITS, *flip)


def test_references_have_the_shape_of_their_bucket(edits):
    source = caption_folder(edits, 32, buckets=16, references=1)
    for part in source.parts:
        batch = part.read(np.arange(1))
        assert batch["reference_image"].shape == (1, 1, *part.image_shape)


TINY = TinyAutoencoder(latent_channels=4, width=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1), smallest_norm=True)


def write_tiny(folder, module=TINY):
    """Writes a tiny autoencoder as TAEF2 is published, and returns its parameters."""
    folder.mkdir()
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda x: (np.asarray(x) + 0.1 * random.randn(*x.shape)).astype(np.float32), params)
    parts = {"encoder": {}, "decoder": {}}
    for name, weight in tiny_vae.to_diffusers(module, params).items():
        part, _, place, rest = name.split(".", 3)
        parts[part][f"{int(place) + (part == 'decoder')}.{rest}"] = np.ascontiguousarray(weight)
    for part, weights in parts.items():
        save_file(weights, folder / f"tiny_{part}.safetensors")
    return params


def test_a_tiny_autoencoder_draws_previews(pairs, tmp_path):
    tiny = write_tiny(tmp_path / "tiny")
    published = write_pipeline(tmp_path / "published")
    imported = import_into(tmp_path / "klein", published, f"--config.space.preview={tmp_path / 'tiny'}")
    (tmp_path / "tiny").rename(tmp_path / "moved")  # the run has its own
    run = open_run(imported, num_devices=1)
    x_0 = np.random.RandomState(0).randn(2, 3, 4, 4, 16).astype(np.float32)
    shown = jax.jit(run.model.space.preview)(run.params["space"], x_0)
    flat = x_0.reshape(6, 4, 4, 16)
    expected = to_uint8(jax.jit(lambda z: TINY.apply(tiny, unfold(z, 2), method="decode"))(flat))
    np.testing.assert_array_equal(shown, expected.reshape(2, 3, 16, 16, 3))
    assert len(np.unique(shown)) > 16 and np.any(shown != jax.jit(run.model.space.decode)(run.params["space"], x_0))
    assert set(run.params["space"]["preview"]["autoencoder"]["params"]) == {"decoder"}
    # A run that begins with it has it too, and shows what it learns by it; its pictures are the autoencoder's.
    flags = ("--config.training.num_previews=2", "--config.training.preview_every=6", "--config.training.num_steps=6")
    mine = tune(imported, tmp_path / "mine", pairs, *flags)
    jax.tree.map(np.testing.assert_array_equal, mine.params["space"], run.params["space"])
    assert list((tmp_path / "mine").rglob("*.png"))
    # Beside the pipeline's parts it is found without being named.
    (tmp_path / "moved").rename(published / "preview")
    found = open_run(import_into(tmp_path / "found", published))
    jax.tree.map(np.testing.assert_array_equal, found.params["space"], run.params["space"])


def test_a_tiny_autoencoder_of_other_latents_is_refused(imported, base, tmp_path):
    write_tiny(tmp_path / "other", TINY.clone(latent_channels=8))
    published = write_pipeline(tmp_path / "published")
    with pytest.raises(ValueError, match=r"space\.preview has 32 channels for each 4 pixels, and the latents 16"):
        import_into(tmp_path / "run", published, f"--config.space.preview={tmp_path / 'other'}")
    assert base.model.space.draft is None and not (tmp_path / "run").exists()


@pytest.mark.skipif(not TAEF2.is_dir(), reason="TAEF2's weights (github.com/madebyollin/taesd) are not beside this")
def test_taef2_is_of_the_latents_of_flux2():
    published = describe(Autoencoder(latent_channels=32, quant_conv=True, post_quant_conv=True), 2)
    tiny = open_autoencoder(TAEF2)
    assert with_preview(published, tiny.codec)["preview"]["fields"]["smallest_norm"]
    assert not np.any(tiny.shift) and (tiny.scale == 1).all() and len(tiny.scale) == 128
