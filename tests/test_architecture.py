"""Imports go one way: papers <- networks, data <- training, pretrained <- evaluation <- model <- runs <- experiments.

Read from the source with `ast`, so that imports inside functions and of optional packages count too. No files import
each other in a circle, anywhere.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OUTSIDE = ("files", "extras", "compiler")
# A room may import rooms of a lower number, and itself. `OUTSIDE` are neither papers nor in a room.
RANKS = {
    "papers": 0,
    "files": 0,
    "networks": 1,
    "data": 1,
    "training": 2,
    "pretrained": 2,
    "evaluation": 3,
    "model": 4,
    "runs": 5,
    "demo": 6,
    "experiments": 6,
    "front": 7,  # diffusion/__init__.py: names for Python callers, imported when they are used
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
    if not rest:
        return "front"
    if rest and (ROOT / "diffusion" / rest[0]).is_dir():
        return rest[0]
    return "files" if rest[0] in OUTSIDE else "papers"


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


def modules_of(names: set[str], known: set[str]) -> set[str]:
    """The modules of ours that imported names mean: a.b.c is module a.b.c, or the name c of module a.b."""
    found = set()
    for name in names:
        while name and name not in known:
            name = name.rpartition(".")[0]
        found |= {name} if name else set()
    return found


def circle(arrows: dict[str, set[str]]) -> list[str]:
    """The modules of one circle of imports, or nothing."""
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> list[str]:
        if module in trail:
            return [*trail[trail.index(module) :], module]
        if module not in done:
            for other in sorted(arrows.get(module, ())):
                if found := visit(other, [*trail, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in sorted(arrows) if (found := visit(module, []))), [])


def test_no_files_import_each_other_in_a_circle():
    known = {module_name(path) for path in SOURCES}
    arrows = {module_name(path): modules_of(imports_of(path), known) - {module_name(path)} for path in SOURCES}
    assert not circle(arrows), " -> ".join(circle(arrows))
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_functions_import_nothing_of_ours():
    """An import inside a function would hide a circle; heavy packages of others may be imported late."""
    hidden = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inner = imports(ast.unparse(node))
                hidden += [f"{module_name(path)}.{node.name}: {name}" for name in inner if room(name)]
    assert not hidden, ", ".join(hidden)


def test_experiments_are_few_and_each_can_be_run():
    modules = [path for path in (ROOT / "experiments").glob("*.py") if path.stem != "__init__"]
    configs = [path for path in (ROOT / "experiments" / "configs").glob("*.py") if path.stem != "__init__"]
    assert len(modules) <= 11 and len(configs) <= 11
    assert all('if __name__ == "__main__":' in path.read_text() for path in modules)


@pytest.mark.parametrize("name", ["make_loss", "make_denoise", "make_generate", "load_weights", "inpaint", "img2img"])
def test_what_the_parts_meet_in_exists_once(name):
    """Outside the papers, where `inpaint` and `img2img` are formulas."""
    places = [
        module_name(path)
        for path in SOURCES
        if room(module_name(path)) != "papers"
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert len(places) <= 1, places


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
        ("model", "runs", True),
        ("runs", "model", False),
        ("evaluation", "model", True),
        ("experiments", "demo", True),
        ("demo", "pretrained", False),
    ],
)
def test_the_rule_itself(importer, imported, wrong):
    assert wrong_arrow(importer, imported) is wrong
