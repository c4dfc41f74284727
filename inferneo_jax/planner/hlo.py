"""Reads the memory traffic and collectives of a compiled program from its optimized HLO text.

XLA's own cost analysis does not know what a kernel reads, nor which arrays stay in a chip's fast
memory. This module instead adds up, for each operation that will run, the operands that it reads
from main memory and the results that it writes there. If a kernel states its own traffic, that
figure is used.

Branches of conditionals are omitted, because in these programs only some requests need them.
"""

import math
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

_BITS = {
    "pred": 8, "s4": 4, "u4": 4, "s8": 8, "u8": 8, "s16": 16, "u16": 16, "s32": 32, "u32": 32,
    "s64": 64, "u64": 64, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64,
}  # fmt: skip
_ARRAY = re.compile(
    r"\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,]*)\](\{[^{}]*(?:\([^{}]*\)[^{}]*)*\})?"
)
_LINE = re.compile(r"^\s+(?:ROOT )?%(\S+) = (.*)$")
_OPCODE = re.compile(r"^(\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_SAID = re.compile(r'"bytes_accessed":"?(\d+)')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition|called_computations)=\{?%([\w.\-]+)")
_COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "ragged-all-to-all",
    "collective-broadcast",
)
_FREE = frozenset(
    (
        "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all", "iota",
        "partition-id", "replica-id", "while", "conditional", "call", "opt-barrier",
        "async-update", "custom-call-bitcast",
    )
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Collective:
    """Collectives of one kind and size; ``num_bytes`` is the size of one's result on a chip."""

    kind: str
    num_bytes: int
    participants: int
    count: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that a chip sends for all of them, in rings (arXiv:2004.09910, section 2)."""
        share = (self.participants - 1) / self.participants
        rounds = 2 if self.kind == "all-reduce" else 1
        return self.count * rounds * share * self.num_bytes


@dataclass(frozen=True, slots=True)
class _Array:
    dtype: str
    shape: tuple[int, ...]
    layout: str

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * _BITS.get(self.dtype, 0) // 8

    @property
    def in_main_memory(self) -> bool:
        return "S(" not in self.layout


@dataclass(slots=True)
class _Operation:
    name: str
    opcode: str
    results: list[_Array]
    operands: list[str]
    text: str


@dataclass(slots=True)
class _Computation:
    operations: list[_Operation] = field(default_factory=list)


class Program:
    """A compiled program.

    Args:
        text: the HLO text that ``compiled.as_text()`` returns.
    """

    def __init__(self, text: str) -> None:
        self._computations: dict[str, _Computation] = {}
        self._entry = ""
        current: _Computation | None = None
        for line in text.splitlines():
            if line and not line[0].isspace() and line.rstrip().endswith("{"):
                entry, _, rest = line.partition("%")
                name = re.split(r"[\s(]", rest, maxsplit=1)[0]
                current = self._computations.setdefault(name, _Computation())
                if entry.startswith("ENTRY"):
                    self._entry = name
            elif current is not None and (operation := _operation(line)):
                current.operations.append(operation)

    def collectives(self) -> list[Collective]:
        """The collectives of one run of the program, sorted by bytes sent, the most first."""
        counted: dict[tuple[str, int, int], int] = {}
        for operation in self._run():
            kind = operation.opcode.removesuffix("-start")
            if kind not in _COLLECTIVES:
                continue
            arrays = operation.results
            if operation.opcode.endswith("-start") and kind != "all-reduce":
                arrays = arrays[len(operation.operands) :] or arrays  # the inputs come first
            key = kind, sum(array.num_bytes for array in arrays), _participants(operation.text)
            counted[key] = counted.get(key, 0) + 1
        found = [Collective(*key, count) for key, count in counted.items() if key[2] > 1]
        return sorted(found, key=lambda each: -each.sent_bytes)

    def traffic(self, in_place: Collection[tuple[int, ...]]) -> int:
        """Bytes that one run moves from and to main memory.

        Args:
            in_place: the shapes of arrays that operations access only partly; reads and writes of
                these arrays are not counted.
        """
        known = {
            operation.name: operation for operation in self._computations[self._entry].operations
        }
        # At the end of a program, a TPU may copy a weight to fast memory for the next run, which
        # then does not copy it at its beginning.
        copied = [each.operands for each in known.values() if each.opcode == "copy-start"]
        return sum(
            self._moved(operation, known, frozenset(in_place))
            for operation in known.values()
            if "cross_program_prefetch_index" not in operation.text
            or copied.count(operation.operands) == 1
        )

    def _moved(
        self,
        operation: _Operation,
        known: dict[str, _Operation],
        in_place: frozenset[tuple[int, ...]],
    ) -> int:
        opcode = operation.opcode
        if opcode in _FREE or opcode.endswith("-done"):
            return 0
        if opcode == "custom-call" and (said := _SAID.search(operation.text)):
            return int(said[1])

        def charged(arrays: list[_Array]) -> list[int]:
            partly = frozenset() if opcode == "copy" else in_place
            return [a.num_bytes for a in arrays if a.in_main_memory and a.shape not in partly]

        if opcode in ("copy-start", "slice-start"):
            # The results are (source, destination, context) or (destination, source, context). The
            # smaller of the two arrays is what moves.
            arrays = [a for a in operation.results if a.shape]
            sizes = [a.num_bytes for a in arrays[:2]]
            sides = sum(a.in_main_memory for a in arrays[:2])
            return min(sizes, default=0) * sides
        written = sum(charged(operation.results))
        total_result = sum(array.num_bytes for array in operation.results)
        read = 0
        sparse = self._gathers(operation)
        for name in operation.operands:
            if name not in known:
                continue
            source = known[name]
            size = sum(charged(source.results))
            read += min(size, total_result) if sparse else size
        return read + written

    def _gathers(self, operation: _Operation) -> bool:
        """Whether the operation reads only a few elements of its operands."""
        if operation.opcode in ("gather", "dynamic-slice", "slice", "dynamic-update-slice"):
            return True
        if operation.opcode != "fusion":
            return False
        inside = {
            each.opcode
            for name in _CALLED.findall(operation.text)
            for each in self._computations.get(name, _Computation()).operations
        }
        return bool(inside & {"gather", "dynamic-slice", "slice"}) and not inside & {
            "dot",
            "convolution",
            "reduce",
        }

    def _run(self) -> Iterator[_Operation]:
        """Iterate over all operations that are run, including those of called computations."""
        waiting, seen = [self._entry], {self._entry}
        while waiting:
            for operation in self._computations.get(waiting.pop(), _Computation()).operations:
                yield operation
                if operation.opcode == "conditional":
                    continue
                for name in _CALLED.findall(operation.text):
                    if name not in seen:
                        seen.add(name)
                        waiting.append(name)


def _operation(line: str) -> _Operation | None:
    named = _LINE.match(line)
    if not named or not (found := _OPCODE.match(named[2])):
        return None
    name, rest = named.groups()
    results = [
        _Array(dtype, tuple(int(n) for n in sizes.split(",") if n), layout or "")
        for dtype, sizes, layout in _ARRAY.findall(found[1])
    ]
    arguments = rest[found.end() :].split("), ", maxsplit=1)[0]
    return _Operation(name, found[2], results, re.findall(r"%([\w.\-]+)", arguments), rest)


def _participants(text: str) -> int:
    # Since jax 0.11, groups may be said by the axes of a mesh, whole or parts of them.
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", found[1]))
        axes = re.findall(r"'([^']+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[name]) for name, part in axes)
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(found[1])
    if found := re.search(r"source_target_pairs=\{\{", text):
        return 2
    return 1
