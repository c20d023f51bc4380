"""The autoencoder against diffusers' (recorded goldens), its published sizes, and decoding in tiles."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published_vaes import IMAGES, golden, record, write_vae

from diffusion.networks.tiles import decode_tiled
from diffusion.networks.vae import Autoencoder, Posterior, fold, sample, unfold
from diffusion.pretrained.autoencoders import load_autoencoder
from diffusion.pretrained.vae import shapes

TINY = Autoencoder(latent_channels=4, channels=(4, 8), blocks_per_level=1, groups=2)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """Opens a case of diffusers, once."""
    opened = {}

    def open_case(case):
        if case not in opened:
            opened[case] = load_autoencoder(write_vae(tmp_path_factory.mktemp("vae") / case, case))
        return opened[case]

    return open_case


@pytest.fixture(scope="module")
def apply():
    """`apply(module, variables, x, method)`, compiled once for each network."""
    return jax.jit(lambda *args: args[0].apply(args[1], args[2], method=args[3]), static_argnums=(0, 3))


@pytest.mark.parametrize("case", ["sd1", "sd3", "no_attention", "flux2"])
def test_equals_diffusers(case, published, apply):
    module, params = published(case)[:2]
    posterior = apply(module, params, IMAGES, "encode")
    # Of order 1, through some 20 products: their float32 roundings.
    np.testing.assert_allclose(posterior.mean, golden(case, "mean"), atol=1e-5)
    np.testing.assert_allclose(posterior.log_variance, golden(case, "log_variance"), atol=1e-5)
    z = record.latents(posterior.mean.shape)
    # Groups of one channel that hardly varies magnify roundings: theirs and ours are each 2.5e-5 from float64.
    atol = 5e-5 if case == "flux2" else 1e-5
    np.testing.assert_allclose(apply(module, params, z, "decode"), golden(case, "decoded"), atol=atol)
    assert posterior.mean.shape == (2, 8 // module.factor, 12 // module.factor, module.latent_channels)


# Stable Diffusion 3's count is the one of its files, and that of 1's autoencoder is published.
@pytest.mark.parametrize(
    "settings, encoder, decoder, total",
    [
        ({}, 34_274_208, 49_545_475, 83_819_683),
        (dict(latent_channels=4, quant_conv=True, post_quant_conv=True), 34_163_592, 49_490_179, 83_653_863),
        (dict(latent_channels=32, quant_conv=True, post_quant_conv=True), 34_421_696, 49_619_203, 84_046_115),
    ],
    ids=["sd3", "sd1", "flux2"],
)
def test_published_sizes(settings, encoder, decoder, total):
    tree = shapes(Autoencoder(**settings))
    size = {name: sum(leaf.size for leaf in jax.tree.leaves(part)) for name, part in tree.items()}
    assert (size["encoder"], size["decoder"], sum(size.values())) == (encoder, decoder, total)


def test_samples_have_the_posterior_moments():
    shape = (2, 64, 64, 4)
    posterior = Posterior(jnp.full(shape, 3.0), jnp.full(shape, 2 * jnp.log(0.5)))
    z = sample(posterior, jax.random.key(0))
    error = 0.5 / z.size**0.5
    assert abs(z.mean() - 3) < 4 * error and abs(z.std() - 0.5) < 4 * error
    exact = Posterior(posterior.mean, jnp.full(shape, -jnp.inf))
    np.testing.assert_array_equal(sample(exact, jax.random.key(0)), posterior.mean)
    alone = sample(jax.tree.map(lambda x: x[1:], posterior), jax.random.split(jax.random.key(1))[1:])
    np.testing.assert_array_equal(sample(posterior, jax.random.split(jax.random.key(1)))[1:], alone)


def test_log_variance_is_clamped(published, apply):
    module, params = published("sd3")[:2]
    kernel = params["params"]["encoder"]["conv_out"]["kernel"]
    out = {**params["params"]["encoder"]["conv_out"], "kernel": 1e4 * kernel}
    params = {"params": {**params["params"], "encoder": {**params["params"]["encoder"], "conv_out": out}}}
    log_variance = apply(module, params, IMAGES, "encode").log_variance
    assert (log_variance.min(), log_variance.max()) == (-30, 20)


def test_all_parameters_learn_from_the_start():
    """At the start residual branches are zero; one step after it everything has a gradient."""
    module: Any = TINY.clone(quant_conv=True, post_quant_conv=True)
    x = jnp.asarray(IMAGES)
    params = jax.jit(module.init)(jax.random.key(0), x)

    def loss(params):
        posterior = module.apply(params, x, method="encode")
        x_hat = module.apply(params, sample(posterior, jax.random.key(1)), method="decode")
        return jnp.square(x_hat - x).mean() + jnp.square(posterior.log_variance).mean()

    gradient = jax.jit(jax.grad(loss))
    params = jax.tree.map(lambda leaf, slope: leaf - 0.1 * slope, params, gradient(params))
    largest = jax.tree.map(lambda slope: float(jnp.abs(slope).max()), gradient(params))
    # Of the key's bias softmax takes nothing.
    still = [jax.tree_util.keystr(path) for path, size in jax.tree_util.tree_leaves_with_path(largest) if size < 1e-12]
    assert all("'key']['bias']" in name for name in still)


def test_bfloat16_is_near(published, apply):
    module, params = published("sd3")[:2]
    plain = apply(module, params, IMAGES, "__call__")
    half = apply(module.clone(dtype=jnp.bfloat16), params, IMAGES, "__call__")
    assert {leaf.dtype for leaf in jax.tree.leaves(half)} == {jnp.dtype("float32")}
    # bfloat16 keeps 8 bits; some 40 roundings one after the other, and outputs of size 1.
    for near, exact in zip(jax.tree.leaves(half), jax.tree.leaves(plain), strict=True):
        assert 0 < np.abs(near - exact).mean() < 40**0.5 * 2**-8


def test_patches_are_channels_and_back():
    z = record.latents((2, 4, 6, 3))
    folded = fold(z, 2)
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(folded[1, 1, 2].reshape(3, 2, 2), z[1, 2:4, 4:6].transpose(2, 0, 1))
    np.testing.assert_array_equal(unfold(folded, 2), z)
    np.testing.assert_array_equal(fold(z, 1), z)
    with pytest.raises(ValueError, match="latents of 4x6 are not whole patches of 4x4"):
        fold(z, 4)


@pytest.mark.parametrize("size, tile, overlap", [((5, 13), 5, 2), ((16, 16), 6, 3), ((7, 4), 4, 0)])
def test_tiles_of_a_local_decoder_are_the_whole(size, tile, overlap):
    seen = []

    def decode(z):
        seen.append(z.shape)
        return np.repeat(np.repeat(np.tanh(z), 4, axis=1), 4, axis=2)

    z = record.latents((2, *size, 3))
    found = decode_tiled(decode, z, tile, overlap)
    # Weights are summed and divided by: two roundings of numbers below 1.
    np.testing.assert_allclose(found, decode(z), atol=1e-6)
    assert {*seen[:-1]} == {(2, min(tile, size[0]), min(tile, size[1]), 3)}


def test_seams_are_blended():
    """A decoder whose tiles differ in brightness by 1: neighbouring pixels differ by one step of the ramp at most."""
    count = iter(range(100))
    tiled = decode_tiled(lambda z: np.full((1, 64, 64, 1), next(count) % 2.0), np.zeros((1, 8, 20, 1)), 8, 2)
    assert {0.0, 1.0} <= {*tiled.ravel()}
    ramp = 2 * 8
    assert np.abs(np.diff(tiled, axis=2)).max() <= 1 / ramp + 1e-6
    hard = decode_tiled(lambda z: np.full((1, 64, 64, 1), next(count) % 2.0), np.zeros((1, 8, 24, 1)), 8, 0)
    assert np.abs(np.diff(hard, axis=2)).max() == 1


def test_tiles_of_the_network(published, apply):
    """Away from seams a tile is what the decoder makes of it alone; all has the size of the whole."""
    module, params = published("no_attention")[:2]
    z = record.latents((1, 6, 10, 4))
    tiled = decode_tiled(lambda z: apply(module, params, z, "decode"), z, tile=6, overlap=1)
    assert tiled.shape == (1, 12, 20, 3)
    first = apply(module, params, z[:, :, :6], "decode")
    np.testing.assert_allclose(tiled[:, :, :8], first[:, :, :8], atol=1e-6)
    whole = decode_tiled(lambda z: apply(module, params, z, "decode"), z, tile=10, overlap=1)
    np.testing.assert_array_equal(whole, apply(module, params, z, "decode"))


@pytest.mark.parametrize("tile, overlap", [(4, 3), (4, -1), (0, 0)])
def test_tiles_that_cannot_be(tile, overlap):
    with pytest.raises(ValueError, match=f"tiles of {tile} cannot overlap by {overlap}"):
        decode_tiled(lambda z: z, np.zeros((1, 8, 8, 1)), tile, overlap)


@pytest.mark.parametrize(
    "change, shape, method, message",
    [
        ({}, (1, 9, 8, 3), "encode", "images of 9x8 cannot be encoded: crop or resize to multiples of 2"),
        ({}, (1, 8, 8, 4), "encode", "images have 4 channels where this autoencoder takes 3"),
        ({}, (1, 8, 8, 3), "decode", "latents have 3 channels where this autoencoder takes 4"),
        (dict(groups=3), (1, 8, 8, 3), "encode", "3 groups do not divide 4 channels"),
    ],
)
def test_bad_input_is_named(change, shape, method, message):
    module = TINY.clone(**change)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: module.init(jax.random.key(0), jnp.zeros(shape), method=method))
