"""The header of a GGUF file: its metadata as Python values, and where each tensor lies.

Source: the GGUF specification, versions 2 and 3, little-endian. Every length is checked against
the file before it is believed, so that a damaged file ends in an error and not in a long loop.
"""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from inferneo_jax.errors import CheckpointError

_SCALARS = {
    GGUFValueType.UINT8: "<B",
    GGUFValueType.INT8: "<b",
    GGUFValueType.UINT16: "<H",
    GGUFValueType.INT16: "<h",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.UINT64: "<Q",
    GGUFValueType.INT64: "<q",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.FLOAT64: "<d",
    GGUFValueType.BOOL: "<?",
}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: shape in NumPy order, block type, and the bytes of the file that hold it."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """All that precedes the tensor data of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """The header of the GGUF file at ``path``.

    Raises:
        CheckpointError: it is no GGUF file, or a damaged or truncated one.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data).header()
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except (OSError, ValueError, struct.error, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a whole GGUF file ({error}); download it again"
        ) from error


class _Parser:
    """A cursor over the file's bytes."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.at = 0

    def header(self) -> Header:
        if self.take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"version {version}, or big-endian; versions 2 and 3 are read")
        num_tensors, num_keys = self.count(), self.count()
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.text()
            metadata[key] = self.value(GGUFValueType(self.scalar("<I")))
        infos = [self.tensor() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise ValueError(f"alignment {alignment!r}")
        start = -(-self.at // alignment) * alignment
        tensors = {
            name: TensorInfo(shape, kind, start + offset, size)
            for name, shape, kind, offset, size in infos
        }
        if len(tensors) != num_tensors:
            raise ValueError("two tensors have the same name")
        for name, info in tensors.items():
            if info.offset + info.size > len(self.data):
                raise ValueError(
                    f"{name} ends at byte {info.offset + info.size}, the file at {len(self.data)}"
                )
        return Header(metadata, tensors)

    def tensor(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int, int]:
        name = self.text()
        dimensions = self.scalar("<I")
        if dimensions > _MAX_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions")
        # Stored with the contiguous dimension first.
        shape = tuple(self.scalar("<Q") for _ in range(dimensions))[::-1]
        kind = GGMLQuantizationType(self.scalar("<I"))
        offset = self.scalar("<Q")
        block, block_bytes = GGML_QUANT_SIZES[kind]
        size = block_bytes
        for length in shape:
            size *= length
        if shape and shape[-1] % block:
            raise ValueError(
                f"{name} has rows of {shape[-1]}, no multiple of {block} ({kind.name})"
            )
        return name, shape, kind, offset, size // block

    def value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self.text()
        if kind == GGUFValueType.ARRAY:
            inner = GGUFValueType(self.scalar("<I"))
            length = self.count()
            if inner in _SCALARS:
                return self.scalars(_SCALARS[inner], length)
            read: Callable[[], Any] = (
                self.text if inner == GGUFValueType.STRING else lambda: self.value(inner)
            )
            return [read() for _ in range(length)]
        return self.scalar(_SCALARS[kind])

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"it ends at byte {len(self.data)}, within its header")
        self.at += size
        return self.data[self.at - size : self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def scalars(self, code: str, length: int) -> list[Any]:
        size = struct.calcsize(code)
        return [value for (value,) in struct.iter_unpack(code, self.take(size * length))]

    def count(self) -> int:
        """A number of things that follow, each of at least one byte."""
        count: int = self.scalar("<Q")
        if count > len(self.data) - self.at:
            raise ValueError(f"it announces {count} items and ends at byte {len(self.data)}")
        return count

    def text(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8")
