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
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from tokenizers import Tokenizer

from diffusion import evaluation, training
from diffusion.data import captions, scenes, text
from diffusion.data.named import named_captions
from diffusion.data.pictures import decode
from diffusion.data.sources import Source, facts_of
from diffusion.evaluation import Measurement, clip_features
from diffusion.evaluation.clip_features import Encoder, normalised
from diffusion.model import clip as contrastive_model
from diffusion.model import formats
from diffusion.model.config import Config, check_ranges, make_settings, plain
from diffusion.runs import clip_weights, compare, target, weights
from diffusion.runs.call import Call, Task, held_out
from diffusion.runs.check import try_out
from diffusion.runs.modes import main
from diffusion.runs.report import REAL, finish_run
from diffusion.training.started import process_start

# What is said of a class is averaged over all sizes, and over all colours (of digits) or digits (of colours).
TEMPLATES = ("a {} {}", "a small {} {}", "a large {} {}", "a {} {} in the middle", "a {} {} on the left")


def read(config: Config, split: str) -> Source:
    """Returns the pictures and captions of a split: "train" or "held_out", of scenes also "test"."""
    data, held_out = config.data, config.evaluation
    if data.name == "scenes":
        count = data.num_examples if split == "train" else held_out.num_examples
        return scenes.scenes(split, data.image_size, count)
    return named_captions(
        data.name,
        "train" if split == "train" else "test",
        data_dir=data.dir,
        held_out_dir=held_out.dir,
        train_split=data.split,
        held_out_split=held_out.split,
        image_size=data.image_size,
        skip_broken=data.skip_broken,
    )


def train_clip(call: Call) -> None:
    """Trains, then evaluates."""
    config = call.config
    if config.evaluation.after_training:
        ready(call)
    clip, tokenizer, source, experiment = prepare(call)
    description = {
        "experiment": call.task.name,
        "config": plain(config),
        "vocabulary": text.to_json(tokenizer),
        "data": facts_of(source),
    }
    state = training.train(
        experiment,
        make_settings(config),
        workdir=call.workdir,
        mesh=call.mesh,
        description=description,
        migrate=formats.current,
        writers=call.writers,
        started=process_start(),
    )
    if config.evaluation.after_training:
        measure(call, contrastive_model.make_trained(config, clip, tokenizer, state))


def prepare(call: Call) -> tuple[contrastive_model.CLIP, Tokenizer, Source, training.Experiment]:
    """Returns the model of a call, its vocabulary, the training pairs and the experiment on them."""
    captioned = read(call.config, "train")
    tokenizer = make_tokenizer(call, captioned.captions)
    clip = contrastive_model.make_clip(call.config, tokenizer)
    source = captions.with_text(captioned, lambda said: text.encode(tokenizer, said, call.config.text.length))
    return clip, tokenizer, source, contrastive_model.make_contrast(call.config, clip, source)


def check(call: Call) -> None:
    """Prints the findings of a dry run."""
    _, _, source, experiment = prepare(call)
    try_out(call, experiment, source)


def make_tokenizer(call: Call, said: Sequence[str]) -> Tokenizer:
    """Returns CLIP's vocabulary where config.text.merges names its file, else one trained on these captions.

    A run that is resumed keeps the vocabulary in its checkpoint.
    """
    if call.stored:
        return text.from_json(call.stored["vocabulary"])
    settings = call.config.text
    return text.clip_tokenizer(settings.merges) if settings.merges else text.train_tokenizer(said, settings.size)


def splits_of(config: Config) -> tuple[str, ...]:
    """Returns the splits that are measured."""
    return ("test", "held_out") if config.data.name == "scenes" else ("held_out",)


def ready(call: Call) -> None:
    """Checks what `measure` needs before training: the splits, with pairs enough."""
    check_ranges(call.config)
    held_out(call)
    for split in splits_of(call.config):
        draw_pairs(read(call.config, split), call.config.evaluation.num_candidates, 0)


def evaluate(call: Call) -> None:
    """Measures retrieval and zero-shot classification; writes report.json, report.md and curves.png."""
    measure(call, open_trained(call))


def open_trained(call: Call) -> contrastive_model.Trained:
    """Returns the trained CLIP of a call."""
    return contrastive_model.open_clip(call.workdir, call.mesh, call.flags.checkpoint)


