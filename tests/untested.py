"""Lists the functions of diffusion/ that no test enters. Run by hand:

    python -m tests.untested                             # all tests, in parallel
    python -m tests.untested tests/test_flow.py -q       # pytest's own arguments

Every Python process is watched by `sys.setprofile`: pytest, the workers of xdist, and what the tests start. The tests
take longer than without. Lambdas are left out; calls while a module is imported count.
"""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "diffusion"
ALL = ["-n", "auto", "--dist", "loadfile"]
Function = tuple[str, str]  # the file, and the name with those of the classes and functions around it


def write_start(start: Path, folder: Path) -> None:
    """Writes a sitecustomize.py to `start`: Python processes with `start` on PYTHONPATH are watched, into `folder`."""
    text = f"import runpy\nrunpy.run_path({__file__!r})['watch']({str(folder)!r})\n"
    (start / "sitecustomize.py").write_text(text, encoding="utf-8")


def watch(folder: str) -> None:
    """Appends each function of diffusion/ that this process enters to a file of its own.

    Each is written when it is first entered, because the process may be killed later.
    """
    package = f"{PACKAGE}{os.sep}"
    seen: dict[int, CodeType] = {}  # holds the codes, so that no other gets the number of one

    def enter(frame: Any, event: str, argument: Any) -> None:
        del argument
        code = frame.f_code
        if event != "call" or id(code) in seen:
            return
        seen[id(code)] = code
        if code.co_filename.startswith(package) and not code.co_name.startswith("<"):
            with open(os.path.join(folder, str(os.getpid())), "a", encoding="utf-8") as file:
                file.write(f"{code.co_filename}\t{code.co_qualname}\n")

    threading.setprofile(enter)
    sys.setprofile(enter)


def entered(folder: Path) -> set[Function]:
    """Returns the functions that any watched process has entered."""
    lines = [line for path in folder.iterdir() for line in path.read_text(encoding="utf-8").splitlines()]
    return {(file, name) for file, _, name in (line.partition("\t") for line in lines)}


def defined(package: Path = PACKAGE) -> dict[Function, int]:
    """Returns the functions of a package with the lines at which they begin."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        for code in functions(compile(path.read_text(encoding="utf-8"), str(path), "exec")):
            found[str(path), code.co_qualname] = code.co_firstlineno
    return found


def functions(code: CodeType) -> Iterator[CodeType]:
    """Yields the functions in a module, in their order, those within classes and functions too."""
    for child in code.co_consts:
        if isinstance(child, CodeType):
            is_class = not child.co_flags & 0x02  # CO_NEWLOCALS: of functions alone
            if not is_class and not child.co_name.startswith("<"):
                yield child
            yield from functions(child)


def main() -> None:
    with tempfile.TemporaryDirectory() as start, tempfile.TemporaryDirectory() as folder:
        write_start(Path(start), Path(folder))
        places = [start, *filter(None, [os.environ.get("PYTHONPATH")])]
        command = [sys.executable, "-m", "pytest", *(sys.argv[1:] or ALL)]
        done = subprocess.run(command, env={**os.environ, "PYTHONPATH": os.pathsep.join(places)}, cwd=ROOT)
        found = entered(Path(folder))
    all_functions = defined()
    never = {function: line for function, line in all_functions.items() if function not in found}
    for (file, name), line in never.items():
        print(f"{Path(file).relative_to(ROOT)}:{line}: {name}")
    print(f"{len(never)} of {len(all_functions)} functions are entered by no test")
    if done.returncode:
        sys.exit(f"error: the tests failed ({done.returncode}): what they would have entered after that is listed too")


if __name__ == "__main__":
    main()
