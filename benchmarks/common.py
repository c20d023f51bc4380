"""What the benchmarks share: flags, rounds in turns, a small run of the digits, peak memory, and results as JSON."""

import argparse
import contextlib
import datetime
import json
import os
import platform
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusion.files import replacing
from diffusion.training.checkpoints import provenance

# Changes that make the config `digits` a run of seconds, with every kind of file that a run writes.
SMALL: dict[str, Any] = {
    "network.channels": 8,
    "network.num_blocks": 1,
    "network.multipliers": (1,),
    "network.attention_resolutions": (),
    "network.num_groups": 4,
    "optimizer.cooldown_steps": 0,
    "data.batch_size": 16,
    "training.num_steps": 40,
    "training.num_previews": 8,
    "training.checkpoint_every": 4,
    "training.log_every": 5,
    "training.preview_every": 20,
    "training.snapshot_every": 20,
    "sampling.num_steps": 3,
    "sampling.batch_size": 8,
    "evaluation.after_training": False,
}

CPU_INFO = Path("/proc/cpuinfo")


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """Returns a parser whose --help shows a module's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def as_flags(changes: Mapping[str, Any]) -> list[str]:
    """Returns changes of a config as the flags of an experiment: ["--config.network.channels=8"]."""
    return [f"--config.{field}={value}" for field, value in changes.items()]


def take_turns(timers: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds that each timer measured in each round.

    Every other round is in reverse order, so that neither a machine whose speed drifts nor the order favours one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for number in range(rounds):
        for name in list(timers)[:: -1 if number % 2 else 1]:
            seconds[name].append(timers[name]())
    return seconds


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """Returns the median of the ratios round by round."""
    return statistics.median([a / b for a, b in zip(numerators, denominators, strict=True)])


def peak_bytes() -> int:
    """Returns the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def write_results(path: str | os.PathLike | None, results: Mapping[str, Any]) -> str:
    """Returns results as JSON beside how they were made, and writes them to `path` where there is one.

    `machine`'s fields come first; `results` may replace them, and its "versions" are added to ours.
    """
    made = machine()
    versions = {**made["versions"], **results.get("versions", {})}
    text = json.dumps({**made, **results, "versions": versions}, indent=2) + "\n"
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(text)
    return text


def machine() -> dict[str, Any]:
    """Returns the devices, the processor and its cores, the versions of Python and JAX, the commit and the date."""
    made = provenance()
    return {
        "device": made["device"]["kind"],
        "device_count": made["device"]["count"],
        "processor": processor(),
        "cpu_count": os.cpu_count(),
        "versions": {name: made["versions"][name] for name in ("python", "jax", "jaxlib")},
        "git": made["git"],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def processor() -> str:
    """Returns the processor, as "AMD EPYC, family 25, model 17", or else its architecture.

    The name alone may be that of several generations: virtual machines have an "AMD EPYC" whose products of matrices
    take half as long as another's.
    """
    with contextlib.suppress(OSError):
        first, _, _ = CPU_INFO.read_text().partition("\n\n")
        said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
        if "model name" in said:
            numbers = [f"{name.removeprefix('cpu ')} {said[name]}" for name in ("cpu family", "model") if name in said]
            return ", ".join([said["model name"], *numbers])
    return platform.processor() or platform.machine()
