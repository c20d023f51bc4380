"""Tiny autoencoders as diffusers and their authors made them (recorded goldens), for the tests that open them."""

import importlib.util
import pathlib
import sys

import numpy as np
from safetensors.numpy import save_file

GOLDEN = pathlib.Path(__file__).parent / "golden"
TAEF2 = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "taef2"  # real weights, not in the repository


def _script(name: str):
    spec = importlib.util.spec_from_file_location(name, GOLDEN / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # one script imports another
    spec.loader.exec_module(module)
    return module


_script("record_mmdit")
record = _script("record_vae")
ARRAYS = np.load(GOLDEN / "vae_tiny.npz")
CASES = tuple(record.CASES)
IMAGES = record.images()


def golden(case: str, name: str) -> np.ndarray:
    """Returns what was recorded."""
    return ARRAYS[f"{case}/{name}"]


def weights_of(case: str) -> dict[str, np.ndarray]:
    """Returns a case's weights under the names of whoever made it."""
    sizes = [tuple(map(int, text.split())) for text in golden(case, "shapes")]
    return record.seeded(dict(zip(golden(case, "names").tolist(), sizes, strict=True)))


def write_vae(folder: pathlib.Path, case: str) -> pathlib.Path:
    """Writes the folder of a case of diffusers, and returns it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(str(golden(case, "config")))
    save_file(weights_of(case), folder / "diffusion_pytorch_model.safetensors")
    return folder


def write_pair(folder: pathlib.Path, case: str) -> pathlib.Path:
    """Writes the two files of a case of TAESD, and returns their folder."""
    folder.mkdir(parents=True)
    weights = weights_of(case)
    for part in ("encoder", "decoder"):
        named = {name.removeprefix(f"{part}."): array for name, array in weights.items() if name.startswith(part)}
        save_file(named, folder / f"taef2_{part}.safetensors")
    return folder
