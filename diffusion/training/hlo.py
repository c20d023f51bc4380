"""Reads a compiled program, XLA's text of it (HLO): its kernels with the bytes they move, and its collectives.

Only text is read, so that no device and no plugin is needed. What is counted, per device and run of the program:

kernels     what the entry computation starts, and bodies of loops as often as they run; of a conditional its largest
            branch. Not tuples, bitcasts and the like, which move nothing
read        the sizes of a kernel's operands, of one that is only sliced the slices
written     the sizes of its results without workspaces, of an update in place the update

A buffer that stays in a cache counts as often as it is used, so bytes are those of memory without caches. What is in
a TPU's vector memory, or the host's, is not counted.
"""

import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
MOVE_NOTHING = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "add-dependency",
    "opt-barrier",
    "partition-id",
    "replica-id",
    "domain",
}
SLICES = {"slice", "dynamic-slice", "gather"}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_START = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """One line of a computation: its result's type, what it does to which operands, and the rest of the line."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    arguments: str


class Kernel(NamedTuple):
    """What a device is given to do at once.

    Attributes:
      kind: "convolution", "product", "attention", "reduction", "elementwise", "copy", "collective", "custom" or other.
      name: of the instruction.
      origin: the operation of the traced program that it is of, "" where that is not known.
      read, written: bytes, each time.
      times: how often it runs.
    """

    kind: str
    name: str
    origin: str
    read: float
    written: float
    times: int


class Collective(NamedTuple):
    """An exchange among devices: its kind, the bytes of its result per device, over how many devices, how often."""

    kind: str
    bytes: float
    group: int
    times: int


class Program:
    """A compiled program.

    Args:
      text: `compiled.as_text()`.

    Attributes:
      kernels: all of them, in order.
      collectives: the same.
      open_loops: how many loops have a number of turns that is not known; they count once.
    """

    def __init__(self, text: str):
        self._computations, self._entry = parse(text)
        self.kernels: list[Kernel] = []
        self.collectives: list[Collective] = []
        self.open_loops = 0
        found = self._walk(self._entry, 1)
        for part in found:
            (self.collectives if isinstance(part, Collective) else self.kernels).append(part)  # type: ignore[arg-type]

    def _walk(self, name: str, times: int) -> list[Kernel | Collective]:
        """Returns what a computation does that runs `times` times."""
        computation, found = self._computations[name], []
        for one in computation.instructions.values():
            called = _called(one)
            if one.opcode in MOVE_NOTHING or one.opcode.endswith(("-done", "-update")):
                continue
            if one.opcode == "while":
                turns = _TRIPS.search(one.attributes)
                self.open_loops += turns is None
                found += self._walk(called["body"][0], times * (int(turns[1]) if turns else 1))
            elif one.opcode == "conditional":
                branches = [self._walk(branch, times) for branches in called.values() for branch in branches]
                found += max(branches, key=moved, default=[])
            elif one.opcode in ("call", "async-start"):
                found += self._walk(next(iter(called.values()))[0], times)
            else:
                found += self._kernel(computation, one, called, times)
        return found

    def _kernel(
        self, computation: "Computation", one: Instruction, called: dict[str, list[str]], times: int
    ) -> list[Kernel | Collective]:
        base = one.opcode.removesuffix("-start")
        inner = self._computations.get(called.get("calls", [""])[0]) if one.opcode == "fusion" else None
        read = sum(
            inner.read_of(place, size) if inner else size
            for place, size in enumerate(computation.size_of(name) for name in one.operands)
        )
        written = inner.written(one.type) if inner else size_of(_results(one))
        origin = re.search(r'op_name="([^"]*)"', one.attributes)
        kind = kind_of(one, inner)
        kernel = Kernel(kind, one.name, origin[1] if origin else "", read, written, times)
        if base not in COLLECTIVES:
            return [kernel]
        return [kernel, Collective(base, written, group_size(one.attributes), times)]


class Computation:
    """Instructions by name, in order."""

    def __init__(self) -> None:
        self.instructions: dict[str, Instruction] = {}

    def size_of(self, name: str) -> float:
        """Returns the bytes of an instruction's result."""
        return size_of(self.instructions[name].type) if name in self.instructions else 0

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of every instruction, those that read it, through bitcasts."""
        found: dict[str, list[Instruction]] = {}
        for one in reversed(self.instructions.values()):
            for name in one.operands:
                found.setdefault(name, []).extend(
                    found.get(one.name, []) if one.opcode == "bitcast" and not one.root else [one]
                )
        return found

    @cached_property
    def opcodes(self) -> set[str]:
        """Those that occur."""
        return {one.opcode for one in self.instructions.values()}

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By place."""
        return {int(one.arguments): one for one in self.instructions.values() if one.opcode == "parameter"}

    def read_of(self, place: int, size: float) -> float:
        """Returns the bytes that are read of the operand at a place, of `size` bytes."""
        name = self.parameters[place].name
        users = self.users.get(name, [])
        origins = self._bitcasts_of(name)
        slices = [one for one in users if one.opcode in SLICES and one.operands[0] in origins]
        updated = [one for one in users if one.opcode == "dynamic-update-slice" and one.operands[0] in origins]
        if len(slices) + len(updated) < len(users):
            return size
        return min(size, sum(size_of(one.type) for one in slices))

    def written(self, type_: str) -> float:
        """Returns the bytes that a fusion with results of this type writes: of updates in place the update alone."""
        saved = 0.0
        of_result = {one.name for one in self.instructions.values() if one.root}
        for one in reversed(self.instructions.values()):
            if one.name in of_result and one.opcode in ("tuple", "bitcast"):
                of_result |= set(one.operands)
            elif one.name in of_result and one.opcode == "dynamic-update-slice":
                saved += size_of(one.type) - self.size_of(one.operands[1])
        return size_of(type_) - saved

    def _bitcasts_of(self, name: str) -> set[str]:
        found = {name}
        for one in self.instructions.values():
            if one.opcode == "bitcast" and one.operands[0] in found:
                found.add(one.name)
        return found


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """Returns the computations of a program by name, and the name of the one it begins with.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith((" ", "HloModule")):
            name = line.removeprefix("ENTRY ").removeprefix("%").split(" ", 1)[0]
            current = computations.setdefault(name, Computation())
            entry = name if line.startswith("ENTRY ") else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (start := _START.match(line)):
            one = _instruction(line, start)
            current.instructions[one.name] = one
    if not entry:
        raise ValueError("no entry computation: this is not the text of a compiled program")
    return computations, entry


def _instruction(line: str, start: re.Match[str]) -> Instruction:
    at = start.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    open_ = line.index("(", end)
    close = _closing(line, open_)
    arguments = line[open_ + 1 : close]
    operands = tuple(_NAME.findall(arguments))
    opcode = line[end:open_].strip()
    return Instruction(start[2], line[at:end], opcode, operands, line[close + 1 :], bool(start[1]), arguments)


def _closing(line: str, at: int) -> int:
    """Returns the place of the parenthesis that closes the one at `at`; those in quotes count too, in pairs."""
    depth = 0
    for match in re.compile(r"[()]").finditer(line, at):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"a parenthesis is not closed: {line[:120]}")


def _called(one: Instruction) -> dict[str, list[str]]:
    """Returns the computations that an instruction calls, by attribute."""
    pattern = r"(body|calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
    return {name: _NAME.findall(value) for name, value in re.findall(pattern, one.attributes)}


def size_of(type_: str) -> float:
    """Returns the bytes of a type, of a tuple's arrays together, in a device's main memory.

    Example:
      size_of("(bf16[2,3]{1,0}, f32[])")  # 16
    """
    total = 0.0
    for dtype, sides, layout in _ARRAY.findall(type_):
        if re.search(r"S\([1-9]", layout):  # another memory space than the device's main one
            continue
        total += math.prod(int(side) for side in filter(None, sides.split(","))) * bits_of(dtype) / 8
    return total


def bits_of(dtype: str) -> int:
    """Returns the bits of an element: those in the name, as of bf16 and f8e4m3fn; 8 of pred, 0 of token."""
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


def _results(one: Instruction) -> str:
    """Returns the type of an instruction's results without what is none: workspaces, and operands passed along."""
    arrays = [match[0] for match in _ARRAY.finditer(one.type)]
    if one.opcode == "custom-call" and len(arrays) > 1 and arrays[-1].startswith(("u8[", "s8[")):
        return " ".join(arrays[:-1])
    if one.opcode.endswith("-start") and one.type.startswith("("):  # (operands, results, contexts)
        count = len(one.operands)
        return " ".join(arrays[count : 2 * count] or arrays)
    return one.type


