"""Images by index: where they come from (`sources`), in which order (`batches`), and how they are shown (`images`)."""

from diffusion.data.batches import batch_indices, make_batches
from diffusion.data.images import image_grid, save_png, to_float, to_uint8
from diffusion.data.sources import Source, array_source, digits
from diffusion.data.tfds import tfds_source

__all__ = [
    "Source",
    "array_source",
    "batch_indices",
    "digits",
    "image_grid",
    "make_batches",
    "save_png",
    "tfds_source",
    "to_float",
    "to_uint8",
]
