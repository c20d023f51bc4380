"""CLIP (Radford et al. 2021) on captioned scenes: two small towers, at most 20 minutes on 2 CPU cores.

    ./launch.sh clip

The paper's parts, each as small as these pictures allow.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    config = ConfigDict()
    config.seed = 0
    config.data = ConfigDict(
        dict(
            name="scenes",  # or folder, or tfds:NAME, a prepared TFDS set as tfds:coco_captions
            dir="",  # folder: of captions.jsonl and the pictures; tfds: its data_dir, empty for TFDS' own
            split="train",  # tfds
            image_size=16,
            num_examples=50_000,  # scenes
            batch_size=256,
            flip=False,  # a mirrored picture is not what its caption says
            skip_broken=False,  # folder: leave out pictures that cannot be read, and say how many
            mean=(0.5, 0.5, 0.5),
            std=(0.5, 0.5, 0.5),
        )
    )
    config.text = ConfigDict(
        dict(
            merges="",  # OpenAI's bpe_simple_vocab_16e6.txt.gz, in place of a vocabulary trained on the captions
            size=512,  # tokens of that
            length=16,
        )
    )
    config.network = ConfigDict(
        dict(
            image=dict(patch_size=4, width=128, num_layers=4, num_heads=4, mlp_width=512),
            text=dict(width=128, num_layers=4, num_heads=4, mlp_width=512),
            projection=512,  # the paper's; with fewer, the first loss is more than 1% above log(batch)
            activation="quick_gelu",
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
            learning_rate=1e-3, warmup_steps=100, decay_steps=2000, clip_norm=1.0, b1=0.9, b2=0.98, eps=1e-6, decay=0.1
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
            num_candidates=100,
            num_sets=10,
            num_single=500,
            after_training=True,
        )
    )
    return config
