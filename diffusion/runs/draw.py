"""Drawing: from a model, weights and requests to uint8 images, batch by batch over all devices."""

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from tqdm import tqdm

from diffusion.data.batches import full_batches
from diffusion.data.samples import load_samples, save_samples
from diffusion.model.condition import Condition, rows_away, rows_of
from diffusion.model.config import Config, plain, round_up
from diffusion.model.model import Model, Use, from_noise, make_generate
from diffusion.model.sampling import make_sampling

Programs = dict[str, Callable[..., Any]]  # compiled by what they depend on


class Painter(NamedTuple):
    """What draws: a model with weights, as a config samples it, on some devices.

    Attributes:
      model: of the weights.
      params: averaged or raw.
      config: its `sampling` is followed.
      mesh: the devices.
      programs: what was compiled before, for the next call.
    """

    model: Model
    params: Any
    config: Config
    mesh: Mesh
    programs: Programs


def draw(
    painter: Painter,
    requests: Sequence[Any],
    index: np.ndarray,
    seed: int | np.ndarray,
    *,
    images: Sequence[np.ndarray] = (),
    references: Sequence[np.ndarray] = (),
    negative: str | Sequence[str | None] | None = None,
    use: Use = from_noise,
    folder: Path | None = None,
    progress: str = "sampling",
) -> np.ndarray:
    """Returns uint8 [N, ...]: what `use` makes of each request, the same whatever the devices or batches.

    Args:
      painter: what draws.
      requests: N prompts, class numbers or None.
      index: int[N], which noise of the seed each is made from.
      seed: of the noise, or N of them.
      images: arrays uint8 [N, H, W, C] that `use` begins with, and masks, bool [N, h, w, 1] in the space of x_0.
      references: pictures to edit, uint8 [h, w, C], which all requests share, or [N, h, w, C]; see
        `pictures.fit_reference`.
      negative: prompt that guidance leads away from, or N of them; None: see `rows_away`.
      use: see `diffusion.model.model.Use`; its `__qualname__` is all that it depends on, unless it is "<locals>".
      folder: batches are written there as they are made, and read from there where an interrupted call has left them.
        The caller removes it.
      progress: title of the progress bar.

    Raises:
      ValueError: requests that do not exist, or samples that are not finite.
    """
    model, params, config, mesh, programs = painter
    warn_of_negative(config, negative)
    key = json.dumps([plain(config)["sampling"], use.__qualname__])
    generate = programs.get(key)
    if generate is None:
        generate = make_generate(model, make_sampling(config, model.process), mesh, use)
        if "<locals>" not in use.__qualname__:  # a closure may be another one next time
            programs[key] = generate
    rows = rows_of(model.condition, requests)
    away = rows_away(model.condition, rows, negative)
    warn_of_no_phrase(model.condition, config, rows, away)
    seeds = np.broadcast_to(np.asarray(seed, np.uint32), len(rows))
    references = [np.broadcast_to(one, (len(rows), *one.shape[-3:])) for one in references]
    batch_size = round_up(min(config.sampling.batch_size, len(rows)), mesh.size)
    found = []
    batches = list(full_batches(len(rows), batch_size))
    for number, batch in enumerate(tqdm(batches, desc=progress, unit="batch", file=sys.stderr, delay=1)):
        path = folder and folder / f"{number * batch_size:08d}_{batch_size}.npz"
        if path and everywhere(path.exists()):
            found.append(load_samples(path))
            continue
        begun = (array[batch] for array in images)
        seen = [pictures[batch] for pictures in references]
        drawn = generate(params, rows[batch], away[batch], seeds[batch], index[batch], *begun, references=seen)
        image, finite = (multihost_utils.process_allgather(array, tiled=True) for array in drawn)
        refuse_not_finite(finite[: len(rows) - number * batch_size])
        found.append(image)
        if path and jax.process_index() == 0:
            save_samples(path, image)
    return np.concatenate(found)[: len(rows)]


def warn_of_negative(config: Config, negative: str | Sequence[str | None] | None) -> None:
    """Warns of a negative prompt that changes nothing."""
    prompts = [negative] if negative is None or isinstance(negative, str) else negative
    if any(prompts) and config.sampling.guidance == 1.0:
        logging.warning("a negative prompt changes nothing at sampling.guidance=1: raise it, to 4 for example")


def warn_of_no_phrase(condition: Condition, config: Config, rows: np.ndarray, away: np.ndarray) -> None:
    """Warns of prompts that guidance changes nothing of: without a phrase they are what it leads away from."""
    if condition.away is None or config.sampling.guidance == 1.0:
        return
    same = np.all(rows == away, axis=1) & np.any(rows != condition.read([None]), axis=1)
    if count := int(same.sum()):
        logging.warning(
            "sampling.guidance=%g changes nothing of %d prompts: they have no phrase for it to lead to; "
            "--negative_prompt= leads away from no prompt",
            config.sampling.guidance,
            count,
        )


def refuse_not_finite(finite: np.ndarray) -> None:
    """Raises ValueError, with the count, unless every sample is finite."""
    if not finite.all():
        raise ValueError(
            f"{np.sum(~finite)} of {len(finite)} samples are not finite (NaN or infinity): the weights cannot be used, "
            "or not with this sampling.guidance, threshold and grid"
        )


def everywhere(flag: bool) -> bool:
    """Returns what the first process found, for all must do the same."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag))) if jax.process_count() > 1 else flag


def remove_parts(folder: Path) -> None:
    """Removes the batches that `draw` wrote."""
    shutil.rmtree(folder, ignore_errors=True)
