"""The text of a compiled program, XLA's HLO, as computations of instructions, and the sizes of what they pass on.

Only text is read, so that no device and no plugin is needed. `program` counts with it.
"""

import math
import re
from functools import cached_property
from typing import NamedTuple

SLICES = {"slice", "dynamic-slice", "gather"}
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_START = re.compile(r"\s+(ROOT )?%([\w.\-]+) = ")
_PARENTHESIS = re.compile(r"[()]")


class Instruction(NamedTuple):
    """One line of a computation: its result's type, what it does to which operands, and the rest of the line."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    root: bool
    arguments: str


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
    for match in _PARENTHESIS.finditer(line, at):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    raise ValueError(f"a parenthesis is not closed: {line[:120]}")


def called_by(one: Instruction) -> dict[str, list[str]]:
    """Returns the computations that an instruction calls, by attribute."""
    pattern = (
        r"(body|condition|calls|to_apply|branch_computations|true_computation|false_computation)=(\{[^}]*\}|%[\w.\-]+)"
    )
    return {name: _NAME.findall(value) for name, value in re.findall(pattern, one.attributes)}


def size_of(type_: str, anywhere: bool = False) -> float:
    """Returns the bytes of a type, of a tuple's arrays together, in a device's main memory, or in any.

    Example:
      size_of("(bf16[2,3]{1,0}, f32[])")  # 16
    """
    total = 0.0
    for dtype, sides, layout in _ARRAY.findall(type_):
        if not anywhere and re.search(r"S\([1-9]", layout):  # another memory space than the device's main one
            continue
        total += math.prod(int(side) for side in filter(None, sides.split(","))) * bits_of(dtype) / 8
    return total


def bits_of(dtype: str) -> int:
    """Returns the bits of an element: those in the name, as of bf16 and f8e4m3fn; 8 of pred, 0 of token."""
    if dtype == "pred":
        return 8
    found = re.match(r"[a-z]+(\d+)", dtype)
    return int(found[1]) if found else 0


def results_of(one: Instruction) -> str:
    """Returns the type of an instruction's results without what is none: workspaces, and operands passed along."""
    arrays = [match[0] for match in _ARRAY.finditer(one.type)]
    if one.opcode == "custom-call" and len(arrays) > 1 and arrays[-1].startswith(("u8[", "s8[")):
        return " ".join(arrays[:-1])
    if one.opcode.endswith("-start") and one.type.startswith("("):  # (operands, results, contexts)
        count = len(one.operands)
        return " ".join(arrays[count : 2 * count] or arrays)
    return one.type
