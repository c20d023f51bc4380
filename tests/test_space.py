"""Spaces: pixels, and latents of an autoencoder with their shift and scale, made once and trained in."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CONFIGS
from published_vaes import write_vae

from diffusion.data import scenes
from diffusion.data.images import to_float, to_uint8
from diffusion.data.precomputed import precomputed
from diffusion.model.experiment import make_model, stored_of
from diffusion.model.fields import change, load
from diffusion.model.loss import make_loss
from diffusion.model.model import init, parts
from diffusion.model.space import fit, latents, mean_and_std, pixels, with_latents
from diffusion.pretrained.vae import load_vae
from diffusion.runs.run import open_run

SHAPE = (16, 24, 3)


def start(space):
    """The parameters that a space begins with."""
    assert space.init is not None
    return space.init(jax.random.key(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published autoencoder of 16 channels at a quarter of the size, with a shift and a scale."""
    return write_vae(tmp_path_factory.mktemp("vae") / "sd3", "sd3")


@pytest.fixture(scope="module")
def images():
    return np.random.RandomState(0).randint(0, 256, (4, *SHAPE), np.uint8)


def test_latents_are_the_autoencoders_shifted_and_scaled(folder, images):
    space = latents(SHAPE, None, folder=str(folder))
    published = load_vae(folder)
    params = start(space)
    assert space.shape == (4, 6, 16) and (space.description or {})["name"] == "vae"
    posterior = jax.jit(lambda x: published.module.apply(published.params, x, method="encode"))(to_float(images))
    x_0 = jax.jit(space.encode)(params, images, None)
    np.testing.assert_allclose(x_0, (posterior.mean - published.shift) * published.scale, rtol=1e-5, atol=1e-5)
    again = jax.jit(space.decode)(params, x_0)
    assert again.shape == images.shape and again.dtype == np.uint8
    decoded = jax.jit(lambda z: published.module.apply(published.params, z, method="decode"))(posterior.mean)
    # z is rounded in another way than x_0 was: a level may go over to its neighbour.
    np.testing.assert_allclose(np.asarray(again, int), np.asarray(to_uint8(decoded), int), atol=1)
    np.testing.assert_array_equal(jax.jit(space.decode)(params, x_0[:, None])[:, 0], again)


def test_a_space_is_made_again_of_what_a_checkpoint_stores(folder, images):
    space = latents(SHAPE, None, folder=str(folder))
    again = latents(SHAPE, space.description)
    params = start(space)
    shapes = jax.eval_shape(lambda: start(again))
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, params)
    np.testing.assert_array_equal(again.encode(params, images, None), space.encode(params, images, None))


def test_samples_have_the_posteriors_mean_and_deviation(folder, images):
    space = latents(SHAPE, None, folder=str(folder), sample=True, precomputed=False)
    params = start(space)
    published = load_vae(folder)
    keys = jax.random.split(jax.random.key(1), 600)
    draw = jax.jit(jax.vmap(lambda key: space.of_batch(params, {"image": images[:1]}, key)))
    drawn = np.asarray(draw(keys))
    posterior = published.module.apply(published.params, to_float(images[:1]), method="encode")
    std = np.exp(posterior.log_variance / 2) * published.scale
    mean = (posterior.mean - published.shift) * published.scale
    # The mean of 600 draws has a deviation of std / 24.5: of 384 such numbers the largest is within 5 of these.
    np.testing.assert_array_less(np.abs(drawn.mean(0) - mean), 5 * std / 600**0.5)
    np.testing.assert_allclose(drawn.std(0) / std, 1, atol=5 / 1200**0.5)


def test_what_is_not_known_of_a_cell_hides_it_whole(folder):
    known = np.ones((16, 24, 1), bool)
    known[3, 5] = False
    hidden = latents(SHAPE, None, folder=str(folder)).mask(known)
    assert hidden.shape == (4, 6, 1) and not hidden[0, 1] and hidden.sum() == 23
    np.testing.assert_array_equal(pixels(SHAPE, None).mask(known), known)


