"""Networks that are told where a step ends, and their derivative in forward mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.networks import flux2
from diffusion.networks.mmdit import MMDiT
from diffusion.networks.unet import UNet

UNET = UNet(
    channels=8,
    multipliers=(1, 2),
    num_blocks=1,
    attention_resolutions=(2,),
    num_groups=4,
    out_channels=3,
    two_times=True,
)
MMDIT = MMDiT(
    width=16,
    depth=2,
    num_heads=2,
    out_channels=3,
    context_width=5,
    pooled_width=7,
    table_size=4,
    base_size=4,
    time_scale=1.0,
    two_times=True,
)
PROMPT = {"context": jnp.ones((2, 4, 5)), "pooled": jnp.ones((2, 7))}
NETWORKS = {"unet": (UNET, {"context": jnp.ones((2, 4, 5))}), "mmdit": (MMDIT, PROMPT)}
X_T = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 3)), jnp.float32)
T, R = jnp.asarray([0.9, 0.5]), jnp.asarray([0.2, 0.1])


def make(name, moved=True):
    """Returns a network, its parameters, moved away from those it starts with (whose output is 0), and its prompt."""
    network, told = NETWORKS[name]
    params = jax.jit(lambda key: network.init(key, X_T, T, **told))(jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), len(jax.tree.leaves(params))))

    def move(path, leaf):
        fresh = "interval_2" in jax.tree_util.keystr(path) and not moved
        return leaf if fresh else leaf + 0.1 * jax.random.normal(next(keys), leaf.shape)

    return network, jax.tree_util.tree_map_with_path(move, params), told


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_begins_as_that_of_one_time_whatever_the_next(name):
    network, params, told = make(name, moved=False)
    one = network.clone(two_times=False)
    alone = {key: value for key, value in params["params"].items() if not key.startswith("interval_")}
    expected = jax.jit(one.apply)({"params": alone}, X_T, T, **told)
    assert np.abs(expected).max() > 0.1
    found = jax.jit(network.apply)(params, X_T, T, **told, next_time=R)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_without_a_next_time_it_is_the_same_time(name):
    network, params, told = make(name)
    apply = jax.jit(network.apply)
    here = apply(params, X_T, T, **told)
    np.testing.assert_array_equal(here, apply(params, X_T, T, **told, next_time=T))
    assert np.abs(here - apply(params, X_T, T, **told, next_time=R)).max() > 1e-3


@pytest.mark.parametrize("name", NETWORKS)
def test_its_derivative_in_forward_mode_is_that_of_differences(name):
    network, params, told = make(name)
    v = jnp.asarray(np.random.default_rng(1).standard_normal(X_T.shape), jnp.float32)

    def u(x, t):
        return network.apply(params, x, t, **told, next_time=R)

    _, derivative = jax.jit(lambda: jax.jvp(u, (X_T, T), (v, jnp.ones_like(T))))()
    h = 1e-2
    ahead, behind = (jax.jit(u)(X_T + s * h * v, T + s * h) for s in (1, -1))
    # Central differences are off by h^2 u''' / 6, and by the rounding of u (1e-6 of it) over h.
    size = np.abs(derivative).max()
    assert size > 0.1
    np.testing.assert_allclose(derivative, (ahead - behind) / (2 * h), atol=2e-2 * size)


def test_flux2s_attention_passes_forward_mode_too():
    rows = [jnp.asarray(np.random.default_rng(i).standard_normal((1, 3, 1, 4)), jnp.float32) for i in range(3)]
    cosine, sine = jnp.ones((3, 2)), jnp.zeros((3, 2))

    def attend(query):
        return flux2.attend(query, rows[1], rows[2], (cosine, sine), jnp.float32)

    forward = jax.jvp(attend, (rows[0],), (jnp.ones_like(rows[0]),))[1]
    backward = jax.vjp(attend, rows[0])[1](jnp.ones_like(rows[0]))[0]
    np.testing.assert_allclose(forward.sum(), backward.sum(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", NETWORKS)
def test_a_next_time_is_refused_by_a_network_of_one_time(name):
    network, params, told = make(name)
    with pytest.raises(ValueError, match=r"next_time was given to an? .* of one time: set two_times") as refused:
        network.clone(two_times=False).apply(params, X_T, T, **told, next_time=R)
    assert "\n" not in str(refused.value)
