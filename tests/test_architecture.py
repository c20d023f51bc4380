"""Imports go one way: papers <- networks, data <- training, pretrained <- evaluation <- experiments, demo.

Read from the source with `ast`, so that imports inside functions and of optional packages count too.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A room may import rooms of a lower number, and itself. `files` is the one module that is neither paper nor in a room.
RANKS = {
    "papers": 0,
    "files": 0,
    "networks": 1,
    "data": 1,
    "training": 2,
    "evaluation": 3,
    "pretrained": 2,
    "demo": 4,
    "experiments": 5,
}
# What a page of mathematics needs: no Flax, no configs, no files, no clocks, no processes.
ALLOWED_IN_PAPERS = {"__future__", "chex", "collections", "functools", "itertools", "jax", "jaxtyping", "math"}
ALLOWED_IN_PAPERS |= {"numpy", "scipy", "typing", "diffusion"}
BARRED = {"tensorflow", "torch", "torchvision", "keras", "clu"}
SOURCES = sorted([*(ROOT / "diffusion").rglob("*.py"), *(ROOT / "experiments").rglob("*.py")])


def imports(source: str, package: str = "") -> set[str]:
    """Full names of what a module imports; `from a import b` gives a.b, as b may be a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *filter(None, [node.module])])
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def room(module: str) -> str | None:
    """The room of a module of ours, None for others: diffusion.x is a paper if diffusion/x is a file."""
    top, *rest = module.split(".")
    if top == "experiments":
        return "experiments"
    if top != "diffusion":
        return None
    if rest and (ROOT / "diffusion" / rest[0]).is_dir():
        return rest[0]
    return "files" if rest[:1] == ["files"] else "papers"


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    name = module_name(path)
    return imports(path.read_text(), name if path.stem == "__init__" else name.rpartition(".")[0])


def wrong_arrow(importer: str | None, imported: str | None) -> bool:
    """Whether a module in room `importer` may not import one in room `imported`."""
    if importer is None or imported is None or importer == imported:
        return False
    return RANKS[imported] >= RANKS[importer]


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_arrows_point_one_way(path):
    own = room(module_name(path))
    assert own in RANKS, f"{own}/ is a room that the plan does not have: give it a rank here"
    wrong = {name for name in imports_of(path) if wrong_arrow(own, room(name))}
    assert not wrong, f"{own} must not import {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("path", [path for path in SOURCES if room(module_name(path)) == "papers"], ids=module_name)
def test_papers_are_mathematics_alone(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert roots <= ALLOWED_IN_PAPERS, f"a paper must not import {', '.join(sorted(roots - ALLOWED_IN_PAPERS))}"
    calls = {
        node.func.id
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input", "exec", "eval"}


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_tensorflow_and_no_torch(path):
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & BARRED
    by_name = re.findall(r"""(?:import_module|__import__)\(\s*["'](\w+)""", path.read_text())
    assert not set(by_name) & BARRED


def test_the_reader_of_imports_sees_every_form():
    source = """
import torch.nn as nn
from diffusion import training, losses
from diffusion.networks.unet import UNet
from . import sibling
from ..data import images
def late():
    import tensorflow
"""
    assert imports(source, "diffusion.evaluation") == {
        "torch.nn",
        "diffusion.training",
        "diffusion.losses",
        "diffusion.networks.unet.UNet",
        "diffusion.evaluation.sibling",
        "diffusion.data.images",
        "tensorflow",
    }
    assert room("diffusion.training.loop") == "training" and room("diffusion.losses.simple_loss") == "papers"
    assert room("experiments.digits") == "experiments" and room("jax.numpy") is None


@pytest.mark.parametrize(
    "importer, imported, wrong",
    [
        ("papers", "networks", True),
        ("papers", "files", True),
        ("networks", "data", True),
        ("networks", "papers", False),
        ("training", "evaluation", True),
        ("evaluation", "training", False),
        ("pretrained", "evaluation", True),
        ("evaluation", "pretrained", False),
        ("pretrained", "training", True),
        ("training", "experiments", True),
        ("demo", "pretrained", False),
    ],
)
def test_the_rule_itself(importer, imported, wrong):
    assert wrong_arrow(importer, imported) is wrong
