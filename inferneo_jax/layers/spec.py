"""One declaration per weight: loading, sharding, memory planning and tests all read it."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from inferneo_jax import mesh


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Shape, dtype and logical axes of one weight.

    On a device a weight is a matrix, its first ``inputs`` dimensions by the others, or without
    inputs a vector: that is how products read it, and chips would lay out further dimensions in
    ways that make them rearrange it at every step.

    Attributes:
        shape: as checkpoints have it.
        dtype: on the device.
        axes: names each dimension for the sharding rules: ``vocab``, ``embed``, ``kv_heads``,
            ``heads``, ``mlp``, or None for a dimension that is never split.
        inputs: leading dimensions that are contracted.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]
    inputs: int = 0

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def num_bytes(self) -> int:
        """Size in bytes of the whole, unsharded weight."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def flat_shape(self) -> tuple[int, ...]:
        """The shape on a device: matrix or vector."""
        return tuple(math.prod(part) for part in self._flat(self.shape))

    @property
    def flat_axes(self) -> tuple[str | None, ...]:
        """The logical axis by which each dimension on a device is split; None where it is not.

        At most one of the axes that make up such a dimension may be one that is split.
        """
        named = [[a for a in part if a in mesh.RULES] for part in self._flat(self.axes)]
        assert all(len(part) < 2 for part in named), self
        return tuple(part[0] if part else None for part in named)

    def _flat(self, values: tuple[Any, ...]) -> tuple[tuple[Any, ...], ...]:
        return (values[: self.inputs], values[self.inputs :]) if self.inputs else (values,)


def weight(
    shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype, inputs: int = 0
) -> nnx.Param[jax.Array]:
    """Declare a weight inside a module; its value comes from a checkpoint, never from here."""
    spec = WeightSpec(shape, jnp.dtype(dtype), axes, inputs)
    return nnx.Param(jnp.zeros(spec.flat_shape, dtype), spec=spec)
