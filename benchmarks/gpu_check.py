"""Is what a GPU computes right? Fused attention and norms beside XLA's, with gradients; small networks beside a CPU's.

    python -m benchmarks.gpu_check --json OUT.json

Errors are |a - b| / |b|, b from float32 products at the highest precision. Needs a GPU; `benchmarks/on_gpu.sh` runs it
with what else is to be known there.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import make_parser, write_results
from diffusion.networks import attention, fused_norm
from diffusion.networks.group_norm import Plan
from diffusion.networks.mmdit import MMDiT
from diffusion.networks.unet import UNet

# (batch, tokens of query, tokens of key, heads, width of a head, causal)
SHAPES = [
    (8, 256, 256, 4, 64, False),
    (2, 4429, 4429, 24, 64, False),
    (4, 77, 77, 12, 64, True),
    (4, 512, 512, 24, 128, False),
    (8, 256, 256, 1, 256, False),
]
# (images, pixels, channels, rate of dropout) of the norms, in 32 groups
NORMS = [(8, 1024, 128, 0.1), (8, 1024, 384, 0.0), (8, 256, 512, 0.0), (8, 16, 256, 0.1), (8, 49, 96, 0.1)]
LARGEST = 1e-2  # of an error in bfloat16
UNTUNED = {"xla_gpu_autotune_level": 0}  # what is compared with may be slow, and is compiled sooner


def relative(found: Any, expected: Any) -> float:
    """Returns |found - expected| / |expected|."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def attention_errors(shape: tuple[int, int, int, int, int, bool]) -> dict[str, Any]:
    """Returns the errors of `attention` in bfloat16, its gradients and its forward mode, and whether it is fused."""
    batch, queries, keys, heads, width, causal = shape
    draws = jax.random.split(jax.random.key(0), 5)
    sizes = [(batch, n, heads, width) for n in (queries, keys, keys, queries, queries)]
    query, key, value, cotangent, tangent = (
        jax.random.normal(k, size).astype(jnp.bfloat16) for k, size in zip(draws, sizes, strict=True)
    )

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return attention.attention(q, k, v, is_causal=causal)

    def plain(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="xla")

    # What is an argument is no constant, which XLA would compute with for minutes while it compiles.
    def both(function: Any, cotangent: jax.Array, tangent: jax.Array, *heads: jax.Array) -> Any:
        output, pull = jax.vjp(function, *heads)
        _, pushed = jax.jvp(lambda q: function(q, *heads[1:]), heads[:1], (tangent,))
        return output, *pull(cotangent), pushed

    arrays = (cotangent, tangent, query, key, value)
    found = jax.jit(partial(both, attend))(*arrays)
    expected = jax.jit(partial(both, plain), compiler_options=UNTUNED)(*(x.astype(jnp.float32) for x in arrays))
    text = jax.jit(attend).lower(query, key, value).compile().as_text() or ""
    names = ("output", "query", "key", "value", "forward mode")
    errors = {name: relative(a, b) for name, a, b in zip(names, found, expected, strict=True)}
    return {"shape": shape, "fused": "fmha" in text, **errors}


