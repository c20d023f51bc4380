"""The modes that every image experiment has, and its command line: `main(__file__, __doc__, ...)`."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from tqdm import tqdm

from diffusion import training
from diffusion.data.images import image_grid, save_png
from diffusion.data.samples import load_samples, save_samples
from diffusion.data.sources import Source
from diffusion.files import replacing
from diffusion.training import RunError, snapshots
from diffusion.training.checkpoints import open_existing
from experiments import command_line, image_diffusion
from experiments.command_line import Config, Run

FAR = 0.1  # an average whose profile misses by more is another one


class Trained(NamedTuple):
    """Averaged weights of a run, after how many steps, and which average: its decay, or "power SIGMA_REL"."""

    ema: Any
    step: int
    average: float | str | None = None


def main(file: str, doc: str | None, *, default_config: str, make_source: Callable[[Config, str], Source]) -> NoReturn:
    """Runs the image experiment in `file`: `make_source(config, split)` gives its images ("train" and "test")."""
    from experiments import image_check, image_evaluation, image_likelihood, image_uses

    def train_and_evaluate(run: Run) -> None:
        source = make_source(run.config, "train")
        trained = train(run, source)
        if run.config.evaluation.after_training:
            image_evaluation.evaluate(run, source, make_source(run.config, "test"), trained)

    def on(split: str, mode: Callable[[Run, Source], None]) -> command_line.Mode:
        return lambda run: mode(run, make_source(run.config, split))

    def on_both(mode: Callable[[Run, Source, Source], None]) -> command_line.Mode:
        return lambda run: mode(run, make_source(run.config, "train"), make_source(run.config, "test"))

    modes = {
        "train": train_and_evaluate,
        "check": on("train", image_check.check),
        "sample": on("train", sample),
        "evaluate": on_both(image_evaluation.evaluate),
        "sweep": on("train", image_evaluation.sweep),
        "likelihood": on("test", image_likelihood.bits_per_dim),
        **image_uses.make_modes(lambda run: make_source(run.config, "test")),
    }

    def define_all(values: flags.FlagValues) -> None:
        define_flags(values)
        image_evaluation.define_flags(values)
        image_uses.define_flags(values)

    command_line.main(file, doc, default_config=default_config, modes=modes, extra_flags=define_all)


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flag of `load`."""
    flags.DEFINE_float(
        "ema_length",
        None,
        "take the power-function average of this relative length in place of the run's own (Karras et al. 2024)",
        flag_values=values,
    )


def train(run: Run, source: Source) -> Trained:
    """Trains, or goes on training, in the run's folder."""
    experiment = image_diffusion.make_experiment(run.config, source, run.mesh)
    settings = image_diffusion.make_settings(run.config)
    state = training.train(experiment, settings, workdir=run.workdir, mesh=run.mesh, description=run.description)
    return Trained(state.ema, int(state.step), settings.ema_decay)


def load(run: Run, source: Source, ema_length: float | None = None) -> Trained:
    """Returns the newest weights in the run's folder, or those of --checkpoint, whatever devices they were saved from.

    With `ema_length` (or --ema_length) the average of that length is made of the stored ones, at the last stored step.

    Raises:
      RunError: there are none, or no such average can be made of what is stored.
    """
    experiment = image_diffusion.make_experiment(run.config, source, run.mesh)
    settings = image_diffusion.make_settings(run.config)
    shape = (run.config.data.batch_size, *source.image_shape)
    batch = {
        "image": jax.ShapeDtypeStruct(shape, np.uint8),
        "label": jax.ShapeDtypeStruct(shape[:1], np.int32),
    }
    abstract = training.abstract_train_state(experiment, settings, run.mesh, batch)
    asked = run.flags.ema_length if ema_length is None and "ema_length" in run.flags else ema_length
    if asked is None:
        with open_existing(run.workdir, run.flags.checkpoint) as checkpoints:
            state = checkpoints.restore(abstract)
        return Trained(state.ema, int(state.step), settings.ema_decay)
    if run.flags.checkpoint is not None:
        raise RunError("averages of other lengths are made at the last stored step: leave --checkpoint out")
    average = snapshots.reconstruct(run.workdir, asked, abstract.ema)
    if average.error > FAR:
        raise RunError(
            f"an average of length {asked:g} cannot be made of those stored in {run.workdir}: its profile would be off "
            f"by {average.error:.0%}; lengths near {', '.join(map(str, settings.ema_profiles))} can"
        )
    params = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), average.params, abstract.ema)
    return Trained(params, max(snapshots.stored_steps(run.workdir)), f"power {asked:g}")


