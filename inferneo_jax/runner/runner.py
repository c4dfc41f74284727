"""Owns the weights, the cache and the compiled steps of a decoder; only this module runs them."""

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from inferneo_jax.config import EngineConfig
from inferneo_jax.distributed.process_group import ProcessGroup, SingleProcess, agree
from inferneo_jax.distributed.transport import Kind
from inferneo_jax.layers.cache import KVCache
from inferneo_jax.models.steps import Sampled, SlotState
from inferneo_jax.platform import compiles
from inferneo_jax.platform.memory import free_memory, oom_as_config_error, require, total_memory
from inferneo_jax.platform.progress import Progress
from inferneo_jax.platform.watchdog import PATIENCE
from inferneo_jax.request import RequestLimits
from inferneo_jax.runner.backends import DecoderBackend
from inferneo_jax.runner.capacity import cache_budget, devices_sharing_memory, make_programs
from inferneo_jax.runner.compile_cache import ExecutableStore
from inferneo_jax.runner.model_info import ModelInfo
from inferneo_jax.runner.programs import (
    MAX_STOP_IDS,
    Admit,
    Called,
    Decode,
    Forward,
    Key,
    Prefill,
    Verify,
    num_sampled,
    num_tokens,
)
from inferneo_jax.runner.wire import Wire
from inferneo_jax.scheduler.prefill import LEAST_TOKENS, PrefillTimes
from inferneo_jax.scheduler.scheduler import DecodeRow, PrefillChunk, SchedulerOutputs
from inferneo_jax.scheduler.speculation import SpeculativeConfig
from inferneo_jax.sharding import mesh as meshes

_TIMES = 3
"""Number of timed runs of a program when its time is compared with another's."""
_PREFILL_TIMES, _TIMED_TOKENS = 4, 64
"""Maximum number of timed runs of prefill, and the tokens up to which they are repeated. The
fastest counts; the engine goes on measuring."""


class StepResults(NamedTuple):
    """The results of a step on the host.

    Attributes:
        decode: what the decode rows sampled, as numpy arrays; None without decode rows.
        prefill: the same of prefill.
        decode_seconds: the time that the device took to decode; 0.0 without decode rows.
        prefill_seconds: the same of prefill.
    """

    decode: Sampled | None = None
    prefill: Sampled | None = None
    decode_seconds: float = 0.0
    prefill_seconds: float = 0.0


