"""Lower bounds for a model on a chip, from shapes alone: bytes, operations and seconds."""

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
    """The model, hardware and settings to plan for.

    Attributes:
        model: that serves.
        topology: the chips.
        engine: the settings.
        context: tokens of each request.
        draft: the model that drafts; None: there is none.
    """

    model: DecoderConfig
    topology: Topology
    engine: EngineConfig
    context: int
    draft: DecoderConfig | None = None


class Budget:
    """The memory of one chip, divided as the runner would divide it, but before compilation.

    All sizes are in bytes.

    Attributes:
        backend: how the model runs on the chip.
        token_bytes: size of one token in the KV cache, and in that of the draft model.
        weights: size of the weights, those of the draft model included.
        rows: number of requests of ``wish.context`` tokens that run at once on a data-parallel
            rank: as many as it has slots, if the KV cache holds them.
        state: size of the slots' tokens and sampling parameters.
        kv: maximum size of the KV cache.
        missing: the memory that is lacking for the weights and one request of ``wish.context``
            tokens.
    """

    def __init__(self, wish: Wish, mesh: Mesh) -> None:
        self._wish = wish
        self.backend = resolve_decoder(wish.model, wish.engine, mesh, {})
        self._draft = resolve_decoder(wish.draft, wish.engine, mesh, {}) if wish.draft else None
        one = self.programs(kv_tokens=meshes.parts(mesh, "slots") * 256, max_len=2)
        self.token_bytes = one.token_bytes
        self.weights = local_bytes(one.weights)
        if one.drafter:
            self.weights += local_bytes(one.drafter.weights)
        context_length = wish.model.context_length
        max_len = min(wish.engine.max_len or context_length, context_length)
        self.state = dataclasses.replace(one, max_len=max_len).state_bytes
        chip = wish.topology.chip
        free = max(0, chip.memory_bytes - self.weights)
        self.kv = cache_budget(self.backend.platform, total=chip.memory_bytes, free=free)
        least = self.token_bytes * wish.context
        self.rows = min(one.slots, self.kv // least)
        self.missing = max(0, least - self.kv, self.weights + least - chip.memory_bytes)

    def programs(self, **changes: Any) -> Programs:
        """The model's programs, with a KV cache as large as the memory permits."""
        config = dataclasses.replace(self._wish.engine, **changes)
        return make_programs(self.backend, config, lambda: self.kv, self._draft)


@dataclass(frozen=True, slots=True)
class Work:
    """The minimum work of a step on one chip: bytes to read and operations to perform."""

    weights: int
    live_kv: int
    operations: int


def work_of(
    backend: DecoderBackend, context: int, token_bytes: int, *parts: tuple[int, int]
) -> Work:
    """The work of a rank in one pass over some parts, after ``context`` tokens of each row.

    A part is a number of rows, and of new tokens of each.
    """
    padded = backend.padded
    model = meshes.parts(backend.mesh, "kv_heads")
    shapes = weight_shapes(padded, backend.mesh, backend.quantization)
    specs = models.weight_specs(padded)
    if not padded.tie_embeddings:
        del shapes["embed.table"], specs["embed.table"]  # only a few of its rows are read
    weights = local_bytes(flat(shapes))
    elements = sum(
        math.prod(spec.shape) // (model if any(spec.flat_axes) else 1)
        for spec in specs.values()
        if spec.inputs
    )
    live = context * sum(rows for rows, _ in parts)
    computed = sum(rows * tokens for rows, tokens in parts)
    heads = padded.num_layers * padded.num_heads // model
    attention = 4 * heads * padded.head_dim * context
    return Work(weights, token_bytes * live, (2 * elements + attention) * computed)


def bound(chip: Chip, work: Work, sent: float, quantization: str) -> tuple[float, str]:
    """Return the minimum seconds of a step, and the resource that takes the longest.

    Memory and compute overlap, but the network does not overlap with them.
    """
    rates = {"int8": chip.int8_rate, "fp8": chip.fp8_rate}
    rate = rates.get(quantization, chip.float_rate)
    parts = {
        "memory": (work.weights + work.live_kv) / chip.memory_rate,
        "compute": work.operations / rate,
        "network": sent / chip.link_rate,
    }
    seconds = max(parts["memory"], parts["compute"]) + parts["network"]
    return seconds, max(parts, key=lambda name: parts[name])
