"""What a model cannot do without on a chip, from shapes alone: bytes, operations, seconds."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from jax.sharding import Mesh

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, EngineConfig
from inferneo_jax.planner.chips import Chip, Topology
from inferneo_jax.runner.backends import DecoderBackend, resolve_decoder
from inferneo_jax.runner.capacity import cache_budget, make_programs
from inferneo_jax.runner.programs import Programs
from inferneo_jax.sharding import mesh as meshes
from inferneo_jax.weights.placement import flat, local_bytes, weight_shapes


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is planned for."""

    model: DecoderConfig
    topology: Topology
    engine: EngineConfig
    context: int


class Budget:
    """A chip's memory, shared out before anything is compiled, as the runner would. All in bytes.

    Attributes:
        backend: how the model runs there.
        token_bytes: that one token takes in the KV cache.
        weights: of the weights.
        state: of the slots' tokens and sampling parameters.
        kv: that the KV cache may take at most.
        missing: by how much the weights and one request of ``wish.context`` tokens do not fit.
    """

    def __init__(self, wish: Wish, mesh: Mesh) -> None:
        self._wish = wish
        self.backend = resolve_decoder(wish.model, wish.engine, mesh)
        one = self.programs(kv_tokens=wish.engine.slots * 256, max_len=2)
        self.token_bytes = one.cache_bytes // (one.num_pages * one.page_len)
        self.weights = local_bytes(one.weights)
        context_length = wish.model.context_length
        max_len = min(wish.engine.max_len or context_length, context_length)
        self.state = dataclasses.replace(one, max_len=max_len).state_bytes
        chip = wish.topology.chip
        free = max(0, chip.memory_bytes - self.weights)
        platform = mesh.devices.flat[0].platform
        self.kv = cache_budget(platform, total=chip.memory_bytes, free=free)
        least = self.token_bytes * wish.context
        self.missing = max(0, least - self.kv, self.weights + least - chip.memory_bytes)

    def programs(self, **changes: Any) -> Programs:
        """The programs, with a cache as large as the memory lets it be."""
        config = dataclasses.replace(self._wish.engine, **changes)
        return make_programs(self.backend, config, lambda: self.kv)


@dataclass(frozen=True, slots=True)
class Work:
    """What a step cannot do without, on one chip: bytes to read, operations to perform."""

    weights: int
    live_kv: int
    operations: int


def work_of(
    backend: DecoderBackend, context: int, token_bytes: int, rows: int, tokens: int
) -> Work:
    """The work of a rank's ``rows`` rows of ``tokens`` new tokens each, after ``context``."""
    padded = backend.padded
    model = meshes.parts(backend.mesh, "kv_heads")
    shapes = weight_shapes(padded, backend.mesh, backend.quantization)
    specs = models.weight_specs(padded)
    if not padded.tie_embeddings:
        del shapes["embed.table"], specs["embed.table"]  # a few rows of it are read
    weights = local_bytes(flat(shapes))
    elements = sum(
        math.prod(spec.shape) // (model if any(spec.flat_axes) else 1)
        for spec in specs.values()
        if spec.inputs
    )
    live = context * rows
    heads = padded.num_layers * padded.num_heads // model
    attention = 4 * heads * padded.head_dim * live * tokens
    return Work(weights, token_bytes * live, 2 * elements * rows * tokens + attention)


def bound(chip: Chip, work: Work, sent: float, quantization: str) -> tuple[float, str]:
    """Seconds that the step takes at least, and what takes longest of them.

    Memory and compute overlap; the network is waited for.
    """
    rate = chip.int8_rate if quantization == "int8" else chip.float_rate
    parts = {
        "memory": (work.weights + work.live_kv) / chip.memory_rate,
        "compute": work.operations / rate,
        "network": sent / chip.link_rate,
    }
    seconds = max(parts["memory"], parts["compute"]) + parts["network"]
    return seconds, max(parts, key=lambda name: parts[name])
