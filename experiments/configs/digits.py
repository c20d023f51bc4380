"""DDPM on scikit-learn's 1,797 handwritten digits (8x8): two to three minutes on 2 CPU cores.

    ./launch.sh digits
    ./launch.sh digits --config=digits:flow,class_conditional

The same parts as the paper's CIFAR-10 experiment, each as small as these images allow.
"""

from ml_collections import ConfigDict

from experiments.configs import _base


def get_config(methods: str = "") -> ConfigDict:
    """Returns the config with the `methods` of `_base.METHODS` applied."""
    config = _base.image_config()
    config.data.name = "digits"
    config.data.batch_size = 64
    config.network.update(
        channels=32, multipliers=(1, 2), num_blocks=1, attention_resolutions=(4,), num_groups=8, dropout=0.0
    )
    config.optimizer.update(learning_rate=2e-3, warmup_steps=100, cooldown_steps=1000)
    config.training.update(
        num_steps=1700,
        ema_decay=0.995,
        snapshot_every=100,
        log_every=50,
        checkpoint_every=850,
        preview_every=850,
        num_previews=100,
    )
    config.sampling.sampler = ConfigDict(dict(name="dpm_solver_pp"))  # in 20 steps better than DDIM in 50
    config.sampling.update(num_steps=20, batch_size=100)  # as many as previews: their program is compiled already
    config.evaluation.update(
        num_samples=2000,  # four sets as large as the held-out images, one of which alone varies by 6%
        features="pixels",
        metrics=("fid", "kid", "precision_recall", "bits_per_dim"),
        likelihood_images=100,
        bound_terms=24,
        ode_steps=50,
        after_training=True,
    )
    return _base.apply(config, methods)
