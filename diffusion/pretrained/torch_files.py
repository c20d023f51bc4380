"""Reads weight files of `torch.save` without PyTorch, and without running what a pickle asks for.

A pickle is a program that may call any function by its name. A state dict needs little of that: dictionaries, numbers,
strings, and four names. Only those are known here, and they build nothing but plain data; all other names and
instructions are refused. Both of PyTorch's forms are read: the zip archive of 1.6 and later, and the older stream.
"""

import io
import os
import pickle
import pickletools
import re
import struct
import zipfile
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_DTYPES = {
    "torch.DoubleStorage": np.dtype("<f8"),
    "torch.FloatStorage": np.dtype("<f4"),
    "torch.HalfStorage": np.dtype("<f2"),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype("<i8"),
    "torch.IntStorage": np.dtype("<i4"),
    "torch.ShortStorage": np.dtype("<i2"),
    "torch.CharStorage": np.dtype("i1"),
    "torch.ByteStorage": np.dtype("u1"),
    "torch.BoolStorage": np.dtype("?"),
}
_FUNCTIONS = ("collections.OrderedDict", "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter")
# The instructions of a pickled state dict. Not among them: building objects of classes, extensions, byte arrays.
_INSTRUCTIONS = """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE
    BINSTRING SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM
    SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID
"""
_MOST_TUPLES = 60_000  # a tensor takes four; Python's hash of 200,000 in one another overflows the stack
_MAGIC = 0x1950A86A20F9469CFC6C  # what the stream form begins with, then its version
_VERSION = 1001
_LONGEST = 500  # characters of a reason: names in a hostile file have no bounds

_Stream = io.BufferedReader | io.BytesIO


class _Storage(NamedTuple):
    """A run of `count` numbers, which lies in the file under `key`."""

    dtype_name: str
    key: str
    count: int


class _Tensor(NamedTuple):
    """A view of a storage. Offset and strides count numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_torch_file(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Returns a state dict saved by `torch.save`: arrays by name, read-only, sharing memory where the tensors did.

    Raises:
      ValueError: there is no such file, it is damaged, it asks for a name that a state dict does not need (which the
        error gives; nothing was run), or it holds anything but tensors by name at the top.
    """
    return _read(Path(path), whole=True)


def read_torch_names(path: str | os.PathLike) -> list[str]:
    """Returns the names of such a file's arrays, without reading those; raises the same errors."""
    return list(_read(Path(path), whole=False))


def _read(path: Path, whole: bool) -> dict[str, Any]:
    """Returns arrays by name, or with `whole` false something else by name."""
    if not path.is_file():
        raise ValueError(f"{path} is not a file")
    try:
        with open(path, "rb") as stream:
            start = stream.read(4)
            stream.seek(0)
            return (_read_zip if start == b"PK\x03\x04" else _read_stream)(stream, whole)
    # What a damaged or hostile pickle or archive raises has no bounds, and all of it means that it is not read.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        reason = reason if len(reason) <= _LONGEST else f"{reason[:_LONGEST]}..."
        raise ValueError(f"{path} is not read as a torch weight file: {reason}") from None


def _read_zip(stream: _Stream, whole: bool) -> dict[str, Any]:
    """Reads the archive: FOLDER/data.pkl and FOLDER/data/KEY for each storage, all uncompressed."""
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it is a zip archive with {len(pickles)} files data.pkl, not one")
        folder = pickles[0].removesuffix("data.pkl")
        for entry in archive.infolist():
            if not entry.filename.startswith(folder) or ".." in entry.filename.split("/"):
                raise ValueError(f"it holds '{entry.filename}', which is outside its folder '{folder}'")
            if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                raise ValueError(f"'{entry.filename}' is compressed or encrypted, which torch.save never does")
        if f"{folder}byteorder" in names and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its numbers are big-endian")
        tensors, storages = _load_state_dict(io.BytesIO(archive.read(pickles[0])))
        if not whole:
            return tensors
        _check_total(storages, stream)

        def read(storage: _Storage) -> bytes:
            name = f"{folder}data/{storage.key}"
            if name not in names:
                raise ValueError(f"it lacks '{name}'")
            return archive.read(name)

        arrays = {key: _storage_array(storage, read(storage)) for key, storage in storages.items()}
    return {name: _view(tensor, arrays) for name, tensor in tensors.items()}


def _read_stream(stream: _Stream, whole: bool) -> dict[str, Any]:
    """Reads the older form: five pickles (magic, version, system, object, storage keys), then storages and lengths."""
    if stream.read(1) != b"\x80":
        raise ValueError("it is neither a zip archive nor a pickle")
    stream.seek(0)
    if _load(stream)[0] != _MAGIC or _load(stream)[0] != _VERSION:
        raise ValueError("it is a pickle, but not one of torch.save")
    if _load(stream)[0].get("little_endian") is not True:
        raise ValueError("its numbers are big-endian")
    tensors, storages = _load_state_dict(stream)
    if not whole:
        return tensors
    _check_total(storages, stream)
    keys = _load(stream)[0]
    if sorted(keys) != sorted(storages):
        raise ValueError("its tensors and its storages do not belong together")
    arrays = {}
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack("<q", stream.read(8))
        if count != storage.count:
            raise ValueError(f"storage '{key}' has {count} numbers, its tensors say {storage.count}")
        arrays[key] = _storage_array(storage, stream.read(_num_bytes(storage)))
    return {name: _view(tensor, arrays) for name, tensor in tensors.items()}


