"""The norm of a gradient and of its groups, and the clip by it, against optax's."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion.model.optimizers import clip
from diffusion.training.step import gradient_norms, parameter_groups

RANDOM = np.random.default_rng(0)
GRADS = {
    "conv": {"kernel": (3, 3, 4, 5), "bias": (5,)},
    "norm": {"scale": (7,), "bias": (7,)},
    "scalar": {"value": ()},
}
GRADS = jax.tree.map(
    lambda shape: jnp.asarray(RANDOM.standard_normal(shape), jnp.float32), GRADS, is_leaf=lambda x: isinstance(x, tuple)
)
ROUNDING = 200 * 2.0**-24  # of a sum of 200 squares


def test_norms_are_optaxs():
    total, groups = jax.jit(gradient_norms)(GRADS)
    np.testing.assert_allclose(total, optax.global_norm(GRADS), rtol=ROUNDING)
    expected = {name: optax.global_norm(leaves) for name, leaves in parameter_groups(GRADS).items()}
    assert groups.keys() == expected.keys()
    for name, norm in groups.items():
        np.testing.assert_allclose(norm, expected[name], rtol=ROUNDING)


def test_clips_as_optax_does_and_keeps_its_state():
    for largest in (1.0, 100.0):
        ours, optaxs = clip(largest), optax.clip_by_global_norm(largest)
        assert ours.init(GRADS) == optaxs.init(GRADS)
        found, expected = (jax.jit(rule.update)(GRADS, rule.init(GRADS))[0] for rule in (ours, optaxs))
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=ROUNDING + 4 * 2.0**-24)
    np.testing.assert_array_equal(jax.jit(clip(100.0).update)(GRADS, None)[0]["norm"]["scale"], GRADS["norm"]["scale"])
