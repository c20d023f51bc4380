"""The folder of a run: which experiment and config it belongs to is written down before anything else."""

import json
from pathlib import Path
from typing import Any

from diffusion.files import replacing
from diffusion.training.errors import RunError

# A run may go on with other values of these: they do not change what a step learns.
FREE_FIELDS = (
    "sampling.",
    "evaluation.",
    "data.dir",
    "training.num_steps",
    "training.log_every",
    "training.checkpoint_every",
    "training.preview_every",
    "training.snapshot_every",
    "training.keep_newest",
    "training.keep_every",
    # These two change what a bad step does, and are turned on when one has stopped a run.
    "training.skip_bad_steps",
    "training.spike_factor",
)


def flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"a.b": value} of a nested config."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Returns a line "field: old -> new" for every field that differs and is not free to."""
    old, new = flatten(old), flatten(new)
    fields = [field for field in sorted(old | new) if not field.startswith(FREE_FIELDS)]
    missing = "(none)"
    return [
        f"{field}: {old.get(field, missing)} -> {new.get(field, missing)}"
        for field in fields
        if old.get(field, missing) != new.get(field, missing)
    ]


def check(workdir: Path, experiment: str, config: dict[str, Any]) -> None:
    """Checks that `workdir` is new, or the folder of this experiment and config (plain JSON). Writes nothing.

    Raises:
      RunError: it cannot be read, or belongs to another experiment or config (the difference is shown).
    """
    path = workdir / "config.json"
    try:
        if not path.exists():
            return
        found = json.loads(path.read_text())
        there, old = str(found["experiment"]), dict(found["config"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunError(f"cannot use --workdir={workdir}: config.json: {error}") from error
    if there != experiment:
        raise RunError(f"{workdir} holds a run of experiment {there}, not {experiment}: name another --workdir")
    if changed := differences(old, config):
        raise RunError(
            f"{workdir} holds a run with another config (there -> asked): {'; '.join(changed)}. "
            "Go on with the old values, or name another --workdir"
        )


def claim(workdir: Path, experiment: str, config: dict[str, Any]) -> None:
    """Makes `workdir` the folder of this experiment and config, after `check`.

    Raises:
      RunError: as `check`, or the folder is not writable.
    """
    check(workdir, experiment, config)
    try:
        with replacing(workdir / "config.json") as temporary:
            temporary.write_text(json.dumps({"experiment": experiment, "config": config}, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"cannot write to --workdir={workdir}: {error}") from error
