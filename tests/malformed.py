"""Malformed commands: each has to end in one clear line and an exit code, and leave every file as it was. By hand:

    python -m tests.malformed             # minutes on a CPU: tiny runs are trained in a temporary folder
    python -m tests.malformed FOLDER      # which are kept there for the next time

`CASES` go through `python -m diffusion.evaluation` and every mode of every experiment, all in this process, so that JAX
starts once. A table is printed: number, input, and the line that it ends in. The exit code is 1 where a case fails.
"""

import contextlib
import json
import os
import runpy
import shlex
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 600  # characters of a line
LIMIT = 60  # seconds, by which a command that is refused has ended


class TooLong(BaseException):
    """A command was not refused in `LIMIT` seconds."""


def too_long(number: int, frame: Any) -> None:
    raise TooLong


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
      code: its exit code.
      line: the last line of its standard error.
      faults: what is wrong with that; empty where it ended as it should.
    """

    code: int
    line: str
    faults: list[str]


def command(program: str, arguments: list[str]) -> tuple[int, str]:
    """Returns the exit code of `python -m PROGRAM ARGUMENTS`, run in this process, and its standard error."""
    argv, stderr, stdout = sys.argv, os.dup(2), os.dup(1)
    module = "diffusion.evaluation" if program == "evaluation" else f"experiments.{program}"
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as printed:
        code: Any = 0
        os.dup2(said.fileno(), 2)
        os.dup2(printed.fileno(), 1)
        sys.argv = [program, *arguments]
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "'.*' found in sys.modules", RuntimeWarning)
                runpy.run_module(module, run_name="__main__")
        except SystemExit as left:
            code = left.code
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.argv = argv
            sys.stdout.flush()
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.dup2(stdout, 1)
            os.close(stderr)
            os.close(stdout)
        said.seek(0)
        heard = said.read()
    if isinstance(code, str):  # Python prints it and exits with 1
        heard, code = f"{heard}{code}\n", 1
    return (code or 0), heard


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns every file and folder under `folder`, with the size and the time of files."""
    found = {}
    for path in folder.rglob("*"):
        status = path.lstat()
        found[str(path.relative_to(folder))] = (0, 0) if path.is_dir() else (status.st_size, status.st_mtime_ns)
    return found


def shortened(line: str, longest: int) -> str:
    """Returns a line, of a long one its beginning."""
    return line if len(line) <= longest else f"{line[:longest]}..."


def run_case(program: str, line: str, folder: Path) -> Ended:
    """Returns how a case ends in `folder`."""
    before = listing(folder)
    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    code, said = command(program, shlex.split(line))
    signal.alarm(0)
    lines = [one for one in said.splitlines() if one.strip()]
    last = lines[-1].replace(f"{folder}/", "").replace(f"{folder.parent}/", "") if lines else ""
    wrong = {
        "exit code 0": code == 0,
        "a traceback": "Traceback" in said,
        f"{len(lines)} lines": len(lines) != 1,
        "no error": not last.startswith("error: "),
        f"more than {LONGEST} characters": any(len(one) > LONGEST for one in lines),
    }
    faults = [fault for fault, found in wrong.items() if found]
    after = listing(folder)
    for name in sorted(after.keys() - before.keys(), reverse=True):
        path = folder / name
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    if changed := sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name)):
        faults.append(f"changed {', '.join(changed[:4])}{' ...' if changed[4:] else ''}")
    return Ended(code, shortened(last, 2 * LONGEST), faults)


