"""CLIP (Radford et al. 2021) on captioned scenes: two small towers, at most 20 minutes on 2 CPU cores.

    ./launch.sh clip

The paper's parts, each as small as these pictures allow.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0  # of weights and data order
    config.data = ConfigDict(
        dict(
            name="scenes",  # or folder, or tfds:NAME, a prepared TFDS set as tfds:coco_captions
            dir="",  # folder: of captions.jsonl and the pictures; tfds: its data_dir, empty for TFDS' own
            split="train",  # tfds
            image_size=16,  # side, or (height, width), to which pictures are cropped and resized
            num_examples=50_000,  # scenes
            batch_size=256,  # pairs over all devices, each against all others
            flip=False,  # a mirrored picture is not what its caption says
            augment=(),
            skip_broken=False,  # folder: leave out pictures that cannot be read, and say how many
            mean=(0.5, 0.5, 0.5),  # of each channel, subtracted from pictures in [0, 1]
            std=(0.5, 0.5, 0.5),  # by which they are divided then
        )
    )
    config.text = ConfigDict(
        dict(
            merges="",  # OpenAI's bpe_simple_vocab_16e6.txt.gz, in place of a vocabulary trained on the captions
            size=512,  # tokens of that
            length=16,  # tokens that are read of a caption
        )
    )
    config.network = ConfigDict(
        dict(
            image=dict(
                patch_size=4,  # side of a patch, in pixels
                width=128,  # of each token
                num_layers=4,  # blocks
                num_heads=4,  # of attention, that divide the width
                mlp_width=512,  # of the hidden layer
            ),
            text=dict(
                width=128,  # of each token
                num_layers=4,  # blocks
                num_heads=4,  # of attention, that divide the width
                mlp_width=512,  # of the hidden layer
            ),
            projection=512,  # the paper's; with fewer, the first loss is more than 1% above log(batch)
            activation="quick_gelu",  # OpenAI's; or gelu
            dtype="float32",
            remat=False,
        )
    )
    config.loss = ConfigDict(
        dict(
            name="softmax",  # or sigmoid (SigLIP)
            rows=0,  # of the similarities held at a time; 0: all
        )
    )
    config.optimizer = ConfigDict(
        dict(
            learning_rate=1e-3,  # the highest
            warmup_steps=100,  # the rate rises along a line
            decay_steps=2000,  # and falls along a cosine until this step
            clip_norm=1.0,  # of the gradient
            b1=0.9,  # decay of the running mean of gradients
            b2=0.98,  # and of their squares
            eps=1e-6,  # added to the root of the latter
            decay=0.1,  # of the weights
        )
    )
    config.training = ConfigDict(
        dict(
            num_steps=2000,
            ema_decay=0.995,
            accumulate=1,
            mesh="",
            sharding="replicated",
            log_every=50,
            checkpoint_every=500,
            keep_newest=2,
            keep_every=0,
            preview_every=500,
            num_previews=0,
        )
    )
    config.evaluation = ConfigDict(
        dict(
            dir="",  # folder: of held-out captions.jsonl and pictures
            split="val",  # tfds: the held-out one
            num_examples=4000,  # scenes of each split
            num_candidates=100,  # captions of which each picture has to find its own
            num_sets=10,  # of so many candidates
            num_single=500,  # pictures of one object, that captions of one name
            after_training=True,  # evaluate when training ends
        )
    )
    return config
