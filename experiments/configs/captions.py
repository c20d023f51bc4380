"""Text to image on pictures with captions (64x64): an MM-DiT of depth 12 (Esser et al. 2024), 57 million parameters.

    python -m experiments.captions --config.data.name=tfds:coco_captions

For one accelerator. Not run to an end yet: there is no expected score.
"""

from ml_collections import ConfigDict

from experiments.configs import _base


def get_config(methods: str = "") -> ConfigDict:
    """Returns the config; there are no methods to apply yet."""
    config = _base.text_config()
    config.data = ConfigDict(
        dict(
            name="folder",  # or tfds:NAME
            dir="",  # folder: of captions.jsonl and the pictures; tfds: its data_dir, empty for TFDS' own
            split="train",  # tfds
            image_size=64,
            batch_size=256,
            flip=False,  # a mirrored picture may not be what its caption says
            skip_broken=False,  # folder: leave out pictures that cannot be read, and report how many
            buckets=0,  # folder: train on several aspect ratios, sides divided by this, as 64; 0: on squares
        )
    )
    config.condition.update(width=384, length=32, size=8192)
    config.network.update(width=384, depth=12, num_heads=6, patch=4, table_size=32, base_size=32, dtype="bfloat16")
    config.optimizer = ConfigDict(
        dict(
            name="muon",
            learning_rate=3e-4,
            warmup_steps=1000,
            cooldown_steps=20_000,
            clip_norm=1.0,
            b1=0.9,
            b2=0.99,
            muon_rate=3.0,
        )
    )
    config.training.update(
        num_steps=200_000,
        ema_decay=0.9999,
        checkpoint_every=5000,
        preview_every=5000,
        num_previews=24,
    )
    config.sampling.update(guidance=4.0, batch_size=256)
    config.evaluation = ConfigDict(
        dict(
            dir="",  # folder: of held-out captions.jsonl and pictures
            split="val",  # tfds: the held-out one
            num_samples=5000,  # at most: one of each held-out caption
            features="inception",  # or clip, pixels
            weights="",  # Inception's file where it is not to be fetched; clip: a published CLIP's folder
            metrics=("fid", "kid"),
            judge="",  # folder of a CLIP, published or trained by experiments.clip, for the CLIP score
            likelihood_images=1000,
            ode_steps=200,
            after_training=True,
        )
    )
    return _base.apply(config, methods, {})
