"""One declaration per weight: loading, sharding, memory planning and tests all read it."""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """Shape, dtype and logical axes of one weight.

    ``axes`` names each dimension for the sharding rules: ``vocab``, ``embed``, ``kv_heads``,
    ``heads``, ``mlp``, or None for a dimension that is never split.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")

    @property
    def num_bytes(self) -> int:
        """Size in bytes of the whole, unsharded weight."""
        return math.prod(self.shape) * self.dtype.itemsize


def weight(
    shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype
) -> nnx.Param[jax.Array]:
    """Declare a weight inside a module; its value comes from a checkpoint, never from here."""
    return nnx.Param(jnp.zeros(shape, dtype), spec=WeightSpec(shape, jnp.dtype(dtype), axes))
