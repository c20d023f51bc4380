"""The experiment that trains an autoencoder: its loss and its game, its folder, a diffusion model in its latents."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS, SHORT, SMALL, do_call, make_call
from PIL import Image

from diffusion import autoencoding
from diffusion.data import scenes
from diffusion.data.images import to_float
from diffusion.data.samples import load_samples
from diffusion.data.sources import array_source, digits
from diffusion.model import vae
from diffusion.model.autoencoders import open_autoencoder
from diffusion.model.fields import change, load
from diffusion.networks.patch_discriminator import PatchDiscriminator
from diffusion.networks.vae import sample
from diffusion.pretrained.folder import read_json
from diffusion.pretrained.vae import load_vae
from diffusion.runs.run import open_run
from diffusion.training import RunError, run_key
from experiments import autoencoder as experiment
from experiments import folder as folder_experiment

TINY = {
    "data.name": "scenes",
    "data.num_examples": 64,
    "data.batch_size": 16,
    "network.channels": (8, 8),
    "network.middle_attention": False,
    "network.groups": 4,
    "discriminator.width": 8,
    "discriminator.layers": 1,
    "discriminator.groups": 4,
    "optimizer.learning_rate": 3e-3,
    "optimizer.warmup_steps": 1,
    "optimizer.cooldown_steps": 0,
    "training.num_steps": 30,
    "training.log_every": 10,
    "training.num_previews": 4,
    "training.ema_decay": 0.5,
    "evaluation.num_images": 24,
    "evaluation.num_latents": 40,
}
FLAGS = [f"--config.{field}={value}" for field, value in TINY.items()]


def run_vae(folder, *arguments):
    """Does what the command line of experiments.autoencoder asks for."""
    modes: Any = {"modes": experiment.MODES, "define_flags": experiment.define_flags}
    call = make_call(experiment.TASK, "autoencoder", folder, *arguments, num_devices=1, **modes)
    experiment.MODES[call.flags.mode](call)


def config_of(**changes):
    config, _ = load("autoencoder", CONFIGS)
    return change(config, {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of 30 steps."""
    folder = tmp_path_factory.mktemp("autoencoder") / "run"
    run_vae(folder, *FLAGS)
    return folder


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """That run as diffusers reads it."""
    folder = tmp_path_factory.mktemp("exported") / "vae"
    run_vae(trained, "--mode=export", f"--weights={folder}")
    return folder


@pytest.fixture(scope="module")
def images():
    return scenes.scenes("held_out", 16, 8).read(np.arange(8))["image"]


# --- the loss


@pytest.fixture(scope="module")
def parts(images):
    """A config without a weight of the KL, parameters none of which is zero, and a batch at the game's start."""
    begin: Any = {"loss__adversarial": 1.0, "loss__adversarial_start": 7, "loss__kl_weight": 0.0}
    config = config_of(**begin, network__channels=(8,))
    random = np.random.RandomState(0)
    shapes = jax.eval_shape(vae.make_learner(config).init, run_key(0, "init"))
    params = jax.tree.map(lambda x: jnp.asarray(0.2 * random.randn(*x.shape), jnp.float32), shapes)
    return config, params, {"image": jnp.asarray(images[:, :8, :8]), "step": jnp.full(8, 7, jnp.int32)}


def loss_of(config):
    """(params, batch) -> the mean loss, and with it the losses and the metrics' means."""
    loss = vae.autoencoder_loss(config, vae.make_autoencoder(config), vae.make_discriminator(config))

    def mean(params, batch) -> Any:
        losses, metrics = loss(params, batch, jax.random.key(3))
        return losses.mean(), (losses, {name: one.total.sum() / one.count.sum() for name, one in metrics.items()})

    return mean


@pytest.fixture(scope="module")
def play(parts):
    """(params, batch) -> losses, metrics, gradient."""
    gradient = jax.jit(jax.value_and_grad(loss_of(parts[0]), has_aux=True))

    def run(params, batch):
        (_, (losses, metrics)), found = gradient(params, batch)
        return losses, metrics, found

    return run


