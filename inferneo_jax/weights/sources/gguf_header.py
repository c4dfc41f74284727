"""The header of a GGUF file: its metadata as Python values, and the location of each tensor.

Source: the GGUF specification, versions 2 and 3, little-endian. Every count and length is checked
against the remaining bytes of the file and against the bounds below before it is used, so that a
damaged file raises an error instead of causing a long loop or exhausting memory.
"""

import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from gguf.constants import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    GGMLQuantizationType,
    GGUFValueType,
)

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import check_regular, shown

_SCALARS = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
    GGUFValueType.BOOL: struct.Struct("<?"),
}
_U32, _U64 = _SCALARS[GGUFValueType.UINT32], _SCALARS[GGUFValueType.UINT64]

# The largest vocabulary in use has 262,144 tokens with score and type, and 514,906 merges: 1.3
# million items in 17 MB. Python needs up to 4 times the bytes of a text, and 32 bytes per number.
_MAX_HEADER_BYTES = 2**25
_MAX_ITEMS = 2**21
# A model of 1,000 layers has 12,000 tensors; files in use have fewer than 100 keys.
_MAX_TENSORS = 2**15
_MAX_KEYS = 2**12
# Both limits are set by the specification.
_MAX_KEY_BYTES = 2**16 - 1
_MAX_NAME_BYTES = 64
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 2**16
# Minimum size of a key (length, type, value) and of a tensor (length, dimensions, type, offset).
_LEAST_KEY_BYTES, _LEAST_TENSOR_BYTES = 13, 24


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: its shape in NumPy order, its block type, and its byte range in the file."""

    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    size: int


@dataclass(frozen=True)
class Header:
    """Everything that precedes the tensor data of a GGUF file."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read the header of the GGUF file at ``path``.

    Raises:
        CheckpointError: the file is not a GGUF file, or it is damaged or truncated.
    """
    try:
        check_regular(path)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Parser(data).header()
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {path}") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole GGUF file ({error}); download it again"
        ) from error


class _Parser:
    """A cursor over the file's bytes; every method raises ValueError at their end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0
        self.end = min(self.size, _MAX_HEADER_BYTES)
        self.items_left = _MAX_ITEMS

    def header(self) -> Header:
        if self.data[self.move(4) : self.at] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version = self.scalar(_U32)
        if version not in (2, 3):
            raise ValueError(f"version {version}, or big-endian; versions 2 and 3 are read")
        num_tensors = self.count("tensors", _LEAST_TENSOR_BYTES, _MAX_TENSORS)
        num_keys = self.count("keys", _LEAST_KEY_BYTES, _MAX_KEYS)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self.text("a key", _MAX_KEY_BYTES)
            if key in metadata:
                raise ValueError(f"it has the key {shown(key)} twice")
            metadata[key] = self.value(shown(key))
        tensors: dict[str, TensorInfo] = {}
        for _ in range(num_tensors):
            name = self.text("the name of a tensor", _MAX_NAME_BYTES)
            if name in tensors:
                raise ValueError(f"it has two tensors of the name {shown(name)}")
            tensors[name] = self.tensor(shown(name))
        return Header(metadata, self.placed(tensors, metadata))

    def placed(
        self, tensors: dict[str, TensorInfo], metadata: dict[str, Any]
    ) -> dict[str, TensorInfo]:
        """Return the tensors with offsets that count from the start of the file."""
        alignment = metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= _MAX_ALIGNMENT:
            raise ValueError(
                f"general.alignment is {shown(alignment)}; it must be 1 to {_MAX_ALIGNMENT}"
            )
        start = -(-self.at // alignment) * alignment
        found = {
            name: TensorInfo(info.shape, info.type, start + info.offset, info.size)
            for name, info in tensors.items()
        }
        in_order = sorted(found.items(), key=lambda item: item[1].offset)
        for name, info in in_order:
            if info.offset + info.size > self.size:
                raise ValueError(
                    f"{shown(name)} ends at byte {info.offset + info.size}, the file at {self.size}"
                )
        for (name, info), (other, following) in pairwise(in_order):
            if info.offset + info.size > following.offset:
                raise ValueError(f"{shown(name)} and {shown(other)} overlap")
        return found

    def tensor(self, name: str) -> TensorInfo:
        dimensions = self.scalar(_U32)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(
                f"{name} has {dimensions} dimensions; it must have 1 to {_MAX_DIMENSIONS}"
            )
        # The file stores the contiguous dimension first.
        shape = tuple(self.scalar(_U64) for _ in range(dimensions))[::-1]
        if 0 in shape:
            raise ValueError(f"{name} has the shape {list(shape)}, and so no values")
        number = self.scalar(_U32)
        try:
            kind = GGMLQuantizationType(number)
        except ValueError:
            raise ValueError(f"{name} is of the unknown type {number}") from None
        offset = self.scalar(_U64)
        block, block_bytes = GGML_QUANT_SIZES[kind]
        if shape[-1] % block:
            raise ValueError(
                f"{name} has rows of {shape[-1]}, no multiple of {block} ({kind.name})"
            )
        size = block_bytes
        for length in shape:
            size *= length
        return TensorInfo(shape, kind, offset, size // block)

    def value(self, key: str) -> Any:
        kind = self.kind(key)
        if kind is GGUFValueType.STRING:
            return self.text(key)
        if kind is not GGUFValueType.ARRAY:
            return self.scalar(_SCALARS[kind])
        inner = self.kind(key)
        if inner is GGUFValueType.ARRAY:
            # No model needs nested arrays, and llama.cpp does not read them either.
            raise ValueError(f"{key} is an array of arrays")
        least = _U64.size if inner is GGUFValueType.STRING else _SCALARS[inner].size
        length = self.count(f"items in {key}", least, self.items_left)
        self.items_left -= length
        if inner is GGUFValueType.STRING:
            return self.texts(key, length)
        form = _SCALARS[inner]
        start = self.move(length * form.size)
        return [item for (item,) in form.iter_unpack(self.data[start : self.at])]

    def kind(self, key: str) -> GGUFValueType:
        number = self.scalar(_U32)
        try:
            return GGUFValueType(number)
        except ValueError:
            raise ValueError(f"{key} is of the unknown type {number}") from None

    def move(self, size: int) -> int:
        """Advance the cursor by ``size`` bytes and return its previous position."""
        start, stop = self.at, self.at + size
        if stop > self.end:
            raise ValueError(
                f"it ends at byte {self.size}, within its header"
                if self.end == self.size
                else f"its header has more than {_MAX_HEADER_BYTES} bytes"
            )
        self.at = stop
        return start

    def scalar(self, form: struct.Struct) -> Any:
        return form.unpack_from(self.data, self.move(form.size))[0]

    def count(self, what: str, least_bytes: int, most: int) -> int:
        """Read the number of items that follow, each of which takes ``least_bytes`` or more."""
        count: int = self.scalar(_U64)
        if count > min(most, (self.size - self.at) // least_bytes):
            raise ValueError(
                f"it announces {count} {what} at byte {self.at} of {self.size}; "
                f"at most {most} are read"
            )
        return count

    def text(self, what: str, most: int = _MAX_HEADER_BYTES) -> str:
        size = self.scalar(_U64)
        if size > most:
            raise ValueError(f"{what} is a text of {size} bytes; at most {most} are read")
        start = self.move(size)
        try:
            return str(self.data[start : self.at], "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} at byte {start} is not UTF-8: {error.reason}") from None

    def texts(self, key: str, length: int) -> list[str]:
        """Read ``length`` strings like ``text``, in a loop that is fast for a million of them."""
        data, end, unpack, start = self.data, self.end, _U64.unpack_from, self.at
        found: list[str] = []
        try:
            for _ in range(length):
                stop = start + 8
                (size,) = unpack(data, start)
                start = stop + size
                if start > end:
                    break
                found.append(str(data[stop:start], "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{key}[{len(found)}] is not UTF-8: {error.reason}") from None
        except struct.error:
            start = end + 1
        self.move(start - self.at)
        return found
