"""DDPM on scikit-learn's 1,797 handwritten digits (8x8): three minutes on 2 CPU cores.

    ./launch.sh digits

The same parts as the paper's CIFAR-10 experiment, each as small as these images allow.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(dict(name="digits", dir="", batch_size=128, flip=False))
    config.network = ConfigDict(
        dict(
            channels=32,
            multipliers=(1, 2),
            num_blocks=1,
            attention_resolutions=(4,),
            dropout=0.1,
            num_groups=8,
            class_conditional=False,
            dtype="float32",
            remat=False,
        )
    )
    config.process = ConfigDict(dict(name="ddpm", beta="linear", first=1e-4, last=0.02, num_steps=1000))
    config.loss = ConfigDict(
        dict(
            prediction="eps",
            weighting="simple",
            draw="uniform",
            learned_variance=False,
            vlb_weight=1e-3,  # only with learned_variance
            label_dropout=0.1,  # only with class_conditional
        )
    )
    config.optimizer = ConfigDict(
        dict(
            name="adam",  # or muon
            learning_rate=2e-3,
            muon_rate=3.0,  # muon: of matrices, in learning rates
            warmup_steps=100,
            cooldown_steps=0,
            clip_norm=1.0,
            b1=0.9,
            b2=0.999,
            eps=1e-8,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=1200,
            ema_decay=0.995,
            ema_profiles=(0.05, 0.1),  # Karras et al. (2024): any other length is made of these afterwards
            snapshot_every=100,
            accumulate=1,
            sharding="replicated",
            log_every=50,
            checkpoint_every=500,
            keep_newest=2,
            keep_every=0,
            preview_every=500,
            num_previews=36,
            skip_bad_steps=False,  # leave out, and count, steps whose loss or gradient is not finite
            spike_factor=0.0,  # stop at a loss so many times the usual one; 0: never
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="ddim",
            num_steps=50,
            grid="uniform",
            order=2,  # dpm_solver_pp and unipc
            eta=0.0,  # ddim
            churn=0.0,  # heun
            variance="large",  # ancestral
            threshold="clip",
            guidance=1.0,
            guidance_interval=(),
            batch_size=250,
        )
    )
    config.evaluation = ConfigDict(
        dict(
            num_samples=500,
            features="pixels",  # or inception
            weights="",  # Inception's file, where it is not to be fetched
            metrics=("fid", "kid", "precision_recall", "bits_per_dim"),
            likelihood_images=200,
            bound_terms=24,  # of the bound's 1000, for each image others; 0: all
            ode_steps=50,
            after_training=True,
        )
    )
    return config
