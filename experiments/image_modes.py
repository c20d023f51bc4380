"""--mode=train and --mode=sample of the image experiments, and the samples every evaluation begins with."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from diffusion.data.samples import save_samples
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffusion import training
from diffusion.data.images import image_grid, save_png
from diffusion.data.sources import Source
from diffusion.training.checkpoints import open_existing
from experiments import image_diffusion
from experiments.command_line import Run


class Trained(NamedTuple):
    """The averaged weights of a run, and after how many steps."""

    ema: Any
    step: int


def train(run: Run, source: Source) -> Trained:
    """Trains, or goes on training, in the run's folder."""
    experiment = image_diffusion.make_experiment(run.config, source, run.mesh)
    settings = image_diffusion.make_settings(run.config)
    state = training.train(experiment, settings, workdir=run.workdir, mesh=run.mesh, description=run.description)
    return Trained(state.ema, int(state.step))


def load(run: Run, source: Source) -> Trained:
    """Returns the newest weights in the run's folder, on this machine's devices whatever they were saved from."""
    experiment = image_diffusion.make_experiment(run.config, source, run.mesh)
    settings = image_diffusion.make_settings(run.config)
    shape = (run.config.data.batch_size, *source.image_shape)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, np.uint8),
        "label": jax.ShapeDtypeStruct(shape[:1], np.int32),
    }
    abstract = training.abstract_train_state(experiment, settings, run.mesh, batch)
    with open_existing(run.workdir) as checkpoints:
        state = checkpoints.restore(abstract)
    return Trained(state.ema, int(state.step))


def generate(run: Run, source: Source, trained: Trained, num_samples: int, seed: int) -> np.ndarray:
    """Returns uint8[num_samples, H, W, C]: images 0, 1, ... of `seed`, the same whatever the devices or batches."""
    diffusion = image_diffusion.make_diffusion(run.config)
    network = image_diffusion.make_network(run.config, source, diffusion)
    generate_batch = image_diffusion.make_generate(run.config, source, network, diffusion, run.mesh)
    batch_size = image_diffusion.round_up(min(run.config.sampling.batch_size, num_samples), run.mesh.size)
    images = []
    for first in tqdm(range(0, num_samples, batch_size), desc="sampling", unit="batch", file=sys.stderr):
        # The last batch is full too, and cut afterwards: one program is compiled for all.
        batch = generate_batch(trained.ema, np.uint32(seed), np.arange(first, first + batch_size))
        images.append(multihost_utils.process_allgather(batch, tiled=True))
    return np.concatenate(images)[:num_samples]


def sample(run: Run, source: Source) -> None:
    """Writes --num_samples images as .npz (`arr_0`, uint8 [N, H, W, C]) and as a PNG grid beside it."""
    trained = load(run, source)
    settings = run.config.sampling
    num_samples = run.flags.num_samples or 64
    name = f"step{trained.step}_{settings.sampler}{settings.num_steps}_seed{run.flags.seed}_n{num_samples}.npz"
    out = Path(run.flags.out or run.workdir / "samples" / name)
    images = generate(run, source, trained, num_samples, run.flags.seed)
    write_samples(out, images)


def write_samples(out: Path, images: np.ndarray, shown: int = 100) -> None:
    """Writes `images` to `out` and the first `shown` of them as a grid to the .png beside it, from process 0."""
    if jax.process_index() == 0:
        save_samples(out, images)
        save_png(out.with_suffix(".png"), image_grid(images[:shown]))
        print(f"{len(images)} samples: {out}\na picture of {min(shown, len(images))}: {out.with_suffix('.png')}")
