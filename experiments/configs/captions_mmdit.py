"""Text to image on pictures with captions (64x64): an MM-DiT of depth 12 (Esser et al. 2024), 57 million parameters.

    python -m experiments.captions --config.data.name=tfds:coco_captions

For one accelerator. Not run to an end yet: there is no expected score.
"""

from ml_collections import ConfigDict

from experiments.configs import scenes_mmdit


def get_config() -> ConfigDict:
    config = scenes_mmdit.get_config()
    config.data = ConfigDict(
        dict(
            name="folder",  # or tfds:NAME
            dir="",  # folder: of captions.jsonl and the pictures; tfds: its data_dir, empty for TFDS' own
            split="train",  # tfds
            image_size=64,
            batch_size=256,
            skip_broken=False,  # folder: leave out pictures that cannot be read, and say how many
        )
    )
    config.text.update(dict(width=384, length=32))
    config.text.size = 8192  # words that are learned: the most frequent of the captions
    config.network.update(
        dict(width=384, depth=12, num_heads=6, patch=4, table_size=32, base_size=32, dtype="bfloat16")
    )
    config.optimizer.update(dict(learning_rate=3e-4, warmup_steps=1000, cooldown_steps=20_000))
    config.training.update(
        dict(
            num_steps=200_000,
            ema_decay=0.9999,
            log_every=100,
            checkpoint_every=5000,
            preview_every=5000,
            keep_every=0,
        )
    )
    config.sampling.update(dict(guidance=4.0))
    config.evaluation = ConfigDict(
        dict(
            dir="",  # folder: of held-out captions.jsonl and pictures
            split="val",  # tfds: the held-out one
            num_samples=5000,  # at most: one of each held-out caption
            features="inception",  # or clip, pixels
            weights="",  # Inception's file where it is not to be fetched; clip: a published CLIP's folder
            metrics=("fid", "kid"),
            judge="",  # folder of a CLIP, published or trained by experiments.clip, for the CLIP score
            after_training=True,
        )
    )
    return config
