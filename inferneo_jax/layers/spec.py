"""One declaration per weight: loading, sharding, memory planning and tests all read it."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from inferneo_jax.layers.quantization import HostArray, MatrixFormat, Piece, Plain
from inferneo_jax.sharding import mesh

_VECTOR = Plain(jnp.dtype("float32"))


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Shape, logical axes and format of one weight.

    On a device a weight is a matrix, its first ``inputs`` dimensions by the others, or without
    inputs a vector: that is how products read it, and chips would lay out further dimensions in
    ways that make them rearrange it at every step.

    Attributes:
        shape: as checkpoints have it.
        axes: names each dimension for the sharding rules: ``vocab``, ``embed``, ``kv_heads``,
            ``heads``, ``mlp``, or None for a dimension that is never split.
        format: how the matrix is kept on a device.
        inputs: leading dimensions that are contracted; of a table, the one that names its rows.
        table: whether it is a table of vectors, whose rows are also its outputs.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    format: MatrixFormat = _VECTOR
    inputs: int = 0
    table: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """The shape on a device, before it is split: matrix or vector."""
        return tuple(math.prod(part) for part in self._flat(self.shape))

    @property
    def flat_axes(self) -> tuple[str | None, ...]:
        """The logical axis by which each dimension on a device is split; None where it is not.

        At most one of the axes that make up such a dimension may be one that is split.
        """
        named = [[a for a in part if a in mesh.RULES] for part in self._flat(self.axes)]
        assert all(len(part) < 2 for part in named), self
        return tuple(part[0] if part else None for part in named)

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The arrays that it is kept in."""
        if not self.inputs:
            return (Piece(self.flat_shape, self.format.dtype, self.flat_axes),)
        (rows, columns), (over_rows, over_columns) = self.flat_shape, self.flat_axes
        return self.format.pieces((rows, columns), (over_rows, over_columns), table=self.table)

    def encode(self, part: HostArray) -> tuple[HostArray, ...]:
        """These arrays, of one device's part of the flat weight."""
        if not self.inputs:
            return (part.astype(self.format.dtype, copy=False),)
        return self.format.encode(part, table=self.table)

    def _flat(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        return (values[: self.inputs], values[self.inputs :]) if self.inputs else (values,)


def weight(spec: WeightSpec) -> nnx.Param[tuple[jax.Array, ...]]:
    """Declare a weight inside a module; its value comes from a checkpoint, never from here."""
    return nnx.Param(tuple(jnp.zeros(p.shape, p.dtype) for p in spec.pieces), spec=spec)


def vector(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param[jax.Array]:
    """Declare a float32 weight that is no matrix, such as a norm's scale or a bias."""
    spec = WeightSpec(shape, axes)
    return nnx.Param(jnp.zeros(spec.flat_shape, jnp.float32), spec=spec)
