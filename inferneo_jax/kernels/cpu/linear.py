"""Block-quantized matrices in the layouts of ``native/block_formats.h``."""

import ctypes
import math
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from inferneo_jax.kernels.cpu.build import Variant, chosen
from inferneo_jax.layers.blocks import BlockPart, BlockRows
from inferneo_jax.layers.mlp import gate
from inferneo_jax.layers.norm import RMSNorm
from inferneo_jax.layers.quantization import (
    NO_EPILOGUE,
    EncodingError,
    Epilogue,
    HostArray,
    ParameterSpec,
    QuantizationMethod,
    RowFunction,
    Stored,
)
from inferneo_jax.platform import huge_pages

_BLOCK = 32
"""Outputs that are stored side by side."""

_SPAN = 64
"""Inputs that kernels read at a time."""


class Superblock(NamedTuple):
    """How many bytes a format takes for some inputs.

    Attributes:
        inputs: of a superblock.
        file_bytes: in a file, for one output.
        stored_bytes: of the superblock, for 32 outputs.
    """

    inputs: int
    file_bytes: int
    stored_bytes: int


FORMATS = {
    "q8_0": Superblock(64, 68, 68 * 32),
    "q4_0": Superblock(64, 36, 36 * 32),
    "q4_1": Superblock(64, 40, 40 * 32),
    "q5_0": Superblock(64, 44, 44 * 32),
    "q5_1": Superblock(64, 48, 48 * 32),
    "q2_k": Superblock(256, 84, 84 * 32),
    "q3_k": Superblock(256, 110, 114 * 32),
    "q4_k": Superblock(256, 144, 148 * 32),
    "q5_k": Superblock(256, 176, 180 * 32),
    "q6_k": Superblock(256, 210, 210 * 32),
    "iq4_nl": Superblock(64, 36, 36 * 32),
    "iq4_xs": Superblock(256, 136, 138 * 32),
}
"""The formats that there are kernels for, in the order of their numbers in ``native``."""

