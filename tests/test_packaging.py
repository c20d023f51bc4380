"""What is installed: the papers alone, extras for the machinery, pinned versions, and launch.sh's set-up of them."""

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import test_architecture
from packaging.requirements import Requirement
from packaging.version import Version

import diffusion
from diffusion import extras

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONSTRAINTS = sorted(ROOT.glob("constraints-*.txt"))


def requirements(lines):
    return [Requirement(line) for line in lines]


def modules_of(names):
    """The modules that distributions bring, as far as they are installed here."""
    wanted = {re.sub("[-_.]+", "-", name).lower() for name in names}
    there = metadata.packages_distributions().items()
    return {module for module, by in there if wanted & {re.sub("[-_.]+", "-", name).lower() for name in by}}


def test_the_distribution_has_a_name_of_its_own():
    assert PROJECT["name"] == extras.DISTRIBUTION != "diffusion"
    assert all(one.name == extras.DISTRIBUTION for one in requirements(PROJECT["optional-dependencies"]["all"]))
    assert metadata.version(extras.DISTRIBUTION) == diffusion.__version__


@pytest.mark.parametrize("path", test_architecture.SOURCES, ids=test_architecture.module_name)
def test_what_is_imported_is_a_dependency_or_is_in_an_extra(path):
    """Papers need nothing but the dependencies; ml_dtypes and jaxlib come with JAX."""
    room = test_architecture.room(test_architecture.module_name(path))
    allowed = modules_of(one.name for one in requirements(PROJECT["dependencies"]))
    if room != "papers":
        optional = [name for name in PROJECT["optional-dependencies"] if name != "test"]
        allowed |= {module for extra in extras.EXTRAS.values() for module in extra} | {*optional, "ml_dtypes", "jaxlib"}
    roots = {name.split(".")[0] for name in test_architecture.imports_of(path)}
    assert roots <= allowed | set(sys.stdlib_module_names) | {"diffusion", "experiments"}


@pytest.mark.parametrize("extra", extras.EXTRAS)
def test_the_modules_of_an_extra_are_those_that_it_installs(extra):
    first, *others = extras.EXTRAS[extra]
    if importlib.util.find_spec(first) is None:
        pytest.skip(f"the extra {extra} is not installed here: pip install -e '.[{extra}]'")
    brought = modules_of(one.name for one in requirements(PROJECT["optional-dependencies"][extra]))
    assert first in brought
    if extra in ("runs", "tfds"):  # of others some come with the first
        assert set(others) <= brought


def run(code, folder=ROOT, **environment):
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**os.environ, **environment})


def without(*modules):
    """Python's first lines, after which these modules are not there."""
    return f"""
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name in {modules} else find(name, *rest)
"""


def test_a_missing_extra_is_one_line_that_names_it():
    code = "try:\n    {}\nexcept ImportError as error:\n    print(type(error).__name__, error)"
    for use, missing, extra in [
        ("import diffusion; diffusion.open_run", ("flax", "grain"), "runs"),
        ("from diffusion.data import digits", ("tokenizers",), "runs"),
        ("from diffusion.data import digits; digits('train')", ("sklearn",), "digits"),
    ]:
        done = run(without(*missing) + code.format(use))
        assert done.stderr == "", done.stderr
        verb = "is" if len(missing) == 1 else "are"
        assert done.stdout.startswith(f"MissingExtra {', '.join(missing)} {verb} not installed: pip install ")
        assert f"'{extras.DISTRIBUTION}[{extra}]'" in done.stdout and done.stdout.count("\n") == 1


def test_the_papers_need_no_extra_and_importing_them_costs_what_jax_does():
    code = without(*(module for extra in extras.EXTRAS.values() for module in extra))
    code += """
import jax, jax.numpy
before = set(sys.modules)
tops = {name.partition(".")[0] for name in before}
import diffusion
ours = {name for name in set(sys.modules) - before if name.startswith("diffusion")}
assert ours == {"diffusion", "diffusion.compiler", "diffusion.extras"}
diffusion.samplers.ddim
print(*{name.partition(".")[0] for name in sys.modules} - tops - set(sys.stdlib_module_names))
"""
    done = run(code)
    assert done.stderr == "" and set(done.stdout.split()) <= {"diffusion", "jaxtyping", "chex", "wadler_lindig"}


