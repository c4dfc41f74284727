"""One specification per weight, read alike by loading, sharding, memory planning and tests."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from inferneo_jax.layers.quantization import (
    HostArray,
    ParameterSpec,
    QuantizationMethod,
    Unquantized,
)
from inferneo_jax.sharding import mesh

_FLOAT32 = Unquantized(jnp.dtype("float32"))


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Shape, logical axes and quantization method of one weight.

    On a device a weight is flat: a matrix of its first ``inputs`` dimensions by the others, or a
    vector if it has no inputs. Products read it in this form; with more dimensions, TPUs would
    choose a layout that has to be rearranged in every step.

    Attributes:
        shape: as it is in checkpoints.
        axes: the name of each dimension for the sharding rules (``vocab``, ``embed``, ``kv_heads``,
            ``heads``, ``mlp``), or None for a dimension that is never split.
        method: how the matrix is stored on a device.
        inputs: number of leading dimensions that a product contracts; for a table, the one that
            indexes its rows.
        table: whether it is a table of vectors, whose rows are the outputs of a product.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    method: QuantizationMethod = _FLOAT32
    inputs: int = 0
    table: bool = False

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """The shape of the matrix or vector over all devices."""
        return tuple(math.prod(sizes) for sizes in self._flat(self.shape))

    @property
    def flat_axes(self) -> tuple[str | None, ...]:
        """The logical axis that splits each dimension of ``flat_shape``; None if it is not split.

        At most one of the axes that form such a dimension can be split.
        """
        split = [[axis for axis in axes if axis in mesh.RULES] for axes in self._flat(self.axes)]
        assert all(len(axes) < 2 for axes in split), self
        return tuple(axes[0] if axes else None for axes in split)

    @property
    def parameters(self) -> tuple[ParameterSpec, ...]:
        """The arrays that store the weight."""
        if not self.inputs:
            return (ParameterSpec(self.flat_shape, self.method.dtype, self.flat_axes),)
        (rows, columns), (row_axis, column_axis) = self.flat_shape, self.flat_axes
        return self.method.parameters((rows, columns), (row_axis, column_axis), table=self.table)

    def encode(self, shard: HostArray) -> tuple[HostArray, ...]:
        """Convert one device's shard of the flat weight into its shards of ``parameters``."""
        if not self.inputs:
            return (shard.astype(self.method.dtype, copy=False),)
        return self.method.encode(shard, table=self.table)

    def _flat(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        return (values[: self.inputs], values[self.inputs :]) if self.inputs else (values,)


def weight(spec: WeightSpec) -> nnx.Param[tuple[jax.Array, ...]]:
    """Declare a weight in a module. Its zeros are placeholders: values come from a checkpoint."""
    return nnx.Param(tuple(jnp.zeros(p.shape, p.dtype) for p in spec.parameters), spec=spec)


def vector(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param[jax.Array]:
    """Declare a float32 weight that no product contracts, such as a bias or a norm's scale."""
    spec = WeightSpec(shape, axes)
    return nnx.Param(jnp.zeros(spec.flat_shape, jnp.float32), spec=spec)