def kind_of(one: Instruction, inner: Computation | None) -> str:
    """Returns the kind of a kernel, see `Kernel`."""
    opcodes = inner.opcodes if inner else {one.opcode.removesuffix("-start")}
    target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
    if target:
        names = {"fmha": "attention", "conv": "convolution", "gemm": "product", "matmul": "product"}
        return next((kind for part, kind in names.items() if part in target[1].lower()), "custom")
    if opcodes & set(COLLECTIVES):
        return "collective"
    if "convolution" in opcodes:  # a TPU's matrix products are convolutions without a window
        lines = inner.instructions.values() if inner else [one]
        windows = any(line.opcode == "convolution" and "window={size" in line.attributes for line in lines)
        return "convolution" if windows else "product"
    if "dot" in opcodes or "gemm" in one.name:
        return "product"
    if one.opcode == "fusion":
        return "reduction" if opcodes & {"reduce", "reduce-window"} else "elementwise"
    return "copy" if opcodes & {"copy", "transpose"} else one.opcode


def group_size(attributes: str) -> int:
    """Returns how many devices exchange with one another: of {{0,1},{2,3}} or [2,2]<=[4], 2; 1 where none is named."""
    if listed := re.search(r"replica_groups=\{\{([\d,]*)\}", attributes):
        return listed[1].count(",") + 1
    if iota := re.search(r"replica_groups=\[\d+,(\d+)\]", attributes):
        return int(iota[1])
    return 2 if "source_target_pairs" in attributes else 1


def moved(parts: Any) -> float:
    """Returns the bytes that kernels read and write together."""
    return sum((part.read + part.written) * part.times for part in parts if isinstance(part, Kernel))


def by_kind(kernels: list[Kernel]) -> dict[str, dict[str, float]]:
    """Returns, by kind, how many kernels run and the bytes that they read and write; the most bytes first."""
    found: dict[str, dict[str, float]] = {}
    for one in kernels:
        row = found.setdefault(one.kind, {"count": 0, "read": 0.0, "written": 0.0})
        row["count"] += one.times
        row["read"] += one.read * one.times
        row["written"] += one.written * one.times
    return dict(sorted(found.items(), key=lambda item: -item[1]["read"] - item[1]["written"]))


def heaviest(kernels: list[Kernel], count: int) -> Iterator[tuple[str, int, float]]:
    """Yields the origins whose kernels move the most bytes, with how many run: layers of one kind count together."""
    found: dict[str, tuple[int, float]] = {}
    for one in kernels:
        name = re.sub(r"\d+", "#", one.origin) or one.kind
        times, size = found.get(name, (0, 0.0))
        found[name] = times + one.times, size + (one.read + one.written) * one.times
    for name, (times, size) in sorted(found.items(), key=lambda item: -item[1][1])[:count]:
        yield name, times, size
