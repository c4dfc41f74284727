"""A tensor within a file, read by rows: floats, or ggml blocks that are dequantized on demand."""

import contextlib
import math
import os
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import shown
from inferneo_jax.layers.blocks import Bytes

Array = np.ndarray[Any, np.dtype[Any]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]

Reader = Callable[[int, Bytes], None]

SPAN_BYTES = 2**22
"""Number of bytes that have a checksum, rounded to whole rows."""
_STEP_BYTES = 2**17
"""Number of bytes that are read at once: they are in the processor's cache when their checksum is
computed, which then costs a third of what it does later."""

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
        if self._as_stored(out, at, rows, columns):
            self._read_all(out.view(np.uint8))
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
        if self.interleaved_heads is None:
            self._read_all(found)
            return found
        for positions, raw in self._pieces(np.arange(self.num_rows)):
            found[_indices(positions)] = raw
        return found

    def _as_stored(self, out: Array, at: Numbers, rows: Numbers, columns: slice | Numbers) -> bool:
        """Whether all of ``out`` is to be all of the tensor, just as it is stored."""
        return (
            self.format in _FLOATS
            and self.interleaved_heads is None
            and out.dtype == self.dtype
            and out.flags.c_contiguous
            and out.shape == (self.num_rows, math.prod(self.shape[1:]))
            and isinstance(columns, slice)
            and columns in (slice(None), slice(0, out.shape[1]))
            and rows.size == at.size == self.num_rows
            and bool((np.diff(rows) == 1).all() and (np.diff(at) == 1).all())
        )

    def _read_all(self, out: Bytes) -> None:
        """Read all rows as they are stored into ``[rows, bytes of a row]``."""
        with self._reader() as read:
            for span in range(self.num_spans):
                start = span * self._rows_per_span
                read(span, out[start : start + self._rows_per_span])

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
        """Read some rows span by span: positions in ``rows``, and the bytes of these rows.

        The bytes are valid until the next span is read.
        """
        stored = rows
        if self.interleaved_heads is not None:
            stored = interleaved(self.num_rows, self.interleaved_heads)[rows]
        per_span = self._rows_per_span
        numbers = stored // per_span
        # One buffer for all spans, which stays in a cache.
        buffer = np.empty((min(per_span, self.num_rows), self._row_bytes), np.uint8)
        with self._reader() as read:
            for span in np.unique(numbers).tolist():
                raw = buffer[: self.num_rows - span * per_span]
                read(span, raw)
                positions = np.flatnonzero(numbers == span)
                yield positions, raw[_indices(stored[positions] - span * per_span)]

    @property
    @abstractmethod
    def _row_bytes(self) -> int:
        """Bytes of a stored row."""

    @abstractmethod
    def _reader(self) -> AbstractContextManager[Reader]:
        """A function that reads and checks a span, given its number and ``[rows, bytes]``."""

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
        plain = replace(self, interleaved_heads=None, checksums=None)
        for _, raw in plain._pieces(np.arange(self.num_rows)):
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

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Reader]:
        try:
            with self.file.open("rb", buffering=0) as opened:
                yield partial(self._read, opened.fileno())
        except OSError as error:
            raise CheckpointError(
                f"{self.file}: {shown(self.name)} cannot be read: {error.strerror or error}"
            ) from error

    def _read(self, descriptor: int, span: int, out: Bytes) -> None:
        start = self.offset + span * self._rows_per_span * self._row_bytes
        content, done, checksum = out.reshape(-1), 0, 0
        while done < content.size:
            step = content[done : done + _STEP_BYTES].data
            got = os.preadv(descriptor, [step], start + done)
            if not got:
                raise CheckpointError(
                    f"{self.file} ends at byte {start + done}, within {shown(self.name)}; restore "
                    "it or download it again"
                )
            if self.checksums:
                checksum = zlib.crc32(step[:got], checksum)
            done += got
        if self.checksums and checksum != self.checksums[span]:
            raise CheckpointError(
                f"{self.file} is damaged: bytes {start} to {start + done - 1}, of "
                f"{shown(self.name)}, are not what they were when the model was made. Restore the "
                "file, or remove the model with `inferneo rm` and pull or convert it again"
            )


def interleaved(num_rows: int, heads: int) -> Numbers:
    """The interleaved row of each row in the form of two halves, within each head."""
    return np.arange(num_rows).reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _indices(numbers: Numbers) -> slice | Numbers:
    """Consecutive numbers as a slice, which needs no copy; others as they are."""
    first, last = int(numbers[0]), int(numbers[-1])
    if last - first + 1 == numbers.size and (np.diff(numbers) == 1).all():
        return slice(first, last + 1)
    return numbers
