"""Stable Diffusion 3 (Esser et al. 2024): what an imported pipeline leaves open, and its fine-tuning.

    python -m experiments.sd3 --mode=import --weights=stable-diffusion-3-medium-diffusers --workdir=runs/sd3

Network, autoencoder, text encoders and the shift of the times are the pipeline's own.
"""

from ml_collections import ConfigDict

from experiments.configs import _base


def get_config(methods: str = "") -> ConfigDict:
    """Returns the config; there are no methods to apply yet."""
    config = _base.captioned_config(image_size=1024, batch_size=8, num_samples=1000)
    config.network.update(dtype="bfloat16")
    config.condition = ConfigDict(
        dict(
            name="sd3",
            folder="",  # training: of the pipeline whose text encoders are read
            leave_out=(),  # of clip_l, clip_g, t5: encoders that are not read
            length=256,  # tokens that T5 reads, at most 512
            clip_skip=0,  # layers more that are left out at the end of both CLIPs
            dtype="bfloat16",
            precomputed=True,  # features of all captions are made once, before training
            dropout=0.463,  # share of the captions that training hides from each encoder by itself
            null="empty",  # what guidance leads away from: the empty prompt, or zeros
        )
    )
    _base.fine_tune(config, sample=True)
    config.sampling = ConfigDict(
        dict(
            sampler=ConfigDict(dict(name="euler")),
            num_steps=28,
            grid=ConfigDict(dict(name="released_flow", shift=3.0)),
            threshold=ConfigDict(dict(name="none")),
            guidance=7.0,
            guidance_interval=(),
            skip_layers=(),  # blocks that guidance leads away from doing without: (7, 8, 9) of 3.5-medium
            skip_scale=2.8,  # of that guidance
            skip_interval=(0.01, 0.2),  # between which shares of the steps
            size=(),  # (height, width), divisible by 16; (): the pipeline's own
            batch_size=4,
        )
    )
    return _base.apply(config, methods, {})
