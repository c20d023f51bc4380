"""DDPM on CIFAR-10, as in Ho, Jain & Abbeel (2020).

    python -m experiments.cifar10 --config=experiments/configs/cifar10_ddpm.py --workdir=runs/ddpm
    python -m experiments.cifar10 --workdir=runs/ddpm --mode=sample --num_samples=50000 --out=samples.npz

Any other TFDS image set is trained by naming it: --config.data.name=svhn_cropped.
"""

from diffusion.data.sources import Source
from diffusion.data.tfds import tfds_source
from experiments import image_likelihood, image_modes, image_uses
from experiments.command_line import Config, Run, main


def make_source(config: Config, split: str) -> Source:
    """Returns a split of the configured TFDS set."""
    return tfds_source(config.data.name, split, config.data.dir or None, image_size=config.data.image_size or None)


def train(run: Run) -> None:
    """Trains on the train split, and evaluates where the config asks for it."""
    source = make_source(run.config, "train")
    trained = image_modes.train(run, source)
    if run.config.evaluation.after_training:
        image_modes.evaluate(run, source, make_source(run.config, "test"), trained)


def sample(run: Run) -> None:
    """Draws samples."""
    image_modes.sample(run, make_source(run.config, "train"))


def evaluate(run: Run) -> None:
    """Draws and scores samples."""
    image_modes.evaluate(run, make_source(run.config, "train"), make_source(run.config, "test"))


def likelihood(run: Run) -> None:
    """Measures bits/dim of the test split."""
    image_likelihood.bits_per_dim(run, make_source(run.config, "test"))


if __name__ == "__main__":
    uses = image_uses.make_modes(lambda run: make_source(run.config, "test"))
    modes = {"train": train, "sample": sample, "evaluate": evaluate, "likelihood": likelihood, **uses}
    main(__file__, __doc__, default_config="cifar10_ddpm.py", modes=modes, extra_flags=image_uses.define_flags)
