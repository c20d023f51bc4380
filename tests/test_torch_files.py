"""Weight files of torch.save: read bit for bit without PyTorch, and nothing that a file asks for is run."""

import builtins
import importlib
import io
import os
import pathlib
import pickle
import struct
import zipfile
from collections import OrderedDict
from typing import Any, ClassVar

import ml_dtypes
import numpy as np
import pytest

from diffusion.pretrained.torch_files import read_torch_file

GOLDEN = np.load(pathlib.Path(__file__).parent / "golden" / "inception_torch_files.npz")
FORMS = ("zip", "stream")


def recorded(kind: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(f"{kind}/"): GOLDEN[name] for name in GOLDEN.files if name.startswith(f"{kind}/")}


@pytest.fixture
def write(tmp_path):
    """Writes bytes to a file, and gives its path."""

    def write(content: bytes | np.ndarray) -> pathlib.Path:
        path = tmp_path / "weights.pth"
        path.write_bytes(bytes(content))
        return path

    return write


def as_zip(data: bytes, storages: dict[str, bytes] | None = None, others: dict[str, bytes] | None = None) -> bytes:
    """The archive around a pickle, as torch.save makes it."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        for key, content in (storages or {}).items():
            archive.writestr(f"archive/data/{key}", content)
        for name, content in (others or {}).items():
            archive.writestr(name, content)
    return out.getvalue()


def as_stream(data: bytes, storages: dict[str, bytes] | None = None, itemsize: int = 4) -> bytes:
    """The older form around a pickle."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True, "type_sizes": {}})
    tail = [struct.pack("<q", len(content) // itemsize) + content for content in (storages or {}).values()]
    return b"".join([*(pickle.dumps(part, 2) for part in head), data, pickle.dumps(list(storages or {}), 2), *tail])


WRAP = {"zip": as_zip, "stream": as_stream}


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments, state: Any = None):
        self.parts = (function, arguments, state) if state is not None else (function, arguments)

    def __reduce__(self):
        return self.parts


def named(module: str, name: str):
    """A function that pickle writes under a name of our choice."""
    return type(name, (), {"__module__": module, "__qualname__": name, "__name__": name})


PythonPickler: Any = getattr(pickle, "_Pickler")  # noqa: B009


class Pickler(PythonPickler):
    """Writes names that don't exist here, without looking them up."""

    def save_global(self, obj, name=None):
        if obj.__module__.partition(".")[0] in ("torch", "numpy", "evil"):
            return self.write(f"c{obj.__module__}\n{obj.__name__}\n".encode())
        return super().save_global(obj, name)

    dispatch: ClassVar[Any] = {**PythonPickler.dispatch, type: save_global}

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None


class Storage:
    def __init__(self, count: Any = 6, key: Any = "0", dtype: str = "FloatStorage", kind: str = "storage", view=()):
        self.pid = (kind, named("torch", dtype), key, "cpu", count, *view)


def dumps(content: Any, protocol: int = 2) -> bytes:
    out = io.BytesIO()
    Pickler(out, protocol).dump(content)
    return out.getvalue()


def tensor(storage=None, offset: Any = 0, shape: Any = (2, 3), strides: Any = (3, 1), *more):
    return Call(
        named("torch._utils", "_rebuild_tensor_v2"), storage or Storage(), offset, shape, strides, False, {}, *more
    )


NUMBERS = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
    "kind, form", [("tensors", "protocol_4"), *((k, f) for k in ("tensors", "module") for f in FORMS)]
)
def test_files_of_torch_are_read_bit_for_bit(write, kind, form):
    expected = recorded(kind)
    found = read_torch_file(write(GOLDEN[f"{kind}.{form}"]))
    assert list(found) == list(expected)
    for name, array in found.items():
        wanted = expected[name].view(ml_dtypes.bfloat16) if name == "bfloat16" else expected[name]
        assert array.dtype == wanted.dtype and array.shape == wanted.shape, name
        assert array.tobytes() == wanted.tobytes(), name
        assert not (array.size and array.flags.writeable)
    if kind == "tensors":
        assert np.shares_memory(found["float32"], found["transposed"]) and found["transposed"].strides == (4, 16)


