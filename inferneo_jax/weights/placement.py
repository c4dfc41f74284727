"""Places weights on a mesh shard by shard, so that no device or host holds more than its own."""

import math
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, ModelConfig
from inferneo_jax.layers.quantization import HostArray, QuantizationConfig
from inferneo_jax.layers.spec import WeightSpec
from inferneo_jax.sharding import mesh as meshes
from inferneo_jax.sharding.padding import Index, PaddedWeight, Sliceable
from inferneo_jax.weights.cache import EncodedShards, Keep

_READERS = 4
"""Number of weights that are read in parallel."""

Shapes = tuple[jax.ShapeDtypeStruct, ...]
"""Shapes, dtypes and shardings of the arrays that store one weight."""


def weight_shapes(
    padded: ModelConfig, mesh: Mesh, quantization: QuantizationConfig
) -> dict[str, Shapes]:
    """The arrays of each weight of a padded model on a mesh, by name, in the order of leaves."""
    return {
        name: tuple(
            jax.ShapeDtypeStruct(
                parameter.shape,
                parameter.dtype,
                sharding=NamedSharding(mesh, meshes.spec(*parameter.axes)),
            )
            for parameter in spec.parameters
        )
        for name, spec in models.weight_specs(padded, quantization).items()
    }


def flat(shapes: Mapping[str, Shapes]) -> list[jax.ShapeDtypeStruct]:
    """All arrays of these weights, in the order in which a step takes them."""
    return [each for arrays in shapes.values() for each in arrays]


def local_bytes(shapes: list[jax.ShapeDtypeStruct]) -> int:
    """Bytes of the shards that one device holds."""
    return sum(
        math.prod(each.sharding.shard_shape(each.shape)) * each.dtype.itemsize for each in shapes
    )


def place_weights(
    sources: Mapping[str, Sliceable],
    model: ModelConfig,
    padded: ModelConfig,
    mesh: Mesh,
    quantization: QuantizationConfig,
    kept: EncodedShards | None = None,
    keep: Keep | None = None,
) -> list[Array]:
    """Read, encode and place the weights of a model, each device's shard on its own.

    Args:
        sources: the weights, with the shapes of ``model``.
        model: as its checkpoint describes it.
        padded: the same model, padded for the mesh.
        mesh: of the devices.
        quantization: of the matrices.
        kept: all shards that this process needs, if they were encoded before; no source is read.
        keep: called with each shard that was encoded.

    Returns:
        The arguments of a step: arrays in the order of the padded module's leaves.
    """
    declared = {} if kept else models.weight_specs(model)
    specs = models.weight_specs(padded, quantization)
    group = None
    if isinstance(model, DecoderConfig) and isinstance(padded, DecoderConfig):
        group = model.group_size, padded.group_size

    def place(name: str, targets: Shapes) -> list[Array]:
        spec = specs[name]
        num_shards = max(map(_num_shards, targets))

        # Devices along an axis that does not split the weight share one encoded shard.
        encoded: dict[int, tuple[HostArray, ...]] = {}

        def encode(number: int) -> tuple[HostArray, ...]:
            if kept:
                return kept[name, number]
            if number not in encoded:
                stored = declared[name].shape
                weight = PaddedWeight(sources[name], stored, spec.shape, spec.axes, group)
                shard = weight[_shard(spec, number, num_shards)]
                shape = [
                    size // (num_shards if axis else 1)
                    for size, axis in zip(spec.flat_shape, spec.flat_axes, strict=True)
                ]
                encoded[number] = spec.encode(shard.reshape(shape))
                if keep:
                    keep(name, number, encoded[number])
            return encoded[number]

        def array(i: int, target: jax.ShapeDtypeStruct) -> Array:
            local = target.sharding.shard_shape(target.shape)

            def shard(index: Index | None) -> HostArray:
                starts = [each.start or 0 for each in index or ()]
                places = (start // size for start, size in zip(starts, local, strict=True) if size)
                return encode(max(places, default=0))[i]

            return jax.make_array_from_callback(target.shape, target.sharding, shard)

        return [array(i, target) for i, target in enumerate(targets)]

    shapes = weight_shapes(padded, mesh, quantization)
    with ThreadPoolExecutor(_READERS) as pool:
        return [a for arrays in pool.map(place, shapes, shapes.values()) for a in arrays]


def _num_shards(target: jax.ShapeDtypeStruct) -> int:
    local: Any = target.sharding.shard_shape(target.shape)
    return max(whole // size for whole, size in zip(target.shape, local, strict=True))


def _shard(spec: WeightSpec, number: int, num_shards: int) -> Index:
    """The slice of a weight, in its declared dimensions, that is shard ``number``."""
    return tuple(
        slice(number * size // num_shards, (number + 1) * size // num_shards)
        if axis and axis in spec.flat_axes
        else slice(0, size)
        for size, axis in zip(spec.shape, spec.axes, strict=True)
    )