def norm_errors(shape: tuple[int, int, int, float]) -> dict[str, Any]:
    """Returns the errors of the kernel of norm, SiLU and dropout on bfloat16, of its gradients and its forward mode."""
    *size, rate = shape
    draws = jax.random.split(jax.random.key(0), 7)
    x, past, dy, along = (jax.random.normal(key, size).astype(jnp.bfloat16) for key in draws[:4])
    shift = jax.random.normal(draws[4], (size[0], size[2]))
    scale, bias = jax.random.normal(draws[5], (2, size[2]))
    keep = [jax.random.bernoulli(draws[6], 1 - rate, x.shape).astype(jnp.uint8)] if rate else []
    arrays = (x, past, dy, along, shift, scale, bias, *keep)

    def both(function: Any, dtype: Any, *arrays: jax.Array) -> Any:
        plan = Plan(32, 1e-6, True, rate, dtype)
        (x, past, dy, along), (shift, scale, bias, *keep) = (image.astype(dtype) for image in arrays[:4]), arrays[4:]

        def of(*inputs: jax.Array) -> Any:
            return function(plan, *inputs, *keep)

        (_, y), pull = jax.vjp(of, x, shift, scale, bias)
        tangent = jax.jvp(lambda x: of(x, shift, scale, bias)[1], (x,), (along,))[1]
        return y, *pull((past, dy)), tangent

    found = jax.jit(partial(both, fused_norm.fused, jnp.bfloat16))(*arrays)
    expected = jax.jit(partial(both, fused_norm.unfused, jnp.float32), compiler_options=UNTUNED)(*arrays)
    names = ("output", "x", "shift", "scale", "bias", "forward mode")
    errors = {name: relative(a, b) for name, a, b in zip(names, found, expected, strict=True)}
    return {"shape": shape, "fused": fused_norm.fits(x), **errors}


def network_errors() -> dict[str, float]:
    """Returns the errors of small networks and of their gradients on this device, in float32, beside the CPU's."""
    x, time = np.random.RandomState(0).randn(4, 16, 16, 4).astype(np.float32), np.linspace(0, 1, 4, dtype=np.float32)
    context, pooled = (np.random.RandomState(1).randn(*size).astype(np.float32) for size in ((4, 7, 32), (4, 24)))
    cases: dict[str, Any] = {
        "unet": (UNet(channels=32, multipliers=(1, 2), attention_resolutions=(8,), num_groups=8, dropout=0.0), {}),
        "mmdit": (
            MMDiT(width=64, depth=2, num_heads=2, context_width=32, pooled_width=24, out_channels=4),
            {"context": context, "pooled": pooled},
        ),
    }
    found = {}
    for name, (network, told) in cases.items():
        with jax.default_device(jax.devices("cpu")[0]):
            params = jax.jit(lambda key, n=network, t=told: n.init(key, x, time, **t))(jax.random.key(0))
            draws = np.random.RandomState(2)
            params = jax.tree.map(
                lambda p, d=draws: np.asarray(p) + 0.05 * d.randn(*p.shape).astype(np.float32), params
            )

        def gradient(params: Any, network: Any = network, told: Any = told) -> Any:
            with jax.default_matmul_precision("highest"):
                return jax.value_and_grad(lambda p: jnp.square(network.apply(p, x, time, **told)).mean())(params)

        results = []
        for device in (jax.devices()[0], jax.devices("cpu")[0]):
            with jax.default_device(device):
                loss, grads = jax.jit(gradient, compiler_options=UNTUNED)(params)
                results.append((np.asarray(loss), np.concatenate([np.ravel(g) for g in jax.tree.leaves(grads)])))
        found |= {f"{name}, loss": relative(results[0][0], results[1][0])}
        found |= {f"{name}, gradient": relative(results[0][1], results[1][1])}
    return found


def shown(errors: dict[str, Any]) -> dict[str, Any]:
    """Prints errors at once, as all of them take minutes, and returns them."""
    print(json.dumps(errors), flush=True)
    return errors


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error(f"this checks a GPU, and JAX has {jax.default_backend()}")
    norms = [shown(norm_errors(shape)) for shape in NORMS]
    rows = [shown(attention_errors(shape)) for shape in SHAPES]
    networks = shown(network_errors())
    write_results(arguments.json, {"norms": norms, "attention": rows, "networks": networks})
    wrong = [
        (row["shape"], name)
        for row in (*norms, *rows)
        for name, error in row.items()
        if name not in ("shape", "fused") and not error < LARGEST
    ]
    if wrong or not all(error < LARGEST for error in networks.values()):
        raise SystemExit(f"error: further off than {LARGEST:g}: {wrong or networks}")


if __name__ == "__main__":
    main()