def test_fitted_latents_have_mean_zero_and_deviation_one(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = scenes.scenes("train", 16, 40)
    space = latents((16, 16, 3), None, folder=str(folder), fitted=True)
    params = start(space)
    calls = []
    reads = source._replace(read=lambda rows: calls.append(len(rows)) or source.read(rows))
    made, fitted = with_latents(reads, space, params, batch_size=16)
    assert len(calls) == 3
    batch = made.read(np.arange(40))
    assert batch.keys() == {"latent", "label"}
    x_0 = fitted.of_batch(start(fitted), batch, jax.random.key(0))
    np.testing.assert_allclose(np.mean(x_0, axis=(0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(np.std(x_0, axis=(0, 1, 2)), 1, rtol=1e-4)
    np.testing.assert_array_equal(batch["label"], source.read(np.arange(40))["label"])
    with_latents(reads, space, params, batch_size=16)
    assert len(calls) == 3  # they are read from the cache
    mean, std = mean_and_std([batch["latent"][:30], batch["latent"][30:]], rows=7)
    np.testing.assert_allclose(mean, batch["latent"].mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std, batch["latent"].std((0, 1, 2)), rtol=1e-5)


def test_the_loss_reads_latents_or_images_alike_and_leaves_the_autoencoder_alone(folder):
    changes = {"space": "latents", "space.folder": str(folder), "network.width": 16, "network.depth": 1}
    changes |= {"network.num_heads": 2, "network.patch": 1}
    config = change(load("scenes", CONFIGS)[0], changes)
    model = make_model(config, (16, 16, 3), vocabulary=["a", "red", "two"])
    assert model.frozen == ("space",) and stored_of(model)["frozen"] == ["space"]
    params = jax.jit(lambda key: init(model, key))(jax.random.key(0))
    source = scenes.scenes("train", 16, 8)
    batch = source.read(np.arange(8))
    batch["text"] = model.condition.read(["a red two"] * 8)
    loss = make_loss(model)
    value = jax.jit(lambda params, batch: loss(params, batch, jax.random.key(0))[0].mean())
    precomputed = model.space.precomputed
    assert precomputed is not None
    known = {**batch, **precomputed(params["space"], jnp.asarray(batch["image"]))}
    known.pop("image")
    np.testing.assert_allclose(value(params, batch), value(params, known), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda params: value(params, batch)))(params)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient["space"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradient["network"]))
    assert parts(model, params).space is not None


def test_channels_that_never_change_are_not_scaled(folder):
    space = latents(SHAPE, None, folder=str(folder), fitted=True)
    with pytest.raises(ValueError, match="1 of 16 channels are the same number in every image"):
        fit(space, np.zeros(16, np.float32), np.append(np.ones(15, np.float32), 0))


def test_rows_that_an_interrupted_call_made_in_other_batches_are_made_again(tmp_path):
    def rows(batch, fail_at=None):
        if fail_at is not None and batch[0] >= fail_at:
            raise KeyboardInterrupt
        return {"x": batch.astype(np.float32)}

    with pytest.raises(KeyboardInterrupt):
        precomputed(tmp_path / "a", 200, lambda batch: rows(batch, fail_at=64), 4, "rows")
    seen = []
    found = precomputed(tmp_path / "a", 200, lambda batch: seen.append(batch[0]) or rows(batch), 24, "rows")
    np.testing.assert_array_equal(found["x"], np.arange(200))
    assert seen[0] == 0
    with pytest.raises(KeyboardInterrupt):
        precomputed(tmp_path / "b", 200, lambda batch: rows(batch, fail_at=64), 4, "rows")
    seen.clear()
    found = precomputed(tmp_path / "b", 200, lambda batch: seen.append(batch[0]) or rows(batch), 4, "rows")
    np.testing.assert_array_equal(found["x"], np.arange(200))
    assert seen[0] == 64  # the same batches resume


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "name its folder, --config.space.folder=DIR"),
        ({"fitted": True, "precomputed": False}, "set space.precomputed=True"),
    ],
)
def test_spaces_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        latents(SHAPE, None, **settings)


@pytest.mark.parametrize("shape", [(18, 16, 3), (16, 16, 1)])
def test_images_without_whole_latents_are_refused(folder, shape):
    with pytest.raises(ValueError, match=r"takes RGB with sides divisible by 4; set data\.image_size"):
        latents(shape, None, folder=str(folder))


def test_a_run_in_latents_trains_resumes_and_draws(folder, kinds, tmp_path):
    """Its checkpoint holds the autoencoder: the folder that it came from is not needed again."""
    copied = shutil.copytree(folder, tmp_path / "vae")
    flags = (
        *kinds["scenes"].flags,
        "--config.space=latents",
        f"--config.space.folder={copied}",
        "--config.space.fitted=True",
        "--config.optimizer.cooldown_steps=0",
        "--config.network.patch=1",
    )
    call = kinds["scenes"].do(tmp_path / "run", *flags, "--config.training.num_steps=2")
    shutil.rmtree(copied)
    run = open_run(tmp_path / "run")
    assert run.step == 2 and run.model.space.shape == (4, 4, 16) and run.params.keys() == {"network", "text", "space"}
    again = kinds["scenes"].do(tmp_path / "run", *flags, "--config.training.num_steps=3")
    assert again.workdir == call.workdir and open_run(tmp_path / "run").step == 3
    drawn = run.sample(prompts=["a red three"], num_samples=2)
    assert drawn.shape == (2, 16, 16, 3) and len(np.unique(drawn)) > 10
    np.testing.assert_array_equal(run.sample(prompts=["a red three"], num_samples=1), drawn[:1])
    with pytest.raises(ValueError, match="bits/dim are of pixels"):
        run.likelihood(drawn, prompts=["a red three"] * 2)
