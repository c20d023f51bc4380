"""DDPM on a folder of your own pictures: any sizes and formats, cropped and resized; classes from sub-folders if asked.

    ./launch.sh folder --config.data.dir=DIR
    ./launch.sh folder --config.data.dir=DIR --config.data.image_size=64 --config.training.num_steps=20000
    ./launch.sh folder --config=folder:class_conditional --config.data.dir=DIR --config.data.classes=True
    ./launch.sh folder --mode=sample --num_samples=100

A tenth of the pictures is kept from training, to be compared with. Decoded once; large folders from a cache on disk.
"""

from diffusion.data.named import named_images
from diffusion.data.sources import Source
from diffusion.model.config import Config
from diffusion.runs.call import Task
from diffusion.runs.modes import main


def read(config: Config, split: str) -> Source:
    """Returns the pictures of a split of the folder."""
    data = config.data
    return named_images(
        data.name,
        split,
        data_dir=data.dir,
        image_size=data.image_size,
        channels=data.channels,
        classes=data.classes,
        held_out=data.held_out,
        skip_broken=data.skip_broken,
    )


TASK = Task("folder", read)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="folder")
