"""Matrices in the layout of ``native/linear.h``, and products with them."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from inferneo_jax.kernels.cpu.build import Variant, library
from inferneo_jax.layers.matrix import HostArray, MatrixFormat, Piece, Prologue, Stored
from inferneo_jax.layers.mlp import gate
from inferneo_jax.layers.norm import RMSNorm

_BLOCK = 32
"""Outputs that lie together."""

_ENCODED_AT_ONCE = 4096
"""Outputs: what is in between is as large as the float32 matrix, many times over."""


@dataclass(frozen=True)
class Grouped(MatrixFormat):
    """int8 in groups along the inputs, for the native kernels of a CPU; on one device.

    Every output has a scale for each group of inputs, and so has every row that is multiplied:
    outliers spoil a group and not the row (the block formats of ggml; ZeroQuant,
    arXiv:2206.01861).

    Attributes:
        group: inputs that share a scale, a multiple of 16.
        variant: of the kernels.
    """

    group: int = 64
    variant: Variant = "native"

    def pieces(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[Piece, ...]:
        """Values plus 128 and scales, in blocks of 32 outputs; both padded to be whole."""
        inputs, outputs = reversed(shape) if table else shape
        groups, blocks = -(-inputs // self.group), -(-outputs // _BLOCK)
        values = (blocks, groups * self.group // 4, _BLOCK, 4)
        return (
            Piece(values, jnp.dtype("uint8"), (None,) * 4),
            Piece((blocks, groups, _BLOCK), jnp.dtype("bfloat16"), (None,) * 3),
        )

    def encode(self, part: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """The nearest multiples of each group's scale, and these."""
        rows = part if table else part.T
        outputs, inputs = rows.shape
        values, scales = (
            np.zeros(piece.shape, piece.dtype)
            for piece in self.pieces(part.shape, (None, None), table=table)
        )
        groups = scales.shape[1]
        for first in range(0, outputs, _ENCODED_AT_ONCE):
            some = rows[first : first + _ENCODED_AT_ONCE].astype(np.float32)
            padding = (0, -len(some) % _BLOCK), (0, groups * self.group - inputs)
            grouped = np.pad(some, padding).reshape(-1, groups, self.group)
            scale = _rounded_up(np.abs(grouped).max(axis=2) / np.float32(127))
            safe = np.maximum(scale.astype(np.float32), np.float32(1e-30))[..., None]
            integers = (np.rint(grouped * (1 / safe)) + 128).astype(np.uint8)
            block, end = first // _BLOCK, -(-(first + len(some)) // _BLOCK)
            packed = integers.reshape(end - block, _BLOCK, -1, 4).transpose(0, 2, 1, 3)
            values[block:end] = packed
            scales[block:end] = scale.reshape(end - block, _BLOCK, groups).transpose(0, 2, 1)
        return values, scales

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
        values, scales = stored
        norm, eps, kind = jnp.zeros(0), 0.0, 0
        if isinstance(prologue, RMSNorm):
            norm, eps, kind = prologue.scale[...], prologue.eps, 1
        elif prologue is gate:
            kind = 2
        elif prologue:
            x = prologue(x)
        padded = values.shape[0] * _BLOCK
        outputs = padded if residual is None else residual.shape[1]
        made = library(self.variant)
        assert made, "formats_for chooses this format only where there is a library"
        return made.call(
            "linear_int8",
            jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32),
            x.astype(jnp.float32),
            values,
            scales,
            norm,
            jnp.zeros((0, 0)) if residual is None else residual,
            prologue=np.int64(kind),
            eps=np.float32(eps),
        )

    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        """Rows of a table, float32, with padding behind their inputs."""
        values, scales = stored
        block, place = ids // _BLOCK, ids % _BLOCK
        mode = "clip"
        rows = values.at[block, :, place].get(mode=mode).astype(jnp.float32) - 128
        scale = scales.at[block, :, place].get(mode=mode).astype(jnp.float32)
        rows = rows.reshape(*scale.shape, self.group) * scale[..., None]
        return rows.reshape(*ids.shape, -1)


def _rounded_up(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 that is not below: so that no value goes beyond 127 multiples of it."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0xFFFF) >> 16).astype(np.uint16).view(jnp.dtype("bfloat16"))
