"""Text to image on captioned scenes: trained, prompted and scored in an hour on a CPU, without a download.

    ./launch.sh scenes
    ./launch.sh scenes --mode=sample --prompt="a red three above a blue seven" --num_samples=16

Pictures and numbers are then in runs/scenes: report.md, curves.png, samples/ and previews/.
"""

from typing import Any

import jax
import numpy as np

from diffusion import evaluation
from diffusion.data import scenes
from diffusion.data.captions import CaptionedSource
from diffusion.data.images import save_labelled_png
from diffusion.evaluation import composition
from experiments import text_modes, text_to_image
from experiments.command_line import Run, from_plain, main, plain
from experiments.image_modes import Trained
from experiments.text_to_image import Parts

# Every word that a caption can hold.
VOCABULARY = sorted(
    {
        word
        for phrase in (
            *("a", "an", "and", *scenes.COLOURS, *scenes.DIGITS, *scenes.PLURALS, *scenes.SIZES),
            *scenes.RELATIONS,
            *(place for row in scenes.PLACES for place in row),
        )
        for word in phrase.split()
    }
)
NUM_SHOWN = 24
SEED = 2  # of the prompts that are measured
SAID = {"held_out": "never-seen combinations", "test": "seen combinations"}


def make_parts(run: Run) -> text_to_image.Parts:
    """Returns what the run's config stands for."""
    canvas = run.config.data.canvas
    return text_to_image.make_parts(run.config, (canvas, canvas, 3), VOCABULARY, text_modes.stored_text(run))


def train(run: Run) -> None:
    """Trains, then evaluates."""
    data, parts = run.config.data, make_parts(run)
    captioned = scenes.scenes("train", data.canvas, data.num_examples)
    trained = text_modes.train(run, parts, captioned, examples())
    if run.config.evaluation.after_training:
        measure(run, parts, trained)


def evaluate(run: Run) -> None:
    """Reads pictures of many prompts back."""
    parts = make_parts(run)
    measure(run, parts, text_modes.load(run, parts, a_batch(run)))


def measure(run: Run, parts: Parts, trained: Trained) -> None:
    """Measures how many pictures show what their prompts say; writes report.json, report.md, curves.png and samples.

    Prompts of the split "test" are combinations that training may show, those of "held_out" never. Beside the pictures'
    score stand the reader's on real ones, that of pictures read against another prompt, other scales of guidance, and
    what the same noise becomes under another prompt.
    """
    config, canvas = run.config, run.config.data.canvas
    read = composition.fit_reader(canvas)
    settings = config.sampling
    count = run.flags.num_samples or config.evaluation.num_samples
    swept_by: dict[str, Any] = {
        "sampler": settings.sampler,
        "num_steps": settings.num_steps,
        "seeds": [run.flags.seed],
        "ema": trained.average,
    }
    drawn = swept_by | {"sampler": f"{settings.sampler}, guidance {settings.guidance:g}"}
    real_images: dict[str, Any] = {"sampler": "real images", "num_steps": None, "seeds": [], "ema": None}
    shares: list[tuple[str, dict[str, float], int, dict[str, Any], str]] = []

    def draw(wanted: list[scenes.Scene], scale: float) -> np.ndarray:
        guided = from_plain(plain(config))
        guided.sampling.guidance = scale
        prompts = [one.caption for one in wanted]
        return text_modes.generate(run, parts._replace(config=guided), trained, prompts, np.arange(len(wanted)))

    for split in ("held_out", "test"):
        wanted = [scenes.scene(SEED, split, i, canvas) for i in range(count)]
        images = draw(wanted, settings.guidance)
        right = composition.wholly(wanted, images, read)
        real = np.stack([scenes.draw(one, split, canvas) for one in wanted])
        others = wanted[1:] + wanted[:1]
        shares += [
            (f"prompts wholly satisfied, {SAID[split]}", composition.by_kind(wanted, right), count, drawn, ""),
            (
                f"the same of real pictures, {SAID[split]}",
                composition.by_kind(wanted, composition.wholly(wanted, real, read)),
                count,
                real_images,
                "the reader's ceiling",
            ),
            (
                f"the same against another prompt, {SAID[split]}",
                {"all": float(composition.wholly(others, images, read).mean())},
                count,
                drawn,
                "each picture read against the next one's prompt",
            ),
        ]
        if jax.process_index() == 0:
            marks = [f"{'right' if ok else 'WRONG'}: {one.caption}" for ok, one in zip(right, wanted, strict=True)]
            path = run.workdir / f"composition_{split}.png"
            save_labelled_png(path, images[:NUM_SHOWN, None], marks[:NUM_SHOWN])
    wanted = [scenes.scene(SEED, "held_out", i, canvas) for i in range(config.evaluation.num_swept)]
    swept = {scale: composition.wholly(wanted, draw(wanted, scale), read) for scale in config.evaluation.guidance}
    values = {f"guidance {scale:g}": float(right.mean()) for scale, right in swept.items()}
    name = f"prompts wholly satisfied, {SAID['held_out']}"
    shares.append((name, values, len(wanted), swept_by, "by scale of guidance"))
    # From the same noise: what the picture shows is the prompt's doing.
    others = wanted[1:] + wanted[:1]
    replaced = draw(others, settings.guidance)
    agree = {
        "with the new prompt": float(composition.wholly(others, replaced, read).mean()),
        "with the old one": float(composition.wholly(wanted, replaced, read).mean()),
    }
    shares.append((f"prompt replaced, noise kept, {SAID['held_out']}", agree, len(wanted), drawn, ""))
    if jax.process_index() != 0:
        return
    measurements = [
        evaluation.Measurement(
            name,
            share,
            number,
            "digit, colour, size, place and number of what is in the picture, by support vector machines and hue",
            None,
            note=note,
            **made_by,
        )
        for name, share, number, made_by, note in shares
    ]
    about = {"experiment": run.experiment, "steps trained": trained.step, "device": jax.devices()[0].device_kind}
    evaluation.write_report(run.workdir, f"{run.experiment} after {trained.step} steps", measurements, about)
    evaluation.draw_curves(run.workdir / "metrics.jsonl", run.workdir / "curves.png")
    print((run.workdir / "report.md").read_text(), end="")


def a_batch(run: Run) -> CaptionedSource:
    """Returns just enough scenes to know a batch's shapes."""
    return scenes.scenes("train", run.config.data.canvas, run.config.data.batch_size)


def examples() -> list[str]:
    """Prompts in combinations that training scenes never show, of every kind in turn."""
    kinds = scenes.KINDS
    return [scenes.scene(1, "held_out", i, kinds=[kinds[i % len(kinds)]]).caption for i in range(NUM_SHOWN)]


if __name__ == "__main__":
    uses = text_modes.make_modes(
        make_parts,
        shapes=a_batch,
        images=lambda run: scenes.scenes("test", run.config.data.canvas, 100),
        examples=examples(),
    )
    main(
        __file__,
        __doc__,
        default_config="scenes_mmdit.py",
        modes={"train": train, "evaluate": evaluate, **uses},
        extra_flags=text_modes.define_flags,
    )
