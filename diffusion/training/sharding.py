"""Where arrays are placed: one mesh axis, "data", over every device of every process."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion.training.experiment import Batch, TrainState

Rule = Callable[[tuple[int, ...], int], PartitionSpec]  # (shape, number of devices) -> how the array is split


def make_mesh(num_devices: int | None = None) -> Mesh:
    """Returns a mesh over all devices, or the first `num_devices`; batches are sharded along its axis "data"."""
    devices = jax.devices()[:num_devices]
    return Mesh(np.asarray(devices), ("data",), axis_types=(AxisType.Auto,))


def replicated(shape: tuple[int, ...], num_devices: int) -> PartitionSpec:
    """Returns the sharding of data parallelism: every device holds the whole array."""
    del shape, num_devices
    return PartitionSpec()


def fully_sharded(shape: tuple[int, ...], num_devices: int, smallest: int = 2**12) -> PartitionSpec:
    """Returns the sharding of FSDP / ZeRO-3: an array is split along its longest axis that the devices divide.

    Arrays of fewer than `smallest` elements, and those without such an axis, stay whole.
    """
    axes = [axis for axis, size in enumerate(shape) if size % num_devices == 0]
    if not axes or np.prod(shape) < smallest:
        return PartitionSpec()
    longest = max(axes, key=lambda axis: shape[axis])
    return PartitionSpec(*["data" if axis == longest else None for axis in range(len(shape))])


def state_shardings(mesh: Mesh, state: TrainState, rule: Rule = replicated) -> TrainState:
    """Returns a sharding for every array of `state`, which may be abstract.

    The rule depends on the shape alone, so a parameter, its average and its optimizer moments are sharded alike.
    """
    return jax.tree.map(lambda x: NamedSharding(mesh, rule(x.shape, mesh.size)), state)


def place_batch(mesh: Mesh, rows: dict[str, np.ndarray]) -> Batch:
    """Returns global arrays [B, ...], sharded over the mesh, of which `rows` are this process's part."""
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in rows.items()}
