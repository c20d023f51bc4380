"""Calls of the experiments' command lines that tests make, and runs as small as they can be.

make_call(digits.TASK, "digits:flow", folder, *SMALL, "--mode=check")  # parsed, nothing is done
do_call(digits.TASK, "digits", folder, *SMALL, *SHORT)                 # trains
"""

import copy
import fcntl
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from PIL import Image

from diffusion.data import scenes as scene_data
from diffusion.data.sources import Source, array_source
from diffusion.model.config import Config
from diffusion.model.fields import load_config
from diffusion.runs import command_line, modes
from diffusion.runs.call import Call, Task
from diffusion.training import make_mesh
from experiments import captions, cifar10, clip, digits, scenes

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "experiments" / "configs"

CLIP: Any = {"modes": clip.MODES, "define_flags": clip.define_flags}  # more of make_call's arguments, for clip.TASK

# A U-Net of one level; six steps, stored after four, which may be more: without a cooldown.
SMALL = (
    "--config.network.channels=8",
    "--config.network.num_blocks=1",
    "--config.network.multipliers=(1,)",
    "--config.network.attention_resolutions=()",
    "--config.network.num_groups=4",
    "--config.network.dropout=0.1",
    "--config.optimizer.cooldown_steps=0",
    "--config.data.batch_size=16",
    "--config.training.num_previews=8",
    "--config.sampling.batch_size=24",
)
SHORT = (
    "--config.training.num_steps=6",
    "--config.training.log_every=4",
    "--config.training.checkpoint_every=4",
    "--config.training.preview_every=100",
    "--config.sampling.num_steps=3",
    "--config.evaluation.after_training=False",
)
# An MM-DiT of one block.
SMALL_TEXT = (
    "--config.network.width=16",
    "--config.network.depth=1",
    "--config.network.num_heads=2",
    "--config.network.dtype=float32",
    "--config.condition.width=8",
    "--config.data.batch_size=16",
    "--config.training.num_previews=8",
    "--config.sampling.batch_size=24",
)


def make_call(
    task: Task,
    config: str,
    folder: Path,
    *arguments: str,
    num_devices: int | None = None,
    modes: Mapping[str, Any] = modes.MODES,
    define_flags: Callable[[flags.FlagValues], None] = modes.define_flags,
) -> Call:
    """Returns what `python -m experiments.TASK --config=CONFIG --workdir=FOLDER ARGUMENTS` asks for; does nothing.

    Args:
      task: of the experiment.
      config: of the call where `arguments` name none: a stem of experiments/configs, with methods as "digits:flow".
      folder: of the run.
      *arguments: the other flags.
      num_devices: the first of them; None: all eight.
      modes: of the experiment.
      define_flags: of these modes.
    """
    values = flags.FlagValues()
    define_flags(values)
    argv = [task.name, f"--workdir={folder}", *map(str, arguments)]
    call, mode = command_line.parse(argv, task, "doc", CONFIGS, config, dict(modes), values)
    assert mode == call.flags.mode
    return call._replace(mesh=make_mesh(num_devices))


def do(call: Call) -> None:
    """Does what a call asks for."""
    modes.MODES[call.flags.mode](call)


def do_call(task: Task, config: str, folder: Path, *arguments: str, num_devices: int | None = 1) -> Call:
    """Does what `make_call` returns, and returns it."""
    call = make_call(task, config, folder, *arguments, num_devices=num_devices)
    do(call)
    return call


def config_of(spec: str, **changes: Any) -> Config:
    """Returns the config of `spec` with fields changed: process__num_steps=100."""
    return load_config(spec, {name.replace("__", "."): value for name, value in changes.items()}, CONFIGS)


class Begun(Exception):
    """What would be compiled is begun: a training, with its settings and experiment, or a drawing."""

    settings: Any
    experiment: Any


def with_fields(document: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Returns a copy of nested dicts with fields at dotted places changed; __ stands for the dot."""
    result = copy.deepcopy(document)
    for place, value in fields.items():
        *parents, last = place.split("__")
        block = result
        for parent in parents:
            block = block[parent]
        block[last] = value
    return result


def random_images(num_examples: int = 40, split: str = "train") -> Source:
    """Returns white noise in the shape of CIFAR-10."""
    random = np.random.RandomState(0 if split == "train" else 1)
    image = random.randint(0, 256, (num_examples, 32, 32, 3), np.uint8)
    return array_source(image, random.randint(0, 10, num_examples).astype(np.int32), "random", split, 10)


def write_pairs(folder: Path, split: str, count: int) -> Path:
    """Writes scenes of a split as pictures with captions.jsonl, as --config.data.dir takes them."""
    folder.mkdir(parents=True)
    lines = []
    for index in range(count):
        scene = scene_data.scene(0, split, index)
        Image.fromarray(scene_data.draw(scene, split)).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "caption": scene.caption}))
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return folder


class Kind(NamedTuple):
    """A kind of run: its task, the config and the flags that train it in seconds."""

    task: Task
    config: str
    flags: tuple[str, ...]

    def call(self, folder: Path, *arguments: str, num_devices: int | None = 1) -> Call:
        """Returns the call on a run of this kind: a trained one's needs no other flags than its own."""
        return make_call(self.task, self.config, folder, *arguments, num_devices=num_devices)

    def do(self, folder: Path, *arguments: str) -> Call:
        """Does it."""
        return do_call(self.task, self.config, folder, *arguments)


def kinds(pairs: Path) -> dict[str, Kind]:
    """Returns the kinds of runs; those of captions are trained on PAIRS/train and scored on PAIRS/test."""
    dirs = (f"--config.data.dir={pairs / 'train'}", f"--config.evaluation.dir={pairs / 'test'}")
    small_captions = (
        *SMALL_TEXT,
        *SHORT,
        *dirs,
        "--config.data.image_size=16",
        "--config.evaluation.features=pixels",
        "--config.evaluation.metrics=('fid',)",
    )
    noise = cifar10.TASK._replace(read=lambda config, split: random_images(split=split))
    of_noise = ("--config.network.dtype=float32", "--config.evaluation.features=pixels")
    few_steps = "--config.process.num_steps=50"  # of 1,000 the likelihood of such images takes 40 s
    return {
        "digits": Kind(digits.TASK, "digits", (*SMALL, *SHORT)),
        "digits_classes": Kind(digits.TASK, "digits:class_conditional", (*SMALL, *SHORT)),
        "cifar10": Kind(noise, "cifar10", (*SMALL, *SHORT, *of_noise, few_steps)),
        "scenes": Kind(scenes.TASK, "scenes", (*SMALL_TEXT, *SHORT, "--config.data.num_examples=64")),
        "captions": Kind(captions.TASK, "captions", small_captions),
    }


def once(folder: Path, make: Callable[[], Any]) -> Path:
    """Does `make` unless another process of the tests did, and returns `folder`, which it fills."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not Path(f"{folder}.done").exists():
            make()
            Path(f"{folder}.done").touch()
    return folder