def write_files(folder: Path) -> None:
    """Writes what the cases read into `folder`: pictures, captions, configs and published folders."""
    from tests import helpers, published_folders

    random = np.random.RandomState(0)

    def picture(path: Path, shape: tuple[int, ...] = (12, 12, 3)) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.randint(0, 256, shape, np.uint8)).save(path)

    for name in ("a", "b"):
        picture(folder / f"{name}.png")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:200])
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "black.png")
    (folder / "words.png").write_text("no picture")
    (folder / "folder.png").mkdir()
    for kind in ("cats", "dogs"):
        for number in range(24):
            picture(folder / "photos" / kind / f"{number}.png", (10, 14, 3))
    picture(folder / "mixed" / "a.png")
    picture(folder / "mixed" / "b.png", (9, 9, 3))
    picture(folder / "large" / "a.png", (100, 200, 3))
    picture(folder / "large" / "b.png", (100, 200, 3))
    for name in ("damaged", "loose"):
        shutil.copytree(folder / "photos", folder / name)
    shutil.copy(folder / "cut.png", folder / "damaged" / "cats" / "7.png")
    shutil.copy(folder / "a.png", folder / "loose")

    for split, count in (("train", 48), ("test", 24)):
        helpers.write_pairs(folder / "pairs" / split, "train" if split == "train" else "held_out", count)
    for name, content in {
        "numbers": '{"image": 3, "caption": "three"}\n',
        "twice": '{"image": "0.png", "caption": "a red two"}{"image": "0.png"}\n',
    }.items():
        picture(folder / name / "0.png", (16, 16, 3))
        (folder / name / "captions.jsonl").write_text(content)

    for name, content in {
        "syntax.py": "def get_config(:\n",
        "raises.py": "def get_config():\n    return 1 / 0\n",
        "imports.py": "import no_such_module\n",
        "number.py": "def get_config():\n    return 7\n",
        "empty.py": "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n",
        "file": "",
    }.items():
        (folder / name).write_text(content)
    (folder / "latin.txt").write_bytes(b"a red two\nun caf\xe9\n")
    np.savez(folder / "some.npz", arr_0=random.randint(0, 256, (30, 8, 8, 1), np.uint8))
    np.savez(folder / "other.npz", arr_0=random.randint(0, 256, (30, 6, 6, 1), np.uint8))
    np.savez(folder / "signed.npz", arr_0=np.zeros((30, 8, 8, 1), np.int8))
    np.savez(folder / "five.npz", arr_0=np.zeros((2, 3, 8, 8, 1), np.uint8))
    np.savez(folder / "scalars.npz", mu=np.float64(0), sigma=np.float64(1))

    published_folders.write_folder(folder / "published")
    for name in ("skips", "short"):
        shutil.copytree(folder / "published", folder / name)
    path = folder / "skips" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"down_block_types": ["DownBlock2D", "SkipDownBlock2D"]}))
    weights = folder / "short" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def train_runs(folder: Path) -> None:
    """Trains a run of every experiment for some steps, imports the published one, and damages a copy."""
    from experiments import clip
    from experiments import folder as pictures
    from tests import helpers

    kinds = helpers.kinds(folder / "pairs")
    own = (f"--config.data.dir={folder / 'photos'}", "--config.data.image_size=8")
    kinds["folder"] = helpers.Kind(pictures.TASK, "folder", (*helpers.SMALL, *helpers.SHORT, *own))
    made = folder / "made"
    for name in ("digits", "digits_classes", "folder", "scenes", "captions"):
        kinds[name].do(made / name, *kinds[name].flags)
    modes: Any = {"modes": clip.MODES, "define_flags": clip.define_flags, "num_devices": 1}
    towers = [f"{tower}.{size}" for tower in ("image", "text") for size in ("width=8", "num_layers=1", "num_heads=2")]
    small = [*(f"network.{size}" for size in towers), "data.num_examples=64", "data.batch_size=16"]
    short = ["training.num_steps=2", "evaluation.after_training=False"]
    flags = [f"--config.{field}" for field in (*small, *short)]
    clip.MODES["train"](helpers.make_call(clip.TASK, "clip", made / "clip", *flags, **modes))
    code, said = command("cifar10", ["--mode=import", "--weights=published", "--workdir=made/cifar10"])
    assert code == 0, said
    shutil.copytree(made / "digits", made / "flipped")
    shutil.rmtree(made / "flipped" / "checkpoints" / "4")
    for path in (made / "flipped" / "checkpoints" / "6").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1])


