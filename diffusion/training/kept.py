"""The compiled program that a run's steps begin with, kept on disk: it is there before Python has made its text anew.

JAX's compilation cache finds a program by its text, so a start with it traces and lowers the step first, and then has
XLA load the program: most of a second start. Here the two are files beside that cache, in its folder "steps": of every
run, by its config and devices, a line with the name of the program that it began with the last time, and a digest of
the sources and the data then; and the programs, by their text. `programs` uses both. JAX_ENABLE_COMPILATION_CACHE=0
turns them off as well.
"""

import contextlib
import hashlib
import importlib
import json
import os
import pickle
import platform
import sys
import sysconfig
import threading
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from diffusion.files import replacing
from diffusion.training.threads import in_thread

MOST = 16  # programs, of some megabytes each

_written = threading.local()  # count: of the programs that this thread compiled and JAX wrote to its cache


def _count_written(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_misses":  # recorded where an entry is written, in the compiling thread
        _written.count = getattr(_written, "count", 0) + 1


jax.monitoring.register_event_listener(_count_written)


class Kept:
    """What is kept of a run; a thread is loading its program.

    Args:
      folder: of the files.
      run: the name of the run's line.
      system: what a program depends on beside its text.
      mesh: the devices that the program is for.

    Attributes:
      trusted: whether sources and data are those of the last start, see `compare`, so that the program is in all
        likelihood, too, and what fitted together then does now.
      unconfirmed: whether steps are being computed with the program, and it is not known yet to be that of the code.
    """

    def __init__(self, folder: Path, run: str, system: str, mesh: Mesh):
        self._folder = folder
        self._line = folder / f"{run}.json"
        self._system = system
        self._devices = list(mesh.devices.flat)
        self._stored: dict[str, str] = {}
        with contextlib.suppress(OSError, ValueError):
            self._stored = dict(json.loads(self._line.read_text()))
        self._name = self._stored.get("program", "")
        self._origin = ""
        self.trusted = self.unconfirmed = False
        self._loading = in_thread(partial(self._load, self._name))

    def compare(self, facts: Any) -> None:
        """Finds out whether the program is to be trusted.

        Args:
          facts: JSON, what the step depends on beside the config and the code: the data, and what was read of it.
        """
        self._origin = name_of(digest_of_sources(), facts)
        self.trusted = self._stored.get("origin") == self._origin and self._path(self._name).exists()

    def program(self) -> jax.stages.Compiled | None:
        """Returns the program of the last start; None where there is none."""
        return self._loading.result()

    def is_of(self, lowered: jax.stages.Lowered) -> bool:
        """Returns whether the program of the last start is that of a lowered function."""
        return self._name == self._name_of(lowered)

    def compile(self, lowered: jax.stages.Lowered) -> jax.stages.Compiled:
        """Returns the program of a lowered function, from disk or the compiler, and keeps it for the next start."""
        name = self._name_of(lowered)
        found = self.program() if name == self._name else self._load(name)
        if found is not None:
            in_thread(partial(self._save, name))
            return found
        _written.count = 0
        compiled = lowered.compile()
        # XLA on CPUs cannot serialize again what was loaded: only a program that JAX wrote to its cache now.
        if _written.count:
            in_thread(partial(self._save, name, compiled))
        return compiled

    def forget(self) -> None:
        """Removes the run's line, and the program."""
        for file in (self._line, self._path(self._name)):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        self.trusted, self.unconfirmed, self._name = False, False, ""

    def _name_of(self, lowered: jax.stages.Lowered) -> str:
        return name_of(self._system, lowered.as_text())

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.program"

    def _load(self, name: str) -> jax.stages.Compiled | None:
        from jax.experimental.serialize_executable import deserialize_and_load

        try:
            parts = pickle.loads(zlib.decompress(self._path(name).read_bytes()))
            program = deserialize_and_load(*parts, execution_devices=self._devices)
        except Exception:  # whatever is wrong with it: the program is compiled
            return None
        with contextlib.suppress(OSError):
            os.utime(self._path(name))  # see `_save`
        return program

    def _save(self, name: str, compiled: jax.stages.Compiled | None = None) -> None:
        """Writes the run's line, and a program that was compiled; removes those not used for longest, beyond `MOST`.

        Where the program cannot be serialized or the disk is full nothing is kept, as in JAX's own cache.
        """
        from jax.experimental.serialize_executable import serialize

        with contextlib.suppress(OSError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError):
            if compiled is not None:
                content = zlib.compress(pickle.dumps(serialize(compiled)), level=1)
                with replacing(self._path(name)) as temporary:
                    temporary.write_bytes(content)
            with replacing(self._line) as temporary:
                temporary.write_text(json.dumps({"program": name, "origin": self._origin}))
            programs = sorted(self._folder.glob("*.program"), key=lambda file: file.stat().st_mtime)
            for old in programs[:-MOST]:
                old.unlink(missing_ok=True)


def kept_program(mesh: Mesh, experiment: str, config: Any) -> Kept | None:
    """Returns what is kept of a run, and begins to load it; `Kept.compare` is to be called before it is used.

    None where JAX keeps no programs on this machine's disk, and for several processes, which compile together: one that
    found its program would leave the others waiting.

    Args:
      mesh: the devices.
      experiment: its name.
      config: of the run, plain JSON.
    """
    settings = jax.config.values
    folder = settings["jax_compilation_cache_dir"]
    if not folder or "://" in folder or not settings["jax_enable_compilation_cache"] or jax.process_count() > 1:
        return None
    devices = mesh.devices.ravel()
    system = name_of(
        [importlib.import_module(name).__version__ for name in ("jax", "jaxlib")],
        [os.environ.get(name) for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")],
        {name: str(value) for name, value in settings.items()},
        [devices[0].client.platform_version, processor()],
        [dict(mesh.shape), [[device.id, device.device_kind] for device in devices]],
    )
    return Kept(Path(folder) / "steps", name_of(system, experiment, config), system, mesh)


def name_of(*parts: Any) -> str:
    """Returns a name for JSON values, the same for the same ones."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def digest_of_sources() -> str:
    """Returns a digest of the modules that were imported and are not installed, but worked on, and of those beside.

    The latter are what is imported when it is used; deeper folders are not searched, which may hold data.
    """
    library = sysconfig.get_paths()["stdlib"]
    files: set[Path] = set()
    folders: set[Path] = set()
    for name, module in list(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        installed = file.is_relative_to(library) or {"site-packages", "dist-packages"}.intersection(file.parts)
        if file.suffix == ".py" and not installed:
            files.add(file)
            folders |= {file.parent} if "." in name else set()  # a script's folder may be anyone's
    digest = hashlib.sha256()
    for file in sorted(files.union(*(folder.glob("*.py") for folder in folders))):
        if file.is_file():  # an editor's lock is a link to nothing
            digest.update(f"{file}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def processor() -> str:
    """Returns what the machine's processor can do: a program for CPUs may not run on another."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return " ".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return platform.processor()
