"""How fast is a CLIP of ViT-B/32's shape on this device, in training and forward, and how fast is transformers'?

    python -m benchmarks.clip --batch 8 --peer_python /path/to/python/with/torch/and/transformers --json OUT.json

"An image" is a pair: one picture of 224 pixels and one text of 77 tokens. A training step is the contrastive loss, its
gradient, AdamW and an average of the weights. Both take turns, medians are reported, and ratios round by round. Without
a peer only ours is timed. `--tiny` is a check of the script, not a measurement.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import turns
from diffusion import contrastive
from diffusion.networks.clip import CLIP, ImageTower, TextTower
from diffusion.training import Experiment


def make_clip(dtype: str, tiny: bool) -> CLIP:
    """Returns the towers of ViT-B/32, or two small ones."""
    small: Any = dict(width=32, num_layers=2, num_heads=2, mlp_width=128, projection=16)
    image: Any = dict(image_size=32, patch_size=16, **small)
    text: Any = dict(vocabulary_size=99, end_of_text=98, length=9, **small)
    shared: Any = dict(dtype=jnp.dtype(dtype))
    return CLIP(ImageTower(**(image if tiny else {}), **shared), TextTower(**(text if tiny else {}), **shared))


def make_ours(clip: CLIP, batch_size: int, options: dict[str, Any] | None = None) -> turns.Ours:
    """Returns this project's network and its own train step."""
    random = np.random.RandomState(0)
    size, text = clip.image.height_width, clip.text
    ids = random.randint(0, text.vocabulary_size - 2, (batch_size, text.length))
    ids[:, -1] = text.end_of_text
    batch = {"image": random.randn(batch_size, *size, 3).astype(np.float32), "text": ids.astype(np.int32)}

    def forward(params: Any, batch: Any) -> Any:
        return clip.apply(params, batch["image"], batch["text"])

    def loss(params: Any, batch: Any, key: jax.Array) -> Any:
        image, text, scale, _ = forward(params, batch)
        return contrastive.softmax_loss(image, text, scale).loss, {}

    experiment = Experiment(
        init=lambda key: clip.init(key, batch["image"][:1], batch["text"][:1]),
        loss=loss,
        optimizer=optax.adamw(5e-4, 0.9, 0.98, 1e-6, weight_decay=0.2),
        learning_rate=lambda step: 5e-4,
        batches=lambda step: (_ for _ in ()),
        batch_size=batch_size,
    )
    return turns.Ours(experiment, forward, batch, options)


def forward_flop(clip: CLIP) -> float:
    """Returns the operations of one pair's forward pass: two per product of a matrix multiplication."""
    image, text = clip.image, clip.text
    patches = math.prod(image.height_width) // image.patch_size**2
    products = patches * 3 * image.patch_size**2 * image.width
    for tower, tokens in ((image, patches + 1), (text, text.length)):
        attention = 4 * tower.width**2 + 2 * tokens * tower.width
        products += tower.num_layers * tokens * (attention + 2 * tower.width * tower.mlp_width)
    return 2.0 * products


def main() -> None:
    parser = turns.make_parser(__doc__)
    parser.add_argument("--tiny", action="store_true", help="two small towers, to see that it runs")
    arguments = turns.parse(parser)
    peer = turns.start_peer(arguments, "clip_peer.py", ["--tiny"] if arguments.tiny else [])
    clip = make_clip(arguments.dtype, arguments.tiny)
    ours = make_ours(clip, arguments.batch)
    variants = {"ours, cuBLAS": make_ours(clip, arguments.batch, turns.CUBLAS)} if arguments.cublas else {}
    turns.compare(arguments, ours, peer, forward_flop(clip), variants)


if __name__ == "__main__":
    main()
