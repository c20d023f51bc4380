"""Text to image on real drawings: the emoji set, in FLUX.2's latent space, in an hour on a CPU.

    ./launch.sh emoji
    ./launch.sh emoji --mode=sample --prompt="woman astronaut, dark skin" --num_samples=16

The drawings (a package of 74 MB, got by npm pack) and the autoencoder (5 MB) are fetched once; where they cannot be,
--config.data.dir=DIR, --config.data.package=FILE and --config.space.folder=DIR name them. Pictures and numbers are then
in runs/emoji: report.md, identified.png, curves.png, previews/.
"""

from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion import autoencoding, evaluation
from diffusion.data import emoji
from diffusion.data.captions import caption_folder
from diffusion.data.images import save_labelled_png, to_float
from diffusion.data.sources import Source
from diffusion.evaluation import Extractor, Measurement, identify
from diffusion.evaluation.features import network_extractor
from diffusion.evaluation.identify import Gallery
from diffusion.model.config import Config
from diffusion.model.model import parts
from diffusion.model.space import with_latents
from diffusion.runs.call import TEST, TRAIN, Call, Task, held_out, refuse_flags
from diffusion.runs.draw import draw
from diffusion.runs.modes import main
from diffusion.runs.report import REAL, made_by
from diffusion.runs.run import Run

NUM_SHOWN = 24
TONES = ["", *emoji.TONES.values()]  # from the plain yellow to the darkest
# The first halves are drawings that training shows, or all but; the others are combinations that no emoji has.
PROMPTS = (
    "woman astronaut, dark skin",
    "horse racing",
    "red apple",
    "man cook, medium light skin",
    "cat face with tears of joy",
    "woman: red hair, medium skin",
    "full moon with face",
    "person surfing, light skin",
    "pizza",
    "thumbs up sign, medium dark skin",
    "rocket",
    "flag of japan",
    "a robot with a crown",
    "cat astronaut",
    "green apple with face",
    "dog cook",
    "woman firefighter with red hair, dark skin",
    "blue pizza",
    "snowman with sunglasses",
    "fire horse",
    "alien in a car",
    "heart with wings",
    "unicorn face with tears of joy",
    "ghost and a rocket",
)

ABOUT = f"""
- Trained on the drawings of Google's Noto emoji (Apache-2.0), as {emoji.PACKAGE} {emoji.VERSION} packs them, 64x64 on
  white, with their names in Unicode as captions. Of each person one skin tone is kept from training.
- Its latents are those of TAEF2 (madebyollin/taesd, MIT licence, copyright 2023 Ollin Boer Bohan), whose weights are
  in it.
- It draws single emoji. A prompt of words that no caption has, or of a combination that is far from all captions, gives
  a mixture of drawings.
"""


class Truth(NamedTuple):
    """The true pictures, those of training before the held-out ones.

    Attributes:
      image: uint8[M, H, W, 3].
      captions: of each.
      gallery: of them.
      wanted: rows of the held-out ones that are measured.
    """

    image: np.ndarray
    captions: list[str]
    gallery: Gallery
    wanted: np.ndarray


def read(config: Config, split: str) -> Source:
    """Returns the emoji of a split: "train", or "test", which are held out."""
    data = config.data
    if data.name != "emoji":
        raise ValueError(f"data.name={data.name}: this experiment is on the emoji; see captions")
    folder = emoji.emoji_folder(data.dir, data.get("package", ""))
    return caption_folder(folder / emoji.SPLITS[split], data.image_size or None, split)


def examples(config: Config) -> list[str]:
    """Returns prompts of people, things, and combinations that no emoji has."""
    del config
    return list(PROMPTS)


def ready(call: Call) -> None:
    """Checks what `evaluate` needs."""
    refuse_flags(call, "metrics", "num_seeds", "out")
    settings, space = call.config.evaluation, call.config.space
    if settings.features != "latents":
        evaluation.make_extractor(settings.features, settings.weights)
    elif space.name != "latents":
        raise ValueError(f"evaluation.features=latents, and space.name is {space.name}: choose pixels or inception")
    held_out(call)


def make_extractor(run: Run) -> Extractor:
    """Returns the extractor of `evaluation.features`; "latents" are x_0 as the run's own space encodes them."""
    settings, space = run.config.evaluation, run.model.space
    if settings.features != "latents":
        return evaluation.make_extractor(settings.features, settings.weights)

    def encode(params: Any, image: jax.Array) -> jax.Array:
        return space.of_batch(params, {"image": image}, jax.random.key(0)).reshape(len(image), -1)

    return network_extractor("latents", encode, parts(run.model, run.params).space)


def find_truth(call: Call, run: Run, extractor: Extractor) -> Truth:
    """Returns the true pictures, and which of the held-out ones are measured: all, or as many as are asked for."""
    sources = [call.task.read(call.config, split) for split in (TRAIN, TEST)]
    batches = [source.read(np.arange(source.num_examples)) for source in sources]
    image = np.concatenate([batch["image"] for batch in batches])
    captions = [
        source.captions[label] for source, batch in zip(sources, batches, strict=True) for label in batch["label"]
    ]
    first, total = sources[0].num_examples, sources[1].num_examples
    count = min(call.flags.num_samples or run.config.evaluation.num_samples, total)
    wanted = first + np.sort(np.random.RandomState(0).permutation(total)[:count])
    people, tones = zip(*map(emoji.parts_of, captions), strict=True)
    gallery = Gallery(
        features_of(run, sources, image, extractor), {"person": people, "tone": tones}, np.arange(len(image)) < first
    )
    return Truth(image, captions, gallery, wanted)


