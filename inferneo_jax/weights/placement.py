"""Weights onto a mesh, part by part: no device or host ever holds more than its own."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from inferneo_jax import mesh as meshes
from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, ModelConfig
from inferneo_jax.fitting import FittedWeight, Index, Sliceable, fit
from inferneo_jax.layers.spec import WeightSpec

_READERS = 4
"""Weights that are read at once."""


def weight_shapes(config: ModelConfig, mesh: Mesh, dtype: jnp.dtype) -> list[jax.ShapeDtypeStruct]:
    """The weights of a model on a mesh, in the order of the module's leaves."""
    fitted = fit(config, meshes.parts(mesh, "vocab"))
    return [
        jax.ShapeDtypeStruct(
            each.flat_shape, each.dtype, sharding=NamedSharding(mesh, meshes.spec(*each.flat_axes))
        )
        for each in models.declare(fitted, dtype).values()
    ]


def local_bytes(shapes: list[jax.ShapeDtypeStruct]) -> int:
    """Bytes that one device holds of arrays that are split as their shardings say."""
    return sum(
        math.prod(each.sharding.shard_shape(each.shape)) * each.dtype.itemsize for each in shapes
    )


def place_weights(
    sources: Mapping[str, Sliceable], config: ModelConfig, mesh: Mesh, dtype: jnp.dtype
) -> list[Array]:
    """The weights of a model, each device's part read and cast on its own.

    Args:
        sources: the weights as the model's own configuration declares them.
        config: of the model, not fitted to the mesh.
        mesh: where they go.
        dtype: of the matrices.

    Returns:
        What a step takes: arrays in the order of the fitted module's leaves.
    """
    declared = models.declare(config, dtype)
    fitted_config = fit(config, meshes.parts(mesh, "vocab"))
    fitted = models.declare(fitted_config, dtype)
    group = None
    if isinstance(config, DecoderConfig) and isinstance(fitted_config, DecoderConfig):
        group = config.group_size, fitted_config.group_size

    def place(name: str, target: jax.ShapeDtypeStruct) -> Array:
        spec = fitted[name]
        stored = declared[name].shape
        weight = FittedWeight(sources[name], stored, spec.shape, spec.axes, group)
        local = target.sharding.shard_shape(target.shape)
        num_parts = [whole // part for whole, part in zip(target.shape, local, strict=True)]
        read: dict[int, Any] = {}

        def part(index: Index | None) -> np.ndarray[Any, np.dtype[Any]]:
            starts = [each.start or 0 for each in index or ()]
            number = max(start // size for start, size in zip(starts, local, strict=True))
            if number not in read:  # devices along an axis that does not split it share one copy
                whole = weight[_part(spec, number, max(num_parts))]
                read[number] = whole.reshape(local).astype(target.dtype, copy=False)
            return read[number]

        return jax.make_array_from_callback(target.shape, target.sharding, part)

    with ThreadPoolExecutor(_READERS) as pool:
        return list(pool.map(place, declared, weight_shapes(config, mesh, dtype)))


def _part(spec: WeightSpec, number: int, parts: int) -> Index:
    """Where one of the parts lies in a weight, by its declared dimensions."""
    return tuple(
        slice(number * size // parts, (number + 1) * size // parts)
        if axis and axis in spec.flat_axes
        else slice(0, size)
        for size, axis in zip(spec.shape, spec.axes, strict=True)
    )
