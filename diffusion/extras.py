"""The optional parts of an installation: which modules stand for each, and the line that names one that is missing.

need("tfds")  # returns, or raises: tensorflow_datasets is not installed: pip install 'diffusion-jax[tfds]'
"""

import functools
import importlib.util
from pathlib import Path

DISTRIBUTION = "diffusion-jax"
# The modules that each extra of pyproject.toml brings, as far as this package imports them.
EXTRAS = {
    "runs": (
        "flax",
        "optax",
        "orbax",
        "absl",
        "ml_collections",
        "grain",
        "PIL",
        "safetensors",
        "tokenizers",
        "matplotlib",
        "tensorboardX",
        "tqdm",
    ),
    "digits": ("sklearn",),
    "wandb": ("wandb",),
    "demo": ("gradio", "fastapi", "starlette", "uvicorn", "anyio"),
    "tfds": ("tensorflow_datasets", "array_record", "importlib_resources"),
}


class MissingExtra(ImportError):
    """A part of the installation that was left out is needed now."""


@functools.cache
def need(extra: str) -> None:
    """Checks that the packages of an extra are there, without importing them.

    Raises:
      MissingExtra: in one line, what is missing and how to install it.
    """
    missing = [name for name in EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed: "
            f"pip install '{DISTRIBUTION}[{extra}]', or in a checkout, .venv/bin/pip install -e '.[{extra}]'"
        )


def check_package(folder: Path) -> None:
    """Checks that no other project's `diffusion` was installed into this package's folder.

    Raises:
      ImportError: the one on PyPI was: which of two files of one name is there depends on which came last.
    """
    if (folder / "session").is_dir():
        raise ImportError(
            f"{folder} also holds PyPI's other `diffusion`, and both cannot live in one environment: "
            f"pip uninstall diffusion {DISTRIBUTION}, then install one of them"
        )