# An experiment, or "evaluation", and what is typed after it, in a folder of what these two functions write.
CASES = [
    ("digits", "--config=syntax.py"),
    ("digits", "--config=imports.py"),
    ("digits", "--config=raises.py"),
    ("digits", "--config=number.py"),
    ("digits", "--config=empty.py"),
    ("digits", "--config="),
    ("digits", "--config.network=5"),
    ("digits", "--config.network.multipliers=(1,0)"),
    ("digits", "--config.network.head_channels=5"),
    ("digits", "--config.training.num_steps=1e400"),
    ("digits", "--config.training.ema_profiles=\"('long',)\""),
    ("digits", "--config.data.image_size=16"),
    ("digits", "--config.process.num_steps=9999999999999"),
    ("digits", f"--{'y' * 3000}=1"),
    ("digits", "--workdir=file/run"),
    ("digits", "--mode=check --config.optimizer.learning_rate=nan"),
    ("digits", "--mode=sample --workdir=made/digits --ema_length=3"),
    ("digits", "--mode=evaluate --workdir=made/digits --num_seeds=2 --out=a.npz"),
    ("digits", "--mode=sweep --workdir=made/digits --sweep_steps=inf"),
    ("digits", "--mode=likelihood --workdir=made/digits --steps=2000"),
    ("digits", "--mode=interpolate --workdir=made/digits --images=a.png,folder.png"),
    ("digits", "--mode=inpaint --workdir=made/digits --mask=words.png"),
    ("digits", "--mode=img2img --workdir=made/digits_classes --images=a.png --label=44"),
    ("digits", "--mode=progressive --workdir=made/digits --sampler=unipc --config.sampling.sampler.order=7"),
    ("digits", "--mode=import --workdir=new --weights=photos"),
    ("digits", "--mode=export --workdir=made/flipped --weights=new"),
    ("digits", "--config.network.multipliers=(1.5,2)"),
    ("digits", "--config.network.attention_resolutions=\"('4',)\""),
    ("digits", "--config.sampling.guidance_interval=\"('low','high')\""),
    ("digits", "--config.process.first=-0.1"),
    ("digits", "--workdir=a.png"),
    ("digits", "--prompt='a red two'"),
    ("digits", "--mode=sample --workdir=made/digits --images=a.png"),
    ("digits", "--mode=sample --workdir=made/digits --steps=2 --config.sampling.num_steps=3"),
    ("digits", "--mode=sample --workdir=made/digits --num_samples=100000000000"),
    ("digits", "--mode=evaluate --workdir=made/digits --strength=0.5"),
    ("digits", "--mode=import --workdir=new --weights=published --config.network.channels=64"),
    ("cifar10", "--config.data.name=../cifar10"),
    ("cifar10", "--mode=check --config.data.dir=photos"),
    ("cifar10", "--mode=sample --workdir=made/cifar10 --label=1"),
    ("cifar10", "--mode=evaluate --workdir=made/cifar10 --config.evaluation.features=clip"),
    ("cifar10", "--mode=sweep --workdir=made/cifar10 --sweep_ema=0.05"),
    ("cifar10", "--mode=likelihood --workdir=made/cifar10"),
    ("cifar10", "--mode=interpolate --workdir=made/cifar10 --images=a.png"),
    ("cifar10", "--mode=inpaint --workdir=made/cifar10 --images=a.png --mask=black.png"),
    ("cifar10", "--mode=img2img --workdir=made/cifar10 --images=a.png --strength=0.5,nan"),
    ("cifar10", "--mode=progressive --workdir=made/cifar10 --sampler=DDIM"),
    ("cifar10", "--mode=import --workdir=new --weights=short"),
    ("cifar10", "--mode=export --workdir=made/cifar10 --weights=photos"),
    ("cifar10", "--mode=import --workdir=new --weights=published --variant=fp32"),
    ("cifar10", "--mode=import --workdir=file/new --weights=published"),
    ("cifar10", "--mode=export --workdir=made/cifar10 --weights=file/new"),
    ("folder", "--config.data.dir=damaged"),
    ("folder", "--mode=check --config.data.dir=loose --config.data.classes=True"),
    ("folder", "--mode=sample --workdir=made/folder --out=file/a.npz"),
    ("folder", "--mode=evaluate --workdir=made/folder --config.data.dir=nowhere"),
    ("folder", "--mode=sweep --workdir=made/folder --sweep_ema=half"),
    ("folder", "--mode=likelihood --workdir=made/folder --num_samples=many"),
    ("folder", "--mode=interpolate --workdir=made/folder '--strength=0.2;0.4'"),
    ("folder", "--mode=inpaint --workdir=made/folder --resample=-1"),
    ("folder", "--mode=img2img --workdir=made/folder --num_samples=99"),
    ("folder", "--mode=progressive --workdir=made/folder --config.sampling.grid=leading "
               "--config.sampling.grid.steps_offset=5000"),
    ("folder", "--mode=import --workdir=made/folder --weights=published"),
    ("folder", "--mode=export --workdir=made/folder --weights=new --config.sampling.threshold.low=-0.5"),
    ("folder", "--config.data.dir=photos --config.data.image_size=-4"),
    ("folder", "--config.data.dir=photos --config.data.channels=2"),
    ("folder", "--config.data.dir=photos --config.data.held_out=nan"),
    ("folder", "--mode=sample --workdir=made/folder --out=folder.png/.npz"),
    ("scenes", "--config.network.num_heads=5"),
    ("scenes", "--mode=check --config.condition=clip --config.condition.folder=made/digits"),
    ("scenes", "--mode=sample --workdir=made/scenes --prompts=latin.txt"),
    ("scenes", "--mode=evaluate --workdir=made/scenes --config.evaluation.guidance=\"(1.0, 'two')\""),
    ("scenes", "--mode=sweep --workdir=made/scenes --sweep_steps=5,,10"),
    ("scenes", "--mode=likelihood --workdir=made/scenes --config.sampling.batch_size=-8"),
    ("scenes", "--mode=interpolate --workdir=made/scenes --prompt='a red two'"),
    ("scenes", "--mode=inpaint --workdir=made/scenes --images=cut.png --prompt='a red two'"),
    ("scenes", "--mode=img2img --workdir=made/scenes --images=a.png"),
    ("scenes", "--mode=progressive --workdir=made/scenes --label=2"),
    ("scenes", "--mode=import --workdir=new --weights=made/clip"),
    ("scenes", "--mode=export --workdir=made/scenes --weights=new"),
    ("scenes", "--config.data.num_examples=1000000000000"),
    ("scenes", "--mode=sweep --workdir=made/scenes --sweep_steps=2 --out=a.npz"),
    ("captions", "--config.data.dir=twice --config.evaluation.dir=pairs/test --config.evaluation.features=pixels"),
    ("captions", "--mode=check --config.data.dir=numbers"),
    ("captions", "--mode=sample --workdir=made/captions"),
    ("captions", "--mode=evaluate --workdir=made/captions --config.evaluation.judge=made/digits"),
    ("captions", "--mode=sweep --workdir=made/captions --sweep_steps=2 --config.evaluation.metrics='()'"),
    ("captions", "--mode=likelihood --workdir=made/captions --config.evaluation.dir=file"),
    ("captions", "--mode=interpolate --workdir=made/captions --prompts=photos"),
    ("captions", "--mode=inpaint --workdir=made/captions --mask=left,right"),
    ("captions", "--mode=img2img --workdir=made/captions --images=a.png, --prompt='a red two'"),
    ("captions", "--mode=progressive --workdir=made/captions --prompt 'a red two' 'a blue four'"),
    ("captions", "--mode=import --workdir=new --weights=skips"),
    ("captions", "--mode=export --workdir=made/scenes --weights=new"),
    ("captions", "--mode=evaluate --workdir=made/captions --prompt='a red two'"),
    ("clip", "--config.data.std='(0.0,0.0,0.0)'"),
    ("clip", "--config.network.dtype=float31"),
    ("clip", "--config.loss.rows=-1"),
    ("clip", "--mode=evaluate --workdir=made/clip --config.evaluation.num_candidates=100000"),
    ("clip", "--mode=score --workdir=made/clip --images=a.png --prompts=';'"),
    ("clip", "--mode=import --workdir=new --weights=published"),
    ("clip", "--mode=export --workdir=made/clip --weights=published"),
    ("clip", "--config.data.mean='(0.5,)'"),
    ("clip", "--mode=sample --workdir=made/clip"),
    ("clip", "--mode=score --workdir=made/clip --images=a.png --prompts=latin.txt"),
    ("evaluation", ""),
    ("evaluation", "some.npz digits more"),
    ("evaluation", "some.npz digits --features=vgg"),
    ("evaluation", "signed.npz digits --features=pixels"),
    ("evaluation", "five.npz digits --features=pixels"),
    ("evaluation", "some.npz other.npz --features=pixels"),
    ("evaluation", "some.npz scalars.npz --features=pixels"),
    ("evaluation", "mixed digits --features=pixels"),
    ("evaluation", "large large --features=pixels"),
    ("evaluation", "a.png b.png --features=pixels"),
    ("evaluation", "some.npz tfds:nothing/test --features=pixels"),
    ("evaluation", "some.npz digits --features=pixels --metrics=bits_per_dim"),
    ("evaluation", "some.npz digits --features=pixels --out=file/report"),
    ("evaluation", "some.npz digits --features=pixels --out="),
    ("evaluation", "some.npz digits --features=clip --weights=made/clip"),
    ("evaluation", "some.npz digits --features=pixels --weights=published"),
    ("evaluation", "some.npz digits --features=pixels --data-dir=photos"),
    ("evaluation", "damaged digits --features=pixels"),
    ("evaluation", "some.npz a.png --features=pixels"),
]  # fmt: skip


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Works in `folder`, with a cache beside it and no data sets."""
    os.environ["XDG_CACHE_HOME"] = str(folder.parent / "cache")
    os.environ["TFDS_DATA_DIR"] = str(folder.parent / "none")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".pytest_cache" / "jax"))
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def main(arguments: list[str]) -> int:
    """Runs the cases (with more arguments, those that begin so), prints the table, and returns the exit code."""
    only, failed = tuple(arguments[1:]) or "", 0
    chosen = [(number, *case) for number, case in enumerate(CASES, 1) if " ".join(case).startswith(only)]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(arguments[0] if arguments else temporary).resolve()
        folder = root / "here"
        folder.mkdir(parents=True, exist_ok=True)
        with inside(folder):
            if not (root / "ready").exists():
                write_files(folder)
                train_runs(folder)
                (root / "ready").touch()
            for number, program, line in chosen:
                ended = run_case(program, line, folder)
                failed += bool(ended.faults)
                print(f"{number:3d}  {shortened(f'{program} {line}', 160)}\n     {ended.line}", flush=True)
                if ended.faults:
                    print(f"     WRONG: exit code {ended.code}; {'; '.join(ended.faults)}", flush=True)
    print(f"{len(chosen)} inputs, {failed} of them wrong")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
