"""Owns the weights, the cache and the compiled steps of a decoder; only this module runs them."""

import dataclasses
import time
from collections.abc import Callable, Iterable
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
from inferneo_jax.platform.memory import (
    free_memory,
    malloc_trim,
    oom_as_config_error,
    require,
    total_memory,
)
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
)
from inferneo_jax.runner.wire import Wire
from inferneo_jax.scheduler.prefill import LEAST_TOKENS, PrefillTimes, Shape
from inferneo_jax.scheduler.scheduler import DecodeRow, PrefillChunk, SchedulerOutputs
from inferneo_jax.scheduler.speculation import SpeculativeConfig
from inferneo_jax.sharding import mesh as meshes
from inferneo_jax.weights.placement import flat, local_bytes, weight_shapes

_TIMES = 3
"""Number of timed runs of a program when its time is compared with another's."""
_PREFILL_TIMES, _TIMED_TOKENS, _PREFILL_SECONDS = 4, 64, 1.0
"""Maximum number of timed runs of prefill, the tokens up to which they are repeated, and the time
after which no more are made. The fastest counts; the engine goes on measuring."""


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

    Only executables are called, so an unforeseen shape raises instead of compiling. To start,
    ``compile`` and ``place`` are called, at the same time if you like: programs depend on shapes
    alone. Then ``warm_up`` is called, and ``compile_rest`` beside the first requests.

    Args:
        backend: how the model runs, with the quantization of its weights.
        config: the configuration of the engine.
        processes: the processes that run the same model together with this one; None: there are
            none.

    Attributes:
        step_seconds: the time after which a step counts as hanging; known after ``warm_up``.
        speculation: when to make drafts; None: never. Known after ``warm_up``.
        prefill_times: how long prefill takes while nothing else runs. Known after ``warm_up``.
        wire: encodes steps for the other processes; None: there are none.

    Raises:
        JobError: the other processes have different programs.
    """

    def __init__(
        self,
        backend: DecoderBackend,
        config: EngineConfig,
        processes: ProcessGroup | None = None,
    ) -> None:
        self.model = backend.model
        self._mesh = backend.mesh
        self._processes = processes or SingleProcess()
        self._weight_bytes = local_bytes(
            flat(weight_shapes(backend.padded, backend.mesh, backend.quantization))
        )
        self._programs = make_programs(backend, config, self._cache_budget)
        agree(self._processes, "programs", self._programs.described())
        self.wire = Wire(self._programs) if processes else None
        self.config = config = self._programs.config
        self.page_len = self._programs.page_len
        self.max_len, self.num_pages = self._programs.max_len, self._programs.num_pages
        self.dp_size = self._programs.dp_size
        self.slots = config.slots // self.dp_size
        self.shapes = self._programs.prefill_shapes
        self._store = ExecutableStore(config.compilation_cache, self._mesh, self._programs)
        self._inputs = self._programs.inputs
        self._make_cache = self._programs.empty_cache()
        self._compiled: dict[Key, Any] = {}
        self.step_seconds = config.step_seconds
        self.speculation: SpeculativeConfig | None = None
        self.prefill_times = PrefillTimes()
        self._clock = DeviceClock()
        self._weights: list[Array]
        self._cache: KVCache
        self._state: SlotState

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

    def place(self, weights: list[Array]) -> None:
        """Take the weights, as laid out by ``place_weights``, and allocate the cache and the slots.

        Raises:
            ConfigError: there is not enough memory for the cache.
        """
        self._weights = weights
        self._allocate()

    def compile(self, progress: Progress | None = None) -> None:
        """Compile the programs that every request can be served with.

        On a CPU these are few, and the others follow in ``compile_rest``. Elsewhere a program is
        first run when it is compiled, and in a job all processes must have the same ones at any
        time: there all are compiled now.
        """
        self._compile(
            self._programs.first_keys() if self._defers else self._programs.all_keys(), progress
        )

    def compile_rest(self, stopped: Callable[[], bool] = lambda: False) -> None:
        """Compile the programs that ``compile`` has left, one by one, until ``stopped``.

        Each is used from its next step on. Blocks; requests are served meanwhile.
        """
        with compiles.expected():
            for key in self._programs.all_keys():
                if stopped():
                    return
                if key not in self._compiled:
                    self._compile([key])
        malloc_trim()

    def _compile(self, keys: Iterable[Key], progress: Progress | None = None) -> None:
        lower = {key: partial(self._programs.lower, key) for key in keys}
        self._compiled |= self._store.compile_all(lower, progress)

    @property
    def _defers(self) -> bool:
        """Whether some programs are compiled while requests are served."""
        return self.wire is None and self._mesh.devices.flat[0].platform == "cpu"

    def _has(self, key: Forward) -> bool:
        """Whether a forward pass, and the sampling after it, are compiled."""
        return key in self._compiled and self._programs.sampled_by(key) in self._compiled

    def has_prefill(self, shape: Shape) -> bool:
        """Whether prefill of a shape is compiled. Once it is, it remains so."""
        return self._has(Prefill(*shape))

    def warm_up(self) -> None:
        """Run compiled programs in slots that no request uses yet, and learn how long they take.

        On a CPU, where a first run takes no longer than later ones, the times of an earlier start
        are used for some days, if there was one.
        """
        # While one process still compiles, collectives of the others would time out.
        self._processes.exchange("compiled", None)
        if self._defers:
            times = self._store.measured("times", self._measure)
            self._seconds(Decode(self._programs.row_buckets[-1]))
        else:
            keys = self._programs.keys()  # in the same order in all processes
            slowest = max(self._seconds(key) for key in keys)
            times = self._measure()
            times["slowest"] = max(slowest, times["slowest"])
        self.prefill_times = PrefillTimes(times["prefill"])
        self.step_seconds = max(self.config.step_seconds, PATIENCE * times["slowest"])
        if buckets := self._programs.draft_buckets:
            cost = times["draft_cost"]
            self.speculation = SpeculativeConfig(self.config.draft_tokens, buckets[-1])
            if self.config.speculation == "auto":
                self.speculation = dataclasses.replace(self.speculation, cost=cost)

    def _measure(self) -> dict[str, Any]:
        """Measure what ``warm_up`` wants to know, in JSON's types."""
        prefill = self._measure_prefill()
        drafts = self.config.speculation == "auto" and self._programs.draft_buckets
        return {
            "prefill": prefill,
            "slowest": max(seconds for _, seconds in prefill),
            "draft_cost": self._draft_cost(drafts[-1]) if drafts else None,
        }

    def _measure_prefill(self) -> list[tuple[float, float]]:
        """Measure the seconds of prefill by its cost in tokens, in one row, for rising numbers.

        They are the least part that is ever computed, and each chunk. If the first of them take
        long, the last ones are estimated from these: a token more takes no longer than those
        before it.
        """
        chunks = [tokens for rows, tokens in self.shapes.shapes if rows == 1]
        measured: list[tuple[float, float]] = []
        spent = 0.0
        for tokens in sorted({min(LEAST_TOKENS, chunks[0]), *chunks}):
            chunk = next(c for c in chunks if c >= tokens and self.has_prefill((1, c)))
            cost = self.shapes.cost((1, chunk), tokens)
            if spent < _PREFILL_SECONDS or not self._defers:
                times = max(1, min(_PREFILL_TIMES, _TIMED_TOKENS // tokens))
                runs = [self._seconds(Prefill(1, chunk), tokens) for _ in range(times)]
                spent += sum(runs)
                measured.append((cost, min(runs)))
            else:
                least, seconds = measured[-1]
                measured.append((cost, seconds * cost / least))
        return measured

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

        The result includes a tenth more, because no step is dispatched ahead of one that verifies
        drafts.
        """
        verify, plain = Verify(bucket, self.config.draft_tokens + 1), Decode(bucket)
        # In turns, so that what else runs on the machine slows down both.
        times = [(self._seconds(verify), self._seconds(plain)) for _ in range(_TIMES)]
        verifying, decoding = map(min, zip(*times, strict=True))
        return 1.1 * verifying / decoding

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
            buckets = self._programs.row_buckets
            bucket = next(b for b in buckets if b >= most and self._has(Decode(b)))
            return self._forward(Decode(bucket), self._inputs.decode(ranks, bucket))
        length, buckets = self.config.draft_tokens, self._programs.draft_buckets
        bucket = next(b for b in buckets if b >= most and self._has(Verify(b, length + 1)))
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
            free=free_memory() - self._weight_bytes,  # not placed yet
        )
        return min(self._processes.exchange("cache budget", mine))
