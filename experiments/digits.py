"""DDPM on scikit-learn's handwritten digits: trained, sampled and scored in minutes on a CPU, without a download.

    ./launch.sh digits

Pictures and numbers are then in runs/digits: report.md, curves.png, samples/ and previews/.
"""

from diffusion.data.sources import Source, digits
from experiments import image_modes
from experiments.command_line import Config


def make_source(config: Config, split: str) -> Source:
    """Returns a split of the digits."""
    del config
    return digits(split)


if __name__ == "__main__":
    image_modes.main(__file__, __doc__, default_config="digits_ddpm.py", make_source=make_source)
