"""DDPM on a folder of your own pictures, of any sizes: cropped and resized to 32x32, a small U-Net.

    ./launch.sh folder --config.data.dir=DIR
    ./launch.sh folder --config=folder:class_conditional --config.data.classes=True ...

Classes are the sub-folders of DIR. An hour on 2 CPU cores, minutes on an accelerator; --config.data.image_size=64 and
more channels where there is one.
"""

from ml_collections import ConfigDict

from experiments.configs import _base


def get_config(methods: str = "") -> ConfigDict:
    """Returns the config with the `methods` of `_base.METHODS` applied."""
    config = _base.image_config()
    config.data = ConfigDict(
        dict(
            name="folder",
            dir="",  # the pictures, in sub-folders too
            image_size=32,  # side, or (height, width), to which pictures are cropped and resized; 0: as stored
            channels=0,  # 1: grey, 3: colour; 0: grey where every picture is
            classes=False,  # sub-folders are classes
            held_out=0.1,  # share of the pictures that is kept from training
            skip_broken=False,  # leave out pictures that cannot be read, and report how many
            batch_size=32,
            flip=True,
            augment=(),
        )
    )
    config.network.update(channels=32, multipliers=(1, 2, 2), num_blocks=1, num_groups=8)
    config.optimizer.update(learning_rate=1e-3, warmup_steps=200)
    config.training.update(
        num_steps=3_000,
        ema_decay=0.999,
        log_every=50,
        checkpoint_every=500,
        preview_every=500,
        num_previews=36,
    )
    config.sampling.sampler = ConfigDict(dict(name="dpm_solver_pp"))
    config.sampling.grid = ConfigDict(dict(name="karras"))
    config.sampling.update(num_steps=20, batch_size=100)
    config.evaluation.update(
        num_samples=500,
        features="pixels",
        metrics=("kid", "precision_recall"),  # and bits_per_dim, which takes minutes on a CPU
        likelihood_images=50,
        bound_terms=24,
        ode_steps=50,
        after_training=True,
    )
    return _base.apply(config, methods)
