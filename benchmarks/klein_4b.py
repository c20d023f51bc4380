"""What FLUX.2 [klein] 4B costs on this machine, at its own shapes: seconds per stage, peak memory, what bounds them.

    python -m benchmarks.klein_4b --folder=/tmp/klein_4b

Its weights are random, in bfloat16, written once as a published folder of 16 GB, from views of one small array, file by
file. The folder is imported with --mode=import. One picture is drawn by `python -m experiments.flux2 --mode=sample`,
whose peak memory is that of its process; then a process opens the run and measures the stages one by one, each compiled
before, beside the products and the memory of this machine. Writes benchmarks/results/klein_4b_cpu.json.
"""

import json
import math
import resource
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from benchmarks import pipelines
from diffusion.data import chat
from diffusion.model.model import make_denoise, network_alone
from diffusion.networks.flux2 import Flux2
from diffusion.networks.qwen3 import Qwen3
from diffusion.networks.vae import Autoencoder
from diffusion.pretrained import flux2, klein, qwen3, vae

NAME = "benchmarks.klein_4b"
PROMPT = "A cat holding a sign that says hello world"
NOISE = 2_000_003  # drawn numbers, of which all weights are views


def random_like(shapes: Any, dtype: Any = jnp.bfloat16) -> Any:
    """Returns parameters of a size that keeps activations near 1; their rows overlap, and take no memory."""
    noise = np.random.default_rng(0).standard_normal(NOISE, np.float32)
    scaled: dict[int, np.ndarray] = {}

    def make(path: Any, leaf: Any) -> np.ndarray:
        name = jax.tree_util.keystr(path)
        if path[-1].key == "scale":
            return np.ones(leaf.shape, dtype)
        if path[-1].key == "bias":
            return np.zeros(leaf.shape, dtype)
        convolves = leaf.ndim == 4 and leaf.shape[0] == leaf.shape[1]
        into = leaf.ndim - 1 if convolves or name.endswith("out']['kernel']") else 1
        rows, columns = (math.prod(part) for part in (leaf.shape[:into], leaf.shape[into:]))
        fan_in = rows if path[-1].key == "kernel" else 1
        if fan_in not in scaled:
            scaled[fan_in] = (noise * fan_in**-0.5).astype(dtype)
        first = zlib.crc32(name.encode()) % (NOISE // 4)
        step = (NOISE - first - columns) // rows
        size = scaled[fan_in].itemsize
        view = np.lib.stride_tricks.as_strided(scaled[fan_in][first:], (rows, columns), (step * size, size))
        return view.reshape(leaf.shape)

    return jax.tree_util.tree_map_with_path(make, shapes)


def make_tokenizer() -> tuple[Tokenizer, int]:
    """Returns a tokenizer of single bytes, with the tokens of Qwen3's template, and the token that it pads with."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(sorted(letters))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in (chat.PADDING, *chat.WHOLE)])
    return tokenizer, len(letters)


def write_folder(folder: Path) -> None:
    """Writes the published folder."""
    module = Autoencoder(latent_channels=32, quant_conv=True, post_quant_conv=True)
    ones = np.ones(4 * module.latent_channels, np.float32)
    encoder, network = Qwen3(whole=True), Flux2()
    klein.save_pipeline(
        folder,
        klein.Klein(
            network,
            {"params": random_like(flux2.shapes(network))},
            vae.PublishedAutoencoder(module, {"params": random_like(vae.shapes(module))}, 0 * ones, ones, 2, False),
            encoder,
            {"params": random_like(qwen3.shapes(encoder))},
            *make_tokenizer(),
            distilled=True,
        ),
    )


def seconds_of(call: Callable[[], Any]) -> tuple[float, Any]:
    """Returns how long a call takes, and what it returns."""
    begun = time.perf_counter()
    found = jax.block_until_ready(call())
    return time.perf_counter() - begun, found


def machine() -> dict[str, float]:
    """Returns what float32 products and reading memory reach here, in GFLOP/s and GB/s: the best of three."""
    product, total = jax.jit(jnp.matmul), jax.jit(jnp.sum)
    side, count = 4096, 2**28
    a, x = jnp.ones((side, side)), jnp.ones(count)
    jax.block_until_ready((product(a, a), total(x)))
    of_product = min(seconds_of(lambda: product(a, a))[0] for _ in range(3))
    of_total = min(seconds_of(lambda: total(x))[0] for _ in range(3))
    return {
        "gflop_per_second": round(2 * side**3 / of_product / 1e9),
        "gb_per_second": round(4 * count / of_total / 1e9, 1),
    }


def measure(workdir: Path, side: int, num_steps: int, out: Path) -> None:
    """Writes the seconds of each stage, and the products and bytes of weights that each asks for."""
    reached = machine()
    opened, run = seconds_of(lambda: pipelines.open_sized(workdir, side, num_steps))
    model, params = run.model, run.params
    rows = model.condition.read([PROMPT])
    x_t, time_ = jax.random.normal(jax.random.key(0), (1, *model.space.shape)), jnp.full(1, 0.9)

    def stage(function: Callable[..., Any], *inputs: Any) -> tuple[dict[str, Any], Any]:
        compiling, program = seconds_of(lambda: jax.jit(function).lower(*inputs).compile())
        took = [seconds_of(lambda: program(*inputs)) for _ in range(2)]
        flops = (program.cost_analysis() or {}).get("flops", 0)
        weights = sum(leaf.nbytes for leaf in jax.tree.leaves(inputs[0]))
        seconds = min(one for one, _ in took)
        bound = {
            "products": flops / 1e9 / reached["gflop_per_second"],
            "weights": weights / 1e9 / reached["gb_per_second"],
        }
        about = {
            "seconds": [round(one, 3) for one, _ in took],
            "seconds_to_compile": round(compiling, 1),
            "weights_gb": round(weights / 1e9, 2),
            "tflop": round(flops / 1e12, 2),
            "least_seconds_of": {name: round(least, 2) for name, least in bound.items()},
            "gflop_per_second": round(flops / seconds / 1e9, 1),
            "weights_gb_per_second": round(weights / seconds / 1e9, 2),
        }
        return about, took[0][1]

    text, told = stage(model.condition.of_request, params["text"], rows)
    step, x_0 = stage(
        lambda own, told, x, t: make_denoise(model, own, told)(x, t), network_alone(model, params), told, x_t, time_
    )
    decode, image = stage(model.space.decode, params["space"], x_0)
    pipelines.check_drawn(image, side)
    found = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "parameters_gb": round(sum(leaf.nbytes for leaf in jax.tree.leaves(params)) / 1e9, 2),
        "machine": reached,
        "seconds_to_open": round(opened, 1),
        "stages": {"text": text, "step": step, "decode": decode},
    }
    out.write_text(json.dumps(found))


def main() -> None:
    arguments = pipelines.parse(__doc__, 16, 4, "measure", "benchmarks/results/klein_4b_cpu.json")
    workdir, side, num_steps = arguments.run, arguments.side, arguments.num_steps
    if arguments.stage == "write":
        return write_folder(arguments.published)
    if arguments.stage == "measure":
        return measure(workdir, side, num_steps, arguments.found)
    imported = pipelines.import_anew(NAME, arguments, "experiments.flux2")
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    drawn = pipelines.run_module(
        *("experiments.flux2", f"--workdir={workdir}", "--mode=sample", f"--prompt={PROMPT}", "--num_samples=1"),
        *(f"--config.sampling.size=({side}, {side})", f"--steps={num_steps}"),
    )
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    if peak <= before:
        raise RuntimeError("importing took more memory than drawing: measure in a process of its own")
    pipelines.do_stage(NAME, arguments, "measure")
    results = {
        "side": side,
        "num_steps": num_steps,
        "seconds_to_import": imported,
        "seconds_to_open_compile_and_draw": drawn,
        "peak_gb_drawing": round(peak * 1024 / 1e9, 2),
        **json.loads(arguments.found.read_text()),
    }
    pipelines.finish(arguments.out, results)


if __name__ == "__main__":
    main()