def close(found, expected):
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    assert largest > 1e-4
    # See the signs below.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3 * largest), found, expected)


def test_each_side_of_the_game_has_its_own_gradient(parts, play):
    config, params, batch = parts
    autoencoder, discriminator = vae.make_autoencoder(config), vae.make_discriminator(config)
    assert discriminator is not None
    x = to_float(batch["image"])
    judge: Any = discriminator.apply
    losses, metrics, found = play(params, batch)
    weight = metrics["adversarial_weight"]

    def reconstruct(own) -> Any:
        posterior: Any = autoencoder.apply(own, x, method="encode")
        return autoencoder.apply(own, sample(posterior, jax.random.key(3)), method="decode")

    def reconstruction(own):
        return autoencoding.reconstruction_loss(x, reconstruct(own)).mean() / 192

    def generator(own):
        return autoencoding.generator_loss(judge(params["discriminator"], reconstruct(own))).mean()

    def discriminate(own):
        return autoencoding.discriminator_loss(judge(own, x), judge(own, reconstruct(params["autoencoder"]))).mean()

    @jax.jit
    def expected(params):
        sides = [jax.value_and_grad(side)(params["autoencoder"]) for side in (reconstruction, generator)]
        return *sides, jax.value_and_grad(discriminate)(params["discriminator"])

    (one, own), (other, game), (third, theirs) = expected(params)
    kernels = (side["params"]["decoder"]["conv_out"]["kernel"] for side in (own, game))
    # The gradient of |x - x_hat| is a sign, and rounding decides that of some of 1,536.
    np.testing.assert_allclose(weight, autoencoding.adaptive_weight(*kernels), rtol=1e-3)
    np.testing.assert_allclose(losses.mean(), one + weight * other + third, rtol=1e-5)
    close(found["autoencoder"], jax.tree.map(lambda a, b: a + weight * b, own, game))
    close(found["discriminator"], theirs)


def test_the_game_begins_at_its_step_and_the_kl_is_weighted(parts, play):
    config, params, batch = parts
    early, metrics, found = play(params, batch | {"step": jnp.full(8, 6, jnp.int32)})
    assert not any(np.any(x) for x in jax.tree.leaves(found["discriminator"]))
    assert any(np.any(x) for x in jax.tree.leaves(found["autoencoder"]))
    assert np.isnan(metrics["adversarial_weight"])  # over no examples: it is not logged
    without = change(config, {"loss.adversarial": 0.0, "loss.kl_weight": 2.0})
    _, (losses, alone) = jax.jit(loss_of(without))(params, batch)
    np.testing.assert_allclose(early.mean(), alone["loss_part_reconstruction"], rtol=1e-5)
    np.testing.assert_allclose((losses - early).mean(), 2.0 * alone["kl"] / 192, rtol=1e-5)
    assert alone["kl"] > 1


def test_batches_know_their_step_when_a_run_is_resumed():
    config = config_of()
    batches = vae.make_experiment(config, experiment.read(config, "train")).batches(5)
    steps = [next(batches)["step"] for _ in range(2)]
    batches.close()
    assert [step.tolist() for step in steps] == [[5] * 16, [6] * 16]


def test_psnr():
    x = jnp.zeros((2, 4, 4, 3))
    x_hat = jnp.stack([jnp.full((4, 4, 3), 0.02), jnp.full((4, 4, 3), 3.0)])  # the latter is clipped to 1
    np.testing.assert_allclose(autoencoding.psnr(x, x_hat), [40.0, 20 * np.log10(2)], rtol=1e-6)
    exact = float(autoencoding.psnr(x, x)[0])
    assert exact == pytest.approx(20 * np.log10(255) + 10 * np.log10(48), rel=1e-6)


def test_the_discriminator_is_the_released_one():
    """30x30 logits for 256x256, and 2.765 million parameters, as its authors' code prints."""
    network = PatchDiscriminator()
    logits, params = jax.eval_shape(network.init_with_output, jax.random.key(0), jnp.zeros((1, 256, 256, 3)))
    assert logits.shape == (1, 30, 30)
    assert round(sum(x.size for x in jax.tree.leaves(params)) / 1e6, 3) == 2.766  # 2.765 and the normalisations' 1792
    with pytest.raises(ValueError, match=r"20x32 are too small .* 24x24 at least: lower discriminator.layers"):
        jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 20, 32, 3)))


