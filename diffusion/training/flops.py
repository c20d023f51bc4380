"""Counts the floating-point operations that a traced function asks for: those of matrix products and convolutions.

Counted in the traced program, before any compiler: what is computed again to save memory counts again, a loop as often
as it turns, of branches the dearest. Sums and elementwise operations are left out, as in "model FLOPs".
"""

import math
from collections import Counter
from typing import Any

from jax.extend import core


def count_flops(jaxpr: Any) -> Counter[str]:
    """Returns FLOPs by the dtype of what is multiplied, over all devices.

    Args:
      jaxpr: of a trace, as `jax.jit(f).trace(x).jaxpr`.

    Example:
      count_flops(jax.make_jaxpr(jnp.dot)(jnp.ones((2, 3)), jnp.ones((3, 4))))  # {"float32": 48}
    """
    found: Counter[str] = Counter()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name = equation.primitive.name.removesuffix("_wrapper")
        if name in ("dot_general", "conv_general_dilated"):
            dtype = equation.invars[0].aval.dtype.name
            found[dtype] += (_of_product if name == "dot_general" else _of_convolution)(equation)
            continue
        if name in ("dot_product_attention_fwd", "dot_product_attention_bwd"):  # cuDNN's, in the layout BTNH
            query, key = (variable.aval for variable in equation.invars[:2])
            products = 4 if name.endswith("fwd") else 10  # the backward pass makes the scores again
            found[query.dtype.name] += products * math.prod(query.shape) * key.shape[1]
            continue
        inner = [count_flops(one) for one in _jaxprs(equation.params)]
        if name == "cond":
            # Of equal ones, as a product's for CPUs and for the rest, the one that multiplies bfloat16.
            found += max(inner, key=lambda count: (sum(count.values()), count["bfloat16"]), default=Counter())
        else:
            times = equation.params["length"] if name == "scan" else 1
            for part in inner:
                found += Counter({dtype: times * count for dtype, count in part.items()})
    return found


def _jaxprs(params: dict[str, Any]) -> list[Any]:
    flat = [item for value in params.values() for item in (value if isinstance(value, tuple | list) else [value])]
    return [item for item in flat if isinstance(item, core.Jaxpr | core.ClosedJaxpr)]


def _of_product(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)


def _of_convolution(equation: Any) -> int:
    """Every product of an input with a weight, but for those with the zeros of a dilated input."""
    kernel = equation.invars[1].aval.shape
    numbers = equation.params["dimension_numbers"].rhs_spec  # (out, in, *space)
    weights = math.prod(kernel[axis] for axis in numbers[1:])
    return 2 * math.prod(equation.outvars[0].aval.shape) * weights // math.prod(equation.params["lhs_dilation"])
