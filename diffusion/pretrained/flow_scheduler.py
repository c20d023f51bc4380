"""The scheduler of published flows: diffusers' `FlowMatchEulerDiscreteScheduler`, in scheduler/ of a pipeline."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from diffusion.pretrained.config_fields import read_fields
from diffusion.pretrained.folder import read_json, write_json

SCHEDULER = "FlowMatchEulerDiscreteScheduler"
FILE = "scheduler/scheduler_config.json"
# The fields of that class, and what holds where a file is silent.
_FIELDS: dict[str, Any] = dict(
    num_train_timesteps=1000,
    shift=1.0,
    use_dynamic_shifting=False,
    base_shift=0.5,
    max_shift=1.15,
    base_image_seq_len=256,
    max_image_seq_len=4096,
    invert_sigmas=False,
    shift_terminal=None,
    use_karras_sigmas=False,
    use_exponential_sigmas=False,
    use_beta_sigmas=False,
    time_shift_type="exponential",
    stochastic_sampling=False,
)
_HONOURED: dict[str, Collection[Any]] = {
    "num_train_timesteps": (1000,),
    "invert_sigmas": (False,),
    "shift_terminal": (None,),
    "use_karras_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_beta_sigmas": (False, None),
    "stochastic_sampling": (False,),
}


def read_flow_scheduler(folder: Path, honoured: Mapping[str, Collection[Any]]) -> dict[str, Any]:
    """Returns the scheduler's fields.

    Args:
      folder: of the pipeline.
      honoured: the values that the pipeline can have, of further fields.

    Raises:
      ValueError: it is missing, another scheduler, or steps as ours does not.
    """
    path = folder / FILE
    try:
        fields = read_fields(read_json(path), SCHEDULER, _FIELDS, {**_HONOURED, **honoured})
        if not isinstance(fields["shift"], int | float) or not fields["shift"] > 0:
            raise ValueError(f"shift is {fields['shift']}, not a number above 0")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return fields


def write_flow_scheduler(folder: Path, **fields: Any) -> None:
    """Writes scheduler/ into the folder of a pipeline that is there."""
    (folder / FILE).parent.mkdir()
    write_json(folder / FILE, {"_class_name": SCHEDULER, "num_train_timesteps": 1000, **fields})