def features_of(run: Run, sources: list[Source], image: np.ndarray, extractor: Extractor) -> np.ndarray:
    """Returns features of the true pictures; their latents are those of the training, made once."""
    space, params = run.model.space, parts(run.model, run.params).space
    if run.config.evaluation.features != "latents" or space.precomputed is None:
        return extractor.extract(image).features
    own = space._replace(fitted=False)  # its parameters are there
    batches = [with_latents(one, own, params)[0].read(np.arange(one.num_examples)) for one in sources]
    latents = [space.of_batch(params, batch, jax.random.key(0)) for batch in batches]
    return np.concatenate(latents).reshape(len(image), -1)


def draw_wanted(call: Call, run: Run, truth: Truth, times: int) -> np.ndarray:
    """Returns drawings of the wanted captions, uint8[times * N, H, W, 3], each of noise of its own."""
    prompts = [truth.captions[row] for row in truth.wanted] * times
    return draw(run.painter, prompts, np.arange(len(prompts)), call.flags.seed)


def through_autoencoder(run: Run, image: np.ndarray) -> np.ndarray:
    """Returns pictures encoded and decoded."""
    space, params, size = run.model.space, parts(run.model, run.params).space, run.config.sampling.batch_size

    @jax.jit
    def there_and_back(params: Any, image: jax.Array) -> jax.Array:
        return space.decode(params, space.of_batch(params, {"image": image}, jax.random.key(0)))

    return np.concatenate([there_and_back(params, image[i : i + size]) for i in range(0, len(image), size)])


def psnr(true: np.ndarray, image: np.ndarray) -> float:
    """Returns the mean over pictures of the PSNR in dB."""
    return float(np.mean(autoencoding.psnr(to_float(true), to_float(image))))


def tones_off(found: np.ndarray, wanted: np.ndarray, truth: Truth) -> dict[str, float]:
    """Returns how often the right person is drawn in the next darker or lighter tone, or in another one."""
    people, tones = truth.gallery.aspects["person"], truth.gallery.aspects["tone"]
    places = np.array([TONES.index(tone) for tone in tones])
    same = np.array([people[f] == people[w] for f, w in zip(found, wanted, strict=True)], bool)
    off = (places[found] - places[wanted])[same]
    named = {"next darker": off == 1, "next lighter": off == -1, "another": np.abs(off) > 1}
    return {name: float(np.sum(values) / len(found)) for name, values in named.items()}


def evaluate(call: Call, run: Run) -> list[Measurement]:
    """Returns which true pictures drawings of held-out captions are nearest to; draws identified.png.

    Beside their shares are those of the true pictures through the autoencoder and of chance, how often a held-out
    caption gives back a picture of the training, and the distance to the true pictures in dB.
    """
    times = run.config.evaluation.num_drawings
    extractor = make_extractor(run)
    truth = find_truth(call, run, extractor)
    image = draw_wanted(call, run, truth, times)
    true = truth.image[truth.wanted]
    ceiling = through_autoencoder(run, true)
    if jax.process_index() != 0:
        return []
    pairs = np.concatenate([image[: len(true)], true], axis=1)[:NUM_SHOWN, None]  # each above its true picture
    captions = [truth.captions[row] for row in truth.wanted[:NUM_SHOWN]]
    save_labelled_png(run.workdir / "identified.png", pairs, captions)
    wanted, gallery = np.tile(truth.wanted, times), truth.gallery
    found = identify.nearest(extractor.extract(image).features, gallery, wanted)
    again = extractor.extract(ceiling).features
    itself = np.linalg.norm(again - gallery.features[truth.wanted], axis=1)
    reached = identify.shares(identify.nearest(again, gallery, truth.wanted).row, truth.wanted, gallery)
    decibels = {"drawings": psnr(np.tile(true, (times, 1, 1, 1)), image), "autoencoder": psnr(true, ceiling)}
    drawn: dict[str, Any] = made_by(run) | {"seeds": [call.flags.seed]}
    real, random = ({**REAL, "sampler": f"true pictures{how}"} for how in (" through the autoencoder", " at random"))
    note = f"nearest of {len(gallery.seen)} true pictures; {times} drawings of each of {len(true)} captions"
    copies = (
        "nearest: to a picture of the training; copies: as near to one as a true picture is to itself after the "
        f"autoencoder, {identify.CALIBRATED} of 100"
    )

    def measured(
        name: str, value: Any, made: dict[str, Any], note: str = "", what: str = extractor.name
    ) -> Measurement:
        return Measurement(name, value, len(image) if made is drawn else len(true), what, None, note=note, **made)

    return [
        measured("held-out captions, right", identify.shares(found.row, wanted, gallery), drawn, note),
        measured("the same, of true pictures", reached, real, "the ceiling"),
        measured("the same, by chance", identify.chance(truth.wanted, gallery), random),
        measured("right person, another tone", tones_off(found.row, wanted, truth), drawn),
        measured("training pictures given back", identify.given_back(found, gallery, itself), drawn, copies),
        measured("dB to the true pictures", decibels, drawn, what="pixels"),
    ]


def score(call: Call, run: Run) -> Measurement:
    """Returns the shares of held-out captions, drawn once each; sweeps draw the first, the right pictures."""
    extractor = make_extractor(run)
    truth = find_truth(call, run, extractor)
    image = draw_wanted(call, run, truth, 1)
    found = identify.nearest(extractor.extract(image).features, truth.gallery, truth.wanted)
    value = identify.shares(found.row, truth.wanted, truth.gallery)
    made: dict[str, Any] = made_by(run) | {"seeds": [call.flags.seed]}
    return Measurement("held-out captions, right, each drawn once", value, len(image), extractor.name, None, **made)


TASK = Task("emoji", read, evaluate, ready, score, examples, about=ABOUT)

if __name__ == "__main__":
    main(__file__, __doc__, TASK, config="emoji")
