"""Where arrays are placed: a mesh of three axes over every device of every process.

data    cuts the batch; every device along it holds the same parameters
fsdp    cuts the batch and the parameters, each array along one axis, gathered where it is used (FSDP, ZeRO-3)
tensor  cuts the work inside layers, along the axes that a network's table names (Megatron)

A table is a sequence of (regular expression, mesh axis or None per axis of the array). It is searched in the array's
path in the state, as "opt_state/0/mu/params/block_0/image_qkv/kernel": written for the end of a path, it finds a
parameter, its averages and its optimizer moments alike.
"""

import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from diffusion.training.errors import RunError, one_line
from diffusion.training.experiment import Batch, Rules

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
SMALLEST = 2**12  # elements of an array that is worth cutting


def find_devices() -> list[Any]:
    """Returns all devices. Raises RunError where JAX finds none, or none of what JAX_PLATFORMS names."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        where = f"JAX_PLATFORMS={asked} names no device of this machine" if asked else "JAX can use no device"
        why = f" ({one_line(error, 200)})" if str(error) else ""
        raise RunError(f"{where}{why}: set JAX_PLATFORMS=cpu, or install JAX for the device") from error


def make_mesh(num_devices: int | None = None, spec: str = "", devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh with the axes `AXES` over all devices, or the first `num_devices`.

    Args:
      num_devices: how many; None: all.
      spec: sizes of axes, see `mesh_sizes`.
      devices: of another machine; None: of this one.

    Raises:
      RunError: JAX finds no device, or the mesh does not fit the devices.

    Example:
      make_mesh(spec="fsdp:4,tensor:2")
    """
    devices = (find_devices() if devices is None else devices)[:num_devices]
    sizes = mesh_sizes(spec, len(devices))
    placed = np.asarray(devices).reshape(tuple(sizes.values()))
    for row in placed.reshape(-1, sizes["tensor"]):
        # Each process reads rows of the batch of its own, and along "tensor" devices share theirs.
        if len({device.process_index for device in row}) > 1:
            raise RunError(
                f"training.mesh={spec}: tensor:{sizes['tensor']} reaches over several processes, of "
                f"{sum(device.process_index == row[0].process_index for device in devices)} devices each: "
                "make it a divisor of that"
            )
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_sizes(spec: str, num_devices: int) -> dict[str, int]:
    """Returns the size of each of `AXES`, whose product is `num_devices`.

    Args:
      spec: as "data:2,fsdp:4". An axis of size -1 takes the devices that the others leave; where none has, "data"
        does if it is absent. Other absent axes have size 1.
      num_devices: to be spread.

    Raises:
      RunError: an unknown axis, no size, or sizes that do not make up the devices.
    """
    where, form = f"training.mesh={spec}", "write sizes of data, fsdp and tensor, as data:2,fsdp:4"
    sizes: dict[str, int] = {}
    for part in filter(None, spec.replace(" ", "").split(",")):
        name, _, size = part.partition(":")
        if name not in AXES or name in sizes or not re.fullmatch(r"-1|[1-9]\d*", size):
            fault = "is no axis" if name not in AXES else "is given twice" if name in sizes else "has no size"
            raise RunError(f"{where}: {name!r} {fault}: {form}, or -1 for the devices that are left")
        sizes[name] = int(size)
    sizes = {name: sizes.get(name, 1 if name != "data" or -1 in sizes.values() else -1) for name in AXES}
    given = math.prod(size for size in sizes.values() if size != -1)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise RunError(f"{where}: only one axis can be -1, the devices that are left")
    if num_devices % given or (not open_axes and given != num_devices):
        raise RunError(
            f"{where} is a mesh of {'' if not open_axes else 'a multiple of '}{given} devices, and there are "
            f"{num_devices}: give another --config.training.mesh, or data:-1 for all of them"
        )
    return {name: num_devices // given if size == -1 else size for name, size in sizes.items()}


def describe_mesh(mesh: Mesh) -> str:
    """Returns the sizes of the axes, as "data:2,fsdp:4,tensor:1"."""
    return ",".join(f"{name}:{size}" for name, size in mesh.shape.items())


def num_batch_parts(mesh: Mesh) -> int:
    """Returns into how many parts the mesh cuts a batch."""
    return math.prod(mesh.shape[name] for name in BATCH_AXES)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays [B, ...] of examples: the one of batches, samples and votes everywhere."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def on_mesh(mesh: Mesh, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns `function`, to be jitted, in which networks can see the mesh; see `networks.layers.cut_along_batch`."""

    @functools.wraps(function)
    def wrapped(*args: Any, **options: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **options)

    return wrapped


def place_batch(mesh: Mesh, rows: dict[str, np.ndarray]) -> Batch:
    """Returns global arrays [B, ...], sharded over the mesh, of which `rows` are this process's part."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in rows.items()}


def partition(
    path: str,
    shape: tuple[int, ...],
    mesh_shape: Mapping[str, int],
    rules: Rules = (),
    spread: Sequence[str] = ("fsdp",),
) -> PartitionSpec:
    """Returns how one array is cut: as the first rule of its path says, then once more over the axes `spread`.

    The second cut is along the longest axis that is still whole and divides, and none where there is no such axis or
    the array has fewer than `SMALLEST` elements.

    Args:
      path: of the array, its names joined by "/".
      shape: of the array.
      mesh_shape: sizes of the mesh's axes.
      rules: the network's table.
      spread: mesh axes over which parameters are spread.

    Raises:
      RunError: a rule cuts an axis into parts that do not divide it.
    """
    axes: list[Any] = [None] * len(shape)
    named = next((along for rule, along in rules if len(along) == len(shape) and re.search(rule, path)), axes)
    for axis, name in enumerate(named):
        if name is not None and mesh_shape[name] > 1:
            axes[axis] = name
            if shape[axis] % mesh_shape[name]:
                raise RunError(
                    f"training.mesh: {name}:{mesh_shape[name]} does not divide {shape[axis]}, axis {axis} of {path} "
                    f"{shape}: choose a {name} that divides the network's heads and widths"
                )
    over = [name for name in spread if mesh_shape[name] > 1]
    count = math.prod(mesh_shape[name] for name in over)
    left = [axis for axis, size in enumerate(shape) if axes[axis] is None and size % count == 0]
    if over and left and math.prod(shape) >= SMALLEST:
        axes[max(left, key=lambda axis: shape[axis])] = over[0] if len(over) == 1 else tuple(over)
    return PartitionSpec(*axes) if any(axes) else PartitionSpec()


def state_shardings(mesh: Mesh, state: Any, rules: Rules = (), spread: Sequence[str] = ("fsdp",)) -> Any:
    """Returns a sharding for every array of `state`, a tree of arrays that may be abstract; see `partition`.

    A parameter, its averages and its optimizer moments are cut alike: their shapes and the ends of their paths agree.
    """

    def place(keys: Any, x: Any) -> NamedSharding:
        path = jax.tree_util.keystr(keys, simple=True, separator="/")
        return NamedSharding(mesh, partition(path, x.shape, mesh.shape, rules, spread))

    return jax.tree_util.tree_map_with_path(place, state)
