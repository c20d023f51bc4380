"""FLUX.2 [klein] (Black Forest Labs 2025): what an imported pipeline leaves open, and its fine-tuning.

    python -m experiments.flux2 --mode=import --weights=FLUX.2-klein-4B --workdir=runs/klein

Network, autoencoder, text encoder, steps and guidance are the pipeline's own.
"""

from ml_collections import ConfigDict

from experiments.configs import _base


def get_config(methods: str = "") -> ConfigDict:
    """Returns the config; there are no methods to apply yet."""
    config = _base.captioned_config(image_size=1024, batch_size=4, num_samples=1000)
    config.data.references = 0  # pictures to edit that every line of captions.jsonl names
    config.network = ConfigDict(
        dict(
            name="flux2",
            num_double=5,  # blocks of two streams
            num_single=20,  # blocks of one
            num_heads=24,  # of attention
            head_width=128,  # channels of each
            mlp_ratio=3,  # hidden units of the MLPs, in widths
            axes=(32, 32, 32, 32),  # channels of a head that picture, row, column and place in the text rotate
            theta=2000.0,  # base of the wavelengths of the rotations
            time_channels=256,  # sines and cosines of the time
            guidance_embedding=False,  # the network is given the scale of guidance, as FLUX.2 [dev]'s
            dtype="bfloat16",
            remat=False,
            scan=False,  # compile the blocks of a kind once, as a loop
        )
    )
    config.condition = ConfigDict(
        dict(
            name="flux2",
            folder="",  # training: of the pipeline whose text encoder is read
            states=(9, 18, 27),  # after how many layers of Qwen3
            length=512,  # tokens that are read, at most 512
            dtype="bfloat16",
            precomputed=False,  # features of all captions are made once, before training: 15 MB of each
            dropout=0.1,  # share of the captions that training replaces by the empty one
        )
    )
    config.process.shift = 0.0  # of training times towards noise: FLUX's, by the size of the pictures
    _base.fine_tune(config, sample=False)
    config.sampling = ConfigDict(
        dict(
            sampler=ConfigDict(dict(name="euler")),
            num_steps=4,  # base model: 50
            grid=ConfigDict(dict(name="flux2")),
            threshold=ConfigDict(dict(name="none")),
            guidance=1.0,  # base model: 4, away from the empty prompt
            guidance_interval=(),
            size=(),  # (height, width), divisible by 16; (): 1024 x 1024, or the first reference's
            batch_size=4,
        )
    )
    return _base.apply(config, methods, {})
