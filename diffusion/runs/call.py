"""What a command asks for: `Task`, what an experiment knows that no other does, and `Call`, one use of it."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from jax.sharding import Mesh

from diffusion.data.sources import Source, check_apart
from diffusion.data.words import make_vocabulary
from diffusion.evaluation import Measurement
from diffusion.model.config import Config
from diffusion.runs.adapters import with_lora
from diffusion.runs.run import Run, load
from diffusion.training.writers import MakeWriter, named

TRAIN, TEST = "train", "test"


class Call(NamedTuple):
    """One command: what to do is settled, nothing is done yet.

    Attributes:
      task: of the experiment.
      config: of the run.
      workdir: folder of the run.
      mesh: the devices.
      flags: of the command line.
      stored: what is stored beside the run's weights; None where it starts.
      asked: fields of the config that the command line names.
    """

    task: "Task"
    config: Config
    workdir: Path
    mesh: Mesh
    flags: flags.FlagValues
    stored: Mapping[str, Any] | None
    asked: tuple[str, ...] = ()

    @property
    def writers(self) -> list[MakeWriter]:
        """What --writers names. Raises RunError where one is unknown or not installed."""
        return named(self.flags.writers)

    def open(self, ema_length: float | None = None) -> Run:
        """Returns the trained run of this call: --checkpoint's and --ema_length's weights."""
        assert self.stored is not None
        length = self.flags.ema_length if ema_length is None else ema_length
        run = load(self.workdir, self.stored, self.config, self.mesh, self.flags.checkpoint, length)
        if "lora" in self.flags and self.flags.lora:
            run = with_lora(run, self.flags.lora)
        if self.flags.prompt or self.flags.prompts or self.flags.negative_prompt:
            run.requests(prompts=[""])  # refuses them where the run reads none
        return run


def held_out(call: Call) -> Source:
    """Returns the images that are kept from training.

    Raises:
      ValueError: they are the training images themselves.
    """
    source = call.task.read(call.config, TEST)
    if call.stored is None:
        check_apart(source, call.task.read(call.config, TRAIN).fingerprint)
    elif "data" in call.stored:
        check_apart(source, call.stored["data"]["fingerprint"])
    return source


def refuse_other_data(config: Config, name: str, instead: str) -> None:
    """Raises ValueError where another data.name, or any data.dir, is given to an experiment that makes its own data."""
    for field, own in (("name", name), ("dir", "")):
        if config.data.get(field, own) != own:
            raise ValueError(f"data.{field}={config.data[field]}: this experiment is on the {name}; see {instead}")


def refuse_flags(call: Call, *names: str) -> None:
    """Raises ValueError where flags are given that this experiment's evaluation does not read."""
    for name in names:
        if call.flags[name].present:
            raise ValueError(f"--{name} is not read by the evaluation of {call.task.name}: leave it out")


def words_of_captions(config: Config, source: Source) -> list[str]:
    """Returns the vocabulary of a run that starts: the most frequent words and phrases of the source's captions."""
    settings = config.condition
    return make_vocabulary(source.captions, settings.get("size", 0), settings.get("phrases", 0))


class Task(NamedTuple):
    """An experiment: its data, and its own questions.

    Attributes:
      name: of the experiment.
      read: (config, split) -> its images, "train" or "test"; the test images are kept from training.
      evaluate: (call, run) -> measurements, for the report; None: FID and its kin.
      ready: (call) -> None: raises what `evaluate` would raise after training, before it; None: that of images.
      score: (call, run) -> the one measurement that sweeps draw; None: the first metric.
      examples: (config) -> prompts that previews show and that are drawn where none is given.
      vocabulary: (config, training images) -> words that a run which starts learns.
      about: what the card of an exported model says of data and licences, Markdown.
    """

    name: str
    read: Callable[[Config, str], Source]
    evaluate: Callable[[Call, Run], list[Measurement]] | None = None
    ready: Callable[[Call], None] | None = None
    score: Callable[[Call, Run], Measurement] | None = None
    examples: Callable[[Config], Sequence[str]] = lambda config: ()
    vocabulary: Callable[[Config, Source], Iterable[str]] = words_of_captions
    about: str = ""