@dataclass(slots=True)
class DeviceClock:
    """Since when the device has no step left to run, as far as the host knows.

    Attributes:
        free: a time of ``time.perf_counter``.
    """

    free: float = 0.0


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A dispatched step, whose results are being copied to the host.

    The results of decode and of prefill are each paired with the program that computes them.

    Attributes:
        scheduled: what it runs.
        decode: the results of its decode rows.
        prefill: the results of its prefill.
        dispatched: when its programs were dispatched, in seconds of ``time.perf_counter``.
        clock: that of the device.
    """

    scheduled: SchedulerOutputs
    decode: tuple[Forward, Sampled] | None
    prefill: tuple[Forward, Sampled] | None
    dispatched: float
    clock: DeviceClock

    def wait(self) -> StepResults:
        """Wait for the results of decode and prefill, and return them as numpy arrays."""
        # The device runs one program after the other, and one step after the other.
        started = max(self.dispatched, self.clock.free)
        decode = self.decode and _read(*self.decode, len(self.scheduled))
        decoded = time.perf_counter() if decode else started
        prefill = self.prefill and _read(*self.prefill, len(self.scheduled))
        self.clock.free = time.perf_counter() if prefill else decoded
        return StepResults(decode, prefill, decoded - started, self.clock.free - decoded)


def _fetch(
    key: Forward, sampled: Sampled, rows: Iterable[DecodeRow | PrefillChunk]
) -> tuple[Forward, Sampled]:
    """Start copying the results to the host, without those that no request of ``rows`` needs."""
    requests = [row.sequence.request for row in rows]
    scored = any(request.logprobs is not None for request in requests)
    prompt_scored = any(request.prompt_logprobs is not None for request in requests)
    wanted = sampled._replace(
        scores=sampled.scores if scored else None,
        prompt_scores=sampled.prompt_scores if prompt_scored else None,
    )
    for array in jax.tree.leaves(wanted):
        array.copy_to_host_async()
    return key, wanted


def _read(key: Forward, sampled: Sampled, dp_size: int) -> Sampled:
    """Return the results of a program's own rows as numpy arrays; with drafts, per token as well.

    Token ids are ``[rows]``, or ``[rows, tokens]`` for a program that verifies drafts.
    """
    rows = dp_size * key.rows
    shape = (rows, key.tokens) if isinstance(key, Verify) else (rows,)

    def own(array: Any) -> Any:
        padded = np.asarray(array)
        by_rank = padded.reshape(dp_size, -1, *padded.shape[1:])
        return by_rank[:, : num_sampled(key)].reshape(*shape, *padded.shape[1:])

    ids, scores = jax.tree.map(own, (sampled.ids, sampled.scores))
    return Sampled(ids, scores, jax.tree.map(np.asarray, sampled.prompt_scores))


class Runner:
    """Runs the scheduled steps of one decoder.

    ``compile`` compiles every shape that can occur. After that only executables are called, so an
    unforeseen shape raises instead of compiling.

    Args:
        backend: how the model runs, with the quantization of ``weights``.
        weights: the weights as laid out by ``place_weights``.
        config: the configuration of the engine.
        processes: the processes that run the same model together with this one; None: there are
            none.

    Attributes:
        step_seconds: the time after which a step counts as hanging; known after ``compile``.
        speculation: when to make drafts; None: never. Known after ``compile``.
        prefill_times: how long prefill takes while nothing else runs. Known after ``compile``.
        wire: encodes steps for the other processes; None: there are none.

    Raises:
        JobError: the other processes have different programs.
    """

    def __init__(
        self,
        backend: DecoderBackend,
        weights: list[Array],
        config: EngineConfig,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.model = backend.model
        self._mesh = backend.mesh
        self._processes = processes or SingleProcess()
        self._programs = make_programs(backend, config, self._cache_budget)
        agree(self._processes, "programs", self._programs.described())
        self.wire = Wire(self._programs) if processes else None
        self.config = config = self._programs.config
        self.page_len = self._programs.page_len
        self.max_len, self.num_pages = self._programs.max_len, self._programs.num_pages
        self.dp_size = self._programs.dp_size
        self.slots = config.slots // self.dp_size
        self.shapes = self._programs.prefill_shapes
        self._weights = weights
        self._inputs = self._programs.inputs
        self._make_cache = self._programs.empty_cache()
        self._compiled: dict[Key, Any] = {}
        self.step_seconds = config.step_seconds
        self.speculation: SpeculativeConfig | None = None
        self.prefill_times = PrefillTimes()
        self._clock = DeviceClock()
        self._cache: KVCache
        self._state: SlotState
        self._allocate()

    @property
    def limits(self) -> RequestLimits:
        """The limits of a request."""
        return RequestLimits(
            vocab_size=self.model.vocab_size,
            max_len=self.max_len,
            max_logprobs=self.config.max_logprobs,
            max_logit_bias=self.config.max_logit_bias,
            max_stop_ids=MAX_STOP_IDS,
        )

    def info(self) -> ModelInfo:
        """Describe the model that runs. Must not be called during a step, which takes the cache."""
        return ModelInfo.of(self._programs.backend, self._weights, jax.tree.leaves(self._cache))

    def reset(self) -> None:
        """Allocate cache and slots anew, after a step that held the old ones has failed.

        The other processes do the same after they have run all earlier steps. If one of them still
        waits for a part of the failed step, the job cannot go on.

        Raises:
            JobError: another process did not finish its steps in time.
        """
        if self._processes.leads:
            self._processes.announce(Kind.RESET)
        else:
            jax.block_until_ready((self._cache, self._state))
        self._processes.exchange("reset", None, self.step_seconds)
        self._allocate()

    def _allocate(self) -> None:
        vars(self).pop("_cache", None)  # freed first, as there may be no memory for two
        what = f"the KV cache of {self.dp_size * self.num_pages * self.page_len} tokens"
        require(self._programs.cache_bytes * devices_sharing_memory(self._mesh), what)
        with compiles.expected(), oom_as_config_error(f"{what} was allocated"):
            self._cache = self._make_cache()
            sharding = NamedSharding(self._mesh, meshes.spec("slots"))
            empty = self._programs.place(self._inputs.empty_state(), "slots")
            self._state = jax.device_put(empty, sharding)
            jax.block_until_ready(self._cache)

    def compile(self, progress: Progress | None = None) -> None:
        """Compile every step for every shape, then run the steps to warm up and to time them."""
        store = ExecutableStore(self.config.compilation_cache, self._mesh, self._programs)
        # The programs that take longest to compile come first.
        keys = [*self._programs.sample_keys(), *self._programs.keys()]
        lower = {key: partial(self._programs.lower, key) for key in keys}
        self._compiled = store.compile_all(lower, progress)
        # While one process still compiles, collectives of the others would time out.
        self._processes.exchange("compiled", None)
        self._warm_up()

    def _warm_up(self) -> None:
        """Run the steps once, in slots that no request uses yet, and time the slowest one."""
        keys = self._programs.keys()  # in the same order in all processes
        if self._mesh.devices.flat[0].platform == "cpu":
            # On CPUs a first run takes no longer than later ones, so only the largest program of
            # each kind is run, to time it.
            largest: dict[type[Called], Called] = {}
            for key in keys:
                largest[type(key)] = max(largest.get(type(key), key), key, key=_size)
            keys = list(largest.values())
        slowest = max(self._seconds(key) for key in keys)
        self.prefill_times = self._measure_prefill()
        self.step_seconds = max(self.config.step_seconds, PATIENCE * slowest)
        if buckets := self._programs.draft_buckets:
            self.speculation = SpeculativeConfig(self.config.draft_tokens, buckets[-1])
            if self.config.speculation == "auto":
                cost = max(self._draft_cost(bucket) for bucket in buckets)
                self.speculation = dataclasses.replace(self.speculation, cost=cost)

    def _measure_prefill(self) -> PrefillTimes:
        """Measure how long prefill takes: the least of a chunk, then each whole one, in one row."""
        shapes = self.shapes
        chunks = [tokens for rows, tokens in shapes.shapes if rows == 1]
        sizes = [(chunks[0], min(LEAST_TOKENS, chunks[0])), *((each, each) for each in chunks)]
        measured = []
        for chunk, tokens in sizes:
            times = max(1, min(_PREFILL_TIMES, _TIMED_TOKENS // tokens))
            seconds = min(self._seconds(Prefill(1, chunk), tokens) for _ in range(times))
            measured.append((shapes.cost((1, chunk), tokens), seconds))
        return PrefillTimes(measured)

    def _seconds(self, key: Called, tokens: int | None = None) -> float:
        """Measure the seconds that a program takes when all its rows are busy.

        Args:
            key: the program.
            tokens: prompt tokens of each row of a prefill; None: as many as it has room for.
        """
        arguments = self._programs.busy_arguments(key, tokens)
        started = time.perf_counter()
        self.execute(key, arguments)
        jax.block_until_ready((self._cache, self._state))
        return time.perf_counter() - started

    def _draft_cost(self, bucket: int) -> float:
        """The time of a step that verifies drafts, as a multiple of a plain step's time.

        Each time is the best of several runs. The result includes a tenth more, because no step is
        dispatched ahead of one that verifies drafts.
        """
        length = self.config.draft_tokens + 1
        verify, plain = (
            min(self._seconds(key) for _ in range(_TIMES))
            for key in (Verify(bucket, length), Decode(bucket))
        )
        return 1.1 * verify / plain

    def run(self, scheduled: SchedulerOutputs) -> PendingStep:
        """Dispatch a scheduled step and return without waiting for its results."""
        if most := max(len(rank.admitted) for rank in scheduled):
            rows = 1 if most == 1 else self.shapes.max_rows
            admitted = self._inputs.admit((rank.admitted for rank in scheduled), rows)
            self._dispatch(Admit(rows), admitted)
        decode = prefill = None
        if most := max(len(rank.decode) for rank in scheduled):
            decode = self._decode(scheduled, most)
        if shape := next((rank.shape for rank in scheduled if rank.shape), None):
            chunks = self._inputs.prefill((rank.prefill for rank in scheduled), shape[0])
            prefill = self._forward(Prefill(*shape), chunks)
        return PendingStep(
            scheduled,
            decode and _fetch(*decode, [row for rank in scheduled for row in rank.decode]),
            prefill and _fetch(*prefill, [row for rank in scheduled for row in rank.prefill]),
            time.perf_counter(),
            self._clock,
        )

    def _decode(self, scheduled: SchedulerOutputs, most: int) -> tuple[Forward, Sampled]:
        """Dispatch a decode step of at most ``most`` rows per rank, which verifies any drafts."""
        ranks = [rank.decode for rank in scheduled]
        if not any(rank.drafted for rank in scheduled):
            bucket = next(b for b in self._programs.row_buckets if b >= most)
            return self._forward(Decode(bucket), self._inputs.decode(ranks, bucket))
        bucket = next(b for b in self._programs.draft_buckets if b >= most)
        length = self.config.draft_tokens
        drafted = self._inputs.verify(ranks, bucket, length)
        return self._forward(Verify(bucket, length + 1), drafted)

    def _forward(self, key: Forward, inputs: Any) -> tuple[Forward, Sampled]:
        """Dispatch a forward pass; return its program together with the sampled results."""
        sampled = self._dispatch(key, (inputs,))
        assert sampled
        return key, sampled

    def _dispatch(self, key: Called, arguments: tuple[Any, ...]) -> Sampled | None:
        """Dispatch one program, on the other processes first, as they take longer to reach."""
        if self.wire:
            self._processes.announce(Kind.STEP, *self.wire.write(key, arguments))
        return self.execute(key, arguments)

    def execute(self, key: Called, arguments: tuple[Any, ...]) -> Sampled | None:
        """Dispatch one program in this process, and the program that samples from its results.

        Returns:
            The sampled results, on the device.
        """
        program, placed = self._compiled[key], self._programs.place(arguments)
        if isinstance(key, Admit):
            self._state = program(self._state, *placed)
            return None
        tokens, block_tables, sampling = self._state
        self._cache, tokens, block_tables, inputs, *prompt_scores = program(
            self._weights, self._cache, tokens, block_tables, *placed
        )
        tokens, sampled = self._compiled[self._programs.sampled_by(key)](tokens, sampling, inputs)
        self._state = SlotState(tokens, block_tables, sampling)
        return Sampled(sampled.ids, sampled.scores, *prompt_scores)

    def _cache_budget(self) -> int:
        """Bytes of one device for the KV cache: the minimum over all processes."""
        mine = cache_budget(
            self._mesh.devices.flat[0].platform,
            total=total_memory() // devices_sharing_memory(self._mesh),
            free=free_memory(),
        )
        return min(self._processes.exchange("cache budget", mine))


def _size(key: Called) -> int:
    return 0 if isinstance(key, Admit) else num_tokens(key)