def measure(call: Call, trained: contrastive_model.Trained) -> None:
    """Does so."""
    config = call.config
    if jax.process_index() != 0:
        return
    measurements = []
    for split in splits_of(config):
        captioned = read(config, split)
        made: dict[str, Any] = REAL | {
            "features": f"CLIP, step {trained.step}",
            "reference": evaluation.reference_of(captioned),
            "ema": config.training.ema_decay,
        }
        num_candidates = config.evaluation.num_candidates
        seeds = list(range(config.evaluation.num_sets))
        rates = [retrieval(trained.encoder, captioned, num_candidates, seed) for seed in seeds]
        means = {name: float(np.mean([rate[name] for rate in rates])) for name in rates[0]}
        name = f"retrieval among {num_candidates}, {split}"
        note = f"mean of {len(rates)} draws of {num_candidates} pictures, no picture and no caption twice"
        count = num_candidates * len(rates)
        made |= {"seeds": seeds}
        measurements.append(Measurement(name, means, count, **made, note=note))
        if config.data.name == "scenes":
            for what, value, count in zero_shot(trained.encoder, split, config):
                name = f"zero-shot accuracy of the {what}, {split}"
                made |= {"seeds": [1]}
                measurements.append(Measurement(name, value, count, **made))
    finish_run(call.workdir, call.task.name, trained.step, measurements, writers=call.writers)


def retrieval(encoder: Encoder, captioned: Source, count: int, seed: int) -> dict[str, float]:
    """Returns recall@1 and @5 both ways among `count` pairs drawn by `seed`."""
    pictures, prompts = draw_pairs(captioned, count, seed)
    image, said = normalised(encoder.image(pictures)), normalised(encoder.text(prompts))
    similarity = image @ said.T
    rates = {}
    for name, matrix in (("image to text", similarity), ("text to image", similarity.T)):
        rates |= {f"{name} R@{k}": clip_features.recall(matrix, k) for k in (1, 5)}
    return rates


def draw_pairs(captioned: Source, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """Returns `count` pictures and their captions, drawn by `seed`: no picture and no caption twice.

    Raises:
      ValueError: there are not so many.
    """
    order = np.random.RandomState(seed).permutation(captioned.num_examples)
    pictures, prompts, seen = [], [], set()
    for start in range(0, len(order), 256):  # a large set is read no further than need be
        batch = captioned.read(order[start : start + 256])
        for picture, row in zip(batch["image"], batch["label"].tolist(), strict=True):
            pair = {row, hashlib.sha256(picture).digest()}
            if not seen & pair and len(pictures) < count:
                seen |= pair
                pictures.append(picture)
                prompts.append(captioned.captions[row])
        if len(pictures) == count:
            return np.stack(pictures), prompts
    raise ValueError(f"{len(pictures)} different pairs, {count} are needed: lower evaluation.num_candidates")


def zero_shot(encoder: Encoder, split: str, config: Config) -> list[tuple[str, float, int]]:
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


def score(call: Call) -> None:
    """Prints CLIP scores, 100 max(0, cosine), of every --images with every one of --prompts, and the softmax."""
    prompts = [prompt.strip() for prompt in (call.flags.prompts or "").split(";")]
    if not all(prompts) or not call.flags.images:
        raise ValueError('give --images=a.png,b.png and --prompts="one prompt;another"')
    if files := [prompt for prompt in prompts if Path(prompt).is_file()]:
        raise ValueError(f"--prompts={files[0]} names a file: give the prompts themselves, with ; between them")
    encoder = open_trained(call).encoder
    # Of any shape: the encoder crops and resizes them as CLIP's own code does.
    pictures = [decode(Path(path).expanduser(), channels=3) for path in call.flags.images]
    image = np.concatenate([encoder.image(picture[None]) for picture in pictures])
    cosine = normalised(image) @ normalised(encoder.text(prompts)).T
    odds = np.exp(encoder.scale * (cosine - cosine.max(axis=1, keepdims=True)))
    share = odds / odds.sum(axis=1, keepdims=True)
    width = max(len(path) for path in call.flags.images)
    for number, prompt in enumerate(prompts, 1):
        print(f"prompt {number}: {prompt}")
    print(" " * width + "".join(f"{f'prompt {n}':>18}" for n in range(1, len(prompts) + 1)))
    for path, row, shares in zip(call.flags.images, 100 * np.maximum(cosine, 0), share, strict=True):
        print(f"{path:<{width}}" + "".join(f"{s:>10.1f} ({p:>5.1%})" for s, p in zip(row, shares, strict=True)))


def define_flags(values: flags.FlagValues) -> None:
    """Defines the flags of --mode=score, import, export and check."""
    flags.DEFINE_list("images", [], "score: pictures", flag_values=values)
    flags.DEFINE_string("prompts", None, "score: prompts, with ; between them", flag_values=values)
    weights.define_flags(values)
    target.define_flags(values)
    compare.define_flags(values)


MODES = {
    "train": train_clip,
    "check": check,
    "evaluate": evaluate,
    "score": score,
    "compare": compare.compare,
    "import": clip_weights.import_weights,
    "export": clip_weights.export_weights,
}

TASK = Task("clip", read)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="clip", modes=MODES, extra_flags=define_flags)
