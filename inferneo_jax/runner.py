"""Owns the weights, the cache and the compiled steps: the only one that touches the device."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from inferneo_jax import compiles
from inferneo_jax import mesh as meshes
from inferneo_jax.cache import KVCache
from inferneo_jax.config import DecoderConfig, EngineConfig
from inferneo_jax.executables import ExecutableStore, Progress
from inferneo_jax.groups import Plans
from inferneo_jax.heartbeat import PATIENCE
from inferneo_jax.layers.matrix import Formats
from inferneo_jax.memory import explained, free_memory, require, total_memory
from inferneo_jax.programs import Key, make_programs
from inferneo_jax.steps import Sampled, SlotState


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A dispatched step, whose results are on their way to the host."""

    plans: Plans
    decode: Sampled | None
    prefill: Sampled | None

    def wait(self) -> tuple[Sampled | None, Sampled | None]:
        """The results of decode and prefill as numpy arrays, once they are there."""
        return jax.tree.map(np.asarray, (self.decode, self.prefill))


class Runner:
    """Runs planned steps of one decoder.

    Every shape it may meet is compiled by ``compile``; after that it calls executables only, so a
    shape that was not foreseen raises instead of compiling.

    Args:
        model: as its checkpoint describes it.
        weights: as ``place_weights`` lays them out.
        config: of the engine.
        formats: of the weights.
        mesh: of the devices; None: over all of them, as the configuration says.

    Attributes:
        step_seconds: a step that takes longer hangs; known after ``compile``.
    """

    def __init__(
        self,
        model: DecoderConfig,
        weights: list[Array],
        config: EngineConfig,
        formats: Formats,
        mesh: Mesh | None = None,
    ) -> None:
        self.model = model
        self._mesh = mesh or meshes.make_mesh(config.mesh)
        self._programs = make_programs(
            model, config, self._mesh, formats, lambda: _cache_budget(self._mesh)
        )
        self.config = config = self._programs.config
        self.page_len = self._programs.page_len
        self.max_len, self.num_pages = self._programs.max_len, self._programs.num_pages
        self.groups = self._programs.groups
        self.slots = config.slots // self.groups
        self.shapes = self._programs.prefill_shapes
        self._weights = weights
        self._rows = self._programs.rows
        self._make_cache = self._programs.empty_cache()
        self._compiled: dict[Key, Any] = {}
        self.step_seconds = config.step_seconds
        self._cache: KVCache
        self._state: SlotState
        self.reset()

    def reset(self) -> None:
        """Allocate cache and slots anew, after a step failed with the old ones in its hands."""
        vars(self).pop("_cache", None)  # freed first: there may be no room for two
        what = f"the KV cache of {self.groups * self.num_pages * self.page_len} tokens"
        require(self._programs.cache_bytes * sharing(self._mesh), what)
        with compiles.expected(), explained(f"{what} was allocated"):
            self._cache = self._make_cache()
            sharding = NamedSharding(self._mesh, meshes.spec("slots"))
            self._state = jax.device_put(self._rows.empty_state(), sharding)
            jax.block_until_ready(self._cache)

    def compile(self, progress: Progress | None = None) -> None:
        """Compile every step for every shape."""
        store = ExecutableStore(self.config.compilation_cache, self._mesh, self._programs)
        keys = self._programs.keys()
        lower = {key: partial(self._programs.lower, key) for key in keys}
        self._compiled = store.compile_all(lower, progress)
        self._warm_up()

    def _warm_up(self) -> None:
        """Run every step once, on padding, and see how long the slowest takes."""
        slowest = 0.0
        for key in self._compiled:
            started = time.perf_counter()
            self._execute(key, self._programs.host_arguments(key))
            jax.block_until_ready((self._cache, self._state))
            slowest = max(slowest, time.perf_counter() - started)
        self.step_seconds = max(self.config.step_seconds, PATIENCE * slowest)

    def run(self, plans: Plans) -> PendingStep:
        """Dispatch a planned step and return at once."""
        if most := max(len(plan.admitted) for plan in plans):
            rows = 1 if most == 1 else self.shapes.max_rows
            admitted = self._rows.admit((plan.admitted for plan in plans), rows)
            self._execute(("admit", rows, 0), admitted)
        decode = prefill = None
        if most := max(len(plan.decode) for plan in plans):
            bucket = next(b for b in self._programs.row_buckets if b >= most)
            decoding = self._rows.decode((plan.decode for plan in plans), bucket)
            decode = self._execute(("decode", bucket, 1), (decoding,))
        if shape := next((plan.shape for plan in plans if plan.shape), None):
            chunks = self._rows.prefill((plan.prefill for plan in plans), shape[0])
            prefill = self._execute(("prefill", *shape), (chunks,))
        return PendingStep(plans, decode, prefill)

    def _execute(self, key: Key, arguments: tuple[Any, ...]) -> Sampled | None:
        """Dispatch one program; what it samples is on its way to the host."""
        program, placed = self._compiled[key], self._programs.place(arguments)
        if key[0] == "admit":
            self._state = program(self._state, *placed)
            return None
        self._cache, self._state, sampled = program(
            self._weights, self._cache, self._state, *placed
        )
        for array in jax.tree.leaves(sampled):
            array.copy_to_host_async()
        return cast(Sampled, sampled)


def sharing(mesh: Mesh) -> int:
    """How many devices of the mesh have their memory from the same place, here."""
    if mesh.devices.flat[0].platform != "cpu":
        return 1
    return sum(device.process_index == jax.process_index() for device in mesh.devices.flat)


def _cache_budget(mesh: Mesh) -> int:
    """Bytes of one device for the KV cache.

    Most of what an accelerator has left; a sixteenth of a host's memory for all its devices.
    """
    if mesh.devices.flat[0].platform != "cpu":
        return int(0.9 * free_memory())
    return total_memory() // 16 // sharing(mesh)
