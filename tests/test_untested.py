"""The list of functions that no test enters: what is a function, and that every process of a run is watched."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import untested

PROGRAM = """
import os, subprocess, sys, threading
from diffusion import files

if sys.argv[1:]:
    files.cache_folder()
    os._exit(0)
thread = threading.Thread(target=lambda: files.replacing("x"))
thread.start()
thread.join()
sys.exit(subprocess.run([sys.executable, "-c", {program!r}, "child"]).returncode)
"""


def test_functions_are_found_with_the_names_around_them():
    source = """
    class A:
        B = [x for x in range(3)]

        @property
        def b(self):
            return lambda: 1

        class C:
            async def d(self):
                def e():
                    yield 1
    def f(): pass
    """
    found = [code.co_qualname for code in untested.functions(compile(textwrap.dedent(source), "x.py", "exec"))]
    assert found == ["A.b", "A.C.d", "A.C.d.<locals>.e", "f"]


def test_what_the_package_defines_is_found():
    found = untested.defined()
    path = str(untested.PACKAGE / "files.py")
    lines = Path(path).read_text().splitlines()
    assert lines[found[path, "cache_folder"] - 1].startswith("def cache_folder")
    assert (path, "replacing") in found and all(line > 0 for line in found.values())


def test_threads_and_processes_that_end_at_once_are_watched(tmp_path):
    """A thread enters one function, and a process that it starts, which leaves without cleaning up, another."""
    start, folder = tmp_path / "start", tmp_path / "entered"
    start.mkdir()
    folder.mkdir()
    untested.write_start(start, folder)
    program = PROGRAM.format(program=PROGRAM.format(program=""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(start), str(untested.ROOT)])}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True, cwd=tmp_path, timeout=60)
    path = str(untested.PACKAGE / "files.py")
    assert {name for file, name in untested.entered(folder) if file == path} == {"replacing", "cache_folder"}
    assert len(list(folder.iterdir())) == 2
