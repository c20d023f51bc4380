"""Group normalisation, SiLU and dropout as one kernel on GPUs, with its gradient.

    x + shift -> normalised, times scale, plus bias -> SiLU -> dropout

XLA's programs pass over x and over the gradients several times. The kernel reads x from memory once and writes once,
and so does its gradient. x itself is an output too, for what goes past the normalisation: the kernel adds the gradient
of that to its own where it writes it, which saves another pass.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float

from diffusion.networks import norm_kernel
from diffusion.networks.attention import has_kernels
from diffusion.networks.group_norm import Plan, in_steps
from diffusion.networks.tangents import make_tangent

BATCH = ("data", "fsdp")  # axes of a mesh that cut a batch


def norm_silu_dropout(
    x: Float[Array, "B *space C"],
    shift: Float[Array, "#B C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    keep: Bool[Array, "B *space C"] | None,
    plan: Plan,
) -> tuple[Float[Array, "B *space C"], Float[Array, "B *space C"]]:
    """Returns x, and what becomes of x + shift, computed in float32.

    On GPUs it is one kernel, and another for the gradient.

    Args:
      x: images of channels.
      shift: added to all pixels first.
      scale: of what was normalised.
      bias: added to that.
      keep: what dropout lets pass; None for all.
      plan: the rest.

    Raises:
      ValueError: a rate of dropout without what it lets pass, or the other way round.
    """
    if (keep is not None) != (plan.rate > 0):
        raise ValueError(f"dropout of a rate of {plan.rate:g} and what it lets pass are given together, or neither")
    shift = jnp.broadcast_to(shift.astype(jnp.float32), (x.shape[0], x.shape[-1]))
    flat = (x.shape[0], -1, x.shape[-1])
    mask = () if keep is None else (keep.reshape(flat).astype(jnp.uint8),)
    function = _traced_once if fits(x) else unfused
    same, y = function(plan, x.reshape(flat), shift, scale, bias, *mask)
    return same.reshape(x.shape), y.reshape(x.shape)


def fits(x: Array) -> bool:
    """Returns whether the kernel takes a batch: a GPU may be there, and all its devices have as many images."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return has_kernels() and x.shape[0] % (sizes.get("data", 1) * sizes.get("fsdp", 1)) == 0


def unfused(plan: Plan, x: Array, *arrays: Array) -> tuple[Array, Array]:
    """Returns what `fused` does, by the formulas."""
    return x, in_steps(plan, x, *arrays)


def fused(plan: Plan, x: Array, shift: Array, scale: Array, bias: Array, *keep: Array) -> tuple[Array, Array]:
    """Returns x and the output by the kernel, where the program is compiled for a GPU.

    Differentiable as often as wanted forward, and once backward, as a kernel's gradient has none of its own.
    """
    return _with_moments(plan, x, shift, scale, bias, *keep)[:2]


# Layers of one shape share a trace, which takes longer for a kernel than for the formulas.
_traced_once = jax.jit(fused, static_argnums=0)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _with_moments(plan: Plan, *arrays: Array) -> tuple[Array, Array, Array, Array]:
    """Returns x, the output, and the kernel's mean and 1 / standard deviation, which its gradient is computed with."""

    def by_kernel(*arrays: Array) -> Any:
        return on_shards(partial(norm_kernel.forward, plan), *arrays)

    def by_xla(*arrays: Array) -> Any:
        nothing = jnp.zeros(arrays[1].shape, jnp.float32)
        return in_steps(plan, *arrays), nothing, nothing

    return arrays[0], *jax.lax.platform_dependent(*arrays, cuda=by_kernel, default=by_xla)


@_with_moments.defjvp
def _with_moments_jvp(plan: Plan, primals: Any, tangents: Any) -> tuple[Any, Any]:
    outputs = _with_moments(plan, *primals)
    nothing = jnp.zeros(outputs[2].shape, jnp.float32)  # no derivative that is asked for goes through the moments
    found = _tangent(*primals, *outputs[2:], *tangents[:4], plan=plan)
    return outputs, (*found, nothing, nothing)


def _push(*arrays: Array, plan: Plan) -> list[Array]:
    """Returns the tangents of both outputs."""
    inputs, keep, tangents = arrays[:4], arrays[4:-6], arrays[-4:]
    return [tangents[0], jax.jvp(lambda *inputs: in_steps(plan, *inputs, *keep), inputs, tangents)[1]]


def _pull(cotangents: Any, *arrays: Array, plan: Plan) -> list[Array | None]:
    """Returns the gradients by x, shift, scale and bias."""
    past, dy = cotangents
    inputs, keep, stored = arrays[:4], arrays[4:-2], arrays[-2:]
    if dy is None:
        return [past, *map(jnp.zeros_like, inputs[1:])]

    def by_kernel(dy: Array, past: Any, inputs: Any, keep: Any, stored: Any) -> Any:
        gradients = partial(norm_kernel.gradients, plan, past is not None)
        dx, dshift, *others = on_shards(gradients, *inputs, *stored, dy, *keep, *([] if past is None else [past]))
        return dx, dshift, *(x.sum(0) for x in others)

    def by_xla(dy: Array, past: Any, inputs: Any, keep: Any, stored: Any) -> Any:
        dx, *others = jax.vjp(lambda *inputs: in_steps(plan, *inputs, *keep), *inputs)[1](dy)
        return (dx if past is None else dx + past), *others

    return list(jax.lax.platform_dependent(dy, past, inputs, keep, stored, cuda=by_kernel, default=by_xla))


def _outputs(x: Any, *_: Any, plan: Plan) -> list[Any]:
    return [x, x.update(dtype=jnp.dtype(plan.dtype))]


_tangent = make_tangent("norm_silu_dropout_tangent", 4, _push, _pull, _outputs)


def on_shards(function: Any, *arrays: Array) -> Any:
    """Returns function(*arrays), each device's with its images, where a mesh is known that cuts the batch.

    XLA does not know what a kernel does and would gather the batch. Arrays of one axis are whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if all(mesh.shape.get(axis, 1) == 1 or axis in mesh.manual_axes for axis in BATCH):
        return function(*arrays)
    images = PartitionSpec(tuple(axis for axis in BATCH if axis in mesh.shape))
    specs = tuple(images if x.ndim > 1 else PartitionSpec() for x in arrays)
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=images, check_vma=False)(*arrays)
