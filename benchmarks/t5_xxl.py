"""What T5 v1.1 XXL costs, the largest of Stable Diffusion 3's text encoders: seconds per prompt and peak memory.

    python -m benchmarks.t5_xxl

Its own shape, 4,762,310,656 parameters, random in bfloat16: 9.5 GB. One prompt of 77 tokens and one of 256 are encoded,
each some rounds. The peak is that of the process, its programs included. Writes benchmarks/results/t5_xxl_cpu.json.
"""

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import make_parser, peak_bytes, take_turns, write_results
from diffusion.networks.t5 import T5Encoder
from diffusion.pretrained.t5 import shapes

LENGTHS = (77, 256)


def random_params(encoder: T5Encoder, dtype: Any, seed: int = 0) -> dict[str, Any]:
    """Returns parameters of a size that keeps activations near 1, made one by one."""
    draw = np.random.default_rng(seed)

    def make(path: Any, leaf: Any) -> jax.Array:
        if path[-1].key == "scale":
            return jnp.ones(leaf.shape, dtype)
        std = leaf.shape[0] ** -0.5 if path[-1].key == "kernel" else 1.0
        if path[-2:-1] and path[-2].key == "query":
            std *= encoder.head_width**-0.5
        made = np.empty(leaf.shape, dtype)
        for row in range(len(made)):  # in float32 a whole array would be the peak
            made[row] = np.float32(std) * draw.standard_normal(leaf.shape[1:], np.float32)
        return jnp.asarray(made)

    return {"params": jax.tree_util.tree_map_with_path(make, shapes(encoder))}


def measure(encoder: T5Encoder, rounds: int) -> dict[str, Any]:
    """Returns seconds per prompt of each of `LENGTHS`, and the process's peak memory."""
    begun = time.perf_counter()
    params = random_params(encoder, jnp.bfloat16)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    made, after = time.perf_counter() - begun, peak_bytes()
    compiled, timers = {}, {}
    for length in LENGTHS:
        begun = time.perf_counter()
        ids = jax.random.randint(jax.random.key(length), (1, length), 2, encoder.vocab_size)
        encode = jax.jit(encoder.apply).lower(params, ids).compile()
        compiled[length] = time.perf_counter() - begun

        def timer(encode: Any = encode, ids: Any = ids) -> float:
            begun = time.perf_counter()
            found = jax.block_until_ready(encode(params, ids))
            seconds = time.perf_counter() - begun
            assert math.isclose(float(jnp.mean(jnp.square(found))), 1, rel_tol=0.1)  # after the last norm
            return seconds

        timers[length] = timer
    take_turns(timers, 1)
    seconds = take_turns(timers, rounds)
    return {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "dtype": "bfloat16",
        "parameters_gb": round(size / 1e9, 2),
        "seconds_to_make_parameters": round(made, 1),
        "peak_gb_after_making": round(after / 1e9, 2),
        "peak_gb": round(peak_bytes() / 1e9, 2),
        "peak_over_parameters": round(peak_bytes() / size, 3),
        "seconds_per_prompt": {str(length): round(statistics.median(one), 2) for length, one in seconds.items()},
        "rounds": {str(length): [round(second, 2) for second in one] for length, one in seconds.items()},
        "compile_seconds": {str(length): round(second, 1) for length, second in compiled.items()},
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--depth", type=int, default=T5Encoder.depth, help="of the encoder: fewer blocks for a try")
    parser.add_argument("--rounds", type=int, default=3, help="per length")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/t5_xxl_cpu.json"))
    arguments = parser.parse_args()
    results = measure(T5Encoder(depth=arguments.depth, dtype=jnp.bfloat16), arguments.rounds)
    print(json.dumps(results))
    write_results(arguments.out, results)


if __name__ == "__main__":
    main()