_NUMBERS = {name: number for number, name in enumerate(FORMATS)}
_ROUNDED = "q8_0"
_FLOATS = {"float32": 0, "bfloat16": 1, "float16": 2}
_NO_PROLOGUE, _RMS_NORM, _SWIGLU = range(3)
_NOTHING: Any = np.zeros(0, np.float32)
_NO_TABLE: Any = np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class BlockQuantized(QuantizationMethod):
    """Block formats of ggml for the native kernels of a CPU, on one device.

    Matrices that a file has in blocks are multiplied as they are. Floats are rounded to Q8_0, where
    each 32 inputs of an output share a scale. Rows of ``x`` are rounded to int8 with a scale for
    each 32 values, so an outlier affects only these.

    Attributes:
        parts: the outputs of the matrix by format, each output in one part. Without any, floats are
            rounded.
        variant: of the kernels.
    """

    padding_cost: ClassVar[float] = 0.125

    parts: tuple[BlockPart, ...] = ()
    variant: Variant = "native"

    @property
    def name(self) -> str:
        """The names of the formats in ggml, such as ``q4_k+q6_k``."""
        return "+".join(sorted({part.format for part in self.parts})) or _ROUNDED

    def parameters(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[ParameterSpec, ...]:
        """Bytes of each part, ``[blocks of outputs, superblocks of inputs, bytes]``, padded."""
        inputs, outputs = reversed(shape) if table else shape
        return tuple(
            ParameterSpec(_shape(part, inputs), jnp.dtype("uint8"), (None,) * 3)
            for part in self._parts(outputs)
        )

    def encode(self, shard: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """Round floats to Q8_0.

        Raises:
            EncodingError: the matrix is to be stored as blocks of a file.
        """
        if self.parts:
            raise EncodingError(f"floats are rounded to {_ROUNDED}, not to {self.name}")
        matrix = shard.T if table else shard
        if matrix.dtype.name not in _FLOATS:
            matrix = matrix.astype(np.float32)
        inputs, outputs = matrix.shape
        (part,) = self._parts(outputs)
        encoded = _allocate(_shape(part, inputs))
        self._encode(
            "encode_floats",
            _FLOATS[matrix.dtype.name],
            matrix.ctypes.data,
            *matrix.strides,
            inputs,
            outputs,
            encoded.ctypes.data,
        )
        return (encoded,)

    def stores(self, parts: tuple[BlockPart, ...] | None) -> bool:
        """Whether ``encode_blocks`` takes blocks of these parts as they are."""
        return bool(self.parts) and parts == self.parts

    def encode_blocks(self, blocks: tuple[BlockRows, ...]) -> tuple[HostArray, ...]:
        """Arrange the blocks of a whole matrix for the kernels; no number changes."""
        return tuple(map(self._encode_rows, blocks))

    def _encode_rows(self, rows: BlockRows) -> HostArray:
        contiguous = [np.ascontiguousarray(each) for each in rows.tensors]
        (row_bytes,) = {each.shape[1] for each in contiguous}
        addresses = np.concatenate(
            [each.ctypes.data + np.arange(len(each)) * row_bytes for each in contiguous]
        )
        counts = [count for _, count in rows.part.runs]
        assert sum(counts) == len(addresses), "a part has other outputs than its tensors"
        # A run is padded to whole blocks: null stands for an output that does not exist.
        padded = np.concatenate(
            [
                np.pad(each, (0, -len(each) % _BLOCK))
                for each in np.split(addresses, np.cumsum(counts)[:-1])
            ]
        )
        size = FORMATS[rows.part.format]
        encoded = _allocate(_shape(rows.part, row_bytes * size.inputs // size.file_bytes))
        self._encode(
            "encode_rows",
            _NUMBERS[rows.part.format],
            padded.ctypes.data,
            len(encoded),
            row_bytes,
            encoded.ctypes.data,
        )
        return encoded

    def _encode(self, function: str, *arguments: int) -> None:
        """Call a function of the library; other threads of the interpreter run meanwhile."""
        chosen(self.variant).host(function)(*map(ctypes.c_int64, arguments))

    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        """``x @ matrix`` in float32; of rounded floats with padding after the outputs."""
        return self.multiply(x, stored, self._num_outputs(stored))

    def multiply(
        self,
        x: Float[Array, "rows n"],
        stored: Stored,
        outputs: int,
        *,
        prologue: RowFunction | None = None,
        epilogue: Epilogue = NO_EPILOGUE,
        live: Int[Array, ""] | None = None,
    ) -> Float[Array, "rows outputs"]:
        """``epilogue(prologue(x) @ matrix)``, in one call if the kernel has them."""
        del live  # The kernel detects rows of zeros.
        known = epilogue.bias is None and epilogue.transform is None and epilogue.dtype is None
        residual = epilogue.residual if known else None
        norm, eps, kind = _NOTHING, 0.0, _NO_PROLOGUE
        if isinstance(prologue, RMSNorm):
            norm, eps, kind = prologue.scale[...], prologue.eps, _RMS_NORM
        elif prologue is gate:
            kind = _SWIGLU
        elif prologue:
            x = prologue(x)
        product = self._call(
            "block_linear",
            (x.shape[0], outputs),
            x.astype(jnp.float32),
            norm,
            _NO_TABLE if residual is None else residual,
            *stored,
            **_places(self._parts(outputs)),
            prologue=np.int64(kind),
            eps=np.float32(eps),
        )
        return epilogue(product) if residual is None else product

    def feed_forward(
        self,
        x: Float[Array, "rows embed"],
        norm: RowFunction,
        gate_up: Stored,
        down: Stored,
        down_method: QuantizationMethod,
        num_gates: int,
    ) -> Float[Array, "rows embed"] | None:
        """One call with the bits of two products, if the gates are whole spans of 64."""
        if not isinstance(down_method, BlockQuantized) or down_method.variant != self.variant:
            return None
        ups = self._parts(2 * num_gates)
        apart = any(first % _BLOCK for part in ups for first, _ in part.runs)
        if num_gates % _SPAN or apart or not isinstance(norm, RMSNorm):
            return None
        return self._call(
            "block_feed_forward",
            x.shape,
            x.astype(jnp.float32),
            norm.scale[...],
            *gate_up,
            *down,
            **_places(ups, down_method._parts(x.shape[1])),
            gate_up_parts=np.int64(len(ups)),
            eps=np.float32(norm.eps),
        )

    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        """Rows of a table in float32, with padding after their inputs."""
        parts = self._parts(self._num_outputs(stored))
        inputs = stored[0].shape[1] * FORMATS[parts[0].format].inputs
        rows = self._call(
            "block_take",
            (ids.size, inputs),
            ids.astype(jnp.int32).reshape(-1),
            *stored,
            **_places(parts),
        )
        return rows.reshape(*ids.shape, -1)

    def _call(self, kernel: str, shape: tuple[int, ...], *arguments: Array, **more: Any) -> Array:
        result: Array = chosen(self.variant).call(
            kernel, jax.ShapeDtypeStruct(shape, jnp.float32), *arguments, **more
        )
        return result

    def _parts(self, outputs: int) -> tuple[BlockPart, ...]:
        return self.parts or (BlockPart(_ROUNDED, ((0, outputs),)),)

    def _num_outputs(self, stored: Stored) -> int:
        """The outputs of a matrix, or with their padding if it is not known."""
        counts = [count for part in self.parts for _, count in part.runs]
        return sum(counts) or stored[0].shape[0] * _BLOCK


def _shape(part: BlockPart, inputs: int) -> tuple[int, int, int]:
    size = FORMATS[part.format]
    blocks = sum(-(-count // _BLOCK) for _, count in part.runs)
    return blocks, -(-inputs // size.inputs), size.stored_bytes


def _places(*matrices: tuple[BlockPart, ...]) -> dict[str, np.ndarray]:
    """Where a call finds the outputs of its matrices, whose parts it numbers one after the other.

    Returns:
        ``formats``: the number of each part's format; ``runs``: the part of each run, its first
        output, number of outputs and first block in the part, by the first output.
    """
    formats: list[int] = []
    runs: list[tuple[int, ...]] = []
    for parts in matrices:
        found = []
        for part in parts:
            block = 0
            for first, count in part.runs:
                found.append((first, count, len(formats), block))
                block += -(-count // _BLOCK)
            formats.append(_NUMBERS[part.format])
        runs += [(part, first, count, block) for first, count, part, block in sorted(found)]
    return {"formats": np.array(formats, np.int64), "runs": np.array(runs, np.int64).reshape(-1)}


def _allocate(shape: tuple[int, ...]) -> HostArray:
    return huge_pages.allocate(math.prod(shape)).reshape(shape)