def test_every_module_is_an_attribute():
    names = {path.stem for path in (ROOT / "diffusion").glob("[a-z]*.py")}
    assert names < set(dir(diffusion)) and {"networks", "open_run", "__version__"} < set(dir(diffusion))
    assert all(getattr(diffusion, name).__name__ == f"diffusion.{name}" for name in names)
    with pytest.raises(AttributeError, match=r"has no attribute 'sampler': it has open_run, .*samplers"):
        diffusion.sampler  # noqa: B018


def test_the_other_package_of_that_name_is_found_beside_ours(tmp_path):
    shutil.copytree(ROOT / "diffusion", tmp_path / "diffusion", ignore=shutil.ignore_patterns("__pycache__"))
    assert run("import diffusion.samplers", tmp_path).returncode == 0
    (tmp_path / "diffusion" / "session").mkdir()
    last = run("import diffusion", tmp_path).stderr.splitlines()[-1]
    assert "both cannot live in one environment: pip uninstall diffusion" in last


def test_the_wheel_holds_the_package_alone():
    """What setuptools finds; experiments are for checkouts."""
    from setuptools import find_packages

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = find_packages(str(ROOT), include=settings["packages"]["find"]["include"])
    assert {name.partition(".")[0] for name in found} == {"diffusion"} and "diffusion.networks" in found
    assert "py.typed" in settings["package-data"]["diffusion"] and (ROOT / "diffusion" / "py.typed").exists()


# --- pinned versions


@pytest.mark.parametrize("path", CONSTRAINTS, ids=lambda path: path.stem)
def test_constraints_pin_every_dependency_within_its_bounds(path):
    pins = {}
    for line in path.read_text().splitlines():
        name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups()  # pyright: ignore[reportOptionalMemberAccess]
        pins[re.sub("[-_.]+", "-", name).lower()] = Version(version)
    installed = {extra: PROJECT["optional-dependencies"][extra] for extra in ("runs", "digits", "tfds", "test")}
    for one in requirements([*PROJECT["dependencies"], *(line for lines in installed.values() for line in lines)]):
        name = re.sub("[-_.]+", "-", one.name).lower()
        if name == extras.DISTRIBUTION:  # other extras
            continue
        assert name in pins and one.specifier.contains(pins[name]), one
    assert pins["jax"] == pins["jaxlib"]


# --- launch.sh


@pytest.fixture
def checkout(tmp_path):
    """A folder with launch.sh, whose interpreter writes down what it is asked to do and installs nothing."""
    for name in ("launch.sh", "pyproject.toml", *(path.name for path in CONSTRAINTS)):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments" / "digits.py").write_text('"""Digits."""\nif __name__ == "__main__":\n')
    python = tmp_path / "python"
    python.write_text(f"""#!/usr/bin/env bash
