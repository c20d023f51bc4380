"""The one way in which all networks attend: a fused kernel of the device where it has one that fits, else XLA.

jax.nn's fused kernel, cuDNN's, has a gradient and no derivative in forward mode; see `tangents`.
"""

import functools
import importlib.util
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion import compiler
from diffusion.networks.tangents import make_tangent

# Of cuDNN's kernel with a gradient, by the compute capability since which they hold: Ampere's, Hopper's, Blackwell's.
# JAX's own tests compare heads of 256 on Hopper alone.
LARGEST_HEADS = {8.0: 128, 9.0: 256, 10.0: 128}

Heads = Float[Array, "B T heads head"]


def attention(query: Heads, key: Array, value: Array, bias: Array | None = None, **options: Any) -> Heads:
    """Returns `jax.nn.dot_product_attention`.

    On GPUs it is one kernel, which holds no scores [B, heads, T, S], where the numbers are bfloat16, heads have a size
    that it takes, and there is no bias and no mask but the causal one.

    Args:
      query: what attends.
      key: what is attended to, [B, S, heads, head].
      value: the same.
      bias: added to the scores.
      **options: `mask`, `is_causal`, `scale`.
    """
    known = {"is_causal", "scale"}.issuperset(name for name, option in options.items() if option is not None)
    if bias is None and known and fits(query, key, value):
        return fused(query, key, value, bool(options.get("is_causal")), options.get("scale"))
    return jax.nn.dot_product_attention(query, key, value, bias, implementation="xla", **options)


def fits(*heads: Array) -> bool:
    """Returns whether a fused kernel takes query, key and value."""
    size = heads[0].shape[-1]
    taken = all(x.dtype == jnp.bfloat16 and x.ndim == 4 and x.shape[-1] == size for x in heads)
    return taken and size <= largest_head() and size % 8 == 0


def largest_head() -> int:
    """Returns the largest size of heads that the kernel takes on every GPU compiled for; 0 where it takes none.

    The program decides by the kind of device it is compiled for, which may be none of these: JAX exports one for CUDA
    on a machine without GPUs, whose devices are taken for Ampere's. JAX compiles the kernel for any GPU, and an older
    one then finds no engine that runs it.
    """
    if not _has_plugin():
        return 0
    devices = compiler.TARGET or jax.local_devices()
    found = (float(getattr(device, "compute_capability", min(LARGEST_HEADS))) for device in devices)
    newest = (max((since for since in LARGEST_HEADS if since <= capability), default=0.0) for capability in found)
    return min(LARGEST_HEADS.get(since, 0) for since in newest)


@functools.cache
def _has_plugin() -> bool:
    """Returns whether JAX's plugin for GPUs is installed, without which it cannot even trace cuDNN's kernel."""
    return any(importlib.util.find_spec(name) is not None for name in compiler.CUDA_PLUGINS)


def has_kernels() -> bool:
    """Returns whether JAX is installed for GPUs, and none here is older than the kernels."""
    return largest_head() > 0


def by_xla(query: Heads, key: Array, value: Array, is_causal: bool, scale: float | None) -> Heads:
    """Returns attention in the steps of its formula."""
    return jax.nn.dot_product_attention(query, key, value, is_causal=is_causal, scale=scale, implementation="xla")


def by_cudnn(query: Heads, key: Array, value: Array, is_causal: bool, scale: float | None) -> Heads:
    """Returns attention in one kernel of cuDNN's.

    JAX refuses its gradient for odd lengths, as those of Stable Diffusion 3's 4,096 + 333 tokens: one is added to
    these, which is not attended to.
    """
    lengths: dict[str, Array] = {}
    length, count = query.shape[1], key.shape[1]
    if length % 2 or count % 2:
        batch = query.shape[0]
        lengths["query_seq_lengths"] = jnp.full(batch, length, jnp.int32)
        lengths["key_value_seq_lengths"] = jnp.full(batch, count, jnp.int32)
        query, key, value = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    attend: Any = partial(jax.nn.dot_product_attention, is_causal=is_causal, scale=scale, implementation="cudnn")
    return attend(query, key, value, **lengths)[:, :length]


@partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def fused(query: Heads, key: Array, value: Array, is_causal: bool, scale: float | None) -> Heads:
    """Returns attention by the kernel of the device that the program is compiled for."""
    options = dict(is_causal=is_causal, scale=scale)
    return jax.lax.platform_dependent(
        query, key, value, cuda=partial(by_cudnn, **options), default=partial(by_xla, **options)
    )


@fused.defjvp
def _fused_jvp(is_causal: bool, scale: float | None, primals: Any, tangents: Any) -> tuple[Array, Array]:
    options = dict(is_causal=is_causal, scale=scale)

    def forward(*heads: Array) -> Array:  # the kernel that the gradient runs too: XLA makes one of both
        return jax.vjp(partial(by_cudnn, **options), *heads)[0]

    out = jax.lax.platform_dependent(*primals, cuda=forward, default=partial(by_xla, **options))
    return out, _tangent(*primals, *tangents, **options)[0]


def _push(*arrays: Array, **options: Any) -> list[Array]:
    """Returns the derivative of attention along a tangent, of query, key, value and their tangents."""
    return [jax.jvp(partial(by_xla, **options), arrays[:3], arrays[3:])[1]]


def _pull(cotangents: Any, *heads: Array, **options: Any) -> list[Array | None]:
    """Returns the gradients by query, key and value."""

    def gradients(attend: Any, *heads: Array) -> tuple[Array, ...]:
        return jax.vjp(partial(attend, **options), *heads)[1](*cotangents)

    return list(
        jax.lax.platform_dependent(*heads, cuda=partial(gradients, by_cudnn), default=partial(gradients, by_xla))
    )


_tangent = make_tangent("attention_tangent", 3, _push, _pull, lambda query, *_, **options: [query])
