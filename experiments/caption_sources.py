"""Pictures with captions that a config names: a folder, or a set prepared by TensorFlow Datasets."""

from diffusion.data.captions import CaptionedSource, caption_folder
from diffusion.data.tfds_captions import tfds_captions
from experiments.command_line import Config


def captioned_source(config: Config, split: str, image_size: int | None) -> CaptionedSource:
    """Returns the pictures and captions of `split`, "train" or "held_out", cropped and resized to `image_size`.

    Where they are is told by the fields of `config`

      data.name: "folder" of pictures and captions.jsonl (data/captions.py), or "tfds:NAME", as "tfds:coco_captions".
      data.dir, evaluation.dir: folder: those of the training and the held-out pairs. A TFDS set has the one data_dir
        data.dir, empty for TFDS' own.
      data.split, evaluation.split: the splits of a TFDS set that they are, as "train" and "val".
      data.skip_broken: folder: leave out pictures that cannot be read, and warn of how many.

    Raises:
      ValueError: another name, a field that is missing, or data that cannot be read, in one line.
    """
    data, part = config.data, "data" if split == "train" else "evaluation"
    kind, _, name = data.name.partition(":")
    match kind:
        case "folder":
            if not config[part].dir:
                raise ValueError(f"no folder of pictures and captions: name one by --config.{part}.dir=DIR")
            return caption_folder(config[part].dir, image_size, split, skip_broken=data.skip_broken)
        case "tfds":
            return tfds_captions(name, config[part].split, data.dir or None, image_size)
        case _:
            raise ValueError(f"data.name is {data.name!r}: choose folder or tfds:NAME")
