"""DDPM on scikit-learn's handwritten digits: trained, sampled and scored in minutes on a CPU, without a download.

    ./launch.sh digits
    ./launch.sh digits --config=digits:flow,class_conditional

Pictures and numbers are then in runs/digits: report.md, curves.png, samples/ and previews/.
"""

from diffusion.data.named import named_images
from diffusion.data.sources import Source
from diffusion.model.config import Config
from diffusion.runs.call import Task, refuse_other_data
from diffusion.runs.modes import main


def read(config: Config, split: str) -> Source:
    """Returns a split of the digits."""
    refuse_other_data(config, "digits", "cifar10, folder")
    return named_images("digits", split, image_size=config.data.image_size)


TASK = Task("digits", read)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="digits")
