"""Every field of a config, once, with what it means; the files beside this one change what their data needs.

A choice (`process`, `network`, `condition`, `loss`, `optimizer`, `sampling.sampler`) has a `name` and the fields of that
name alone: `--config.process.name=flow` replaces DDPM's fields by a flow's. `METHODS` are the published changes that
apply to any data: `--config=experiments/configs/digits.py:flow,class_conditional`.
"""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

Change = Callable[[ConfigDict], None]

UNET = dict(
    name="unet",
    channels=128,  # of the first level
    multipliers=(1, 2, 2, 2),  # of those channels, one per level
    num_blocks=2,  # residual blocks per level
    attention_resolutions=(16,),  # heights at which self-attention follows each block
    dropout=0.1,
    num_groups=32,  # of the group normalisation
    head_channels=0,  # of each attention head; 0: one head
    dtype="float32",  # of convolutions and products; parameters, statistics and output are float32
    remat=False,  # recompute activations in the backward pass: less memory, more time
)
MMDIT = dict(
    name="mmdit",
    width=96,
    depth=4,
    num_heads=3,
    patch=2,  # side of a patch, in pixels
    table_size=16,  # side of the position table, in patches
    base_size=16,  # the side that the table's positions span
    qk_norm=True,
    dual_attention=0,  # of the blocks, from the first, how many have image attention of their own
    dtype="float32",
    remat=False,
    scan=False,  # blocks of one kind are compiled once: deep networks compile as fast as shallow ones
)
WORDS = dict(
    name="words",  # learned with the network; or clip: the text tower of a trained CLIP, frozen
    width=96,
    length=12,  # words that are read of a caption
    size=0,  # of the vocabulary: the most frequent words; 0: every word
    dropout=0.1,  # share of the captions that training hides, for guidance
)


def image_config() -> ConfigDict:
    """Returns DDPM with a U-Net on images without a condition: Ho, Jain & Abbeel (2020)."""
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        dict(
            name="",  # which images
            dir="",  # their folder; empty: the data set's own
            image_size=0,  # side to which images are cropped and resized; 0: as stored
            batch_size=128,  # over all devices
            flip=False,  # mirror half of the images
        )
    )
    config.network = ConfigDict(UNET)
    config.condition = ConfigDict(dict(name="nothing"))  # or classes, words, clip
    config.space = ConfigDict(dict(name="pixels"))  # or latents, of an autoencoder
    config.lora = ConfigDict(
        dict(
            rank=0,  # of the adapters that are learned in place of the network, which --init_from gives; 0: none
            alpha=0.0,  # their product's scale is alpha / rank; 0: rank
            targets=(),  # modules of the network's blocks, as image_qkv and image_out; (): those of attention
        )
    )
    config.process = ConfigDict(dict(name="ddpm", beta="linear", first=1e-4, last=0.02, num_steps=1000))
    config.loss = ConfigDict(
        dict(
            name="denoising",
            prediction="eps",  # what the network returns: eps, x_0, v, velocity or F
            weighting="simple",  # of noise levels: none, simple, min_snr, p2, edm or vlb
            draw="uniform",  # of training times; or stratified over the batch
            learned_variance=False,  # the network also returns the variance of ancestral steps; with process ddpm
            vlb_weight=1e-3,  # of the bound in L_hybrid; with learned_variance
        )
    )
    config.optimizer = ConfigDict(
        dict(
            name="adam",  # or adamw, muon, sgd, lion
            learning_rate=2e-4,
            schedule=ConfigDict(dict(name="wsd")),  # of the rate after its warm-up; or constant, linear, cosine
            warmup_steps=5000,  # the rate rises along a line
            cooldown_steps=0,  # wsd: and in the last steps falls along one
            clip_norm=1.0,  # of the gradient
            b1=0.9,
            b2=0.999,
            eps=1e-8,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=800_000,
            ema_decay=0.9999,  # of the average of the weights that samples are drawn with
            ema_profiles=(0.05, 0.1),  # power-function averages; any other length is made of these afterwards
            snapshot_every=0,  # steps; stores those averages, 0: never
            accumulate=1,  # micro-batches per step
            mesh="",  # sizes of data, fsdp and tensor, as data:2,fsdp:4; empty: every device on data
            sharding="replicated",  # of parameters and optimizer over data; or full: cut over it as over fsdp
            log_every=100,
            checkpoint_every=5_000,
            keep_newest=2,
            keep_every=0,  # keep the checkpoints of these steps for good, 0: none
            preview_every=10_000,  # pictures of raw and averaged weights
            num_previews=64,
            skip_bad_steps=False,  # leave out, and count, steps whose loss or gradient is not finite
            spike_factor=0.0,  # stop at a loss so many times the usual one; 0: never
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler=ConfigDict(dict(name="ddim")),  # or ancestral, euler, heun, dpm_solver_pp, unipc
            num_steps=50,
            # In time, shift moves a flow's towards noise; or quadratic, log_snr, karras, or leading, trailing, linspace
            # as in diffusers.
            grid=ConfigDict(dict(name="uniform", shift=1.0)),
            threshold=ConfigDict(dict(name="clip")),  # of x_0_hat; or dynamic, none
            guidance=1.0,  # scale of classifier-free guidance; 1: none
            guidance_interval=(),  # (least, largest) noise / signal at which guidance acts; (): always
            size=(),  # (height, width) of what is drawn, where the network can; (): that of the training
            batch_size=500,
        )
    )
    config.evaluation = ConfigDict(
        dict(
            num_samples=50_000,
            features="inception",  # or pixels, clip
            weights="",  # Inception's file where it is not to be fetched; clip: a published CLIP's folder
            metrics=("fid", "kid", "inception_score", "precision_recall", "bits_per_dim"),
            likelihood_images=10_000,
            bound_terms=0,  # of the bound's steps, for each image others; 0: all
            ode_steps=200,
            after_training=False,  # evaluate when training ends
        )
    )
    return config