def _load_state_dict(stream: _Stream) -> tuple[dict[str, _Tensor], dict[str, _Storage]]:
    """Returns the tensors by name, and the storages by key that they are views of."""
    tensors, storages = _load(stream)
    if not isinstance(tensors, dict):
        raise ValueError(f"it holds a {type(tensors).__name__}, not tensors by name")
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, _Tensor):
            what = f"under '{name}' it holds a {type(tensor).__name__.lstrip('_')}, not a tensor"
            raise ValueError(f"{what}: save the state dict alone, as torch.save(model.state_dict(), path)")
    return tensors, storages


def _load(stream: _Stream) -> tuple[Any, dict[str, _Storage]]:
    """Returns the next pickle of the stream and the storages it named. Instructions are all seen before one is run."""
    start = stream.tell()
    size = stream.seek(0, os.SEEK_END) - start
    stream.seek(start)
    num_tuples = 0
    for instruction, argument, _ in pickletools.genops(stream):
        if instruction.name not in _INSTRUCTIONS.split():
            raise ValueError(f"its pickle holds the instruction {instruction.name}, which no state dict needs")
        if instruction.name == "GLOBAL":
            _check_name(str(argument).replace(" ", "."))
        if instruction.name == "LONG_BINPUT" and (argument or 0) > size:  # it would make room for so many
            raise ValueError("its pickle is damaged")
        num_tuples += instruction.name.startswith("TUPLE")
        if num_tuples > _MOST_TUPLES:
            raise ValueError(f"its pickle holds more than {_MOST_TUPLES} tuples, which may be nested to crash us")
    stream.seek(start)
    unpickler = _Unpickler(stream)
    return unpickler.load(), unpickler.storages


def _check_name(name: str):
    if name not in _DTYPES and name not in _FUNCTIONS:
        raise ValueError(f"its pickle asks for {name}, which no state dict needs; nothing was run")


class _StateDict(dict):
    """Stands in for OrderedDict. It takes no attributes: what torch adds (versions of modules) is dropped."""

    def __setstate__(self, state: Any):
        pass


class _Unpickler(pickle.Unpickler):
    """Knows four kinds of names. What it gives for them is made for this file alone and can only build plain data."""

    def __init__(self, stream: _Stream):
        super().__init__(stream)
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Returns what stands for a name; a storage's class is just that name."""
        full_name = f"{module}.{name}"
        _check_name(full_name)
        # New functions every time: a pickle can set attributes of what it holds.
        known = {
            "collections.OrderedDict": _StateDict,
            "torch._utils._rebuild_tensor_v2": lambda *arguments: _tensor(*arguments),
            "torch._utils._rebuild_parameter": lambda tensor, requires_grad, hooks: tensor,
        }
        return known.get(full_name, full_name)

    def persistent_load(self, pid: Any) -> _Storage:
        """Returns a storage of ("storage", class, key, device, count); the stream form ends with None for views."""
        kind, dtype_name, key, _, count, *view = pid
        if kind != "storage" or dtype_name not in _DTYPES or view not in ([], [None]):
            raise ValueError("it names a storage in a way that torch.save does not today")
        if not re.fullmatch(r"[0-9]+", key) or type(count) is not int or count < 0:
            raise ValueError(f"it names a storage '{key}' of {count} numbers")
        storage = _Storage(dtype_name, key, count)
        if self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"it names storage '{key}' twice, and differently")
        return storage


def _tensor(storage, offset, shape, strides, requires_grad, hooks, metadata=None) -> _Tensor:
    """Returns what `torch._utils._rebuild_tensor_v2` is given, checked: the view lies in its storage."""
    if not isinstance(storage, _Storage) or len(shape) != len(strides) or metadata:
        raise ValueError("it describes a tensor in a way that is not known here")
    if any(type(number) is not int or number < 0 for number in (offset, *shape, *strides)):
        raise ValueError(f"it holds a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset}")
    last = offset + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    if prod(shape) > storage.count or (prod(shape) and last >= storage.count):
        raise ValueError(
            f"it holds a tensor of shape {list(shape)}, strides {list(strides)} and offset {offset} "
            f"in a storage of {storage.count} numbers"
        )
    return _Tensor(storage, offset, tuple(shape), tuple(strides))


def _num_bytes(storage: _Storage) -> int:
    return storage.count * _DTYPES[storage.dtype_name].itemsize


def _check_total(storages: dict[str, _Storage], stream: _Stream):
    """Raises ValueError if the storages together are larger than the file, before memory is taken for them."""
    place = stream.tell()
    size = stream.seek(0, os.SEEK_END)
    stream.seek(place)
    total = sum(map(_num_bytes, storages.values()))
    if total > size:
        raise ValueError(f"its tensors need {total} bytes, and the whole file has {size}: is it truncated?")


def _storage_array(storage: _Storage, data: bytes) -> np.ndarray:
    if len(data) != _num_bytes(storage):
        raise ValueError(f"storage '{storage.key}' has {len(data)} bytes, its tensors say {_num_bytes(storage)}")
    return np.frombuffer(data, _DTYPES[storage.dtype_name])


def _view(tensor: _Tensor, storages: dict[str, np.ndarray]) -> np.ndarray:
    """Returns the tensor's numbers, where they lie in its storage."""
    numbers = storages[tensor.storage.key]
    if not prod(tensor.shape):
        return np.empty(tensor.shape, numbers.dtype)
    strides = [stride * numbers.itemsize for stride in tensor.strides]
    return np.lib.stride_tricks.as_strided(numbers[tensor.offset :], tensor.shape, strides, writeable=False)
