"""Draws of one image do not depend on its batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.randomness import draw_like, fold_in, normal_like


def test_with_one_key_per_image_the_batch_does_not_matter():
    keys, x = jax.random.split(jax.random.key(0), 6), jnp.zeros((6, 4, 3))
    noise = normal_like(fold_in(keys, 5), x)
    np.testing.assert_array_equal(normal_like(fold_in(keys[2:4], 5), x[2:4]), noise[2:4])
    np.testing.assert_array_equal(normal_like(fold_in(keys[::-1], 5), x), noise[::-1])
    np.testing.assert_array_equal(noise[1], jax.random.normal(jax.random.fold_in(keys[1], 5), (4, 3)))


def test_with_one_key_the_images_differ():
    noise = normal_like(jax.random.key(0), jnp.zeros((2, 8)))
    assert not np.any(noise[0] == noise[1])


def test_noise_is_standard_normal_at_both_kinds_of_key():
    x = jnp.zeros((200, 500))  # 1e5 values: the standard errors are 0.003 and 0.002
    for key in (jax.random.key(0), jax.random.split(jax.random.key(0), 200)):
        noise = normal_like(key, x)
        assert abs(noise.mean()) < 0.012 and abs(noise.std() - 1) < 0.009


def test_purposes_and_steps_give_different_noise():
    key, x = jax.random.key(0), jnp.zeros((1, 8))
    draws = [normal_like(fold_in(key, step), x)[0] for step in range(3)]
    assert len(np.unique(np.stack(draws))) == 24


def test_legacy_keys_draw_the_same():
    x = jnp.zeros((2, 3))
    np.testing.assert_array_equal(normal_like(jax.random.PRNGKey(3), x), normal_like(jax.random.key(3), x))
    legacy = jax.random.split(jax.random.PRNGKey(3), 2)
    np.testing.assert_array_equal(normal_like(legacy, x), normal_like(jax.random.split(jax.random.key(3), 2), x))


def test_other_draws_keep_shape_and_dtype():
    signs = draw_like(jax.random.rademacher, jax.random.split(jax.random.key(0), 4), jnp.zeros((4, 50), jnp.int32))
    assert signs.shape == (4, 50) and signs.dtype == jnp.int32 and set(np.unique(signs)) == {-1, 1}
    assert normal_like(jax.random.key(0), jnp.zeros((2, 2), jnp.bfloat16)).dtype == jnp.bfloat16


def test_a_wrong_number_of_keys_is_an_error():
    with pytest.raises(ValueError, match="one per image"):
        normal_like(jax.random.split(jax.random.key(0), 3), jnp.zeros((2, 2)))
