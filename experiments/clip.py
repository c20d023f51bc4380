"""CLIP: trained on captioned scenes in minutes on a CPU, without a download, or on pictures and captions of your own.

    ./launch.sh clip
    ./launch.sh clip --mode=evaluate
    ./launch.sh clip --mode=score --images=a.png,b.png --prompts="a red three;a blue four"
    ./launch.sh clip --config.data.name=folder --config.data.dir=DIR --config.evaluation.dir=OTHER
    ./launch.sh clip --config.data.name=tfds:coco_captions --config.evaluation.split=val
    ./launch.sh clip --mode=import --weights=clip-vit-base-patch32 --workdir=runs/published

DIR holds the pictures and captions.jsonl, a line {"image": "name.png", "caption": "..."} for each pair. The last makes
a run of a published CLIP, a folder as transformers reads it; --mode=export writes one.
"""

import hashlib
from collections.abc import Sequence

import jax
import numpy as np
from absl import flags
from tokenizers import Tokenizer

from diffusion import evaluation, training
from diffusion.data import captions, scenes, text
from diffusion.data.captions import CaptionedSource
from diffusion.evaluation import clip_features
from diffusion.evaluation.clip_features import Encoder, normalised
from diffusion.training import RunError
from diffusion.training.checkpoints import open_existing
from experiments import clip_weights, image_text
from experiments.command_line import Run, main

# What is said of a class is averaged over all sizes, and over all colours (of digits) or digits (of colours).
TEMPLATES = ("a {} {}", "a small {} {}", "a large {} {}", "a {} {} in the middle", "a {} {} on the left")


def train(run: Run) -> None:
    """Trains, then evaluates."""
    config = run.config
    captioned = image_text.make_source(config, "train")
    tokenizer = make_tokenizer(run, captioned.captions)
    clip = image_text.make_clip(config, tokenizer)
    source = captions.with_text(captioned, lambda said: text.encode(tokenizer, said, config.text.length))
    experiment = image_text.make_experiment(config, clip, source)
    settings = image_text.make_settings(config)
    description = {**run.description, "vocabulary": text.to_json(tokenizer)}
    state = training.train(experiment, settings, workdir=run.workdir, mesh=run.mesh, description=description)
    if config.evaluation.after_training:
        measure(run, image_text.make_trained(config, clip, tokenizer, state))


def make_tokenizer(run: Run, said: Sequence[str]) -> Tokenizer:
    """Returns CLIP's vocabulary where config.text.merges names its file, else one trained on these captions.

    A run that goes on keeps the vocabulary in its checkpoint.
    """
    try:
        with open_existing(run.workdir) as checkpoints:
            return text.from_json(checkpoints.description()["vocabulary"])
    except RunError:
        settings = run.config.text
        return text.clip_tokenizer(settings.merges) if settings.merges else text.train_tokenizer(said, settings.size)


def evaluate(run: Run) -> None:
    """Measures retrieval and zero-shot classification; writes report.json, report.md and curves.png."""
    measure(run, image_text.load(run.workdir, run.mesh, run.flags.checkpoint))


def measure(run: Run, trained: image_text.Trained) -> None:
    """Does so."""
    config = run.config
    if jax.process_index() != 0:
        return
    splits = ("test", "held_out") if config.data.name == "scenes" else ("held_out",)
    measurements = []
    for split in splits:
        captioned = image_text.make_source(config, split)
        made = {
            "features": f"CLIP, step {trained.step}",
            "reference": evaluation.reference_of(captioned.source),
            "sampler": "real images",
            "num_steps": None,
            "ema": config.training.ema_decay,
        }
        num_candidates = config.evaluation.num_candidates
        seeds = range(config.evaluation.num_sets)
        rates = [retrieval(trained.encoder, captioned, num_candidates, seed) for seed in seeds]
        means = {name: float(np.mean([rate[name] for rate in rates])) for name in rates[0]}
        name = f"retrieval among {num_candidates}, {split}"
        note = f"mean of {len(rates)} draws of {num_candidates} pictures, no picture and no caption twice"
        count = num_candidates * len(rates)
        measurements.append(evaluation.Measurement(name, means, count, seeds=list(seeds), note=note, **made))
        if config.data.name == "scenes":
            for what, value, count in zero_shot(trained.encoder, split, config):
                name = f"zero-shot accuracy of the {what}, {split}"
                measurements.append(evaluation.Measurement(name, value, count, seeds=[1], **made))
    about = {"experiment": run.experiment, "steps trained": trained.step, "device": jax.devices()[0].device_kind}
    evaluation.write_report(run.workdir, f"{run.experiment} after {trained.step} steps", measurements, about)
    evaluation.draw_curves(run.workdir / "metrics.jsonl", run.workdir / "curves.png")
    print((run.workdir / "report.md").read_text(), end="")


