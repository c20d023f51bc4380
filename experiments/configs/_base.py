"""Every field of a config, once, with what it means; the files beside this one change what their data needs.

A choice (`process`, `network`, `condition`, `loss`, `optimizer`, `sampling.sampler`) has a `name` and the fields of
that name alone: `--config.process.name=flow` replaces DDPM's fields by a flow's. `METHODS` are the published changes
that apply to any data: `--config=digits:flow,class_conditional`.
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
    dropout=0.1,  # share of the features that each residual block hides in training
    num_groups=32,  # of the group normalisation
    head_channels=0,  # of each attention head; 0: one head
    dtype="float32",  # of convolutions and products; parameters, statistics and output are float32
    remat=False,  # recompute activations in the backward pass: less memory, more time
    fused_norms=False,  # norm, SiLU, dropout in one kernel on GPUs: fast, but not checked on one yet
)
MMDIT = dict(
    name="mmdit",
    width=96,  # of each token
    depth=4,  # blocks
    num_heads=3,  # of attention, that divide the width
    patch=2,  # side of a patch, in pixels
    table_size=16,  # side of the position table, in patches
    base_size=16,  # the side that the table's positions span
    qk_norm=True,  # normalise queries and keys, as in Stable Diffusion 3.5
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
    phrases=0,  # that are read as one word each: the most frequent pairs of neighbours
    dropout=0.1,  # share of the captions that training hides, for guidance
    word_dropout=0.0,  # of the words of the others, that are read as unknown
    phrase_dropout=0.0,  # and of their phrases; guidance then leads away from the prompt without its phrases
)


def image_config() -> ConfigDict:
    """Returns DDPM with a U-Net on images without a condition: Ho, Jain & Abbeel (2020)."""
    config = ConfigDict()
    config.seed = 0  # of weights, data order and noise; --seed is that of samples
    config.data = ConfigDict(
        dict(
            name="",  # which images
            dir="",  # their folder; empty: the data set's own
            image_size=0,  # side, or (height, width), to which images are cropped and resized; 0: as stored
            batch_size=128,  # over all devices
            flip=False,  # mirror half of the images
            augment=(),  # change images, by names: shift, crop, rotate90, colour
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
            name="adam",  # or adamw, radam, muon, sgd, lion
            learning_rate=2e-4,  # the highest
            schedule=ConfigDict(dict(name="wsd")),  # of the rate after its warm-up; or constant, linear, cosine
            warmup_steps=5000,  # the rate rises along a line
            cooldown_steps=0,  # wsd: and in the last steps falls along one
            clip_norm=1.0,  # of the gradient
            b1=0.9,  # decay of the running mean of gradients
            b2=0.999,  # and of their squares
            eps=1e-8,  # added to the root of the latter
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=800_000,  # of the optimizer
            ema_decay=0.9999,  # of the average of the weights that samples are drawn with
            ema_profiles=(0.05, 0.1),  # power-function averages; any other length is made of these afterwards
            snapshot_every=0,  # steps; stores those averages, 0: never
            accumulate=1,  # micro-batches per step
            mesh="",  # sizes of data, fsdp and tensor, as data:2,fsdp:4; empty: every device on data
            sharding="replicated",  # of parameters and optimizer over data; or full: cut over it as over fsdp
            log_every=100,  # steps; the metrics
            checkpoint_every=5_000,  # steps
            keep_newest=2,  # checkpoints
            keep_every=0,  # keep the checkpoints of these steps for good, 0: none
            preview_every=10_000,  # steps; pictures of raw and averaged weights
            num_previews=64,  # pictures in each; 0: none
            skip_bad_steps=False,  # leave out, and count, steps whose loss or gradient is not finite
            spike_factor=0.0,  # stop at a loss so many times the usual one; 0: never
        )
    )
    config.sampling = ConfigDict(
        dict(
            sampler=ConfigDict(dict(name="ddim")),  # or ancestral, euler, heun, dpm_solver_pp, unipc
            num_steps=50,  # of the sampler
            grid=ConfigDict(dict(name="uniform", shift=1.0)),  # where it steps; shift: of a flow, towards noise
            threshold=ConfigDict(dict(name="clip")),  # of x_0_hat; or dynamic, none
            guidance=1.0,  # scale of classifier-free guidance; 1: none
            guidance_interval=(),  # (least, largest) noise / signal at which guidance acts; (): always
            size=(),  # (height, width) of what is drawn, where the network can; (): that of the training
            batch_size=500,  # samples drawn at a time
        )
    )
    config.evaluation = ConfigDict(
        dict(
            num_samples=50_000,  # that are drawn and scored
            features="inception",  # inception, pixels or clip
            weights="",  # Inception's file where it is not to be fetched; clip: a published CLIP's folder
            metrics=("fid", "kid", "inception_score", "precision_recall", "bits_per_dim"),  # names of scores
            likelihood_images=10_000,  # held-out ones whose bits/dim are computed
            bound_terms=0,  # of the bound's steps, for each image others; 0: all
            ode_steps=200,  # of the likelihood by the ODE
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
            image_size=image_size,  # side, or (height, width), to which pictures are cropped and resized; 0: as stored
            batch_size=batch_size,
            flip=False,  # a mirrored picture may not be what its caption says
            augment=(),  # change pictures, by names: shift, crop, rotate90, colour
            skip_broken=False,  # folder: leave out pictures that cannot be read, and report how many
            buckets=0,  # folder: train on several aspect ratios, sides divided by this, as 64; 0: on one
        )
    )
    config.evaluation = ConfigDict(
        dict(
            dir="",  # folder: of held-out captions.jsonl and pictures
            split="val",  # tfds: the held-out one
            num_samples=num_samples,  # at most: one of each held-out caption
            features="inception",  # inception, pixels or clip
            weights="",  # Inception's file where it is not to be fetched; clip: a published CLIP's folder
            metrics=("fid", "kid"),
            judge="",  # folder of a CLIP, published or trained by experiments.clip, for the CLIP score
            likelihood_images=100,
            ode_steps=200,
            after_training=False,
        )
    )
    return config


def muon(config: ConfigDict, learning_rate: float, warmup_steps: int, cooldown_steps: int) -> None:
    """Changes a config to Muon (Jordan et al. 2024), whose matrices learn at 3 times the rate of the rest."""
    config.optimizer = ConfigDict(
        dict(
            name="muon",
            learning_rate=learning_rate,
            warmup_steps=warmup_steps,
            cooldown_steps=cooldown_steps,
            clip_norm=1.0,
            b1=0.9,
            b2=0.99,
            muon_rate=3.0,  # of matrices, in learning rates
        )
    )


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
            preview="",  # of a tiny autoencoder that decodes previews, or taef2; empty: that of --init_from
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


def mean_flow(config: ConfigDict) -> None:
    """Geng et al. (2025), "Mean Flows": the average velocity of a step, trained from scratch, for 1 to 4 steps.

    As "Improved Mean Flows" has it with --config.loss.tangent=predicted --config.loss.share=0.5.
    """
    config.process = ConfigDict(dict(name="flow", time_scale=1.0))  # of the network's derivative by time
    config.loss = ConfigDict(
        dict(
            name="mean_flow",
            mean=-0.4,  # of the logit of times
            std=1.0,
            share=0.75,  # of the batch whose step has no length: flow matching
            tangent="conditional",  # or predicted
            p=1.0,  # exponent of the adaptive weight
            c=1e-2,
            omega=1.0,  # guidance of scale omega / (1 - kappa) is trained in; 1 and 0: none
            kappa=0.0,
        )
    )
    config.sampling.sampler = ConfigDict(dict(name="mean_flow"))
    config.sampling.num_steps = 2
    config.sampling.guidance = 1.0
    config.sampling.threshold = ConfigDict(dict(name="none"))


def consistency(config: ConfigDict) -> None:
    """Geng et al. (2024), "Consistency Models Made Easy": EDM's network becomes a consistency model in stages.

    Begin with a run of `edm`: --init_from=RUN.
    """
    edm(config)
    config.loss = ConfigDict(
        dict(
            name="consistency",
            prediction="F",
            mean=-1.1,  # of ln sigma
            std=2.0,
            q=2.0,  # the pair's distance is divided by it at each stage
            stage_steps=max(1, config.training.num_steps // 8),
            num_stages=8,
        )
    )
    config.sampling.sampler = ConfigDict(dict(name="multistep_consistency"))
    config.sampling.grid = ConfigDict(dict(name="consistency"))
    config.sampling.num_steps = 2
    no_likelihood(config)


def continuous_consistency(config: ConfigDict) -> None:
    """Lu & Song (2024): a consistency model in continuous time, from scratch or from a flow of the same time_scale."""
    config.process = ConfigDict(dict(name="flow", time_scale=1.0))  # of the network's derivative by time
    config.loss = ConfigDict(
        dict(
            name="continuous_consistency",
            mean=-1.0,  # of the logit of times
            std=1.4,
            c=0.1,  # of the tangent's norm
            warmup_steps=min(10_000, config.training.num_steps // 4),
        )
    )
    config.sampling.sampler = ConfigDict(dict(name="multistep_consistency"))
    config.sampling.num_steps = 2
    config.sampling.threshold = ConfigDict(dict(name="none"))
    no_likelihood(config)


def student(config: ConfigDict) -> None:
    """Changes a config to a trained flow's student: drawn in 4 steps, with the guidance that it learns, no bits/dim."""
    flow(config)
    config.sampling.num_steps = 4
    config.sampling.guidance = 1.0
    no_likelihood(config)


