"""Plans a model on a topology: its memory, its collectives and the roofline of its speed.

The programs are those that the runner would run there (``runner/programs.py``), compiled for chips
that need not be present. Memory and collectives are read from the executables. Operations, and thus
the bounds on speed, follow from shapes.
"""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from inferneo_jax.config import MeshShape
from inferneo_jax.layers.sampler import Sampling
from inferneo_jax.planner.advice import advise, remedies
from inferneo_jax.planner.budget import Budget, Wish, bound, work_of
from inferneo_jax.planner.hlo import Collective, Program
from inferneo_jax.runner.programs import (
    Decode,
    Draft,
    Fill,
    Key,
    Mixed,
    Prefill,
    Programs,
    Sample,
    Score,
    Verify,
    prefill_of,
)
from inferneo_jax.scheduler.prefill import Shape
from inferneo_jax.sharding import mesh as meshes


@dataclass(frozen=True, kw_only=True)
class Step:
    """One forward pass on one chip, over rows with ``context`` live positions, and its sampling.

    Attributes:
        kind: ``decode``, or ``mixed``, which also prefills the longest chunk.
        tokens: the number of tokens computed on all chips together.
        temporary_bytes: memory needed in addition to the arguments.
        aliased_bytes: bytes of the cache that are updated in place.
        cache_bytes: size of the whole cache.
        needed_bytes: memory traffic that no program can avoid, for weights and live KV.
        moved_bytes: memory traffic of the compiled program; None if the compiler does not show it.
        operations: the number of multiplications and additions.
        collectives: the collectives and the bytes that they send.
        seconds: lower bound of the step's duration.
        wall: the resource that sets this bound: memory, compute or network.
    """

    kind: str
    tokens: int
    temporary_bytes: int
    aliased_bytes: int
    cache_bytes: int
    needed_bytes: int
    moved_bytes: int | None
    operations: int
    collectives: tuple[Collective, ...]
    seconds: float
    wall: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The plan of a model on a topology; all bytes are per chip.

    Attributes:
        topology: the topology as text.
        mesh: the number of devices along both axes.
        dtype: type of the weights and matrix products.
        quantization: quantization of the weights.
        kv_dtype: type of keys and values.
        slots: maximum number of requests that run at once, on all chips.
        context: number of live positions assumed for each request.
        rows: number of such requests that run at once: all slots, if the KV cache holds as many.
        row_buckets: the numbers of rows of a data-parallel rank for which decode is compiled.
        prefill_shapes: numbers of rows, and of tokens of each, for which prefill is compiled.
        memory_bytes: memory of the chip that is available to programs.
        weight_bytes: size of the weights, those of a draft model included.
        state_bytes: size of tokens and sampling parameters.
        temporary_bytes: temporary memory of the step that needs the most.
        code_bytes: size of all programs, each counted like the largest of its kind.
        num_programs: number of programs that a server has there; 0 if the model does not fit.
        compile_seconds: how long compiling all of them would take on this machine, one after the
            other, each counted like the one of those compiled here that it resembles most.
        kv_bytes: maximum size of the KV cache; a server takes less if its slots need no more.
        kv_tokens: number of tokens that this KV cache holds, on all chips together.
        steps: a step that decodes, and one that also prefills; empty if the model does not fit.
        tokens_per_second: upper bound of the output tokens per second, on all chips.
        missing_bytes: memory that is lacking for the model to fit; 0 if it fits.
        remedies: changes that would make the model fit.
        advised_mesh: the mesh with the highest bound on decode.
    """

    topology: str
    mesh: MeshShape
    dtype: str
    quantization: str
    kv_dtype: str
    slots: int
    context: int
    rows: int
    row_buckets: tuple[int, ...]
    prefill_shapes: tuple[Shape, ...]
    memory_bytes: int
    weight_bytes: int
    state_bytes: int
    temporary_bytes: int
    code_bytes: int
    num_programs: int
    compile_seconds: float
    kv_bytes: int
    kv_tokens: int
    steps: tuple[Step, ...]
    tokens_per_second: float
    missing_bytes: int
    remedies: tuple[str, ...]
    advised_mesh: MeshShape

    def to_dict(self) -> dict[str, Any]:
        """Convert the plan to plain JSON values."""
        return dataclasses.asdict(self)


def make_plan(wish: Wish, progress: Callable[[str], None] = lambda _: None) -> Plan:
    """Compile a model's steps for a topology and measure what they need.

    Raises:
        ConfigError: the mesh does not match the topology, or its compiler cannot be used.
    """
    shape = wish.engine.mesh
    data, model = shape.over(wish.topology.num_chips)
    devices = wish.topology.devices()
    mesh = meshes.make_mesh(shape, devices)
    budget = Budget(wish, mesh)
    plan = Plan(
        topology=str(wish.topology),
        mesh=MeshShape(data, model),
        dtype=budget.backend.quantization.dtype.name,
        quantization=wish.engine.quantization,
        kv_dtype=budget.backend.kv_dtype,
        slots=wish.engine.batch_sizes(budget.backend.platform).slots,
        context=wish.context,
        rows=data * budget.rows,
        row_buckets=(),
        prefill_shapes=(),
        memory_bytes=wish.topology.chip.memory_bytes,
        weight_bytes=budget.weights,
        state_bytes=budget.state,
        temporary_bytes=0,
        code_bytes=0,
        num_programs=0,
        compile_seconds=0.0,
        kv_bytes=0,
        kv_tokens=0,
        steps=(),
        tokens_per_second=0.0,
        missing_bytes=budget.missing,
        remedies=(),
        advised_mesh=advise(wish, devices),
    )
    if budget.missing:
        return dataclasses.replace(plan, remedies=tuple(remedies(wish)))
    programs = budget.programs()
    kept, shapes = programs.all_keys(), programs.prefill_shapes.shapes
    decode = Decode(next(each for each in programs.row_buckets if each >= budget.rows))
    mixed = programs.mixed(max(shapes, key=lambda shape: shape[1]))
    compiled: dict[Key, Any] = {}
    seconds: dict[type[Key], float] = {}
    passes: list[tuple[Decode | Mixed, Sample]] = []
    wanted: tuple[Decode | Mixed, ...] = decode, mixed
    for key in wanted:
        progress(f"compiling {_kind(key)} for {wish.topology}")
        rows = programs.sampled_rows(key)
        least, most = Sample(rows, min(Sampling)), Sample(rows, max(Sampling))
        passes.append((key, least))
        parts: tuple[Key, ...] = key, least, most, Score(rows)
        for part in parts:
            if part in compiled:
                continue
            started = time.perf_counter()
            with jax.set_mesh(mesh):
                compiled[part] = programs.lower(part).compile()
            took = time.perf_counter() - started
            seconds[type(part)] = max(took, seconds.get(type(part), 0.0))
    temporary = 0
    largest: dict[type[Key], int] = {}
    for part, program in compiled.items():
        memory = program.memory_analysis()
        size = memory.generated_code_size_in_bytes
        largest[type(part)] = max(size, largest.get(type(part), 0))
        # Some compilers state a peak that exceeds the temporaries.
        beside = memory.peak_memory_in_bytes - memory.argument_size_in_bytes
        temporary = max(temporary, beside, memory.temp_size_in_bytes)
    steps = [
        _read_step(wish, programs, key, budget.rows, [compiled[key], compiled[sample]])
        for key, sample in passes
    ]
    code = sum(largest.get(_resembled(each), 0) for each in kept)
    cache = programs.token_bytes * programs.num_pages * programs.page_len
    taken = budget.weights + cache + programs.state_bytes + temporary + code
    return dataclasses.replace(
        plan,
        row_buckets=tuple(programs.row_buckets),
        prefill_shapes=shapes,
        state_bytes=programs.state_bytes,
        temporary_bytes=temporary,
        code_bytes=code,
        num_programs=len(kept),
        compile_seconds=sum(seconds.get(_resembled(each), min(seconds.values())) for each in kept),
        kv_bytes=budget.kv,
        kv_tokens=budget.kv // budget.token_bytes * data,
        missing_bytes=max(0, taken - plan.memory_bytes),
        steps=tuple(steps),
        tokens_per_second=data * budget.rows / steps[0].seconds,
    )


def _resembled(key: Key) -> type[Key]:
    """The kind of program that is as large, and takes as long to compile."""
    match key:
        case Verify() | Draft():
            return Decode
        case Prefill() | Fill():
            return Mixed
        case _:
            return type(key)


def _kind(key: Decode | Mixed) -> str:
    return type(key).__name__.lower()


def _read_step(
    wish: Wish, programs: Programs, key: Decode | Mixed, rows: int, compiled: list[Any]
) -> Step:
    """Read a step off its forward pass and its sampling, of which ``rows`` rows decode."""
    parts = [(rows, 1)]
    if prefill := prefill_of(key):
        parts.append((prefill.rows, prefill.tokens))
    memory = compiled[0].memory_analysis()
    read = [Program(each.as_text()) for each in compiled]
    shards = {each.sharding.shard_shape(each.shape) for each in jax.tree.leaves(programs.cache())}
    chip = wish.topology.chip
    token_bytes = programs.cache_bytes // (programs.num_pages * programs.page_len)
    work = work_of(programs.backend, wish.context, token_bytes, *parts)
    collectives = tuple(each for program in read for each in program.collectives())
    moved = None
    if chip.name != "cpu":
        moved = sum(program.traffic(shards) for program in read) + work.live_kv
    seconds, wall = bound(
        chip, work, sum(each.sent_bytes for each in collectives), programs.config.quantization
    )
    return Step(
        kind=_kind(key),
        tokens=programs.dp_size * sum(rows * tokens for rows, tokens in parts),
        temporary_bytes=memory.temp_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        cache_bytes=programs.cache_bytes,
        needed_bytes=work.weights + work.live_kv,
        moved_bytes=moved,
        operations=work.operations,
        collectives=collectives,
        seconds=seconds,
        wall=wall,
    )
