"""Matrices in the layouts of ``native/tiles.h``, and products with them."""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from inferneo_jax.kernels.cpu.build import Variant, library
from inferneo_jax.layers.matrix import (
    EncodingError,
    HostArray,
    MatrixFormat,
    Piece,
    Prologue,
    Stored,
)
from inferneo_jax.layers.mlp import gate
from inferneo_jax.layers.norm import RMSNorm

_BLOCK = 32
"""Outputs that lie together, and inputs that share a scale."""

_SPAN = 64
"""Inputs that share a scale of a row."""

_ENCODED_AT_ONCE = 2048
"""Outputs: what is made on the way is several times as large as the part in float32."""

_GROUP_BYTES = {8: 2 * 32 + 32 * 32, 4: 2 * 32 + 2 * 32 + 32 * 16}
_NONE, _RMS_NORM, _SWIGLU = range(3)


@dataclass(frozen=True)
class Blocks(MatrixFormat):
    """Integers in groups of 32 inputs, for the native kernels of a CPU; on one device.

    Each group of an output has a scale, and with 4 bits a minimum too: the blocks of ggml's Q8_0
    and Q4_1, so that what a file has in these is kept as it is. Rows that are multiplied are
    rounded to int8, with a scale for each 64 of their values: outliers spoil these and not the row.

    Attributes:
        bits: 8, or 4 for matrices that have no more than 16 values in a group, evenly spaced.
            Tables have 8.
        variant: of the kernels.
    """

    bits: Literal[4, 8] = 8
    variant: Variant = "native"

    def pieces(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[Piece, ...]:
        """Groups as bytes, ``[blocks of outputs, groups of inputs, bytes]``; padded to be whole."""
        inputs, outputs = reversed(shape) if table else shape
        groups = -(-inputs // _SPAN) * (_SPAN // _BLOCK)
        whole = -(-outputs // _BLOCK), groups, _GROUP_BYTES[self.bits]
        return (Piece(whole, jnp.dtype("uint8"), (None,) * 3),)

    def encode(self, part: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """The nearest that a matrix of 8 bits can be; with 4, what is exactly it.

        Raises:
            EncodingError: it is not made of groups of 4 bits.
        """
        rows = part if table else part.T
        (piece,) = self.pieces(part.shape, (None, None), table=table)
        blocks, groups, _ = piece.shape
        encoded = np.zeros(piece.shape, np.uint8)
        for first in range(0, len(rows), _ENCODED_AT_ONCE):
            some = rows[first : first + _ENCODED_AT_ONCE].astype(np.float32)
            padding = (0, -len(some) % _BLOCK), (0, groups * _BLOCK - some.shape[1])
            whole = np.pad(some, padding).reshape(-1, _BLOCK, groups, _BLOCK)
            block = first // _BLOCK
            encode = _eight_bits if self.bits == 8 else _four_bits
            encoded[block : block + len(whole)] = _packed(encode(whole.transpose(0, 2, 1, 3)))
        assert len(encoded) == blocks
        return (encoded,)

    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        """``x`` times the matrix, float32; with padding behind the outputs."""
        return self.multiply(x, stored)

    def multiply(
        self,
        x: Float[Array, "rows n"],
        stored: Stored,
        *,
        prologue: Prologue | None = None,
        residual: Float[Array, "rows outputs"] | None = None,
    ) -> Float[Array, "rows outputs"]:
        """``residual + prologue(x) @ matrix``, float32, in one call where the kernel knows how."""
        (weights,) = stored
        norm, eps, kind = jnp.zeros(0), 0.0, _NONE
        if isinstance(prologue, RMSNorm):
            norm, eps, kind = prologue.scale[...], prologue.eps, _RMS_NORM
        elif prologue is gate:
            kind = _SWIGLU
        elif prologue:
            x = prologue(x)
        outputs = weights.shape[0] * _BLOCK if residual is None else residual.shape[1]
        return self._call(
            f"linear_{self.bits}",
            (x.shape[0], outputs),
            x.astype(jnp.float32),
            weights,
            norm,
            jnp.zeros((0, 0)) if residual is None else residual,
            prologue=np.int64(kind),
            eps=np.float32(eps),
        )

    def feed_forward(
        self,
        x: Float[Array, "rows embed"],
        norm: Prologue,
        gate_up: Stored,
        down: Stored,
        num_gates: int,
    ) -> Float[Array, "rows embed"] | None:
        """One call, whose bits are those of two, where the gates are whole spans of 64."""
        if num_gates % _SPAN or not isinstance(norm, RMSNorm):
            return None
        return self._call(
            f"feed_forward_{self.bits}",
            x.shape,
            x.astype(jnp.float32),
            *gate_up,
            *down,
            norm.scale[...],
            eps=np.float32(norm.eps),
        )

    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        """Rows of a table, float32, with padding behind their inputs."""
        (weights,) = stored
        shape = ids.size, weights.shape[1] * _BLOCK
        rows = self._call("take_8", shape, ids.astype(jnp.int32).reshape(-1), weights)
        return rows.reshape(*ids.shape, -1)

    def _call(self, kernel: str, shape: tuple[int, ...], *arguments: Array, **more: Any) -> Array:
        made = library(self.variant)
        assert made, "formats_for chooses this format only where there is a library"
        result: Array = made.call(
            kernel, jax.ShapeDtypeStruct(shape, jnp.float32), *arguments, **more
        )
        return result


Groups = Float32[np.ndarray, "blocks groups outputs inputs"]


class _Encoded(NamedTuple):
    """Groups taken apart.

    Attributes:
        numbers: float16 ones of each output, ``[blocks, groups, outputs]``.
        values: a byte for each weight or two, ``[blocks, groups, outputs, inputs]``.
    """

    numbers: tuple[np.ndarray, ...]
    values: np.ndarray


def _packed(encoded: _Encoded) -> np.ndarray:
    """The bytes of each group: its numbers, then its values, those of 4 inputs together."""
    blocks, groups, outputs, inputs = encoded.values.shape
    values = encoded.values.reshape(blocks, groups, outputs, inputs // 4, 4).swapaxes(2, 3)
    numbers = (np.ascontiguousarray(each).view(np.uint8) for each in encoded.numbers)
    return np.concatenate([*numbers, values.reshape(blocks, groups, -1)], axis=2)


def _eight_bits(weights: Groups) -> _Encoded:
    scales = (np.abs(weights).max(axis=3) / np.float32(127)).astype(np.float16)
    safe = np.maximum(scales.astype(np.float32), np.float32(1e-30))[..., None]
    # A scale that was rounded down leaves its largest value above 127, but by less than a half,
    # unless it is too small for float16 to tell.
    values = np.clip(np.rint(weights / safe), -127, 127)
    return _Encoded((scales,), (values + 128).astype(np.uint8))


def _four_bits(weights: Groups) -> _Encoded:
    low, high = weights.min(axis=3), weights.max(axis=3)
    minima = low.astype(np.float16)
    scales = np.zeros_like(minima)
    values = np.zeros(weights.shape, np.uint8)
    close = np.maximum(np.abs(low), np.abs(high))[..., None] * np.float32(1e-6)
    left = np.ones(low.shape, bool)
    # The least value of a group is 0, and the largest nearly always 15.
    for largest in range(15, 0, -1):
        span = (high[left] - low[left]) / np.float32(largest)
        scale = span.astype(np.float16)
        wide = np.maximum(scale.astype(np.float32), np.float32(1e-30))[:, None]
        start = minima[left].astype(np.float32)[:, None]
        found = np.clip(np.rint((weights[left] - start) / wide), 0, 15)
        stands_for = found * scale.astype(np.float32)[:, None] + start
        exact = (np.abs(stands_for - weights[left]) <= close[left]).all(axis=1)
        places = tuple(index[exact] for index in np.nonzero(left))
        scales[places], values[places] = scale[exact], found[exact].astype(np.uint8)
        left[places] = False
        if not left.any():
            break
        # What a file has in 4 bits has nearly all of its groups found at once.
        if largest == 15 and left.mean() > 0.5:
            break
    if left.any():
        raise EncodingError(f"{left.mean():.0%} of the matrix is not in groups of 4 bits")
    half = _BLOCK // 2
    return _Encoded((scales, minima), values[:, :, :half] | values[:, :, half:] << 4)