def imitation(config: ConfigDict) -> None:
    """Chen et al. (2025), "pi-Flow": a student of the flow --config.loss.teacher=RUN, whose steps are policies."""
    student(config)
    config.loss = ConfigDict(
        dict(
            name="imitation",
            teacher="",  # work folder of a run of `flow`, as whose copy the student begins
            guidance=0.0,  # of the teacher; 0: as its run samples
            num_steps=(4,),  # in how many the student draws; (1, 2, 4): in each
            shift=config.sampling.grid.shift,  # of the times of steps, and of values in a step, towards noise
            num_values=10,  # of x_0 in a step
            num_points=2,  # of a step that the teacher evaluates
            start="data",  # of a step: data with noise added; or own, where the student's steps before it led
            prediction="velocity",  # what the network returns, so many times; that of the teacher, which it begins as
        )
    )
    config.sampling.sampler = ConfigDict(dict(name="policy", shift=config.loss.shift))


def progressive(config: ConfigDict) -> None:
    """Salimans & Ho (2022): a student whose 4 steps are 8 of a trained flow; --config.loss.teacher=RUN."""
    student(config)
    config.loss = ConfigDict(
        dict(
            name="progressive",
            teacher="",  # work folder of a run of `flow`, or of the round before
            guidance=0.0,  # of the teacher; 0: as its run samples
            num_steps=4,  # of the student
            shift=config.sampling.grid.shift,  # of the times of steps, towards noise
            prediction="velocity",  # what the network returns; that of the teacher, which it begins as
        )
    )


def no_likelihood(config: ConfigDict) -> None:
    """Leaves bits/dim out of the evaluation of a model that has no ODE."""
    if "metrics" in config.evaluation:
        config.evaluation.metrics = tuple(name for name in config.evaluation.metrics if name != "bits_per_dim")


def class_conditional(config: ConfigDict) -> None:
    """Ho & Salimans (2022): classes, hidden in a tenth of the examples, and guidance towards them."""
    config.condition = ConfigDict(dict(name="classes", dropout=0.1))
    config.sampling.guidance = 1.5


FEW_STEPS: dict[str, Change] = dict(
    mean_flow=mean_flow,
    consistency=consistency,
    continuous_consistency=continuous_consistency,
    imitation=imitation,
    progressive=progressive,
)
METHODS: dict[str, Change] = dict(
    cosine_hybrid=cosine_hybrid,
    v_min_snr=v_min_snr,
    edm=edm,
    flow=flow,
    class_conditional=class_conditional,
    **FEW_STEPS,
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
