"""DDPM on CIFAR-10, as in Ho, Jain & Abbeel (2020).

    python -m experiments.cifar10 --config=experiments/configs/cifar10_ddpm.py --workdir=runs/ddpm
    python -m experiments.cifar10 --workdir=runs/ddpm --mode=evaluate

The first trains: 800,000 steps, 9.5 hours on a GPU that trains 3,000 images a second. The second draws 50,000 samples,
going on where a killed call stopped, and scores them; the paper's FID is 3.17. What each config expects stands in it.
Any other TFDS image set is trained by naming it: --config.data.name=svhn_cropped.
"""

from diffusion.data.sources import Source
from diffusion.data.tfds import tfds_source
from experiments import image_modes
from experiments.command_line import Config


def make_source(config: Config, split: str) -> Source:
    """Returns a split of the configured TFDS set."""
    return tfds_source(config.data.name, split, config.data.dir or None, image_size=config.data.image_size or None)


if __name__ == "__main__":
    image_modes.main(__file__, __doc__, default_config="cifar10_ddpm.py", make_source=make_source)
