"""A weight of the model as rows of source tensors, of which slices or blocks are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from inferneo_jax.layers.blocks import BlockPart, BlockRows
from inferneo_jax.models.families.family import WeightMapping
from inferneo_jax.sharding.padding import Index
from inferneo_jax.weights.sources.tensor import Array, Numbers, StoredTensor


class Weight(Protocol):
    """One weight on disk, read on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight."""

    @property
    def parts(self) -> tuple[BlockPart, ...] | None:
        """Its outputs by block format; None unless all of its tensors are matrices of blocks."""

    def __getitem__(self, index: Any, /) -> Array:
        """Read a slice as float32, float16 or bfloat16, and little more than that slice.

        Raises:
            CheckpointError: it cannot be read.
        """

    def blocks(self) -> tuple[BlockRows, ...] | None:
        """Read all blocks as they are stored, one entry for each of ``parts``; None without.

        Raises:
            CheckpointError: they cannot be read.
        """


def block_formats(weights: Mapping[str, Weight]) -> dict[str, tuple[BlockPart, ...]]:
    """The parts of each weight that is stored in blocks, by its name; nothing is read."""
    return {name: weight.parts for name, weight in weights.items() if weight.parts}


@dataclass(frozen=True)
class SourceWeight:
    """A weight that is made of tensors in files.

    Attributes:
        mapping: says which rows of the tensors it has.
        tensors: in the order of the mapping's, with the shapes that it names.
    """

    mapping: WeightMapping
    tensors: tuple[StoredTensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole weight."""
        return self.mapping.shape

    def __getitem__(self, index: Any, /) -> Array:
        """Read a slice; tensors of several dtypes become float32, which represents all."""
        slices = _completed(index, len(self.shape))
        num_rows = self._origins.size
        num_columns = int(np.prod(self.mapping.tensors[0].shape[1:]))
        split = self._split
        if self.mapping.kernel:
            rows = _selected(num_rows, self.shape[split:], slices[split:])
            columns = _selected(num_columns, self.shape[:split], slices[:split])
        else:
            rows = _selected(num_rows, self.shape[:split], slices[:split])
            columns = _selected(num_columns, self.shape[split:], slices[split:])
        dtypes = {tensor.dtype for tensor in self.tensors}
        dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
        found: Array = np.empty((rows.size, columns.size), dtype)
        origins, start = self._origins[rows], 0
        wanted = _columns(columns)
        for tensor in self.tensors:
            numbers = origins - start
            at = np.flatnonzero((numbers >= 0) & (numbers < tensor.shape[0]))
            if at.size and columns.size:
                tensor.read_into(found, at, numbers[at], wanted)
            start += tensor.shape[0]
        sizes = [
            len(range(*part.indices(size))) for part, size in zip(slices, self.shape, strict=True)
        ]
        return (found.T if self.mapping.kernel else found).reshape(sizes)

    @cached_property
    def parts(self) -> tuple[BlockPart, ...] | None:
        """Its outputs by block format; None unless all of its tensors are matrices of blocks."""
        if not all(tensor.blocks for tensor in self.tensors):
            return None
        outputs = np.argsort(self._origins)
        runs: dict[str, list[tuple[int, int]]] = {}
        start = 0
        for tensor in self.tensors:
            mine = outputs[start : start + tensor.shape[0]]
            breaks = np.flatnonzero(np.diff(mine) != 1) + 1
            for run in np.split(mine, breaks):
                known = runs.setdefault(tensor.format, [])
                if known and sum(known[-1]) == run[0]:
                    known[-1] = known[-1][0], known[-1][1] + run.size
                else:
                    known.append((int(run[0]), run.size))
            start += tensor.shape[0]
        return tuple(BlockPart(format, tuple(each)) for format, each in runs.items())

    def blocks(self) -> tuple[BlockRows, ...] | None:
        """Read all blocks as they are stored, one entry for each of ``parts``; None without."""
        if self.parts is None:
            return None
        return tuple(
            BlockRows(part, tuple(t.read_blocks() for t in self.tensors if t.format == part.format))
            for part in self.parts
        )

    @cached_property
    def _origins(self) -> Numbers:
        """For each row of the weight, its number among the rows of all tensors."""
        starts = np.cumsum([0, *(tensor.shape[0] for tensor in self.mapping.tensors)])
        numbers: Numbers = self.mapping.arrange(*(np.arange(a, b) for a, b in pairwise(starts)))
        return numbers

    @cached_property
    def _split(self) -> int:
        """Number of leading dimensions that are inputs of a kernel, or rows of anything else."""
        first = self.mapping.tensors[0].shape
        leading = int(np.prod(first[1:])) if self.mapping.kernel else self._origins.size
        return next(k for k in range(1, len(self.shape) + 1) if np.prod(self.shape[:k]) == leading)


def _completed(index: Any, dimensions: int) -> Index:
    """An index with a slice for each dimension."""
    given = index if isinstance(index, tuple) else (index,)
    if Ellipsis in given:
        place = given.index(Ellipsis)
        missing = dimensions - len(given) + 1
        given = (*given[:place], *[slice(None)] * missing, *given[place + 1 :])
    return (*given, *[slice(None)] * (dimensions - len(given)))


def _selected(total: int, shape: tuple[int, ...], index: Index) -> Numbers:
    """The numbers of the elements in a slice of ``np.arange(total).reshape(shape)``."""
    return np.arange(total).reshape(shape)[index].reshape(-1)


def _columns(numbers: Numbers) -> slice | Numbers:
    """Consecutive columns as a slice; others as they are."""
    if numbers.size and numbers[-1] - numbers[0] + 1 == numbers.size:
        return slice(int(numbers[0]), int(numbers[-1]) + 1)
    return numbers
