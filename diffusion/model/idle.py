"""Fields of a config that change nothing beside its others: refused where a command line asks for them."""

from collections.abc import Iterator, Sequence
from typing import Any

from diffusion.model.config import Config
from diffusion.training import RunError

BETAS = ("linear", "sqrt_linear", "sigmoid")  # schedules of a chain between `first` and `last`
MADE = ("scenes", "digits")  # data that has its own held-out split
ONE_KIND = {  # fields of captioned data that one kind of it reads
    "folder": ("data.skip_broken", "data.buckets", "data.references", "evaluation.dir"),
    "tfds": ("data.split", "evaluation.split"),
}


def refuse_idle(config: Config, asked: Sequence[str]) -> None:
    """Raises RunError where a field that the command line names is one that changes nothing.

    Args:
      config: with what was asked for.
      asked: full names of fields, as "loss.vlb_weight".
    """
    for field, reason in idle(config):
        if field in asked:
            raise RunError(f"--config.{field} changes nothing: {reason}. Leave it out, or change that too")


def idle(config: Config) -> Iterator[tuple[str, str]]:
    """Yields the fields that are not read, and why; a field that is off is not among them."""
    found: dict[str, tuple[str, ...]] = {}
    if value_of(config, "loss.learned_variance") is False:
        found["it is read with loss.learned_variance=True"] = ("loss.vlb_weight",)
    if value_of(config, "lora.rank") == 0:
        found["lora.rank=0 trains no adapters"] = ("lora.alpha", "lora.targets")
    if value_of(config, "sampling.guidance") == 1.0:
        names = ("guidance_interval", "skip_layers", "skip_scale", "skip_interval")
        found["sampling.guidance=1 is no guidance"] = tuple(f"sampling.{name}" for name in names)
    if value_of(config, "evaluation.features") in ("pixels", "latents"):
        found[f"evaluation.features={config.evaluation.features} have no network"] = ("evaluation.weights",)
    if value_of(config, "process.name") not in (None, "ddpm"):
        found[f"process.name={config.process.name} has no chain, and so no bound"] = ("evaluation.bound_terms",)
    if (beta := value_of(config, "process.beta")) is not None and beta not in BETAS:
        found[f"process.beta={beta} has ends of its own"] = ("process.first", "process.last")
    if beta != "table":
        found["it is read with process.beta=table"] = ("process.table",)
    if value_of(config, "data.name") == "scenes":
        found["data.name=scenes has words of its own"] = (
            "condition.size",
            "condition.phrases",
            "condition.phrase_dropout",
        )
    if value_of(config, "training.ema_profiles") == ():
        found["training.ema_profiles=() are no averages to be stored"] = ("training.snapshot_every",)
    if value_of(config, "evaluation.split") is not None:  # of captions
        kind = config.data.name if config.data.name in ("folder", *MADE) else "tfds"
        unread = tuple(field for other, fields in ONE_KIND.items() if other != kind for field in fields)
        found[f"data.name={config.data.name} does not read it"] = unread
    for reason, fields in found.items():
        yield from ((field, reason) for field in fields if value_of(config, field))


def value_of(config: Config, field: str) -> Any:
    """Returns the value of a field by its full name; None where the config has none."""
    for name in field.split("."):
        if not hasattr(config, "items") or name not in config:
            return None
        config = config[name]
    return config
