"""The folder of a run: to which experiment and config it belongs, and which fields of it may change.

`config.json` and the checkpoints hold the config that the run was trained with. A resumed run records

- new values of the free `training.*` fields and of `data.dir`, once it trains with them;
- never new values of `sampling.*` and `evaluation.*`: given on a resume they hold for that call alone.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.files import replacing
from diffusion.training.description import FORMAT, Description, Migrate, check_description, unchanged
from diffusion.training.errors import RunError

Config = dict[str, Any]  # plain JSON

# Fields (or blocks, with a dot at their end) that do not change what was learned: free when a trained run is used.
FREE_AFTERWARDS = ("sampling.", "evaluation.", "data.dir", "training.mesh")
# Those that also do not change what further steps learn: free when a run is resumed.
FREE_IN_TRAINING = (
    *FREE_AFTERWARDS,
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
# A field is free only where each of these others has one of these values, or is not there, in both configs: a cooldown
# of the learning rate ends at num_steps, and so does a schedule that falls all along.
FREE_WITH = {
    "training.num_steps": {"optimizer.cooldown_steps": (0,), "optimizer.schedule.name": ("wsd", "constant")},
}
# Blocks of which a resumed run keeps the recorded values.
KEPT = ("sampling", "evaluation")


def flatten(config: Config, prefix: str = "") -> Config:
    """Returns {"a.b": value} of a nested config."""
    flat = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def differences(old: Config, new: Config, free: tuple[str, ...] = FREE_IN_TRAINING) -> list[str]:
    """Returns the fields in which two configs differ although they may not.

    Args:
      old: as stored, plain JSON.
      new: as asked for, plain JSON.
      free: what may differ, FREE_IN_TRAINING or FREE_AFTERWARDS.

    Returns:
      A line "field: old -> new" for each, in alphabetical order.
    """
    flat_old, flat_new = flatten(old), flatten(new)

    missing = "(none)"
    lines = []
    for field in sorted(flat_old | flat_new):
        before, after = flat_old.get(field, missing), flat_new.get(field, missing)
        is_free = any(field.startswith(name) if name.endswith(".") else field == name for name in free)
        needed = FREE_WITH.get(field, {}) if is_free else {}
        fixing = [
            name
            for name, values in needed.items()
            if any(flat.get(name, values[0]) not in values for flat in (flat_old, flat_new))
        ]
        if before != after and (fixing or not is_free):
            lines.append(f"{field}: {before} -> {after}" + (f" (fixed by {fixing[0]})" if fixing else ""))
    return lines


def check(workdir: Path, experiment: str, config: Config, migrate: Migrate = unchanged) -> None:
    """Checks that `workdir` is new, or the folder of this experiment and config. Writes nothing.

    Args:
      workdir: the folder of the run.
      experiment: its name.
      config: of the run, plain JSON.
      migrate: brings the stored description to the present format.

    Raises:
      RunError: its config.json cannot be read, is of another experiment or config (the line has the differences), or
        was written by a newer version.
    """
    path = workdir / "config.json"
    try:
        if not path.exists():
            return
        stored = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(f"cannot use --workdir={workdir}: config.json: {error}") from error
    check_same_run(migrate(check_description(stored, path)), workdir, experiment, config)


def check_same_run(stored: Description, workdir: Path, experiment: str, config: Config) -> None:
    """Checks that a run in `workdir` may be resumed with this experiment and config.

    Args:
      stored: its description, of the present format.
      workdir: its folder.
      experiment: the name asked for.
      config: the config asked for, plain JSON.

    Raises:
      RunError: it is of another experiment, or of a config that differs where it may not.
    """
    if stored["experiment"] != experiment:
        raise RunError(
            f"{workdir} holds a run of experiment {stored['experiment']}, not {experiment}: name another --workdir"
        )
    if changed := differences(stored["config"], config, FREE_IN_TRAINING):
        raise RunError(
            f"{workdir} holds a run with another config (there -> asked): {'; '.join(changed)}. Resume with the old "
            f"values, or name another --workdir, which may begin with the run's weights (--init_from={workdir})"
        )


def check_same_data(stored: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Raises RunError where a run was trained on other data than `data`, by their fingerprints.

    Args:
      stored: its description; runs of before 0.3.0 have no "data", and may be resumed with any.
      data: of `data.sources.facts_of`.
    """
    there = stored.get("data")
    if there and there["fingerprint"] != data["fingerprint"]:
        was, now = (
            f"{one['name']} {one['split']}, {one['num_examples']} examples, {one['fingerprint'][:20]}..."
            for one in (there, data)
        )
        raise RunError(
            f"the run was trained on other data: {was}; these are {now}. Resume with the old data, or name another "
            "--workdir, which may begin with the run's weights (--init_from)"
        )


def recorded_config(stored: Config, asked: Config) -> Config:
    """Returns what a run with the config `stored` records when it is resumed with `asked`: see the module's lines."""
    return {**asked, **{block: stored[block] for block in KEPT if block in stored}}


def claim(workdir: Path, experiment: str, config: Config, migrate: Migrate = unchanged) -> None:
    """Makes `workdir` the folder of this experiment and config, after `check`: writes its config.json.

    Raises:
      RunError: as `check`, or the folder is not writable.
    """
    check(workdir, experiment, config, migrate)
    description = {"experiment": experiment, "config": config, "format": FORMAT}
    try:
        with replacing(workdir / "config.json") as temporary:
            temporary.write_text(json.dumps(description, indent=2) + "\n")
    except OSError as error:
        raise RunError(f"cannot write to --workdir={workdir}: {error}") from error