def test_an_images_logits_are_its_own(images):
    network = PatchDiscriminator(8, 1, 4)
    x = to_float(images)
    params = jax.jit(network.init)(jax.random.key(0), x)
    judge = jax.jit(network.apply)
    np.testing.assert_allclose(judge(params, x)[:1], judge(params, x[:1]), atol=1e-6)


# --- the run


def test_training_lowers_the_loss_and_reports(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"] and lines[-1]["psnr"] > lines[0]["psnr"] + 1
    report = {one["name"]: one for one in json.loads((trained / "report.json").read_text())["measurements"]}
    assert report["PSNR in dB"]["num_samples"] == 24 and report["PSNR in dB"]["value"]["mean"] > 10
    assert {"FID of reconstructions", "latents' mean", "KL to the unit normal in nats per image"} < {*report}
    with Image.open(trained / "reconstructions.png") as picture:
        assert picture.size[0] > picture.size[1]  # 8 columns, and 2 rows above 2
    assert (trained / "curves.png").exists()
    with Image.open(trained / "previews" / "step_00000030_ema.png") as picture:
        assert picture.mode == "RGB"


def test_latents_are_fitted_to_the_training_images(trained, exported):
    opened = open_autoencoder(trained)
    assert (opened.shift == opened.shift[0]).all() and (opened.scale == opened.scale[0]).all()
    source = scenes.scenes("train", 16, 64)
    rows = np.linspace(0, 63, 40).astype(int)
    mean, _ = jax.jit(opened.codec.encode)(opened.params, to_float(source.read(rows)["image"]))
    x_0 = (np.asarray(mean, np.float64) - opened.shift) * opened.scale
    assert abs(x_0.mean()) < 1e-5 and abs(x_0.std() - 1) < 1e-5  # float32
    config = read_json(exported / "config.json")
    assert config["scaling_factor"] == pytest.approx(float(opened.scale[0]), rel=1e-6)
    assert config["shift_factor"] == pytest.approx(float(opened.shift[0]), rel=1e-6)


def test_an_export_makes_the_same_pictures_bit_for_bit(trained, exported, images):
    own = vae.open_published(trained)
    again = load_vae(exported)
    assert again.module == own.module and again.sampled
    jax.tree.map(np.testing.assert_array_equal, again.params, own.params)
    np.testing.assert_array_equal(again.shift, own.shift)
    np.testing.assert_array_equal(again.scale, own.scale)
    reconstruct = jax.jit(vae.make_reconstruct(own.module))
    pictures = [reconstruct(one.params, images) for one in (own, again)]
    np.testing.assert_array_equal(pictures[0][0], pictures[1][0])
    with pytest.raises(ValueError, match="there already"):
        run_vae(trained, "--mode=export", f"--weights={exported}")


def test_an_import_is_a_run_that_trains_on(exported, tmp_path, capsys):
    folder = tmp_path / "imported"
    ours = [flag for flag in FLAGS if not flag.startswith("--config.network.")]
    run_vae(folder, "--mode=import", f"--weights={exported}", *ours, "--config.network.groups=4")
    published, own = load_vae(exported), vae.open_published(folder)
    assert own.module == published.module
    jax.tree.map(np.testing.assert_array_equal, own.params, published.params)
    np.testing.assert_array_equal(own.scale, published.scale)
    out = tmp_path / "a.npz"
    run_vae(folder, "--mode=reconstruct", "--num_samples=3", f"--out={out}")
    assert "PSNR" in capsys.readouterr().out and load_samples(out).shape == (3, 16, 16, 3)
    with pytest.raises(RunError, match=r"--config.network.groups=2: .* has 4: leave it out"):
        run_vae(tmp_path / "b", "--mode=import", f"--weights={exported}", "--config.network.groups=2")


def test_pictures_of_any_size_are_reconstructed(trained, tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path, size in zip(paths, ((22, 17), (40, 40)), strict=True):
        Image.fromarray(np.random.RandomState(0).randint(0, 256, (*size, 3), np.uint8)).save(path)
    out = tmp_path / "c.npz"
    run_vae(trained, "--mode=reconstruct", f"--images={paths[0]},{paths[1]}", f"--out={out}")
    assert load_samples(out).shape == (2, 22, 16, 3)
    with np.load(out) as stored:
        assert stored["psnr"].shape == (2,)
    assert out.with_suffix(".png").exists()


def test_a_diffusion_model_trains_and_draws_in_its_latents(trained, tmp_path):
    pictures, run, out = tmp_path / "pictures", tmp_path / "run", tmp_path / "a.npz"
    pictures.mkdir()
    for number, image in enumerate(scenes.scenes("train", 16, 40).read(np.arange(40))["image"]):
        Image.fromarray(image).save(pictures / f"{number}.png")
    flags = (*SMALL, *SHORT, f"--config.data.dir={pictures}", "--config.data.image_size=16", "--config.data.flip=False")
    flags = (*flags, "--config.space.name=latents", f"--config.space.folder={trained}", "--config.training.num_steps=2")
    do_call(folder_experiment.TASK, "folder", run, *flags, "--config.training.num_previews=0")
    do_call(folder_experiment.TASK, "folder", run, "--mode=sample", "--num_samples=2", f"--out={out}")
    assert load_samples(out).shape == (2, 16, 16, 3)
    opened, own = open_run(run, num_devices=1), open_autoencoder(trained)
    assert opened.model.space.shape == (8, 8, 4)
    jax.tree.map(np.testing.assert_array_equal, opened.params["space"]["autoencoder"], own.params)
    np.testing.assert_array_equal(opened.params["space"]["scale"], own.scale)


# --- what is refused


def test_images_that_do_not_fit():
    config = config_of()
    with pytest.raises(ValueError, match=r"images of 1 channels: the autoencoder takes RGB; set data.channels=3"):
        vae.make_experiment(config, digits("train"))
    with pytest.raises(ValueError, match=r"of 17x17: 2 levels .* sides divisible by 2; set data.image_size"):
        vae.make_experiment(config, array_source(np.zeros((20, 17, 17, 3), np.uint8), None, "odd", "train", None))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config.network.chanels=(8,)"], "did you mean network.channels?"),
        (["--config.loss.perceptual=1"], "unknown config field loss.perceptual"),
        (["--config.network.channels=()"], "name the channels of at least one level"),
        (["--config.network.channels=(8.5,8)"], "whole numbers are needed"),
        (["--config.network.groups=3"], "3 groups do not divide 8 channels"),
        (["--config.loss.kl_weight=-1"], "loss.kl_weight is -1"),
        (["--config.loss.adversarial=1", "--config.discriminator.layers=3"], "lower discriminator.layers"),
        (["--config.data.name=nothing"], "choose digits, folder or tfds:NAME"),
        (["--config.data.name=digits"], "digits are 8x8 with 1 channel"),
        (["--config.evaluation.features=nothing"], "unknown features 'nothing'"),
        (["--num_samples=3"], "--num_samples is not read by the evaluation of autoencoder"),
        (["--steps=3"], "sampling.num_steps"),
    ],
)
def test_what_cannot_be_is_named_before_anything_is_written(tmp_path, flags, message):
    with pytest.raises((ValueError, RunError), match=re.escape(message)) as refused:
        run_vae(tmp_path / "run", *FLAGS, *flags)
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def test_folders_that_are_none(trained, tmp_path):
    with pytest.raises(RunError, match="train first"):
        vae.open_published(tmp_path)
    (trained / "latents" / "30.json").rename(tmp_path / "30.json")
    try:
        with pytest.raises(RunError, match="has no shift and scale of its latents after step 30: finish its training"):
            open_autoencoder(trained)
    finally:
        (tmp_path / "30.json").rename(Path(trained) / "latents" / "30.json")
    with pytest.raises(ValueError, match="keeps one average of its weights"):
        run_vae(trained, "--mode=reconstruct", "--ema_length=0.1")
