"""Diffusion models that read like the papers: the modules beside this file; the machinery has a room each.

    import diffusion

    run = diffusion.open_run("runs/digits")
    images = run.sample(16, seed=0)

The names below are imported when they are first used, so that `import diffusion` costs nothing.
"""

import importlib
from typing import Any

__version__ = "0.3.0"

# What Python callers use, and the module and name behind it.
_NAMES = {
    "open_run": ("diffusion.runs.run", "open_run"),
    "train": ("diffusion.runs.train", "train_run"),
    "load_config": ("diffusion.model.fields", "load_config"),
    "save_gif": ("diffusion.runs.pictures", "save_gif"),
}
_MODULES = (
    "averages",
    "chains",
    "consistency",
    "contrastive",
    "distillation",
    "editing",
    "flow",
    "flow_map",
    "gaussian",
    "grids",
    "guidance",
    "likelihood",
    "losses",
    "metrics",
    "predictions",
    "samplers",
    "schedules",
    "types",
    "weightings",
)

__all__ = ["load_config", "open_run", "save_gif", "train"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"diffusion.{name}")
    if name in _NAMES:
        module, attribute = _NAMES[name]
        return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'diffusion' has no attribute {name!r}: it has {', '.join([*_NAMES, *_MODULES])}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES, *_MODULES])
