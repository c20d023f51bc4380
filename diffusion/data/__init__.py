"""Images by index: where they come from (`sources`), in which order (`batches`), and how they are shown (`images`).

- `named`: one scheme of names for all sources; `folder`, `captions`, `tfds`, `tfds_captions`, `scenes`: the sources.
- `pictures`: the one decoder of picture files; `decoded`: many files as one array; `lines`: text files.
- `augmentations`: changes of training images; `samples`: sets of images in one file; `text`: token ids.
"""

from diffusion.extras import need

need("runs")

from diffusion.data.batches import batch_indices, full_batches, make_batches
from diffusion.data.folder import image_folder
from diffusion.data.images import image_grid, save_png, to_float, to_uint8
from diffusion.data.named import named_captions, named_images, open_images
from diffusion.data.sources import Source, array_source, digits
from diffusion.data.tfds import tfds_source

__all__ = [
    "Source",
    "array_source",
    "batch_indices",
    "digits",
    "full_batches",
    "image_folder",
    "image_grid",
    "make_batches",
    "named_captions",
    "named_images",
    "open_images",
    "save_png",
    "tfds_source",
    "to_float",
    "to_uint8",
]