case "$1 $2" in
"-c "*version_info\\ \\<*) exit 0 ;;
"-c "*"%d.%d"*) echo "$VERSION" ;;
"-c "*) echo "$VERSION.1 (main)" ;;
"-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
"-m pip") echo "pip $*" >>{tmp_path}/asked; exit "${{PIP_FAILS:-0}}" ;;
*) echo "ran $*" >>{tmp_path}/asked ;;
esac
""")
    python.chmod(0o755)

    def launch(*arguments, version="3.11", **environment):
        given = {**os.environ, "PYTHON": str(python), "VERSION": version, "JAX_EXTRA": "cpu", **environment}
        path = os.pathsep.join(
            folder for folder in os.environ["PATH"].split(os.pathsep) if not (Path(folder) / "uv").exists()
        )
        given["PATH"] = environment.get("PATH", path)
        (tmp_path / "asked").write_text("")
        done = subprocess.run(
            [str(tmp_path / "launch.sh"), *arguments], env=given, capture_output=True, text=True, timeout=60
        )
        return done, (tmp_path / "asked").read_text().splitlines()

    return launch


def test_it_installs_once_and_again_when_dependencies_change(checkout, tmp_path):
    done, asked = checkout("digits", "--seed=1")
    assert done.returncode == 0 and "setting up .venv (all, test)" in done.stderr
    assert "--constraint constraints-3.11.txt --editable .[all,test]" in asked[0]
    assert asked[1] == "ran -m experiments.digits --seed=1"
    done, asked = checkout("digits")
    assert (done.stderr, asked) == ("", ["ran -m experiments.digits"])
    with open(tmp_path / "pyproject.toml", "a") as file:
        file.write("# tools change often\n")
    assert len(checkout("digits")[1]) == 1
    (tmp_path / ".venv" / "kept").touch()
    with open(tmp_path / "constraints-3.11.txt", "a") as file:
        file.write("more==1\n")
    done, asked = checkout("digits")
    assert len(asked) == 2 and (tmp_path / ".venv" / "kept").exists()  # in its place
    done, asked = checkout("digits", version="3.13")
    assert "--constraint constraints-3.13.txt" in asked[0] and not (tmp_path / ".venv" / "kept").exists()


@pytest.mark.parametrize(
    ("version", "file"),
    [("3.12", "constraints-3.11.txt"), ("3.13", "constraints-3.13.txt"), ("3.20", "constraints-3.13.txt")],
)
def test_the_versions_are_those_of_the_newest_file_that_is_not_above_the_interpreter(checkout, version, file):
    assert f"--constraint {file} " in checkout("digits", version=version)[1][0]


def test_other_versions_can_be_asked_for(checkout, tmp_path):
    assert "--constraint /dev/null " in checkout("digits", CONSTRAINTS="/dev/null")[1][0]
    done, asked = checkout("digits", CONSTRAINTS="nowhere.txt")
    assert done.returncode == 1 and "CONSTRAINTS=nowhere.txt: there is no such file" in done.stderr and not asked


def test_an_install_that_fails_is_reported_and_tried_again(checkout):
    done, asked = checkout("digits", PIP_FAILS="1")
    assert done.returncode == 1 and "error: could not install" in done.stderr and len(asked) == 1
    assert len(checkout("digits")[1]) == 2


def test_uv_installs_where_it_is_there_and_pip_where_it_fails(checkout, tmp_path):
    (tmp_path / "bin").mkdir()
    uv = tmp_path / "bin" / "uv"
    uv.write_text(f"""#!/usr/bin/env bash
echo "uv $*" >>{tmp_path}/asked
[ "$1" = pip ] && exit "${{UV_FAILS:-0}}"
mkdir -p .venv/bin && cp {tmp_path}/python .venv/bin/python
""")
    uv.chmod(0o755)
    path = f"{uv.parent}{os.pathsep}{os.environ['PATH']}"
    done, asked = checkout("digits", PATH=path)
    assert done.returncode == 0
    assert [line.split()[:2] for line in asked] == [["uv", "venv"], ["uv", "pip"], ["ran", "-m"]]
    assert "--constraint constraints-3.11.txt --editable .[all,test]" in asked[1]
    shutil.rmtree(tmp_path / ".venv")
    done, asked = checkout("digits", PATH=path, UV_FAILS="2")
    assert done.returncode == 0
    assert [line.split()[0] for line in asked] == ["uv", "uv", "pip", "ran"]


def test_every_launch_of_a_command_names_extras_that_there_are():
    text = (ROOT / "launch.sh").read_text()
    named = {extra for words in re.findall(r"^\s*set_up +([a-z0-9 ]+)$", text, flags=re.M) for extra in words.split()}
    assert named <= PROJECT["optional-dependencies"].keys()


def test_imports_of_packages_of_extras_are_checked_where_they_are_late():
    """A function that imports a package of a small extra calls `need` before."""
    small = {*extras.EXTRAS["digits"], *extras.EXTRAS["tfds"]}
    for path in test_architecture.SOURCES:
        tree = ast.parse(path.read_text())
        if any(root.split(".")[0] in small for root in test_architecture.imports_of(path)):
            called = [
                node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "need"
            ]
            assert called or path.stem == "tfds_captions", path
