"""Where arrays live: one mesh axis, "data", over every device of every process."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion.training.experiment import Batch, TrainState

Rule = Callable[[tuple[int, ...], int], PartitionSpec]


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh over all devices (or the first `num_devices`), the batch spread along its axis "data"."""
    devices = jax.devices()[:num_devices]
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(shape: tuple[int, ...], num_devices: int) -> PartitionSpec:
    """The rule of data parallelism: every device holds the whole array."""
    del shape, num_devices
    return PartitionSpec()


def fully_sharded(shape: tuple[int, ...], num_devices: int, smallest: int = 2**12) -> PartitionSpec:
    """The rule of FSDP / ZeRO-3: an array is cut along its longest axis that the devices divide.

    Arrays of fewer than `smallest` elements, and those that no axis divides, stay whole.
    """
    axes = [axis for axis, size in enumerate(shape) if size % num_devices == 0]
    if not axes or np.prod(shape) < smallest:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*["data" if axis == longest else None for axis in range(len(shape))])


def state_shardings(mesh: Mesh, state: TrainState, rule: Rule = replicated) -> TrainState:
    """Returns a sharding for every array of `state` (which may be abstract): the rule sees its shape alone.

    So a parameter, its average and its optimizer moments, which have one shape, always live together.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, rule(x.shape, mesh.size)), state)


def place_batch(mesh: Mesh, rows: dict[str, np.ndarray]) -> Batch:
    """Makes global arrays [B, ...] from this process's rows, spread over the mesh."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in rows.items()}
