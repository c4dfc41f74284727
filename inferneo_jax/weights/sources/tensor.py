"""A tensor within a file, read by rows: floats, or ggml blocks that are dequantized on demand."""

import math
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
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
"""Number of bytes that are read and checked at once, rounded to whole rows. They are small enough
to stay in a cache until they are used."""

_FLOATS = {
    "f32": np.dtype("<f4"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
BLOCKS = {
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q8_0": (32, 34),
    "q2_k": (256, 84),
    "q3_k": (256, 110),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
    "iq1_s": (256, 50),
    "iq1_m": (256, 56),
    "iq2_xxs": (256, 66),
    "iq2_xs": (256, 74),
    "iq2_s": (256, 82),
    "iq3_xxs": (256, 98),
    "iq3_s": (256, 110),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
    "tq1_0": (256, 54),
    "tq2_0": (256, 66),
    "mxfp4": (32, 17),
}
"""Numbers and bytes of a block of each format; not taken from gguf, which takes 0.3 s to import."""


INT8 = "int8"
"""This package's own format: a row is its numbers as int8, and then their scale in float32."""


def stored_bytes(format: str, shape: tuple[int, ...]) -> int | None:
    """Bytes of a tensor; None if the format is unknown or does not divide its rows."""
    count = math.prod(shape)
    if format == INT8:
        return count + 4 * shape[0] if len(shape) == 2 else None
    if format in _FLOATS:
        return count * _FLOATS[format].itemsize
    values, size = BLOCKS.get(format, (0, 0))
    return count // values * size if values and shape[-1] % values == 0 else None


@dataclass(frozen=True, kw_only=True)
class StoredTensor(ABC):
    """One tensor on disk: everything but its numbers is known.

    Attributes:
        name: of it, for errors.
        shape: in NumPy order (rows first).
        format: ``f32``, ``f16``, ``bf16``, ``int8``, or ggml's name of a block format in lower
            case. Any other format is an error when its numbers are read.
        interleaved_heads: the number of heads whose rows are stored in the interleaved form of
            rotary embeddings; this class has them in the form of two halves, as all other tensors.
        checksums: CRC-32 of each span; None if nothing is known that what is read could be
            compared with, or if it is compared by others.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    interleaved_heads: int | None = None
    checksums: tuple[int, ...] | None = None

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of its numbers as they are read: its own, or float32 for blocks."""
        return _FLOATS.get(self.format, _FLOATS["f32"])

    @property
    def blocks(self) -> bool:
        """Whether it is a matrix in a block format."""
        return len(self.shape) == 2 and self.format in BLOCKS

    @property
    def num_rows(self) -> int:
        """Number of rows that are stored; a vector of blocks is one row."""
        return 1 if len(self.shape) == 1 and self.format not in _FLOATS else self.shape[0]

    def check_format(self) -> None:
        """Raise CheckpointError unless numbers of this format can be read."""
        if self.format not in _FLOATS and self.format not in BLOCKS and self.format != INT8:
            raise CheckpointError(
                f"{self._where}: {shown(self.name)} is of the type {shown(self.format.upper())}, "
                "which cannot be read; take an unquantized release of the model, or another "
                "quantization"
            )

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

    def pieces(self) -> Iterator[tuple[int, Array]]:
        """All rows, span by span: the number of the first, and ``[rows, columns]``.

        Where rows are interleaved, all of them are one piece.

        Raises:
            CheckpointError: they cannot be read, or are of a format that is not supported.
        """
        per_piece = self.num_rows if self.interleaved_heads else self._rows_per_span
        for start in range(0, self.num_rows, per_piece):
            rows = np.arange(start, min(self.num_rows, start + per_piece))
            found = np.empty((rows.size, math.prod(self.shape[1:])), self.dtype)
            self.read_into(found, rows - start, rows, slice(None))
            yield start, found

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
    def num_spans(self) -> int:
        """Number of spans that are read and checked at once."""
        return -(-self.num_rows // self._rows_per_span)

    @property
    def _span_bytes(self) -> int:
        return SPAN_BYTES

    @cached_property
    def _rows_per_span(self) -> int:
        return max(1, self._span_bytes // max(1, self._row_bytes))

    def _pieces(self, rows: Numbers) -> Iterator[tuple[Numbers, Bytes]]:
        """Read some rows span by span: positions in ``rows``, and the bytes of these rows."""
        stored = rows
        if self.interleaved_heads is not None:
            stored = interleaved(self.num_rows, self.interleaved_heads)[rows]
        per_span = self._rows_per_span
        numbers = stored // per_span
        for span, raw in self._spans(np.unique(numbers).tolist()):
            positions = np.flatnonzero(numbers == span)
            yield positions, raw[_indices(stored[positions] - span * per_span)]

    @property
    @abstractmethod
    def _row_bytes(self) -> int:
        """Bytes of a stored row."""

    @abstractmethod
    def _spans(self, numbers: Iterable[int]) -> Iterator[tuple[int, Bytes]]:
        """Read and check some spans: their numbers and ``[rows, bytes of a row]``."""

    @property
    @abstractmethod
    def _where(self) -> str:
        """Where it is stored, for errors."""

    def _numbers(self, raw: Bytes) -> Array:
        """The numbers of rows, ``[rows, columns]``."""
        if self.format in _FLOATS:
            return raw.view(self.dtype)
        if self.format == INT8:
            scales = np.ascontiguousarray(raw[:, -4:]).view(np.float32)
            return raw[:, :-4].view(np.int8).astype(np.float32) * scales
        self.check_format()
        import gguf  # takes 0.3 s

        kind = gguf.GGMLQuantizationType[self.format.upper()]
        numbers: Array = gguf.quants.dequantize(raw, kind)
        return numbers


@dataclass(frozen=True, kw_only=True)
class FileTensor(StoredTensor):
    """A tensor whose bytes follow each other in a file.

    They are read with ``pread``, not mapped: a file that shrinks or a disk that fails while it is
    read is an error then, not the end of the process.

    Attributes:
        file: the file.
        offset: of its first byte in the file.
        size: in bytes.
        span_bytes: of a span.
    """

    file: Path
    offset: int
    size: int
    span_bytes: int = SPAN_BYTES

    def with_checksums(self, each: Callable[[int], None]) -> "FileTensor":
        """The same tensor, with the checksums of all that is in the file now.

        Args:
            each: called with the bytes of each span that has been read.

        Raises:
            CheckpointError: it cannot be read.
        """
        found = []
        for _, raw in self._spans(range(self.num_spans)):
            found.append(zlib.crc32(raw.data))
            each(raw.size)
        return replace(self, checksums=tuple(found))

    @property
    def _where(self) -> str:
        return str(self.file)

    @property
    def _span_bytes(self) -> int:
        return self.span_bytes

    @property
    def _row_bytes(self) -> int:
        return self.size // max(1, self.num_rows)

    def _spans(self, numbers: Iterable[int]) -> Iterator[tuple[int, Bytes]]:
        per_span = self._rows_per_span
        try:
            with self.file.open("rb", buffering=0) as opened:
                for span in numbers:
                    first = span * per_span
                    count = min(per_span, self.num_rows - first)
                    raw = self._read(opened.fileno(), first * self._row_bytes, count)
                    if self.checksums and zlib.crc32(raw.data) != self.checksums[span]:
                        start = self.offset + first * self._row_bytes
                        raise CheckpointError(
                            f"{self.file} is damaged: bytes {start} to {start + raw.size - 1}, of "
                            f"{shown(self.name)}, are not what they were when the model was made. "
                            "Restore the file, or remove the model with `inferneo rm` and pull or "
                            "convert it again"
                        )
                    yield span, raw
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
                    f"{shown(self.name)}; restore it or download it again"
                )
            done += got
        return content.reshape(num_rows, self._row_bytes)


def interleaved(num_rows: int, heads: int) -> Numbers:
    """The interleaved row of each row in the form of two halves, within each head."""
    return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _indices(numbers: Numbers) -> slice | Numbers:
    """Consecutive numbers as a slice, which needs no copy; others as they are."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == numbers.size and (np.diff(numbers) == 1).all():
        return slice(first, last + 1)
    return numbers
