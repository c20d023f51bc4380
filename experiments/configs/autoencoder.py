"""A small autoencoder for latent diffusion (Rombach et al. 2022): images of 32x32 to latents of 8x8x4.

    ./launch.sh autoencoder --config.data.name=folder --config.data.dir=DIR --config.data.image_size=32

A quarter of an hour on 2 CPU cores. Stable Diffusion's has channels=(128, 256, 512, 512), blocks_per_level=2, groups=32
and the adversarial loss from step 50,000 on.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        dict(
            name="cifar10",  # a TFDS set, also tfds:NAME; or folder, scenes
            dir="",  # folder: the pictures, in sub-folders too; TFDS: its data_dir, empty for TFDS' own
            image_size=0,  # side, or (height, width); 0: as stored; of scenes 16 or more
            channels=3,  # grey pictures are made RGB; 0: as stored
            held_out=0.1,  # folder: share that is kept from training, where evaluation.dir is empty
            num_examples=50_000,  # scenes
            skip_broken=False,  # folder: leave out pictures that cannot be read, and report how many
            batch_size=32,
            flip=True,
            augment=(),
        )
    )
    config.network = ConfigDict(
        dict(
            latent_channels=4,  # of the latents
            channels=(32, 64, 64),  # of each level; every level but the last halves height and width
            blocks_per_level=1,  # residual blocks
            groups=8,  # of the normalisations
            middle_attention=True,  # in the middle of encoder and decoder
            quant_conv=False,  # a 1x1 convolution after the encoder, as in Stable Diffusion 1
            post_quant_conv=False,  # and before the decoder
            dtype="float32",
        )
    )
    config.loss = ConfigDict(
        dict(
            kl_weight=1e-6,  # latent diffusion's, of sums over an image
            adversarial=0.0,  # 1: latent diffusion's; 0: no discriminator
            adversarial_start=50_000,  # step from which it counts
        )
    )
    config.discriminator = ConfigDict(
        dict(
            width=64,  # channels of its first convolution
            layers=3,  # that halve height and width
            groups=32,  # of the normalisations
        )
    )
    config.optimizer = ConfigDict(
        dict(
            name="adam",  # or muon
            learning_rate=1e-3,
            warmup_steps=100,  # the rate rises along a line
            cooldown_steps=1000,  # and in the last steps falls along one
            clip_norm=1.0,  # of the gradient, of the discriminator's apart
            b1=0.9,
            b2=0.99,
            eps=1e-8,
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=5000,
            ema_decay=0.99,  # of the average of the weights that is used
            accumulate=1,  # micro-batches per step
            mesh="",
            sharding="replicated",
            log_every=50,
            checkpoint_every=1000,
            keep_newest=2,
            keep_every=0,
            preview_every=1000,  # the first training images above their reconstructions
            num_previews=32,
            skip_bad_steps=False,
            spike_factor=0.0,
        )
    )
    config.evaluation = ConfigDict(
        dict(
            dir="",  # folder: of held-out pictures, in place of data.held_out
            split="test",  # TFDS: the held-out one
            num_images=1000,  # of these, evenly spread
            num_latents=10_000,  # training images of whose latents shift and scale are fitted, evenly spread
            batch_size=64,  # images encoded at a time
            features="pixels",  # pixels, inception or clip
            weights="",  # Inception's file where it is not to be fetched; clip: a published CLIP's folder
            metrics=("fid",),  # of reconstructions against their images; (): none
            after_training=True,
        )
    )
    return config
