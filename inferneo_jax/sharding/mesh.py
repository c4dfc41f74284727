"""The device mesh, and the rules by which the model is split over its axes.

A mesh has two axes. The weights and the KV heads are split over ``model``, so that a model can run
on chips none of which could hold it alone (Megatron: arXiv:1909.08053). The slots and their pages
are split over ``data``, so that groups of chips serve different requests. ``RULES`` is the only
table of these splits.

Steps run inside ``jax.shard_map``. Every function sees the part that its device holds, and calls
``reduce``, ``maximum`` or ``gather`` where it needs the parts of others. Outside of a mesh, these
do nothing.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Int, Num

from inferneo_jax.config import MeshShape

DATA, MODEL = "data", "model"

RULES = {
    "kv_heads": MODEL,
    "heads": MODEL,
    "mlp": MODEL,
    "vocab": MODEL,
    "slots": DATA,
    "rows": DATA,
    "pages": DATA,
}
"""Maps logical axes to mesh axes; an axis that is not listed is never split."""


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Make a mesh of the given devices, by default of all devices of the job.

    Neighbours along ``model`` are physically close.

    Raises:
        ConfigError: the shape does not match the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = shape.over(len(devices))
    return jax.make_mesh(
        sizes,
        (DATA, MODEL),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[: math.prod(sizes)],
    )


def spec(*axes: str | None) -> PartitionSpec:
    """The partition of an array with these logical axes."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def parts(mesh: Mesh, axis: str) -> int:
    """The number of parts into which a logical axis is split."""
    return int(mesh.shape[RULES[axis]]) if axis in RULES else 1


def is_split(axis: str | None) -> bool:
    """Whether the function being traced sees only a part of this logical axis."""
    return axis in RULES and jax.sharding.get_abstract_mesh().shape.get(RULES[axis], 1) > 1


def reduce(partial: Num[Array, "..."], *axes: str | None) -> Num[Array, "..."]:
    """Sum the partial results of all devices over the contracted logical axes."""
    split = {RULES[axis] for axis in axes if axis and is_split(axis)}
    return lax.psum(partial, tuple(sorted(split))) if split else partial


def maximum(part: Num[Array, "..."], axis: str) -> Num[Array, "..."]:
    """The largest of what all devices have along a logical axis, element by element."""
    return lax.pmax(part, RULES[axis]) if is_split(axis) else part


def gather(part: Array, axis: str, dim: int) -> Array:
    """Concatenate the parts of a logical axis on every device, along dimension ``dim``."""
    return lax.all_gather(part, RULES[axis], axis=dim, tiled=True) if is_split(axis) else part


def local_size(axis: str | None, size: int) -> int:
    """The number of entries, out of an axis's ``size``, that the function being traced sees."""
    if not (axis and is_split(axis)):
        return size
    return size // int(jax.sharding.get_abstract_mesh().shape[RULES[axis]])


def first_index(axis: str | None, size: int) -> int | Int[Array, ""]:
    """The index at which this device's part of a logical axis begins, if each has ``size``."""
    return lax.axis_index(RULES[axis]) * np.int32(size) if axis and is_split(axis) else 0
