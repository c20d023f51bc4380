"""Derivatives along a tangent as primitives: XLA computes them forward; their transpose, the gradient, is a kernel's.

A fused kernel has a gradient of its own and no derivative in forward mode, which flow maps are trained by
(`flow_map.total_derivative`). `jax.custom_vjp` would refuse that mode.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array


def make_tangent(
    name: str,
    count: int,
    push: Callable[..., list[Array]],
    pull: Callable[..., list[Array | None]],
    outputs: Callable[..., list[Any]],
) -> Callable[..., list[Array]]:
    """Returns bind(*arrays, *tangents, **options) -> tangents of the outputs, differentiable in both modes.

    Args:
      name: of the primitive.
      count: how many tangents there are; they come last.
      push: (*arrays, *tangents, **options) -> tangents of the outputs, in operations of JAX.
      pull: (cotangents of the outputs, *arrays, **options) -> gradients of the `count` inputs; a cotangent that is 0
        is None.
      outputs: (*arrays, *tangents, **options) -> abstract values of what `push` returns, of those of its arguments.
    """
    primitive = Primitive(name)
    primitive.multiple_results = True

    def jvp(primals: Any, tangents: Any, **options: Any) -> Any:
        return jax.jvp(partial(push, **options), tuple(primals), tuple(map(ad.instantiate_zeros, tangents)))

    def transpose(cotangents: Any, *inputs: Any, **options: Any) -> list[Any]:
        """Returns the gradients of those tangents that are asked for."""
        arrays, tangents = inputs[:-count], inputs[-count:]
        none: list[Any] = [None] * len(arrays)
        found = [None if isinstance(x, ad.Zero) else x for x in cotangents]
        if all(x is None for x in found):
            return none + [None] * count
        gradients = pull(found, *arrays, **options)
        pairs = zip(gradients, tangents, strict=True)
        return none + [gradient if ad.is_undefined_primal(x) else None for gradient, x in pairs]

    def batch(inputs: Any, axes: Any, **options: Any) -> Any:
        outputs = jax.vmap(partial(push, **options), in_axes=tuple(axes))(*inputs)
        return outputs, [0] * len(outputs)

    primitive.def_impl(push)
    primitive.def_abstract_eval(outputs)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(push, multiple_results=True))
    return primitive.bind
