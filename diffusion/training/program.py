"""What a compiled program does, read from its text: its kernels with the bytes they move, and its collectives.

Counted per device and run of the program:

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
from typing import Any, NamedTuple

from diffusion.training.hlo import Computation, Instruction, called_by, parse, results_of, size_of

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
NO_WORK = ("AllocateBuffer", "AsyncCollectiveStart", "AsyncCollectiveDone", "Sharding", "annotate_device_placement")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Kernel(NamedTuple):
    """What a device is given to do at once.

    Attributes:
      kind: "convolution", "product", "attention", "reduction", "elementwise", "copy", "collective", "sort", "scatter",
        "rng-bit-generator", or "custom" for what others wrote.
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
        self._channels: set[str] = set()
        found = self._walk(self._entry, 1)
        for part in found:
            (self.collectives if isinstance(part, Collective) else self.kernels).append(part)  # type: ignore[arg-type]

    def _walk(self, name: str, times: int) -> list[Kernel | Collective]:
        """Returns what a computation does that runs `times` times."""
        computation, found = self._computations[name], []
        for one in computation.instructions.values():
            called = called_by(one)
            if one.opcode in MOVE_NOTHING or one.opcode.endswith(("-done", "async-update")) or _is_idle(one):
                continue
            if one.opcode == "while":
                turns = self._turns(one, called["condition"][0])
                self.open_loops += turns is None
                found += self._walk(called["body"][0], times * (turns or 1))
            elif one.opcode == "conditional":
                branches = [self._walk(branch, times) for branches in called.values() for branch in branches]
                found += max(branches, key=moved, default=[])
            elif one.opcode in ("call", "async-start") and called:
                found += self._walk(next(iter(called.values()))[0], times)
            else:
                found += self._kernel(computation, one, called, times)
        return found

    def _kernel(
        self, computation: Computation, one: Instruction, called: dict[str, list[str]], times: int
    ) -> list[Kernel | Collective]:
        inner = self._computations.get(called.get("calls", [""])[0]) if one.opcode == "fusion" else None
        read = sum(
            inner.read_of(place, size) if inner else size
            for place, size in enumerate(computation.size_of(name) for name in one.operands)
        )
        written = inner.written(one.type) if inner else size_of(results_of(one))
        origin = re.search(r'op_name="([^"]*)"', one.attributes)
        kernel = Kernel(kind_of(one, inner), one.name, origin[1] if origin else "", read, written, times)
        exchanges = inner.instructions.values() if inner else [one]
        return [kernel, *filter(None, (self._collective(other, times) for other in exchanges))]

    def _collective(self, one: Instruction, times: int) -> Collective | None:
        """Returns what an instruction exchanges; a channel that several fusions take part in counts once."""
        kind = one.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            return None
        channel = re.search(r"channel_id=(\d+)", one.attributes)
        if channel and channel[1] in self._channels:
            return None
        self._channels |= {channel[1]} if channel else set()
        return Collective(kind, size_of(results_of(one), anywhere=True), group_size(one.attributes), times)

    def _turns(self, loop: Instruction, condition: str) -> int | None:
        """Returns how often a loop turns: as XLA says, or from 0 up to what its condition compares with."""
        if known := _TRIPS.search(loop.attributes):
            return int(known[1])
        lines = self._computations[condition].instructions
        root = next(one for one in lines.values() if one.root)
        ends = [lines[name].arguments for name in root.operands if name in lines and lines[name].opcode == "constant"]
        if root.opcode == "compare" and "direction=LT" in root.attributes and len(ends) == 1 and ends[0].isdigit():
            return int(ends[0])
        return None


def _is_idle(one: Instruction) -> bool:
    """Returns whether a custom call is one that XLA keeps for its own books."""
    return one.opcode == "custom-call" and any(f'target="{name}"' in one.attributes for name in NO_WORK)


def kind_of(one: Instruction, inner: Computation | None) -> str:
    """Returns the kind of a kernel, see `Kernel`."""
    opcodes = inner.opcodes if inner else {one.opcode.removesuffix("-start")}
    target = re.search(r'custom_call_target="([^"]*)"', one.attributes)
    if target:
        names = {"fmha": "attention", "conv": "convolution", "gemm": "product", "matmul": "product"}
        return next((kind for part, kind in names.items() if part in target[1].lower()), "custom")
    if "convolution" in opcodes:  # a TPU's matrix products are convolutions without a window
        lines = inner.instructions.values() if inner else [one]
        windows = any(line.opcode == "convolution" and "window={size" in line.attributes for line in lines)
        return "convolution" if windows else "product"
    if "dot" in opcodes or "gemm" in one.name:
        return "product"
    if opcodes & set(COLLECTIVES):
        return "collective"
    if opcodes & {"reduce", "reduce-window"}:
        return "reduction"
    if one.opcode in ("copy", "copy-start", "transpose"):
        return "copy"
    return one.opcode if one.opcode in ("sort", "scatter", "rng-bit-generator") else "elementwise"


def group_size(attributes: str) -> int:
    """Returns how many devices exchange with one another; 1 where no groups are named.

    Example:
      group_size("replica_groups={{0,1},{2,3}}")  # 2; also of [2,2]<=[4] and of mesh['a'=2,'b'=2] {'b'}
    """
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"('[^']*')=(\d+)", named[1])}
        parts = re.findall(r"('[^']*')(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
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
