"""How fast is an MM-DiT on this device, in training and forward, and how fast is diffusers' of the same shape?

    python -m benchmarks.mmdit --batch 32 --peer_python /path/to/python/with/torch/and/diffusers --json OUT.json

The network is that of the emoji: 8x8 latents of 32 channels, 64 tokens, and 12 words. A training step is the mean
squared error, its gradient, AdamW and an average of the weights. Both take turns, medians are reported, and ratios
round by round. Without a peer only ours is timed. `--width 96 --depth 4` is that of the scenes, but for its patches.
"""

import argparse
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import turns
from diffusion.networks.mmdit import MMDiT
from diffusion.training import Experiment

SIDE, CHANNELS, WORDS, HEAD = 8, 32, 12, 32
TOKENS = SIDE**2


def make_ours(arguments: argparse.Namespace, options: dict[str, Any] | None = None) -> turns.Ours:
    """Returns this project's network and its own train step."""
    width, batch_size = arguments.width, arguments.batch
    network = MMDiT(
        width=width,
        depth=arguments.depth,
        num_heads=width // HEAD,
        patch=1,
        out_channels=CHANNELS,
        context_width=width,
        pooled_width=width,
        table_size=SIDE,
        base_size=SIDE,
        qk_norm=True,
        dtype=jnp.dtype(arguments.dtype),
    )
    random = np.random.RandomState(0)
    shapes = {
        "x": (SIDE, SIDE, CHANNELS),
        "velocity": (SIDE, SIDE, CHANNELS),
        "context": (WORDS, width),
        "pooled": (width,),
    }
    batch = {name: random.randn(batch_size, *shape).astype(np.float32) for name, shape in shapes.items()}
    batch["time"] = np.linspace(0, 1, batch_size, dtype=np.float32)

    def forward(params: Any, batch: Any) -> Any:
        return network.apply(params, batch["x"], batch["time"], batch["context"], batch["pooled"])

    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        return jnp.mean((forward(params, batch) - batch["velocity"]) ** 2, axis=(1, 2, 3)), {}

    one = {name: value[:1] for name, value in batch.items()}
    experiment = Experiment(
        init=lambda key: network.init(key, one["x"], one["time"], one["context"], one["pooled"]),
        loss=loss,
        optimizer=optax.adamw(1e-3),
        learning_rate=lambda step: 1e-3,
        batches=lambda step: (_ for _ in ()),
        batch_size=batch_size,
    )
    return turns.Ours(experiment, forward, batch, options)


def forward_flop(width: int, depth: int) -> float:
    """Returns the operations of one image's forward pass: two per product of the blocks' matrix multiplications."""
    tokens = TOKENS + WORDS
    block = tokens * (4 * width**2 + 2 * tokens * width + 8 * width**2) + 12 * width**2
    return 2.0 * depth * block


def main() -> None:
    parser = turns.make_parser(__doc__)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=6)
    parser.set_defaults(batch=32)
    arguments = turns.parse(parser)
    extra = ["--width", str(arguments.width), "--depth", str(arguments.depth)]
    peer = turns.start_peer(arguments, "mmdit_peer.py", extra)
    ours = make_ours(arguments)
    variants = {"ours, cuBLAS": make_ours(arguments, turns.CUBLAS)} if arguments.cublas else {}
    turns.compare(arguments, ours, peer, forward_flop(arguments.width, arguments.depth), variants)


if __name__ == "__main__":
    main()
