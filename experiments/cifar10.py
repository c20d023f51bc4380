"""DDPM on CIFAR-10, as in Ho, Jain & Abbeel (2020).

    python -m experiments.cifar10 --config=experiments/configs/cifar10.py --workdir=runs/ddpm
    python -m experiments.cifar10 --workdir=runs/ddpm --mode=evaluate
    python -m experiments.cifar10 --mode=import --weights=ddpm-cifar10-32 --workdir=runs/published

The first trains: 800,000 steps, 9.5 hours on a GPU that trains 3,000 images a second. The second draws 50,000 samples,
resuming where an interrupted call stopped, and scores them; the paper's FID is 3.17. The third makes a published model
a run. Any other TFDS image set is trained by naming it: --config.data.name=svhn_cropped.
"""

from diffusion.data.named import named_images
from diffusion.data.sources import Source
from diffusion.model.config import Config
from diffusion.runs.call import Task
from diffusion.runs.modes import main


def read(config: Config, split: str) -> Source:
    """Returns a split of the configured TFDS set."""
    return named_images(config.data.name, split, data_dir=config.data.dir, image_size=config.data.image_size)


TASK = Task("cifar10", read)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="cifar10")
