"""Text to image on the emoji set (64x64), in FLUX.2's latents: an MM-DiT of 3.7 million parameters, words learned.

    ./launch.sh emoji
    ./launch.sh emoji --config=experiments/configs/emoji.py:clip      # after ./launch.sh clip on these captions

A picture is 8x8 latents of 32 channels, 64 tokens. A caption has one picture, and one step from pure noise already has
the person and the tone of the finished drawing: what is learned of the caption is learned near t = 1, so training times
are shifted towards noise. Of some captions the tone is hidden, and guidance leads from a person of any tone to one:
without, a tone that training has not shown of a person is drawn too near to those that it has.

A step takes 0.4 s of CPU time. 2 CPU cores, 49 minutes: half of one until the first step, 48 of training, one of
evaluation. Of held-out captions the person is right in 99%, the skin tone in 88%.
"""

from ml_collections import ConfigDict

from experiments.configs import _base


def get_config(methods: str = "") -> ConfigDict:
    """Returns the config with `clip` or one of `_base.FEW_STEPS` applied."""
    config = _base.text_config()
    config.data = ConfigDict(
        dict(
            name="emoji",
            dir="",  # with train/ and held_out/, each of captions.jsonl and pictures; empty: made once, in the cache
            package="",  # the packed file or unpacked folder that it is made of; empty: got by npm pack
            image_size=64,
            batch_size=32,
            flip=False,  # hands point to the right or left
        )
    )
    config.space = ConfigDict(
        dict(
            name="latents",
            folder="taef2",  # the autoencoder's; taef2: FLUX.2's tiny one, fetched once
            sample=False,
            precomputed=True,
            fitted=True,
            patch=1,  # published: 2, which would leave 16 tokens
        )
    )
    config.process = ConfigDict(dict(name="flow", times="logit_normal", shift=3.0))
    config.network.update(width=128, depth=6, num_heads=4, patch=1)
    config.condition.update(width=128, phrases=6, phrase_dropout=0.15)  # the five tones of skin, and "facing right"
    _base.muon(config, learning_rate=2e-3, warmup_steps=100, cooldown_steps=5000)
    config.training.update(
        num_steps=12_500,
        ema_decay=0.999,
        ema_profiles=(0.05, 0.1),
        snapshot_every=500,
        log_every=100,
        checkpoint_every=500,
        keep_every=2000,
        preview_every=2000,
        num_previews=24,
    )
    config.sampling.update(num_steps=8, guidance=1.7, batch_size=64)
    config.sampling.grid.shift = 3.0
    config.evaluation = ConfigDict(
        dict(
            num_samples=1000,  # held-out captions, at most; there are 316
            num_drawings=4,  # of each
            features="latents",  # by which the nearest true picture is found; or pixels, inception, clip
            weights="",  # Inception's file where it is not to be fetched; clip: a published CLIP's folder
            likelihood_images=100,
            ode_steps=50,
            after_training=True,
        )
    )
    return _base.apply(config, methods, {"clip": clip, **_base.FEW_STEPS})


def clip(config: ConfigDict) -> None:
    """Prompts read by the frozen text tower of a trained CLIP."""
    config.condition = ConfigDict(
        dict(
            name="clip",
            folder="runs/clip",  # work folder of a run of experiments.clip
            precomputed=True,  # the features of all captions are made once and kept on disk
            dropout=0.1,
        )
    )
