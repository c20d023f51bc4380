"""Text to image on captioned scenes: trained, prompted and scored in an hour on a CPU, without a download.

    ./launch.sh scenes
    ./launch.sh scenes --mode=sample --prompt="a red three above a blue seven" --num_samples=16

Pictures and numbers are then in runs/scenes: report.md, curves.png, samples/ and previews/.
"""

from diffusion.data import scenes
from experiments import text_modes, text_to_image
from experiments.command_line import Run, main

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
NUM_PREVIEWED = 24


def make_parts(run: Run) -> text_to_image.Parts:
    """Returns what the run's config stands for."""
    canvas = run.config.data.canvas
    return text_to_image.make_parts(run.config, (canvas, canvas, 3), VOCABULARY)


def train(run: Run) -> None:
    """Trains."""
    data = run.config.data
    text_modes.train(run, make_parts(run), scenes.scenes("train", data.canvas, data.num_examples), examples())


def examples() -> list[str]:
    """Prompts in combinations that training scenes never show, four of each kind."""
    kinds = scenes.KINDS
    return [scenes.scene(1, "held_out", i, kinds=[kinds[i % len(kinds)]]).caption for i in range(NUM_PREVIEWED)]


if __name__ == "__main__":
    uses = text_modes.make_modes(
        make_parts,
        shapes=lambda run: scenes.scenes("train", run.config.data.canvas, run.config.data.batch_size),
        images=lambda run: scenes.scenes("test", run.config.data.canvas, 100),
        examples=examples(),
    )
    main(
        __file__,
        __doc__,
        default_config="scenes_mmdit.py",
        modes={"train": train, **uses},
        extra_flags=text_modes.define_flags,
    )
