"""A tensor within a file, read by rows: floats, or ggml blocks that are dequantized on demand."""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import shown
from inferneo_jax.layers.blocks import Bytes

Array = np.ndarray[Any, np.dtype[Any]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

SPAN_BYTES = 2**22
"""Number of bytes that are read at once: small enough to stay in a cache until they are used."""

_FLOATS = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
_BLOCKS = re.compile(r"(q|iq|tq|mxfp)\d\w*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """One tensor in a file: everything but its numbers is known.

    Its rows are read with ``pread``, not mapped: a file that shrinks or a disk that fails while it
    is read is an error then, not the end of the process.

    Attributes:
        file: the file.
        name: in that file, for errors.
        shape: in NumPy order (rows first).
        format: ``f32``, ``f16``, ``bf16``, or ggml's name of a block format in lower case. Any
            other format is an error when its numbers are read.
        offset: of its first byte in the file.
        size: in bytes.
        interleaved_heads: the number of heads whose rows the file stores in the interleaved form of
            rotary embeddings; this class has them in the form of two halves, as all other tensors.
    """

    file: Path
    name: str
    shape: tuple[int, ...]
    format: str
    offset: int
    size: int
    interleaved_heads: int | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its numbers as they are read: its own, or float32 for blocks."""
        return _FLOATS.get(self.format, _FLOATS["f32"])

    @property
    def blocks(self) -> bool:
        """Whether it is a matrix in a block format."""
        return len(self.shape) == 2 and bool(_BLOCKS.fullmatch(self.format))

    @property
    def num_rows(self) -> int:
        """Number of rows in the file; a vector of blocks is one row."""
        return 1 if len(self.shape) == 1 and self.format not in _FLOATS else self.shape[0]

    def read(self) -> Array:
        """All numbers, with the shape of the tensor.

        Raises:
            CheckpointError: they cannot be read, or are of a format that is not supported.
        """
        rows = self.shape[0]
        found = np.empty((rows, int(np.prod(self.shape[1:]))), self.dtype)
        everything = np.arange(rows)
        self.read_into(found, everything, everything, slice(None))
        return found.reshape(self.shape)

    def read_into(self, out: Array, at: Numbers, rows: Numbers, columns: slice | Numbers) -> None:
        """Read numbers of some rows into an array.

        Args:
            out: ``[any, columns]``, whose rows ``at`` are set.
            at: rows of ``out``, one for each of ``rows``.
            rows: rows of the tensor.
            columns: of all but the first dimension, flattened.

        Raises:
            CheckpointError: they cannot be read, or are of a format that is not supported.
        """
        if len(self.shape) == 1 and self.num_rows == 1:
            ((_, raw),) = self._pieces(np.zeros(1, np.int64))
            out[_indices(at), 0] = self._numbers(raw)[0, rows]
            return
        for positions, raw in self._pieces(rows):
            out[_indices(at[positions])] = self._numbers(raw)[:, columns]

    def read_blocks(self) -> Bytes:
        """All rows of a matrix as they are stored, ``[rows, bytes of a row]``.

        Raises:
            CheckpointError: they cannot be read.
        """
        found = np.empty((self.num_rows, self._row_bytes), np.uint8)
        for positions, raw in self._pieces(np.arange(self.num_rows)):
            found[_indices(positions)] = raw
        return found

    @cached_property
    def _row_bytes(self) -> int:
        return self.size // max(1, self.num_rows)

    def _pieces(self, rows: Numbers) -> Iterator[tuple[Numbers, Bytes]]:
        """Read some rows span by span: positions in ``rows``, and the bytes of these rows."""
        stored = rows
        if self.interleaved_heads is not None:
            stored = interleaved(self.num_rows, self.interleaved_heads)[rows]
        per_span = max(1, SPAN_BYTES // max(1, self._row_bytes))
        spans = stored // per_span
        try:
            with self.file.open("rb", buffering=0) as opened:
                for span in np.unique(spans).tolist():
                    positions = np.flatnonzero(spans == span)
                    first = span * per_span
                    count = min(per_span, self.num_rows - first)
                    content = self._read(opened.fileno(), first * self._row_bytes, count)
                    yield positions, content[_indices(stored[positions] - first)]
        except OSError as error:
            raise CheckpointError(
                f"{self.file}: {shown(self.name)} cannot be read: {error.strerror or error}"
            ) from error

    def _read(self, descriptor: int, start: int, num_rows: int) -> Bytes:
        """The bytes of ``num_rows`` rows, the first of which begins ``start`` bytes in."""
        content = np.empty(num_rows * self._row_bytes, np.uint8)
        done = 0
        while done < content.size:
            got = os.preadv(descriptor, [content[done:].data], self.offset + start + done)
            if not got:
                raise CheckpointError(
                    f"{self.file} ends at byte {self.offset + start + done}, within "
                    f"{shown(self.name)}; download it again"
                )
            done += got
        return content.reshape(num_rows, self._row_bytes)

    def _numbers(self, raw: Bytes) -> Array:
        """The numbers of rows, ``[rows, columns]``."""
        if self.format in _FLOATS:
            return raw.view(self.dtype)
        if not _BLOCKS.fullmatch(self.format):
            raise CheckpointError(
                f"{self.file}: {shown(self.name)} is of the type {self.format.upper()}; F32, F16, "
                "BF16 and blocks of ggml are read: take an unquantized release of the model"
            )
        import gguf  # takes 0.3 s

        try:
            kind = gguf.GGMLQuantizationType[self.format.upper()]
            numbers: Array = gguf.quants.dequantize(raw, kind)
        except (KeyError, NotImplementedError):
            raise CheckpointError(
                f"{self.file}: {shown(self.name)} is of the block type {self.format.upper()}, "
                "which cannot be dequantized; take another quantization of the model"
            ) from None
        return numbers


def interleaved(num_rows: int, heads: int) -> Numbers:
    """The interleaved row of each row in the form of two halves, within each head."""
    return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _indices(numbers: Numbers) -> slice | Numbers:
    """Consecutive numbers as a slice, which needs no copy; others as they are."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == numbers.size and (np.diff(numbers) == 1).all():
        return slice(first, last + 1)
    return numbers