def text_config() -> ConfigDict:
    """Returns rectified flow with an MM-DiT on pictures with captions: Esser et al. (2024)."""
    config = image_config()
    flow(config)
    config.network = ConfigDict(MMDIT)
    config.condition = ConfigDict(WORDS)
    config.loss.draw = "stratified"
    config.sampling.num_steps = 40
    config.sampling.guidance = 3.0
    config.training.ema_profiles = ()
    return config


def captioned_config(image_size: int, batch_size: int, num_samples: int) -> ConfigDict:
    """Returns `text_config` on a folder of captions, or a TFDS set, scored on held-out pairs.

    Args:
      image_size: side of the pictures.
      batch_size: over all devices.
      num_samples: at most so many held-out captions are drawn for the scores.
    """
    config = text_config()
    config.data = ConfigDict(
        dict(
            name="folder",  # or tfds:NAME
            dir="",  # folder: of captions.jsonl and the pictures; tfds: its data_dir, empty for TFDS' own
            split="train",  # tfds
            image_size=image_size,
            batch_size=batch_size,
            flip=False,  # a mirrored picture may not be what its caption says
            skip_broken=False,  # folder: leave out pictures that cannot be read, and report how many
            buckets=0,  # folder: train on several aspect ratios, sides divided by this, as 64; 0: on squares
        )
    )
    config.evaluation = ConfigDict(
        dict(
            dir="",  # folder: of held-out captions.jsonl and pictures
            split="val",  # tfds: the held-out one
            num_samples=num_samples,  # at most: one of each held-out caption
            features="inception",  # or clip, pixels
            weights="",  # Inception's file where it is not to be fetched; clip: a published CLIP's folder
            metrics=("fid", "kid"),
            judge="",  # folder of a CLIP, published or trained by experiments.clip, for the CLIP score
            likelihood_images=100,
            ode_steps=200,
            after_training=False,
        )
    )
    return config


def fine_tune(config: ConfigDict, sample: bool) -> None:
    """Changes a config to latents of a published pipeline, and to the steps of a network that is trained already.

    Args:
      config: changed in place.
      sample: whether the pipeline was trained on samples of the encoder's distribution, or on its modes.
    """
    config.space = ConfigDict(
        dict(
            name="latents",
            folder="",  # of the autoencoder or pipeline; empty: that of --init_from
            sample=sample,
            precomputed=True,  # latents of all pictures are made once, before training
            fitted=False,
            patch=0,
        )
    )
    config.optimizer.update(learning_rate=1e-5, warmup_steps=500)
    config.training.update(num_steps=10_000, ema_decay=0.999, checkpoint_every=1000, preview_every=500, num_previews=8)


def cosine_hybrid(config: ConfigDict) -> None:
    """Nichol & Dhariwal (2021): the cosine schedule, learned variances and L_hybrid.

    The chain has the base config's 1,000 steps, the paper's CIFAR-10 one 4,000 (--config.process.num_steps=4000).
    """
    config.process.beta = "cosine"
    config.loss.learned_variance = True
    if config.sampling.sampler.name == "ancestral":
        config.sampling.sampler.variance = "learned"


def v_min_snr(config: ConfigDict) -> None:
    """Salimans & Ho (2022) and Hang et al. (2023): v-prediction weighted by min-SNR-5."""
    config.loss.prediction = "v"
    config.loss.weighting = "min_snr"


def edm(config: ConfigDict) -> None:
    """Karras et al. (2022): the variance-exploding process, preconditioning, loss, sampler and grid.

    Not the paper's network (its DDPM++), augmentation or training budget: those of the base config.
    """
    config.process = ConfigDict(dict(name="edm"))
    config.loss.prediction = "F"
    config.loss.weighting = "edm"
    config.sampling.sampler = ConfigDict(dict(name="heun"))
    config.sampling.grid = ConfigDict(dict(name="karras"))
    config.sampling.num_steps = 18  # 35 network evaluations
    config.sampling.threshold = ConfigDict(dict(name="none"))


def flow(config: ConfigDict) -> None:
    """Esser et al. (2024): rectified flow with logit-normal times, sampled by Euler's method."""
    config.process = ConfigDict(dict(name="flow", times="logit_normal"))
    config.loss.prediction = "velocity"
    config.loss.weighting = "none"
    config.sampling.sampler = ConfigDict(dict(name="euler"))
    config.sampling.num_steps = 50
    config.sampling.threshold = ConfigDict(dict(name="none"))


def class_conditional(config: ConfigDict) -> None:
    """Ho & Salimans (2022): classes, hidden in a tenth of the examples, and guidance towards them."""
    config.condition = ConfigDict(dict(name="classes", dropout=0.1))
    config.sampling.guidance = 1.5


METHODS: dict[str, Change] = dict(
    cosine_hybrid=cosine_hybrid, v_min_snr=v_min_snr, edm=edm, flow=flow, class_conditional=class_conditional
)


def apply(config: ConfigDict, methods: str, table: Mapping[str, Change] = METHODS) -> ConfigDict:
    """Returns `config` changed by each of the comma-separated `methods`, in their order.

    Raises:
      ValueError: a method that `table` does not have.
    """
    for name in filter(None, (name.strip() for name in methods.split(","))):
        if name not in table:
            raise ValueError(f"unknown method {name!r}: choose from {', '.join(table)}")
        table[name](config)
    return config
