"""Text to image on any pictures with captions: a folder of them with captions.jsonl, or a TFDS set.

    python -m experiments.captions --config.data.name=folder --config.data.dir=DIR --config.evaluation.dir=OTHER
    python -m experiments.captions --config.data.name=tfds:coco_captions
    python -m experiments.captions --workdir=runs/captions_mmdit --mode=sample --prompt="a dog on a beach"

DIR and OTHER hold pictures and captions.jsonl, a line {"image": "name.png", "caption": "..."} for each pair; those of
OTHER are kept from training. Words are learned with the network, or the prompt is read by a CLIP trained before:
--config.text.encoder=clip --config.text.clip=runs/CLIP (experiments.clip trains one on the same pairs, or imports one).
"""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion import evaluation
from diffusion.data.captions import CaptionedSource
from diffusion.data.images import save_labelled_png
from diffusion.data.sources import array_source
from diffusion.evaluation.clip_features import Encoder
from experiments import image_evaluation, image_text, text_modes, text_to_image
from experiments.caption_sources import captioned_source
from experiments.command_line import Run, main
from experiments.image_modes import Trained
from experiments.text_encoders import frequent_words
from experiments.text_to_image import Parts

NUM_SHOWN = 24


def make_parts(run: Run, captions: tuple[str, ...] = ()) -> Parts:
    """Returns what the run's config stands for; a run that starts learns the words of `captions`."""
    size = run.config.data.image_size
    words = frequent_words(captions, run.config.text.size)
    return text_to_image.make_parts(run.config, (size, size, 3), words, text_modes.stored_text(run))


def train(run: Run) -> None:
    """Trains, and evaluates where there are held-out pairs to do it on."""
    captioned = captioned_source(run.config, "train", run.config.data.image_size)
    parts = make_parts(run, captioned.captions)
    shown = np.linspace(0, len(captioned.captions) - 1, NUM_SHOWN).astype(int)
    trained = text_modes.train(run, parts, captioned, [captioned.captions[i] for i in shown])
    if run.config.evaluation.after_training:
        measure(run, parts, trained)


def evaluate(run: Run) -> None:
    """Draws a picture of each of many held-out captions and compares them with the pictures that these belong to."""
    parts = make_parts(run)
    measure(run, parts, text_modes.load(run, parts, a_batch(run)))


def measure(run: Run, parts: Parts, trained: Trained) -> None:
    """Does so; writes report.json, report.md, curves.png and captions.png into the run's folder."""
    settings = run.config.evaluation
    source, captions = held_out(run)
    extractor = evaluation.make_extractor(settings.features, settings.weights)
    evaluation.check_names(settings.metrics, extractor)  # before hours of sampling
    judge = load_judge(settings.judge) if settings.judge else None
    count = min(run.flags.num_samples or settings.num_samples, source.num_examples)
    rows = np.sort(np.random.RandomState(0).permutation(source.num_examples)[:count])
    real = source.read(rows)
    prompts = [captions[label] for label in real["label"]]
    images = text_modes.generate(run, parts, trained, prompts, np.arange(count))
    if jax.process_index() != 0:
        return
    reference = evaluation.reference_set(source, extractor)
    seeds = [run.flags.seed]
    measurements = image_evaluation.score(run, trained, [images], seeds, list(settings.metrics), extractor, reference)
    if judge:
        made: dict[str, Any] = image_evaluation.made_by(run, trained, seeds, extractor, None) | {"features": judge.name}
        unmade: dict[str, Any] = made | {"sampler": "real images", "num_steps": None, "seeds": [], "ema": None}
        for name, pictures, how in (("CLIP score", images, made), ("that of the real pictures", real["image"], unmade)):
            value = float(evaluation.clip_score(judge, pictures, prompts).mean())
            measurements.append(evaluation.Measurement(name, value, count, note="100 max(0, cosine)", **how))
    about = {"experiment": run.experiment, "steps trained": trained.step, "device": jax.devices()[0].device_kind}
    evaluation.write_report(run.workdir, f"{run.experiment} after {trained.step} steps", measurements, about)
    evaluation.draw_curves(run.workdir / "metrics.jsonl", run.workdir / "curves.png")
    pairs = np.stack([images, real["image"]], axis=1)[:NUM_SHOWN]  # each beside the picture that has the caption
    save_labelled_png(run.workdir / "captions.png", pairs, prompts[:NUM_SHOWN])
    print((run.workdir / "report.md").read_text(), end="")


def load_judge(folder: str) -> Encoder:
    """Returns the CLIP in a folder: a published one, or the work folder of experiments.clip."""
    published = (Path(folder) / "config.json").exists()
    return evaluation.load_encoder(folder) if published else image_text.load(Path(folder)).encoder


def held_out(run: Run) -> CaptionedSource:
    """Returns the pairs that are kept from training."""
    return captioned_source(run.config, "held_out", run.config.data.image_size)


def a_batch(run: Run) -> CaptionedSource:
    """Returns a batch of nothing, to know its shapes without the data."""
    data = run.config.data
    image = np.zeros((data.batch_size, data.image_size, data.image_size, 3), np.uint8)
    return CaptionedSource(array_source(image, np.zeros(len(image), np.int32), "nothing", "none", 1), ("",))


MODES = {
    "train": train,
    "evaluate": evaluate,
    **text_modes.make_modes(make_parts, shapes=a_batch, images=held_out, examples=[]),
}


if __name__ == "__main__":
    main(__file__, __doc__, default_config="captions_mmdit.py", modes=MODES, extra_flags=text_modes.define_flags)