@pytest.mark.parametrize("form", FORMS)
def test_parameters_of_a_module_are_read(write, form):
    found = read_torch_file(write(GOLDEN[f"parameters.{form}"]))
    assert list(found) == [name for name in recorded("module") if "running" not in name and "num_" not in name]
    for name, array in found.items():
        np.testing.assert_array_equal(array, recorded("module")[name])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "kind, message",
    [
        ("nested", "under 'state_dict' it holds a StateDict, not a tensor: save the state dict alone"),
        ("list", "it holds a list, not tensors by name"),
        ("whole_module", r"asks for torch\.nn\.modules\.container\.Sequential"),
        ("complex", r"asks for torch\.ComplexFloatStorage"),
    ],
)
def test_other_files_of_torch_are_refused(write, form, kind, message):
    with pytest.raises(ValueError, match=message):
        read_torch_file(write(GOLDEN[f"{kind}.{form}"]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["whole", "value", "key", "state", "persistent"])
def test_calls_are_refused_by_name_and_nothing_is_run(write, tmp_path, form, protocol, place):
    marker = tmp_path / "run"
    for function, argument, name in [
        (os.system, f"touch {marker}", "posix.system"),
        (builtins.eval, f"open({str(marker)!r}, 'w')", "eval"),
        (os.mkdir, str(marker), "posix.mkdir"),
        (importlib.import_module, "shutil", "importlib.import_module"),
    ]:
        call = Call(function, argument)
        content = {
            "whole": call,
            "value": {"weight": tensor(), "bias": call},
            "key": {(call,): tensor()},
            "state": Call(OrderedDict, state={"_metadata": call}),
            "persistent": {"weight": tensor(Storage(count=call))},
        }[place]
        data = dumps(content, protocol)
        assert argument.encode() in data  # the attack is in the file
        with pytest.raises(ValueError, match=rf"asks for \S*{name}, which no state dict needs; nothing was run"):
            read_torch_file(write(WRAP[form](data)))
        assert not marker.exists()


def test_the_attack_itself_works_on_a_plain_pickle(tmp_path):
    """Else the test above would show nothing."""
    pickle.loads(dumps({"bias": Call(os.mkdir, str(tmp_path / "run"))}))
    assert (tmp_path / "run").exists()


# The names that are known, for instructions put together by hand.
DICT, TENSOR, FLOAT = b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nFloatStorage\n"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "attack, message",
    [
        pytest.param(b"iposix\nsystem\n", "INST", id="instance"),
        pytest.param(DICT + b")\x81", "NEWOBJ", id="new object"),
        pytest.param(b"(" + DICT + b"o", "OBJ", id="object"),
        pytest.param(b"\x82\x01", "EXT1", id="extension"),
        pytest.param(b"\x96\xff\xff\xff\xff\xff\xff\xff\x7f", "BYTEARRAY8|read", id="endless byte array"),
        pytest.param(b"}r\xff\xff\xff\xff", "damaged", id="endless memo"),
        pytest.param(b"})" + b"\x85" * 200_000 + b"Ns", "nested", id="key nested so deeply that hashing it crashes"),
        pytest.param(b"X\xff\xff\xff\xff", r"expected 4294967295 bytes|exhausted", id="endless string"),
        pytest.param(b"\x8c\x05posix\x8c\x06system\x93", r"posix\.system", id="name off the stack"),
        pytest.param(b"cbuiltins\neval\n", r"builtins\.eval", id="a name alone"),
        pytest.param(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n", "__globals__", id="dotted name"),
        pytest.param(b"\x8c\x0ccollections \x8c\x0bOrderedDict\x93", "collections ", id="almost a known name"),
        pytest.param(FLOAT + b")R", "not callable", id="call of a storage's class"),
        pytest.param(
            DICT + b"}(X\x05\x00\x00\x00itemsNub",
            "missing a required argument|missing 1 required",
            id="state on the class",
        ),
        pytest.param(
            TENSOR + b"N}(X\x0c\x00\x00\x00__defaults__)u\x86b", "it holds a function", id="slots on the function"
        ),
        pytest.param(
            DICT + b")R" + b"N}(X\x05\x00\x00\x00items" + TENSOR + b"u\x86b" + b"}(" + DICT + b"Nu0", "POP", id="pop"
        ),
    ],
)
def test_tricks_are_refused(write, form, attack, message):
    from diffusion.pretrained import torch_files

    before = dict(vars(torch_files._StateDict)), torch_files._tensor.__defaults__, dict(torch_files._tensor.__dict__)
    with pytest.raises(ValueError, match=message) as error:
        read_torch_file(write(WRAP[form](b"\x80\x02" + attack + b".")))
    assert "\n" not in str(error.value) and "not read as a torch weight file: " in str(error.value)
    assert before == (
        dict(vars(torch_files._StateDict)),
        torch_files._tensor.__defaults__,
        dict(torch_files._tensor.__dict__),
    )


def test_attributes_put_on_a_dictionary_change_nothing(write):
    state = {"items": OrderedDict, "__class__": OrderedDict, "_metadata": OrderedDict(version=1)}
    data = dumps(Call(OrderedDict, [["weight", tensor()]], state=state))
    (found,) = read_torch_file(write(as_zip(data, {"0": NUMBERS.tobytes()}))).values()
    np.testing.assert_array_equal(found, NUMBERS.reshape(2, 3))


@pytest.mark.parametrize("name", ["../outside", "archive/../../outside", "/tmp/outside", "other/data/0"])
def test_names_that_leave_the_archive_are_refused(write, tmp_path, name):
    file = as_zip(dumps({"weight": tensor()}), {"0": NUMBERS.tobytes()}, others={name: b"x"})
    with pytest.raises(ValueError, match=f"it holds '{name}', which is outside"):
        read_torch_file(write(file))
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pth"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "content, message",
    [
        (tensor(shape=(3, 3)), r"shape \[3, 3\], strides \[3, 1\] and offset 0 in a storage of 6"),
        (tensor(offset=1), "offset 1 in a storage of 6"),
        (tensor(strides=(4, 1)), r"strides \[4, 1\]"),
        (tensor(strides=(-3, 1)), r"strides \[-3, 1\]"),
        (tensor(offset=-1), "offset -1"),
        (tensor(shape=(2.0, 3)), r"shape \[2.0, 3\]"),
        (tensor(shape=(True, 3)), r"shape \[True, 3\]"),
        (tensor(strides=(1,)), "describes a tensor"),
        (tensor(shape=(1 << 20, 1 << 20), strides=(0, 0)), "shape"),  # a whole lot of one number
        (tensor(shape=(0, 1 << 62, 1 << 62), strides=(0, 0, 0)), "too big|aximum"),
        (tensor(None, 0, (2, 3), (3, 1), {"neg": True}), "describes a tensor"),
        (tensor("0"), "describes a tensor"),
        (tensor(Storage(count=1 << 40)), "its tensors need 4398046511104 bytes, and the whole file has"),
        (tensor(Storage(count=-6)), "storage '0' of -6 numbers"),
        (tensor(Storage(count=7)), "storage '0' has"),
        (tensor(Storage(key="../0")), r"storage '\.\./0'"),
        (tensor(Storage(key="1")), "lacks 'archive/data/1'|do not belong together"),
        (tensor(Storage(dtype="DoubleStorage")), "storage '0' has|need"),
        (tensor(Storage(kind="module")), "in a way that torch.save does not today"),
        (tensor(Storage(view=(("1", 0, 2),))), "in a way that torch.save does not today"),
        ([tensor(), tensor(Storage(dtype="IntStorage"))], "names storage '0' twice"),
        (3, "a int, not a tensor"),
        (Storage(), "a Storage, not a tensor"),
    ],
)
def test_tensors_that_do_not_fit_their_storage_are_refused(write, form, content, message):
    file = WRAP[form](dumps({"weight": content}), {"0": NUMBERS.tobytes()})
    with pytest.raises(ValueError, match=message) as error:
        read_torch_file(write(file))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", FORMS)
