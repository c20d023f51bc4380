"""DDPM on CIFAR-10, unconditional, as in Ho, Jain & Abbeel (2020), "Denoising Diffusion Probabilistic Models".

    python -m experiments.cifar10 --config=experiments/configs/cifar10.py --workdir=runs/ddpm
    python -m experiments.cifar10 --config=experiments/configs/cifar10.py:edm,class_conditional --workdir=runs/edm

Hardware and hours: 800,000 steps of 128 images, 37.3 GFLOP per image: 3.8e18 FLOP. The paper took 10.6 hours on a TPU
v3-8 (21 steps a second); one GPU that trains 3,000 images a second takes 9.5 hours.

Expected: FID 3.17 (50,000 samples against the 50,000 training images, 1,000 ancestral steps, averaged weights), IS
9.46, at most 3.75 bits/dim. Not yet reproduced here from end to end, nor are the other methods.

"Paper" below is appendix B, "code" the released diffusion_tf.
"""

from ml_collections import ConfigDict

from experiments.configs import _base

NO_CLIP = 1e9  # a norm of the gradient that is never reached


def get_config(methods: str = "") -> ConfigDict:
    """Returns the config with the `methods` of `_base.METHODS`, or `small`, applied."""
    config = _base.image_config()
    config.data.update(
        name="cifar10",
        batch_size=128,  # paper
        flip=True,  # paper: "We used random horizontal flips during training for CIFAR10"
    )
    config.network.update(
        channels=128,  # code: ch=128, 35.7 million parameters
        multipliers=(1, 2, 2, 2),  # code: ch_mult
        num_blocks=2,  # paper: two residual blocks per resolution level
        attention_resolutions=(16,),  # paper: self-attention at 16x16 between the blocks
        dropout=0.1,  # paper: 0.1, swept over 0.1, 0.2, 0.3, 0.4
        num_groups=32,  # code: the default of its group normalisation
        dtype="bfloat16",  # the paper computed in float32
    )
    config.process.update(beta="linear", first=1e-4, last=0.02, num_steps=1000)  # paper, section 4
    config.loss.update(
        weighting="simple",  # paper: L_simple, equation 14
        draw="uniform",  # paper: t ~ Uniform({1, ..., T})
    )
    config.optimizer.update(
        name="adam",  # paper
        learning_rate=2e-4,  # paper
        warmup_steps=5000,  # code: warmup
        clip_norm=1.0,  # code: grad_clip
        b1=0.9,
        b2=0.999,
        eps=1e-8,  # paper: Adam's standard values
    )
    config.training.update(
        num_steps=800_000,  # paper
        ema_decay=0.9999,  # paper
        snapshot_every=20_000,  # 286 MB each, 40 in all
        keep_every=100_000,
    )
    config.sampling.sampler = ConfigDict(
        dict(
            name="ancestral",  # paper: Algorithm 2
            variance="large",  # code: "fixedlarge" for CIFAR-10
        )
    )
    config.sampling.num_steps = 1000
    config.sampling.threshold = ConfigDict(dict(name="clip"))  # code: clip_denoised
    config.evaluation.num_samples = 50_000  # paper
    own = dict(
        flow=flow,
        small=small,
        mean_flow=mean_flow,
        consistency=consistency,
        continuous_consistency=continuous_consistency,
    )
    return _base.apply(config, methods, _base.METHODS | own)


def flow(config: ConfigDict) -> None:
    """Rectified flow, sampled in 100 Euler steps."""
    _base.flow(config)
    config.sampling.num_steps = 100


