"""Power-function averages stored during a run, and an average of any length reconstructed from them afterwards.

One .safetensors file per stored step in the run's folder `averages/`: float32 tensors, each named
SIGMA_REL/PATH/OF/PARAMETER.

Source: Karras et al. (2024), "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from diffusion.averages import combine, power_exponent
from diffusion.files import replacing
from diffusion.training.errors import RunError
from diffusion.training.experiment import Params


class Average(NamedTuple):
    """Averaged weights, and the relative error of their profile against the requested one."""

    params: Params
    error: float


def folder_of(workdir: Path) -> Path:
    """Returns the folder in which a run stores its averages."""
    return workdir / "averages"


def save(workdir: Path, step: int, profiles: dict[str, Params]) -> None:
    """Writes the averages after `step` updates. Every process must call this; the first one writes.

    Args:
      workdir: of the run.
      step: the number of updates.
      profiles: {sigma_rel: params}.
    """
    path = folder_of(workdir) / f"step_{step:09d}.safetensors"
    arrays: dict[str, np.ndarray] = {}
    for name, params in profiles.items():
        for keys, value in jax.tree_util.tree_leaves_with_path(params):
            value = multihost_utils.process_allgather(value, tiled=True)
            arrays[f"{name}/{path_name(keys)}"] = np.array(value, order="C")  # ascontiguousarray gives a scalar an axis
    if jax.process_index() == 0:
        with replacing(path) as temporary:
            save_file(arrays, temporary)


def path_name(keys: Any) -> str:
    """Returns "a/b/c" of a key path in a pytree of dictionaries."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def stored_steps(workdir: Path) -> dict[int, Path]:
    """Returns {step: file} of the stored averages, in the order of steps."""
    files = sorted(folder_of(workdir).glob("step_*.safetensors"))
    return {int(path.stem.removeprefix("step_")): path for path in files}


def reconstruct(workdir: Path, sigma_rel: float, like: Params, step: int | None = None) -> Average:
    """Returns the average of relative length `sigma_rel` after `step` updates. Files are read one at a time.

    Args:
      workdir: of the run.
      sigma_rel: the relative length: the width of the profile over the number of steps.
      like: the tree, shapes and dtypes of the parameters; may be abstract.
      step: one of those stored; None: the last.

    Raises:
      RunError: nothing is stored of that step, or a file is damaged or of another network.
      ValueError: a length that no average has.
    """
    gamma = power_exponent(sigma_rel)
    files = stored_steps(workdir)
    if not files:
        raise RunError(f"{workdir} holds no averages: train with training.ema_profiles=(0.05, 0.1) first")
    step = max(files) if step is None else step
    if step not in files:
        raise RunError(f"{workdir} holds no averages of step {step}: choose from {', '.join(map(str, files))}")
    files = {at: path for at, path in files.items() if at <= step}
    names = {at: profile_names(path) for at, path in files.items()}
    pairs = [(at, name) for at in files for name in names[at]]
    combination = combine([at for at, _ in pairs], [power_exponent(float(n)) for _, n in pairs], step, gamma)
    weight = dict(zip(pairs, combination.weight, strict=True))

    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    total = [np.zeros(leaf.shape, np.float64) for _, leaf in leaves]
    for at, path in files.items():
        with safe_open(path, framework="numpy") as stored:
            there = set(stored.keys())
            for (keys, leaf), into in zip(leaves, total, strict=True):
                for name in names[at]:
                    key = f"{name}/{path_name(keys)}"
                    value = stored.get_tensor(key) if key in there else None
                    if value is None or value.shape != leaf.shape:
                        raise RunError(f"{path} is of another network: {key} is not {list(leaf.shape)} in it")
                    into += weight[at, name] * value
    params = [np.asarray(value, leaf.dtype) for value, (_, leaf) in zip(total, leaves, strict=True)]
    return Average(jax.tree.unflatten(tree, params), combination.error)


def profile_names(path: Path) -> list[str]:
    """Returns the lengths stored in a file, by their names there.

    Raises:
      RunError: the file is damaged or of another kind.
    """
    try:
        with safe_open(path, framework="numpy") as stored:
            names = sorted({key.split("/")[0] for key in stored.keys()})  # noqa: SIM118 (it is no dictionary)
        [float(name) for name in names]
    except (SafetensorError, ValueError, OSError) as error:
        raise RunError(f"{path} is not a whole file of averages ({' '.join(str(error).split())})") from error
    return names
