"""Folders of published models as diffusers wrote them (recorded goldens), for the tests that open them."""

import pathlib

import numpy as np

GOLDEN = pathlib.Path(__file__).parent / "golden"
TINY = np.load(GOLDEN / "published_tiny.npz")
CASES = np.load(GOLDEN / "published_unets.npz")
NAMES = sorted({name.split("/")[1] for name in CASES.files if name.startswith("files/")})


def write_folder(path: pathlib.Path, case: str | None = None) -> pathlib.Path:
    """Writes the folder of a case of record_unets.py, or the one of record_published.py, and returns its path."""
    golden, prefix = (TINY, "files/") if case is None else (CASES, f"files/{case}/")
    for name in golden.files:
        if name.startswith(prefix):
            file = path / name.removeprefix(prefix)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(golden[name].tobytes())
    return path


def inputs(case: str) -> dict[str, np.ndarray]:
    """Returns what the network of a case was given."""
    return {name: CASES[f"{case}/{name}"] for name in ("x_t", "time", "label") if f"{case}/{name}" in CASES.files}