def test_the_files_made_here_are_good_where_nothing_is_wrong(write, form):
    file = WRAP[form](dumps({"weight": tensor()}), {"0": NUMBERS.tobytes()})
    np.testing.assert_array_equal(read_torch_file(write(file))["weight"], NUMBERS.reshape(2, 3))


@pytest.mark.parametrize("form", FORMS)
def test_cut_off_and_damaged_files(write, form):
    whole = bytes(GOLDEN[f"tensors.{form}"])
    for length in range(0, len(whole) - 1, 97):
        with pytest.raises(ValueError, match=r"not read as a torch weight file: .") as error:
            read_torch_file(write(whole[:length]))
        assert "\n" not in str(error.value)
    rng = np.random.RandomState(0)
    for _ in range(200):  # what is damaged gives an error of that one kind, or other numbers
        damaged = bytearray(whole)
        for place in rng.randint(0, len(whole), 3):
            damaged[place] = rng.randint(256)
        try:
            read_torch_file(write(damaged))
        except ValueError as error:
            assert "\n" not in str(error)


def test_archives_that_torch_does_not_write(write):
    data = dumps({"weight": tensor()})
    with pytest.raises(ValueError, match="with 0 files"):
        read_torch_file(write(as_zip(data).replace(b"data.pkl", b"date.pkl")))
    with pytest.raises(ValueError, match="big-endian"):
        read_torch_file(write(as_zip(data, others={"archive/byteorder": b"big"})))
    with pytest.raises(ValueError, match="big-endian"):
        file = as_stream(data)
        read_torch_file(write(file.replace(b"\x88", b"\x89")))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", data * 100)
    with pytest.raises(ValueError, match="compressed"):
        read_torch_file(write(out.getvalue()))


@pytest.mark.parametrize(
    "content, message", [(b"", "neither"), (b"text", "neither"), (pickle.dumps({"a": 1}), "not one of torch.save")]
)
def test_other_files_are_refused(write, content, message):
    with pytest.raises(ValueError, match=message):
        read_torch_file(write(content))


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match=r"nothing\.pth is not a file"):
        read_torch_file(tmp_path / "nothing.pth")