def mean_flow(config: ConfigDict) -> None:
    """MeanFlow as its paper has it on CIFAR-10, but with DDPM's U-Net and without EDM's augmentation.

    Expected: FID 2.92 in 1 step (Geng et al. 2025, with EDM's DDPM++ of 55 million parameters); 2.80 with the times of
    the released cifar10_v1.sh, loss.mean=-0.6, loss.std=1.6 and loss.lower=(-4.0, 1.6). Not reproduced here.

    "Code" is py-meanflow of its authors, cifar10_v0.sh: the paper's settings.
    """
    _base.mean_flow(config)
    config.loss.update(
        mean=-2.0,  # code: P_mean_t and P_mean_r
        std=2.0,  # code: P_std_t and P_std_r
        share=0.25,  # code: its ratio, 0.75, is of steps that have a length
        p=0.75,  # code: norm_p
        c=1e-3,  # code: norm_eps
    )
    config.network.update(
        dropout=0.2,  # code
        dtype="float32",  # code: without autocast; the derivative by time is noisy in bfloat16
    )
    config.data.batch_size = 1024  # code: 128 on each of 8 GPUs
    config.optimizer.update(
        learning_rate=6e-4,  # code, of Adam with b1 and b2 as above
        warmup_steps=10_000,  # code: 200 of 16,000 epochs, which are 800,000 steps
        clip_norm=NO_CLIP,  # code
    )
    config.sampling.num_steps = 1


def consistency(config: ConfigDict) -> None:
    """ECT, from a run of `edm`: --init_from=RUN.

    Expected (Geng et al. 2024, from EDM's DDPM++), not reproduced here:

    | steps | FID in 1 step | in 2 |
    | --- | --- | --- |
    | 100,000 | 4.54 | 2.20 |
    | 200,000 | 3.86 | 2.15 |
    | 400,000 | 3.60 | 2.11 |

    "Code" is locuslab/ect, run_ecm.sh. Its run of an hour on an A100 has loss.q=256, loss.num_stages=1 and
    training.ema_decay=0.9993, and is first scored after 8,000 steps.
    """
    config.training.update(
        num_steps=200_000,  # code: 25.6 million images
        ema_decay=0.9999,  # code: ema_beta
    )
    _base.consistency(config)
    config.loss.stage_steps = 25_000  # code: 250 ticks of 12,800 images
    config.data.flip = False  # code: xflip, and no augmentation
    config.network.update(
        dropout=0.2,  # code, the same in both of a pair
        dtype="float32",  # code; the pair's difference is small
    )
    config.optimizer.update(
        name="radam",  # code
        learning_rate=1e-4,  # code
        warmup_steps=0,  # code
        clip_norm=NO_CLIP,  # code, which sets what is not finite to 0 instead
    )


def continuous_consistency(config: ConfigDict) -> None:
    """sCT of Lu & Song (2024), in a flow's coordinates, without their double normalisation and adaptive weight.

    It begins with a trained flow of the same time_scale: --init_from=RUN. Expected: FID 2.85 in 1 step and 2.06 in 2
    (theirs). Not reproduced here.

    They released no code. "Others" is revsic/torch-flow-models, which repeats their settings, with a learning rate that
    falls by the inverse root of the steps after 70,000; here it is constant.
    """
    config.training.update(
        num_steps=400_000,  # others
        ema_decay=0.9993,  # others: a half-life of 500,000 images
    )
    _base.continuous_consistency(config)
    config.data.batch_size = 512  # others
    config.network.update(
        dropout=0.2,  # others
        dtype="float32",  # the derivative by time is noisy in bfloat16
    )
    config.optimizer.update(
        name="radam",  # others
        learning_rate=1e-4,  # others
        warmup_steps=0,
        clip_norm=NO_CLIP,
        b2=0.99,  # others
    )


def small(config: ConfigDict) -> None:
    """A network so small that an hour on 2 CPU cores shows something: 1.6 million parameters in place of 35.7.

    The process, the loss and the protocol are the paper's, so every tool can be tried on it.
    """
    config.data.batch_size = 32
    config.network.update(channels=32, num_blocks=1, dropout=0.0, num_groups=8, dtype="float32")
    config.optimizer.update(learning_rate=1e-3, warmup_steps=200)
    config.training.update(
        num_steps=3_000,
        ema_decay=0.999,
        snapshot_every=250,
        log_every=50,
        checkpoint_every=250,
        keep_every=0,
        preview_every=1_000,
    )
    config.sampling.sampler = ConfigDict(dict(name="dpm_solver_pp"))
    config.sampling.grid = ConfigDict(dict(name="karras"))
    config.sampling.update(num_steps=20, batch_size=250)
    config.evaluation.update(num_samples=5_000, likelihood_images=500, bound_terms=32, ode_steps=100)
