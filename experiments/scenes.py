"""Text to image on captioned scenes: trained, prompted and scored in an hour on a CPU, without a download.

    ./launch.sh scenes
    ./launch.sh scenes --mode=sample --prompt="a red three above a blue seven" --num_samples=16

Pictures and numbers are then in runs/scenes: report.md, curves.png, samples/ and previews/.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion.data import scenes
from diffusion.data.images import save_labelled_png
from diffusion.data.sources import Source
from diffusion.evaluation import Measurement, composition
from diffusion.model.config import Config
from diffusion.runs.call import Call, Task, refuse_flags, refuse_other_data
from diffusion.runs.draw import draw
from diffusion.runs.modes import main
from diffusion.runs.report import REAL, made_by
from diffusion.runs.run import Run

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
NUM_TEST = 100
SEED = 2  # of the prompts that are measured
SAID = {"held_out": "never-seen combinations", "test": "seen combinations"}
WHAT = "digit, colour, size, place and number of what is in the picture, by support vector machines and hue"

Read = Callable[[Sequence[scenes.Scene], np.ndarray], np.ndarray]  # scenes, pictures -> bool[N], wholly satisfied


def read(config: Config, split: str) -> Source:
    """Returns the scenes of a split."""
    refuse_other_data(config, "scenes", "captions")
    return scenes.scenes(split, config.data.image_size, config.data.num_examples if split == "train" else NUM_TEST)


def examples(config: Config) -> list[str]:
    """Returns prompts in combinations that training scenes never show, of every kind in turn."""
    del config
    kinds = scenes.KINDS
    return [scenes.scene(1, "held_out", i, kinds=[kinds[i % len(kinds)]]).caption for i in range(NUM_SHOWN)]


def ready(call: Call) -> None:
    """Refuses what `evaluate` does not read, or cannot."""
    refuse_flags(call, "metrics", "num_seeds", "out")
    scales = call.config.evaluation.guidance
    if not all(isinstance(scale, int | float) for scale in scales):
        raise ValueError(f"evaluation.guidance is {scales}: give numbers")


class Share(NamedTuple):
    """A share of prompts, whole and by name, and how the pictures were made."""

    name: str
    value: dict[str, float]
    count: int
    made: dict[str, Any]
    note: str = ""


def evaluate(call: Call, run: Run) -> list[Measurement]:
    """Returns how many pictures show what their prompts say; draws composition_SPLIT.png.

    Prompts of the split "test" are combinations that training may show, those of "held_out" never. Beside the pictures'
    score are the reader's on real ones, that of pictures read against another prompt, other scales of guidance, and
    what the same noise becomes under another prompt.
    """
    judge = make_judge(run)
    count = call.flags.num_samples or run.config.evaluation.num_samples
    shares = [
        *(share for split in SAID for share in of_split(call, run, split, count, judge)),
        by_guidance(call, run, judge),
        prompt_replaced(call, run, judge),
    ]
    return [Measurement(s.name, s.value, s.count, WHAT, None, note=s.note, **s.made) for s in shares]


def score(call: Call, run: Run) -> Measurement:
    """Returns the share of never-seen prompts that pictures wholly satisfy: what sweeps draw."""
    wanted = prompts_of(run, "held_out", call.flags.num_samples or run.config.evaluation.num_samples)
    right = make_judge(run)(wanted, draw_scenes(call, run, wanted))
    value = composition.by_kind(wanted, right)
    name = f"prompts wholly satisfied, {SAID['held_out']}"
    return Measurement(name, value, len(wanted), WHAT, None, **made(call, run))


def make_judge(run: Run) -> Read:
    """Returns (scenes, pictures) -> which pictures wholly satisfy them, told by a reader of real scenes."""
    reader = composition.fit_reader(run.config.data.image_size)
    return lambda wanted, images: composition.wholly(wanted, images, reader)


def prompts_of(run: Run, split: str, count: int) -> list[scenes.Scene]:
    """Returns the scenes whose captions are measured."""
    return [scenes.scene(SEED, split, i, run.config.data.image_size) for i in range(count)]


def draw_scenes(call: Call, run: Run, wanted: Sequence[scenes.Scene]) -> np.ndarray:
    """Returns a picture of each scene's caption, of noise 0, 1, ..."""
    return draw(run.painter, [one.caption for one in wanted], np.arange(len(wanted)), call.flags.seed)


def made(call: Call, run: Run) -> dict[str, Any]:
    """Returns how pictures are made."""
    return made_by(run) | {"seeds": [call.flags.seed]}


def shifted(wanted: list[scenes.Scene]) -> list[scenes.Scene]:
    """Returns another scene for each."""
    return wanted[1:] + wanted[:1]


def of_split(call: Call, run: Run, split: str, count: int, judge: Read) -> list[Share]:
    """Returns the shares of a split's prompts: of drawn pictures, of real ones, and read against another prompt."""
    size = run.config.data.image_size
    wanted = prompts_of(run, split, count)
    images = draw_scenes(call, run, wanted)
    right = judge(wanted, images)
    real = np.stack([scenes.draw(one, split, size) for one in wanted])
    other = {"all": float(judge(shifted(wanted), images).mean())}
    if jax.process_index() == 0:
        marks = [f"{'right' if ok else 'WRONG'}: {one.caption}" for ok, one in zip(right, wanted, strict=True)]
        path = run.workdir / f"composition_{split}.png"
        save_labelled_png(path, images[:NUM_SHOWN, None], marks[:NUM_SHOWN])
    how, by_kind = made(call, run), composition.by_kind
    return [
        Share(f"prompts wholly satisfied, {SAID[split]}", by_kind(wanted, right), count, how),
        Share(
            f"the same of real pictures, {SAID[split]}",
            by_kind(wanted, judge(wanted, real)),
            count,
            REAL,
            "the reader's ceiling",
        ),
        Share(
            f"the same against another prompt, {SAID[split]}",
            other,
            count,
            how,
            "each picture read against the next one's prompt",
        ),
    ]


def by_guidance(call: Call, run: Run, judge: Read) -> Share:
    """Returns the share of never-seen prompts at each scale of guidance."""
    settings = run.config.evaluation
    wanted = prompts_of(run, "held_out", settings.num_swept)
    values = {}
    for scale in settings.guidance:
        images = draw_scenes(call, run.change({"sampling.guidance": scale}), wanted)
        values[f"guidance {scale:g}"] = float(judge(wanted, images).mean())
    how = made(call, run) | {"sampler": run.config.sampling.sampler.name}
    name = f"prompts wholly satisfied, {SAID['held_out']}"
    return Share(name, values, len(wanted), how, "by scale of guidance")


def prompt_replaced(call: Call, run: Run, judge: Read) -> Share:
    """Returns which prompt pictures satisfy when it is replaced and the noise kept: what they show is its doing."""
    wanted = prompts_of(run, "held_out", run.config.evaluation.num_swept)
    replaced = draw_scenes(call, run, shifted(wanted))
    agree = {
        "with the new prompt": float(judge(shifted(wanted), replaced).mean()),
        "with the old one": float(judge(wanted, replaced).mean()),
    }
    return Share(f"prompt replaced, noise kept, {SAID['held_out']}", agree, len(wanted), made(call, run))


TASK = Task("scenes", read, evaluate, ready, score, examples, vocabulary=lambda config, source: VOCABULARY)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="scenes")