def retrieval(encoder: Encoder, captioned: CaptionedSource, count: int, seed: int) -> dict[str, float]:
    """Returns recall@1 and @5 both ways among `count` pairs drawn by `seed`."""
    pictures, prompts = draw_pairs(captioned, count, seed)
    image, said = normalised(encoder.image(pictures)), normalised(encoder.text(prompts))
    similarity = image @ said.T
    rates = {}
    for name, matrix in (("image to text", similarity), ("text to image", similarity.T)):
        rates |= {f"{name} R@{k}": clip_features.recall(matrix, k) for k in (1, 5)}
    return rates


def draw_pairs(captioned: CaptionedSource, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Returns `count` pictures and their captions, drawn by `seed`: no picture and no caption twice.

    Raises:
      ValueError: there are not so many.
    """
    order = np.random.RandomState(seed).permutation(captioned.source.num_examples)
    pictures, prompts, seen = [], [], set()
    for start in range(0, len(order), 256):  # a large set is read no further than need be
        batch = captioned.source.read(order[start : start + 256])
        for picture, row in zip(batch["image"], batch["label"].tolist(), strict=True):
            pair = {row, hashlib.sha256(picture).digest()}
            if not seen & pair and len(pictures) < count:
                seen |= pair
                pictures.append(picture)
                prompts.append(captioned.captions[row])
        if len(pictures) == count:
            return np.stack(pictures), prompts
    raise ValueError(f"{len(pictures)} different pairs, {count} are needed: lower evaluation.num_candidates")


def zero_shot(encoder: Encoder, split: str, config) -> list[tuple[str, float, int]]:
    """Returns (what, accuracy, number of pictures) for the digit and for the colour of single digits."""
    count, canvas = config.evaluation.num_single, config.data.image_size
    made = [scenes.scene(1, split, index, canvas, ("single",)) for index in range(count)]
    image = np.stack([scenes.draw(one, split, canvas) for one in made])
    objects = [one.objects[0] for one in made]

    def prompts(colours: Sequence[str], digits: Sequence[str]) -> list[str]:
        said = [template.format(c, d) for template in TEMPLATES for c in colours for d in digits]
        return [one.replace("a orange", "an orange") for one in said]

    colours = tuple(scenes.COLOURS)
    digit = clip_features.zero_shot(encoder, image, [prompts(colours, [name]) for name in scenes.DIGITS])
    colour = clip_features.zero_shot(encoder, image, [prompts([name], scenes.DIGITS) for name in colours])
    return [
        ("digit", float(np.mean(digit == [one.digit for one in objects])), count),
        ("colour", float(np.mean(colour == [colours.index(one.colour) for one in objects])), count),
    ]


def score(run: Run) -> None:
    """Prints CLIP scores, 100 max(0, cosine), of every --images with every one of --prompts, and the softmax."""
    prompts = [prompt.strip() for prompt in run.flags.prompts.split(";")] if run.flags.prompts is not None else []
    if not prompts or not run.flags.images:
        raise ValueError('give --images=a.png,b.png and --prompts="one prompt;another"')
    encoder = image_text.load(run.workdir, run.mesh, run.flags.checkpoint).encoder
    # Of any shape: the encoder crops and resizes them as CLIP's own code does.
    pictures = [np.asarray(captions.open_picture(path)) for path in run.flags.images]
    image = np.concatenate([encoder.image(picture[None]) for picture in pictures])
    cosine = normalised(image) @ normalised(encoder.text(prompts)).T
    odds = np.exp(encoder.scale * (cosine - cosine.max(axis=1, keepdims=True)))
    share = odds / odds.sum(axis=1, keepdims=True)
    width = max(len(path) for path in run.flags.images)
    for number, prompt in enumerate(prompts, 1):
        print(f"prompt {number}: {prompt}")
    print(" " * width + "".join(f"{f'prompt {n}':>18}" for n in range(1, len(prompts) + 1)))
    for path, row, shares in zip(run.flags.images, 100 * np.maximum(cosine, 0), share, strict=True):
        print(f"{path:<{width}}" + "".join(f"{s:>10.1f} ({p:>5.1%})" for s, p in zip(row, shares, strict=True)))


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of --mode=score, import and export."""
    flags.DEFINE_list("images", [], "score: pictures", flag_values=values)
    flags.DEFINE_string("prompts", None, "score: prompts, with ; between them", flag_values=values)
    flags.DEFINE_string("weights", None, "import, export: a folder as transformers reads it", flag_values=values)


MODES = {
    "train": train,
    "evaluate": evaluate,
    "score": score,
    "import": clip_weights.import_weights,
    "export": clip_weights.export_weights,
}

if __name__ == "__main__":
    main(__file__, __doc__, default_config="clip_scenes.py", modes=MODES, extra_flags=define_flags)
