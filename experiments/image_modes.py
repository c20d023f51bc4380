"""The modes of the image experiments: train, sample, evaluate."""

import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffusion import evaluation, training
from diffusion.data.images import image_grid, save_png
from diffusion.data.samples import save_samples
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
    draw_samples(run, source, load(run, source), run.flags.num_samples or 64)


def draw_samples(run: Run, source: Source, trained: Trained, num_samples: int, shown: int = 100) -> np.ndarray:
    """Generates samples, writes them to --out and the first `shown` as a grid to the .png beside it; returns them."""
    settings, seed = run.config.sampling, run.flags.seed
    name = f"step{trained.step}_{settings.sampler}{settings.num_steps}_seed{seed}_n{num_samples}.npz"
    out = Path(run.flags.out or run.workdir / "samples" / name)
    images = generate(run, source, trained, num_samples, seed)
    if jax.process_index() == 0:
        save_samples(out, images)
        save_png(out.with_suffix(".png"), image_grid(images[:shown]), smallest_side=720)
        print(f"{len(images)} samples: {out}\na picture of {min(shown, len(images))}: {out.with_suffix('.png')}")
    return images


def evaluate(run: Run, train: Source, test: Source, trained: Trained | None = None) -> None:
    """Scores samples against held-out real images, in pixel space; writes report.json, report.md and pictures.

    Of small images with classes also the share of each among the samples, told by a classifier of the real ones.
    """
    trained = trained or load(run, train)
    num_samples = run.flags.num_samples or run.config.evaluation.num_samples
    samples = draw_samples(run, train, trained, num_samples)
    if jax.process_index() != 0:
        return
    settings = run.config.sampling
    real = train.read(np.arange(train.num_examples))
    held_out = test.read(np.arange(test.num_examples))
    score = evaluation.held_out_score(samples, real["image"], held_out["image"])
    made = {
        "num_samples": score.count,
        "features": f"pixels in [-1, 1], {np.prod(train.image_shape)} values",
        "reference": evaluation.reference_of(train),
        "sampler": settings.sampler,
        "num_steps": settings.num_steps,
        "seeds": [run.flags.seed],
        "ema": run.config.training.ema_decay,
    }
    unseen = {**made, "sampler": f"real images, {test.name} {test.split}", "num_steps": None, "seeds": [], "ema": None}
    measurements = [
        evaluation.Measurement("Fréchet distance of samples", score.samples, **made),
        evaluation.Measurement("Fréchet distance of held-out real images", score.held_out, **unseen),
        evaluation.Measurement("the first over the second", score.ratio, **made, note="1 is as good as unseen images"),
    ]
    # A machine on pixels: it reads digits, but not photographs.
    if train.num_classes is not None and np.prod(train.image_shape) <= 256:
        classify = evaluation.fit_classifier(real["image"], real["label"])
        right = float(np.mean(classify(held_out["image"]) == held_out["label"]))
        shares = evaluation.class_shares(classify(samples), train.num_classes)
        named = {str(number): float(share) for number, share in enumerate(shares)}
        note = f"told by a support vector machine that reads {right:.1%} of the held-out images"
        measurements.append(
            evaluation.Measurement("share of each class", named, **{**made, "num_samples": len(samples)}, note=note)
        )
    about = {"experiment": run.experiment, "steps trained": trained.step, "device": jax.devices()[0].device_kind}
    evaluation.write_report(run.workdir, f"{run.experiment} after {trained.step} steps", measurements, about)
    evaluation.draw_curves(run.workdir / "metrics.jsonl", run.workdir / "curves.png")
    print((run.workdir / "report.md").read_text(), end="")
