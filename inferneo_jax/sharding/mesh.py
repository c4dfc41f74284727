"""The device mesh, and what of the model is split over which of its axes.

A mesh has two axes. Over ``model`` the weights and the KV heads are split, so that a model runs on
chips none of which could hold it (Megatron: arXiv:1909.08053); over ``data`` the slots and their
pages, so that groups of chips serve different requests. ``RULES`` is the only table that says so.

Steps run inside ``jax.shard_map``: every function sees the part that its device holds, and calls
``reduce`` or ``gather`` where it needs the others'. Outside of a mesh both do nothing.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

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
"""Logical axis to mesh axis; an axis that is not listed is never split."""


def make_mesh(shape: MeshShape, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the given devices, or all of this job; neighbours on ``model`` are near.

    Raises:
        ConfigError: the shape does not go with the number of devices.
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
    """How an array with these logical axes is split."""
    return PartitionSpec(*(RULES.get(axis) if axis else None for axis in axes))


def parts(mesh: Mesh, axis: str) -> int:
    """Into how many parts a logical axis is split."""
    return int(mesh.shape[RULES[axis]]) if axis in RULES else 1


def is_split(axis: str | None) -> bool:
    """Whether the function being traced sees a part of this logical axis only."""
    return axis in RULES and jax.sharding.get_abstract_mesh().shape.get(RULES[axis], 1) > 1


def reduce(partial: Float[Array, "..."], *axes: str | None) -> Float[Array, "..."]:
    """Sum over the devices what each found for its part of the contracted logical axes."""
    split = {RULES[axis] for axis in axes if axis and is_split(axis)}
    return lax.psum(partial, tuple(sorted(split))) if split else partial


def gather(part: Array, axis: str, dim: int) -> Array:
    """Join the parts of a logical axis, which is the array's dimension ``dim``, on each device."""
    return lax.all_gather(part, RULES[axis], axis=dim, tiled=True) if is_split(axis) else part


def local_size(axis: str | None, size: int) -> int:
    """How many of an axis's ``size`` entries the function being traced sees."""
    if not (axis and is_split(axis)):
        return size
    return size // int(jax.sharding.get_abstract_mesh().shape[RULES[axis]])


def first_index(axis: str | None, size: int) -> int | Int[Array, ""]:
    """Where this device's part of a logical axis begins, when each part has ``size`` entries."""
    return lax.axis_index(RULES[axis]) * np.int32(size) if axis and is_split(axis) else 0
