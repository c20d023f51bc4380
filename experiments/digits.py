"""DDPM on scikit-learn's handwritten digits: trained, sampled and scored in minutes on a CPU, without a download.

./launch.sh digits
"""

from diffusion.data.sources import digits
from experiments import image_modes
from experiments.command_line import Run, main


def train(run: Run) -> None:
    """Trains on the train split."""
    image_modes.train(run, digits("train"))


def sample(run: Run) -> None:
    """Draws samples."""
    image_modes.sample(run, digits("train"))


if __name__ == "__main__":
    main(__file__, __doc__, default_config="digits_ddpm.py", modes={"train": train, "sample": sample})
