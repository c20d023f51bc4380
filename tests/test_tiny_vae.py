"""The tiny autoencoder against diffusers' and TAESD's own code (recorded goldens), with TAEF2's real weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_vaes import IMAGES, TAEF2, golden, record, write_pair, write_vae

from diffusion.networks.tiny_vae import TinyAutoencoder
from diffusion.pretrained.autoencoders import load_autoencoder
from diffusion.pretrained.vae import shapes


@pytest.fixture(scope="module")
def apply():
    return jax.jit(lambda *args: args[0].apply(args[1], args[2], method=args[3]), static_argnums=(0, 3))


def test_equals_diffusers(tmp_path, apply):
    module, params = load_autoencoder(write_vae(tmp_path / "tiny", "tiny"))[:2]
    posterior = apply(module, params, IMAGES, "encode")
    # Of order 1, through some 20 convolutions: their float32 roundings.
    np.testing.assert_allclose(posterior.mean, golden("tiny", "mean"), atol=1e-5)
    assert (posterior.log_variance == -np.inf).all()
    z = record.latents(posterior.mean.shape)
    np.testing.assert_allclose(apply(module, params, z, "decode"), golden("tiny", "decoded"), atol=1e-5)


def test_equals_taesd_with_normalised_blocks(tmp_path, apply):
    module, params = load_autoencoder(write_pair(tmp_path / "taef2", "taef2_seeded"))[:2]
    assert module == TinyAutoencoder(latent_channels=32, smallest_norm=True)
    x = np.tile(IMAGES, (1, 2, 2, 1))
    # Sums over 576 numbers, 32 layers deep, with activations up to 10.
    mean = apply(module, params, x, "encode").mean
    np.testing.assert_allclose(mean, golden("taef2_seeded", "mean"), atol=1e-4)
    z = record.latents(mean.shape)
    np.testing.assert_allclose(apply(module, params, z, "decode"), golden("taef2_seeded", "decoded"), atol=1e-4)


@pytest.mark.skipif(not TAEF2.is_dir(), reason="TAEF2's weights (github.com/madebyollin/taesd) are not beside this")
def test_taef2_on_a_photograph(apply):
    published = load_autoencoder(TAEF2)
    x = record.photograph()
    mean = apply(published.module, published.params, x, "encode").mean
    np.testing.assert_allclose(mean, golden("taef2", "mean"), atol=1e-4)
    x_hat = apply(published.module, published.params, mean, "decode")
    np.testing.assert_allclose(x_hat, golden("taef2", "decoded"), atol=1e-4)
    assert np.square(x_hat - x).mean() < np.var(x) / 4  # it is that picture


# TAESD's README, and the numbers in TAEF2's two files.
@pytest.mark.parametrize(
    "settings, encoder, decoder",
    [({}, 1_222_532, 1_222_531), (dict(latent_channels=32, smallest_norm=True), 1_338_528, 1_338_499)],
    ids=["taesd", "taef2"],
)
def test_published_sizes(settings, encoder, decoder):
    tree = shapes(TinyAutoencoder(**settings))
    sizes = [sum(leaf.size for leaf in jax.tree.leaves(tree[part])) for part in ("encoder", "decoder")]
    assert sizes == [encoder, decoder]


def test_bad_input_is_named():
    module = TinyAutoencoder(width=4, encoder_blocks=(1, 1), decoder_blocks=(1, 1))
    with pytest.raises(ValueError, match="images of 8x7 cannot be encoded: crop or resize to multiples of 2"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 8, 7, 3))))
    with pytest.raises(ValueError, match="latents have 3 channels where this autoencoder takes 4"):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros((1, 2, 2, 3)), method="decode"))
