"""Attention by a fused kernel: which shapes take it, and that values and both modes' derivatives are XLA's.

The kernel is cuDNN's on GPUs alone; here one of the same formula, with a gradient and no forward mode, is in its place.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import compiler
from diffusion.networks import attention

OPTIONS = [(False, None), (True, 0.3)]


@pytest.fixture
def kernel(as_on_gpu, monkeypatch):
    """A kernel as cuDNN's: its gradient is its own, and JAX refuses to push a tangent through it."""
    calls = []

    def by_kernel(query, key, value, is_causal, scale):
        @jax.custom_vjp
        def attend(query, key, value):
            calls.append("forward")
            return attention.by_xla(query, key, value, is_causal, scale)

        def backward(heads, cotangent):
            calls.append("backward")
            return jax.vjp(lambda q, k, v: attention.by_xla(q, k, v, is_causal, scale), *heads)[1](cotangent)

        attend.defvjp(lambda *heads: (attend(*heads), heads), backward)
        return attend(query, key, value)

    # XLA compiles the default branch for a CPU; the kernel is to be taken here.
    monkeypatch.setattr(attention, "by_cudnn", by_kernel)
    monkeypatch.setattr(attention, "largest_head", lambda: 128)
    return calls


def heads(length=5, other=7, size=8, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(2, length, 3, size), (2, other, 3, size), (2, other, 3, size)]
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_values_and_gradients_are_xlas(kernel, options):
    def loss(attend):
        return jax.jit(jax.value_and_grad(lambda *x: jnp.sum(attend(*x, *options) ** 2), (0, 1, 2)))(*heads())

    expected, found = loss(attention.by_xla), loss(attention.fused)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, found)
    assert "backward" in kernel  # the gradient is the kernel's


@pytest.mark.parametrize("options", OPTIONS)
def test_forward_mode_is_xlas(kernel, options):
    x, along = heads(), tuple(map(jnp.cos, heads()))
    expected = jax.jvp(lambda *x: attention.by_xla(*x, *options), x, along)
    found = jax.jit(lambda x, along: jax.jvp(lambda *x: attention.fused(*x, *options), x, along))(x, along)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), expected, found)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda *x: attention.by_cudnn(*x, *options), x, along)


def test_a_gradient_through_a_forward_derivative_is_xlas(kernel):
    """As of a flow map's loss: parameters are in what is pushed forward, and in a checkpointed loop."""
    query, key, value = heads(other=5)

    def loss(attend, weight):
        @jax.checkpoint
        def block(x, _):
            return x + attend(x * weight, key, value, False, None), None

        f = lambda x: jax.lax.scan(block, x, None, length=2)[0]  # noqa: E731
        y, dy = jax.jvp(f, (query,), (value,))
        return jnp.sum(y**2) + jnp.sum(dy**3)

    expected = jax.grad(lambda w: loss(attention.by_xla, w))(0.7)
    found = jax.jit(jax.grad(lambda w: loss(attention.fused, w)))(0.7)
    np.testing.assert_allclose(found, expected, rtol=1e-4)  # sums of some 200 terms of float32


def test_a_gradient_by_some_arguments_and_a_batched_derivative(kernel):
    query, key, value = heads()
    found = jax.grad(lambda value: jnp.sum(attention.fused(query, key, value, False, None) ** 2))(value)
    expected = jax.grad(lambda value: jnp.sum(attention.by_xla(query, key, value, False, None) ** 2))(value)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    columns = jnp.stack([query, 2 * query])
    push = lambda attend: jax.vmap(lambda d: jax.jvp(lambda q: attend(q, key, value, False, None), (query,), (d,))[1])  # noqa: E731
    np.testing.assert_allclose(push(attention.fused)(columns), push(attention.by_xla)(columns), rtol=1e-5, atol=1e-6)


def test_what_no_kernel_takes_is_left_to_xla(kernel):
    bfloat16 = heads(dtype=jnp.bfloat16)
    attention.attention(*bfloat16, is_causal=True, scale=1.0)
    assert kernel == ["forward"]
    attention.attention(*heads())  # float32
    attention.attention(*heads(size=12, dtype=jnp.bfloat16))  # no multiple of 8
    attention.attention(*heads(size=136, dtype=jnp.bfloat16))
    attention.attention(*bfloat16, bias=jnp.zeros((1, 3, 5, 7)))
    attention.attention(*bfloat16, mask=jnp.ones((1, 1, 5, 7), bool))
    assert kernel == ["forward"]


def test_without_a_plugin_of_gpus_all_is_xlas(monkeypatch):
    monkeypatch.setattr(attention, "largest_head", lambda: 0)
    assert not attention.fits(*heads(dtype=jnp.bfloat16))


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [((), 128), (("8.9",), 128), (("9.0",), 256), (("10.3",), 128), (("9.0", "8.0"), 128), (("9.0", "7.5"), 0)],
)
@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_largest_heads_of_a_kernel_are_those_that_all_gpus_take(monkeypatch, elsewhere, capabilities, expected):
    """GPUs of this machine, or those of one that is not here and that this process compiles for."""
    gpus = [SimpleNamespace(compute_capability=capability) for capability in capabilities] or [SimpleNamespace()]
    monkeypatch.setattr(attention, "_has_plugin", lambda: True)
    monkeypatch.setattr(compiler, "TARGET", gpus if elsewhere else [])
    monkeypatch.setattr(jax, "local_devices", lambda: [] if elsewhere else gpus)
    assert attention.largest_head() == expected
    assert attention.has_kernels() is (expected > 0)
