"""Recommends a mesh for a model, and finds changes that would make a model fit."""

import dataclasses
from typing import Any

from inferneo_jax.config import MeshShape
from inferneo_jax.errors import ConfigError
from inferneo_jax.planner.budget import Budget, Wish, bound, work_of
from inferneo_jax.sharding import mesh as meshes


def advise(wish: Wish, devices: list[Any]) -> MeshShape:
    """The mesh with the fastest decode step by roofline, among those on which the model fits."""
    best, fastest = wish.engine.mesh, 0.0
    for data in range(1, len(devices) + 1):
        if len(devices) % data or (wish.engine.slots or data) % data:
            continue
        shape = MeshShape(data, len(devices) // data)
        mesh = meshes.make_mesh(shape, devices)
        changed = dataclasses.replace(wish, engine=dataclasses.replace(wish.engine, mesh=shape))
        budget = Budget(changed, mesh)
        rows = budget.rows
        if budget.missing or not rows:
            continue
        model = len(devices) // data
        reduced = 2 * (2 * wish.model.num_layers + 1) * (model - 1) / model
        sent = reduced * rows * wish.model.hidden_size * budget.backend.quantization.dtype.itemsize
        work = work_of(budget.backend, wish.context, budget.token_bytes, (rows, 1))
        seconds, _ = bound(wish.topology.chip, work, sent, wish.engine.quantization)
        if data * rows / seconds > fastest:
            best, fastest = shape, data * rows / seconds
    data, model = best.over(len(devices))
    return MeshShape(data, model)


def remedies(wish: Wish) -> list[str]:
    """Changes, each of which would make the model fit, from the smallest to the largest."""
    found = []
    topology = wish.topology
    shape = MeshShape(data=wish.engine.mesh.data)
    if wish.engine.quantization in ("auto", "none"):
        engine = dataclasses.replace(wish.engine, quantization="int8")
        if _fits(dataclasses.replace(wish, engine=engine)):
            found.append("quantization int8")
    if wish.engine.mesh.data > 1:
        alone = dataclasses.replace(wish.engine, mesh=MeshShape())
        if _fits(dataclasses.replace(wish, engine=alone)):
            found.append("a mesh with data=1")
    for _ in range(6):
        topology = topology.larger()
        engine = dataclasses.replace(wish.engine, mesh=shape)
        if _fits(dataclasses.replace(wish, topology=topology, engine=engine)):
            found.append(f"topology {topology}")
            break
    return found


def _fits(wish: Wish) -> bool:
    try:
        mesh = meshes.make_mesh(wish.engine.mesh, wish.topology.devices())
        return not Budget(wish, mesh).missing
    except ConfigError:
        return False
