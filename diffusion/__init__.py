"""Diffusion models that read like the papers: the modules beside this file; the machinery has a room each.

    import diffusion

    run = diffusion.open_run("runs/digits")
    images = run.sample(16, seed=0)

The names below, and every module as `diffusion.samplers`, are imported when they are first used, so that
`import diffusion` costs nothing.
"""

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from diffusion.compiler import set_cpu_flags
from diffusion.extras import check_package

__version__ = "0.3.0"

# What Python callers use, and the module and name behind it.
_NAMES = {
    "open_run": ("diffusion.runs.run", "open_run"),
    "train": ("diffusion.runs.train", "train_run"),
    "load_config": ("diffusion.model.fields", "load_config"),
    "save_gif": ("diffusion.runs.pictures", "save_gif"),
}

__all__ = ["load_config", "open_run", "save_gif", "train"]  # pyright: ignore[reportUnsupportedDunderAll]

check_package(Path(__file__).parent)
set_cpu_flags()  # before JAX reads them


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(module), attribute)
    if not name.startswith("_") and importlib.util.find_spec(f"diffusion.{name}"):
        return importlib.import_module(f"diffusion.{name}")
    raise AttributeError(f"module 'diffusion' has no attribute {name!r}: it has {', '.join([*_NAMES, *_modules()])}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_modules()})


def _modules() -> list[str]:
    import pkgutil  # 10 ms, for errors and completion alone

    return sorted(module.name for module in pkgutil.iter_modules(__path__))