def generate(
    run: Run, source: Source, trained: Trained, num_samples: int, seed: int, parts: Path | None = None
) -> np.ndarray:
    """Returns uint8[num_samples, H, W, C]: images 0, 1, ... of `seed`, the same whatever the devices or batches.

    With `parts`, a folder, every batch is written there as it is made, and read from there if a call that was killed
    has left it. The caller removes the folder.
    """
    diffusion = image_diffusion.make_diffusion(run.config)
    network = image_diffusion.make_network(run.config, source, diffusion)
    generate_batch = image_diffusion.make_generate(run.config, source, network, diffusion, run.mesh)
    batch_size = image_diffusion.round_up(min(run.config.sampling.batch_size, num_samples), run.mesh.size)
    images = []
    for first in tqdm(range(0, num_samples, batch_size), desc="sampling", unit="batch", file=sys.stderr):
        path = parts and parts / f"{first:08d}_{batch_size}.npz"
        if path and everywhere(path.exists()):
            images.append(load_samples(path))
            continue
        # The last batch is full too, and cut afterwards: one program is compiled for all.
        batch = generate_batch(trained.ema, np.uint32(seed), np.arange(first, first + batch_size))
        images.append(multihost_utils.process_allgather(batch, tiled=True))
        if path and jax.process_index() == 0:
            save_samples(path, images[-1])
    return np.concatenate(images)[:num_samples]


def everywhere(flag: bool) -> bool:
    """Returns what the first process says, for all must do the same."""
    return bool(multihost_utils.broadcast_one_to_all(np.asarray(flag))) if jax.process_count() > 1 else flag


def sample(run: Run, source: Source) -> None:
    """Writes --num_samples images as .npz (`arr_0`, uint8 [N, H, W, C]) and as a PNG grid beside it."""
    draw_samples(run, source, load(run, source), run.flags.num_samples or 64, run.flags.seed, run.flags.out)


def draw_samples(
    run: Run,
    source: Source,
    trained: Trained,
    num_samples: int,
    seed: int,
    out: str | Path | None = None,
    shown: int = 100,
) -> np.ndarray:
    """Returns samples; writes them to `out`, the first `shown` as a grid to the .png and how they were made to .json.

    A call that was killed goes on where it was, and samples that are there already, made in the same way of the same
    weights, are read.
    """
    settings = run.config.sampling
    name = f"step{trained.step}_{settings.sampler}{settings.num_steps}_seed{seed}_n{num_samples}.npz"
    out = Path(out or run.workdir / "samples" / name)
    config = run.description["config"]
    made = {  # what a sample depends on; not, for one, what is to be measured of it
        "experiment": run.experiment,
        **{name: config[name] for name in ("network", "process", "loss", "sampling")},
        "step": trained.step,
        "average": trained.average,
        "weights": digest(trained.ema),
        "seed": seed,
        "num_samples": num_samples,
    }
    text = json.dumps(made, indent=2) + "\n"
    note = out.with_suffix(".json")
    if everywhere(out.exists() and note.exists() and note.read_text() == text):
        images = load_samples(out)
        say(f"{len(images)} samples made before: {out}")
        return images
    parts = out.with_name(f".{out.stem}-{hashlib.sha256(text.encode()).hexdigest()[:16]}")
    images = generate(run, source, trained, num_samples, seed, parts)
    if jax.process_index() == 0:
        save_samples(out, images)
        save_png(out.with_suffix(".png"), image_grid(images[:shown]), smallest_side=720)
        with replacing(note) as temporary:
            temporary.write_text(text)
        shutil.rmtree(parts)
    say(f"{len(images)} samples: {out}\na picture of {min(shown, len(images))}: {out.with_suffix('.png')}")
    return images


def say(line: str) -> None:
    """Prints, once for all processes."""
    if jax.process_index() == 0:
        print(line)


def digest(params: Any) -> str:
    """Returns "sha256:..." over all weights."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(multihost_utils.process_allgather(leaf, tiled=True)).tobytes())
    return f"sha256:{total.hexdigest()}"
