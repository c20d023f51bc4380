"""Text to image on pictures with captions (64x64): an MM-DiT of depth 12 (Esser et al. 2024), 57 million parameters.

    python -m experiments.captions --config.data.name=tfds:coco_captions

For one accelerator. Not run to an end yet: there is no expected score.
"""

from ml_collections import ConfigDict

from experiments.configs import _base


def get_config(methods: str = "") -> ConfigDict:
    """Returns the config; there are no methods to apply yet."""
    config = _base.captioned_config(image_size=64, batch_size=256, num_samples=5000)
    config.condition.update(width=384, length=32, size=8192)
    config.network.update(width=384, depth=12, num_heads=6, patch=4, table_size=32, base_size=32, dtype="bfloat16")
    _base.muon(config, learning_rate=3e-4, warmup_steps=1000, cooldown_steps=20_000)
    config.training.update(
        num_steps=200_000,
        ema_decay=0.9999,
        checkpoint_every=5000,
        preview_every=5000,
        num_previews=24,
    )
    config.sampling.update(guidance=4.0, batch_size=256)
    config.evaluation.update(likelihood_images=1000, after_training=True)
    return _base.apply(config, methods, {})
