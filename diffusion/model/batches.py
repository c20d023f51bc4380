"""The batches that a config trains on."""

from collections.abc import Generator
from typing import Any

import jax

from diffusion.data.augmentations import check_augmentations
from diffusion.data.batches import batch_indices, make_batches
from diffusion.data.sources import Source
from diffusion.model.config import Config


def training_batches(config: Config, source: Source, start_step: int) -> Generator[dict[str, Any], None, None]:
    """Returns this process's rows of the batches of a training, from number `start_step` on; see `make_batches`."""
    return make_batches(
        source,
        config.seed,
        config.data.batch_size,
        start_step=start_step,
        flip=config.data.flip,
        augmentations=config.data.augment,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def check_batches(config: Config, source: Source) -> None:
    """Raises ValueError where there are no such batches: found before anything is compiled."""
    batch_indices(config.seed, 0, config.data.batch_size, source.num_examples)
    check_augmentations(config.data.augment, [part.image_shape for part in source.parts or (source,)])
