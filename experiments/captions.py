"""Text to image on any pictures with captions: a folder of them with captions.jsonl, or a TFDS set.

    python -m experiments.captions --config.data.name=folder --config.data.dir=DIR --config.evaluation.dir=OTHER
    python -m experiments.captions --config.data.name=tfds:coco_captions
    python -m experiments.captions --workdir=runs/captions --mode=sample --prompt="a dog on a beach"

DIR and OTHER hold pictures and captions.jsonl, a line {"image": "name.png", "caption": "..."} for each pair; those of
OTHER are kept from training. Words are learned with the network, or the prompt is read by a CLIP trained before:
--config.condition.name=clip --config.condition.folder=runs/CLIP (experiments.clip trains one on the same pairs, or
imports one).
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion import evaluation
from diffusion.data.images import save_labelled_png
from diffusion.data.named import named_captions
from diffusion.data.sources import Source
from diffusion.evaluation import Measurement
from diffusion.evaluation.clip_features import Encoder
from diffusion.model import clip
from diffusion.model.config import Config
from diffusion.runs.call import TEST, Call, Task, held_out, refuse_flags
from diffusion.runs.draw import draw
from diffusion.runs.evaluate import score as score_sets
from diffusion.runs.modes import main
from diffusion.runs.report import REAL, made_by
from diffusion.runs.run import Run

NUM_SHOWN = 24


def read(config: Config, split: str) -> Source:
    """Returns the pairs of a split, "train" or the held-out "test"."""
    data, held_out = config.data, config.evaluation
    return named_captions(
        data.name,
        split,
        data_dir=data.dir,
        held_out_dir=held_out.dir,
        train_split=data.split,
        held_out_split=held_out.split,
        image_size=data.image_size,
        skip_broken=data.skip_broken,
        buckets=data.get("buckets", 0),
        references=data.get("references", 0),
    )


def draw_held_out(call: Call, run: Run) -> tuple[Source, np.ndarray, list[str], np.ndarray]:
    """Returns the held-out pairs, real pictures of some, their captions, and a drawn picture of each caption."""
    source = call.task.read(call.config, TEST)
    if source.image_shape != run.model.space.image_shape:
        raise ValueError(
            f"{run.workdir} draws images of shape {run.model.space.image_shape}, and the held-out ones have "
            f"{source.image_shape}: crop all to one by data.image_size"
        )
    count = min(call.flags.num_samples or run.config.evaluation.num_samples, source.num_examples)
    rows = np.sort(np.random.RandomState(0).permutation(source.num_examples)[:count])
    real = source.read(rows)
    prompts = [source.captions[label] for label in real["label"]]
    references = list(real.get("reference_image", np.empty((0, 0))).swapaxes(0, 1))
    images = draw(run.painter, prompts, np.arange(count), call.flags.seed, references=references)
    return source, real["image"], prompts, images


def metrics_of(call: Call) -> list[str]:
    """Returns --metrics, or the config's. Raises ValueError where there are none."""
    names = list(call.flags.metrics or call.config.evaluation.metrics)
    if not names:
        raise ValueError("evaluation.metrics is empty: name at least one, as ('kid',)")
    return names


def score(call: Call, run: Run) -> Measurement:
    """Returns the first metric of the config on pictures of held-out captions: what sweeps draw."""
    names, settings = metrics_of(call)[:1], run.config.evaluation
    extractor = evaluation.make_extractor(settings.features, settings.weights)
    evaluation.check_names(names, extractor)  # before pictures are drawn
    source, _, _, images = draw_held_out(call, run)
    reference = evaluation.reference_set(source, extractor)
    samples = evaluation.extract(images, extractor, reference)
    return score_sets(run, [samples], [call.flags.seed], names, extractor, reference)[0]


def ready(call: Call) -> None:
    """Checks what `evaluate` needs: held-out pairs, features, metrics."""
    refuse_flags(call, "num_seeds", "out")
    settings = call.config.evaluation
    extractor = evaluation.make_extractor(settings.features, settings.weights)
    source = held_out(call)
    count = min(call.flags.num_samples or settings.num_samples, source.num_examples)
    evaluation.check_names(metrics_of(call), extractor, num_samples=count, num_reference=source.num_examples)
    if settings.judge:
        load_judge(settings.judge)


def evaluate(call: Call, run: Run) -> list[Measurement]:
    """Returns scores of pictures of many held-out captions against the pictures that these belong to.

    Draws captions.png, each picture beside the real one.
    """
    settings = run.config.evaluation
    extractor = evaluation.make_extractor(settings.features, settings.weights)
    judge = load_judge(settings.judge) if settings.judge else None
    source, real, prompts, images = draw_held_out(call, run)
    if jax.process_index() != 0:
        return []
    seeds = [call.flags.seed]
    reference = evaluation.reference_set(source, extractor)
    samples = evaluation.extract(images, extractor, reference)
    measurements = score_sets(run, [samples], seeds, metrics_of(call), extractor, reference)
    if judge:
        how: dict[str, Any] = {"features": judge.name, "reference": None, "note": "100 max(0, cosine)"}
        drawn: dict[str, Any] = made_by(run) | {"seeds": seeds}
        for name, pictures, made in (("CLIP score", images, drawn), ("that of the real pictures", real, REAL)):
            value = float(evaluation.clip_score(judge, pictures, prompts).mean())
            measurements.append(Measurement(name, value, len(prompts), **how, **made))
    pairs = np.stack([images, real], axis=1)[:NUM_SHOWN]  # each beside the picture that has the caption
    save_labelled_png(run.workdir / "captions.png", pairs, prompts[:NUM_SHOWN])
    return measurements


def load_judge(folder: str) -> Encoder:
    """Returns the CLIP in a folder: a published one, or the work folder of experiments.clip."""
    path = Path(folder).expanduser()
    is_run = (path / "checkpoints").is_dir()
    return clip.open_clip(path).encoder if is_run else evaluation.load_encoder(path)


TASK = Task("captions", read, evaluate, ready, score)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="captions")
