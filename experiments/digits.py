"""DDPM on scikit-learn's handwritten digits: trained, sampled and scored in minutes on a CPU, without a download.

    ./launch.sh digits

Pictures and numbers are then in runs/digits: report.md, curves.png, samples/ and previews/.
"""

from diffusion.data.sources import digits
from experiments import image_likelihood, image_modes, image_uses
from experiments.command_line import Run, main


def train(run: Run) -> None:
    """Trains, then evaluates."""
    trained = image_modes.train(run, digits("train"))
    if run.config.evaluation.after_training:
        image_modes.evaluate(run, digits("train"), digits("test"), trained)


def sample(run: Run) -> None:
    """Draws samples."""
    image_modes.sample(run, digits("train"))


def evaluate(run: Run) -> None:
    """Draws and scores samples."""
    image_modes.evaluate(run, digits("train"), digits("test"))


def likelihood(run: Run) -> None:
    """Measures bits/dim of the test split."""
    image_likelihood.bits_per_dim(run, digits("test"))


if __name__ == "__main__":
    uses = image_uses.make_modes(lambda run: digits("test"))
    modes = {"train": train, "sample": sample, "evaluate": evaluate, "likelihood": likelihood, **uses}
    main(__file__, __doc__, default_config="digits_ddpm.py", modes=modes, extra_flags=image_uses.define_flags)
