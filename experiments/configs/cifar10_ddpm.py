"""DDPM on CIFAR-10, unconditional, as in Ho, Jain & Abbeel (2020), "Denoising Diffusion Probabilistic Models".

    python -m experiments.cifar10 --config=experiments/configs/cifar10_ddpm.py --workdir=runs/ddpm

Hardware and hours: 800,000 steps of 128 images, 37.3 GFLOP an image: 3.8e18 FLOP. The paper took 10.6 hours on a TPU
v3-8 (21 steps a second); one GPU that trains 3,000 images a second takes 9.5 hours.

Expected: FID 3.17 (50,000 samples against the 50,000 training images, 1,000 ancestral steps, averaged weights), IS
9.46, at most 3.75 bits/dim. Not yet reproduced here from end to end.

"Paper" below is appendix B, "code" the released diffusion_tf.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        dict(
            name="cifar10",
            dir="",  # TFDS's own: $TFDS_DATA_DIR or ~/tensorflow_datasets
            image_size=0,  # as stored
            batch_size=128,  # paper
            flip=True,  # paper: "We used random horizontal flips during training for CIFAR10"
        )
    )
    config.network = ConfigDict(
        dict(
            channels=128,  # code: ch=128, 35.7 million parameters
            multipliers=(1, 2, 2, 2),  # code: ch_mult
            num_blocks=2,  # paper: two residual blocks per resolution level
            attention_resolutions=(16,),  # paper: self-attention at 16x16 between the blocks
            dropout=0.1,  # paper: 0.1, swept over 0.1, 0.2, 0.3, 0.4
            num_groups=32,  # code: the default of its group normalisation
            class_conditional=False,
            dtype="bfloat16",  # the paper computed in float32; parameters, statistics and output still are
            remat=False,
        )
    )
    config.process = ConfigDict(
        dict(name="ddpm", beta="linear", first=1e-4, last=0.02, num_steps=1000)
    )  # paper, section 4
    config.loss = ConfigDict(
        dict(
            prediction="eps",
            weighting="simple",  # paper: L_simple, equation 14
            draw="uniform",  # paper: t ~ Uniform({1, ..., T})
            learned_variance=False,
            vlb_weight=1e-3,  # only with learned_variance
            label_dropout=0.1,  # only with class_conditional
        )
    )
    config.optimizer = ConfigDict(
        dict(
            name="adam",  # paper; or muon
            learning_rate=2e-4,  # paper
            muon_rate=3.0,  # muon: of matrices, in learning rates
            warmup_steps=5000,  # code: warmup
            cooldown_steps=0,  # the paper has none
            clip_norm=1.0,  # code: grad_clip
            b1=0.9,
            b2=0.999,
            eps=1e-8,  # paper: Adam's standard values
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=800_000,  # paper
            ema_decay=0.9999,  # paper
            ema_profiles=(0.05, 0.1),  # Karras et al. (2024): any other length is made of these afterwards
            snapshot_every=20_000,  # 286 MB each, 40 in all; 0 stores none
            accumulate=1,
            sharding="replicated",
            log_every=100,
            checkpoint_every=5_000,
            keep_newest=2,
            keep_every=100_000,
            preview_every=10_000,
            num_previews=64,
            skip_bad_steps=False,  # leave out, and count, steps whose loss or gradient is not finite
            spike_factor=0.0,  # stop at a loss so many times the usual one; 0: never
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler="ancestral",  # paper: Algorithm 2
            num_steps=1000,
            grid="uniform",
            order=2,  # dpm_solver_pp and unipc
            eta=0.0,  # ddim
            churn=0.0,  # heun
            variance="large",  # code: "fixedlarge" for CIFAR-10
            threshold="clip",  # code: clip_denoised
            guidance=1.0,
            guidance_interval=(),
            batch_size=500,
        )
    )
    config.evaluation = ConfigDict(
        dict(
            num_samples=50_000,  # paper
            features="inception",  # or pixels
            weights="",  # Inception's file, where it is not to be fetched
            metrics=("fid", "kid", "inception_score", "precision_recall", "bits_per_dim"),
            likelihood_images=10_000,  # the test set
            bound_terms=0,  # paper: all 1000
            ode_steps=200,
            after_training=False,
        )
    )
    return config
