"""Places weights on a mesh shard by shard, so that no device or host holds more than its own."""

import math
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, ModelConfig
from inferneo_jax.layers.quantization import HostArray, QuantizationConfig
from inferneo_jax.layers.spec import WeightSpec
from inferneo_jax.platform.progress import Progress, silent
from inferneo_jax.sharding import mesh as meshes
from inferneo_jax.sharding.padding import Index, PaddedWeight
from inferneo_jax.weights.sources.weight import Weight

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
    weights: Mapping[str, Weight],
    model: ModelConfig,
    padded: ModelConfig,
    mesh: Mesh,
    quantization: QuantizationConfig,
    progress: Progress = silent,
) -> list[Array]:
    """Read, encode and place the weights of a model, each device's shard on its own.

    On the host this takes the memory of what is placed there, and that of the largest shard while
    it is read and encoded; or that of the largest weight, if this process has several shards of it
    that lie in the same rows on disk.

    Args:
        weights: on disk, with the shapes of ``model``.
        model: as its checkpoint describes it.
        padded: the same model, padded for the mesh.
        mesh: of the devices.
        quantization: of the matrices.
        progress: called after each weight, with the bytes that are placed and those of all.

    Returns:
        The arguments of a step: arrays in the order of the padded module's leaves.
    """
    declared = models.weight_specs(model)
    specs = models.weight_specs(padded, quantization)
    shapes = weight_shapes(padded, mesh, quantization)
    sizes = {name: local_bytes(list(targets)) for name, targets in shapes.items()}
    group = None
    if isinstance(model, DecoderConfig) and isinstance(padded, DecoderConfig):
        group = model.group_size, padded.group_size

    def stored(name: str) -> bool:
        """Whether a weight is taken in the blocks that it is stored in."""
        return bool(specs[name].inputs) and specs[name].method.stores(weights[name].parts)

    def read_bytes(name: str) -> int:
        """Bytes of a shard before it is encoded: in its blocks, or in float32."""
        if stored(name):
            return sizes[name]
        return 4 * math.prod(specs[name].shape) // max(map(_num_shards, shapes[name]))

    room = _Room(max(map(read_bytes, shapes)))

    def encode(
        name: str, weight: Weight | HostArray, number: int, num_shards: int
    ) -> tuple[HostArray, ...]:
        spec = specs[name]
        if stored(name):
            return spec.method.encode_blocks(weights[name].blocks() or ())
        whole = PaddedWeight(weight, declared[name].shape, spec.shape, spec.axes, group)
        shard = whole[_shard(spec, number, num_shards)]
        shape = [
            size // (num_shards if axis else 1)
            for size, axis in zip(spec.flat_shape, spec.flat_axes, strict=True)
        ]
        return spec.encode(shard.reshape(shape))

    def place(name: str, targets: Shapes) -> list[Array]:
        spec, num_shards = specs[name], max(map(_num_shards, targets))
        local_devices = len(targets[0].sharding.addressable_devices)
        by_inputs = bool(spec.inputs and spec.flat_axes[0]) and not spec.table
        if by_inputs and num_shards > 1 and local_devices > 1:
            # A shard of the inputs is a part of each row on disk, so all rows are read for any.
            with room.taken(num_shards * read_bytes(name)):
                return arrays(name, targets, num_shards, weights[name][...])
        return arrays(name, targets, num_shards, None)

    def arrays(name: str, targets: Shapes, num_shards: int, whole: HostArray | None) -> list[Array]:
        # Devices along an axis that does not split the weight share one encoded shard.
        encoded: dict[int, tuple[HostArray, ...]] = {}

        def array(i: int, target: jax.ShapeDtypeStruct) -> Array:
            local = target.sharding.shard_shape(target.shape)

            def shard(index: Index | None) -> HostArray:
                starts = [each.start or 0 for each in index or ()]
                places = (start // size for start, size in zip(starts, local, strict=True) if size)
                number = max(places, default=0)
                if number not in encoded and whole is not None:
                    encoded[number] = encode(name, whole, number, num_shards)
                elif number not in encoded:
                    with room.taken(read_bytes(name)):
                        encoded[number] = encode(name, weights[name], number, num_shards)
                return encoded[number][i]

            return jax.make_array_from_callback(target.shape, target.sharding, shard)

        return [array(i, target) for i, target in enumerate(targets)]

    found: list[Array] = []
    placed = 0
    progress("loading", 0, sum(sizes.values()))
    with ThreadPoolExecutor(_READERS) as pool:
        for name, each in zip(shapes, pool.map(place, shapes, shapes.values()), strict=True):
            found += each
            placed += sizes[name]
            progress("loading", placed, sum(sizes.values()))
    return found


class _Room:
    """Memory that several threads share, in bytes. Who takes more than all of it has it alone."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used = 0
        self._changed = threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        """Wait for ``size`` bytes and have them while the block runs."""
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._size)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


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
