"""Weights onto a mesh, part by part: no device or host ever holds more than its own."""

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
from inferneo_jax.weights.cache import EncodedParts, Keep

_READERS = 4
"""Weights that are read at once."""

Shapes = tuple[jax.ShapeDtypeStruct, ...]
"""Of the arrays that one weight is kept in."""


def weight_shapes(
    padded: ModelConfig, mesh: Mesh, quantization: QuantizationConfig
) -> dict[str, Shapes]:
    """The weights of a padded model on a mesh, by name, in the order of the module's leaves."""
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
    """All arrays of these weights: what a step takes."""
    return [each for arrays in shapes.values() for each in arrays]


def local_bytes(shapes: list[jax.ShapeDtypeStruct]) -> int:
    """Bytes that one device holds of arrays that are split as their shardings say."""
    return sum(
        math.prod(each.sharding.shard_shape(each.shape)) * each.dtype.itemsize for each in shapes
    )


def place_weights(
    sources: Mapping[str, Sliceable],
    model: ModelConfig,
    padded: ModelConfig,
    mesh: Mesh,
    quantization: QuantizationConfig,
    kept: EncodedParts | None = None,
    keep: Keep | None = None,
) -> list[Array]:
    """The weights of a model, each device's part read and encoded on its own.

    Args:
        sources: the weights as ``model`` declares them.
        model: as its checkpoint describes it.
        padded: the same model, padded for the mesh.
        mesh: where they go.
        quantization: of the matrices.
        kept: all parts that this process needs, encoded before; then no source is read.
        keep: is given each part that was encoded.

    Returns:
        What a step takes: arrays in the order of the padded module's leaves.
    """
    declared = {} if kept else models.weight_specs(model)
    specs = models.weight_specs(padded, quantization)
    group = None
    if isinstance(model, DecoderConfig) and isinstance(padded, DecoderConfig):
        group = model.group_size, padded.group_size

    def place(name: str, targets: Shapes) -> list[Array]:
        spec = specs[name]
        parts = max(map(_num_parts, targets))

        # Devices along an axis that does not split the weight share one copy.
        encoded: dict[int, tuple[HostArray, ...]] = {}

        def encode(number: int) -> tuple[HostArray, ...]:
            if kept:
                return kept[name, number]
            if number not in encoded:
                stored = declared[name].shape
                weight = PaddedWeight(sources[name], stored, spec.shape, spec.axes, group)
                part = weight[_part(spec, number, parts)]
                shape = [
                    size // (parts if axis else 1)
                    for size, axis in zip(spec.flat_shape, spec.flat_axes, strict=True)
                ]
                encoded[number] = spec.encode(part.reshape(shape))
                if keep:
                    keep(name, number, encoded[number])
            return encoded[number]

        def array(i: int, target: jax.ShapeDtypeStruct) -> Array:
            local = target.sharding.shard_shape(target.shape)

            def part(index: Index | None) -> HostArray:
                starts = [each.start or 0 for each in index or ()]
                places = (start // size for start, size in zip(starts, local, strict=True) if size)
                return encode(max(places, default=0))[i]

            return jax.make_array_from_callback(target.shape, target.sharding, part)

        return [array(i, target) for i, target in enumerate(targets)]

    shapes = weight_shapes(padded, mesh, quantization)
    with ThreadPoolExecutor(_READERS) as pool:
        return [a for arrays in pool.map(place, shapes, shapes.values()) for a in arrays]


def _num_parts(target: jax.ShapeDtypeStruct) -> int:
    local: Any = target.sharding.shard_shape(target.shape)
    return max(whole // part for whole, part in zip(target.shape, local, strict=True))


def _part(spec: WeightSpec, number: int, parts: int) -> Index:
    """Where one of the parts lies in a weight, by its declared dimensions."""
    return tuple(
        slice(number * size // parts, (number + 1) * size // parts)
        if axis and axis in spec.flat_axes
        else slice(0, size)
        for size, axis in zip(spec.shape, spec.axes, strict=True)
    )
