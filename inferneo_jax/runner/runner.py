"""Owns the weights, the cache and the compiled steps of a decoder; only this module runs them."""

import dataclasses
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array

from inferneo_jax.config import EngineConfig
from inferneo_jax.distributed.process_group import ProcessGroup, SingleProcess, agree
from inferneo_jax.distributed.transport import Kind
from inferneo_jax.errors import ConfigError
from inferneo_jax.layers.cache import KVCache
from inferneo_jax.layers.sampler import Sampling
from inferneo_jax.models.steps import Sampled, SampleInputs, SlotState
from inferneo_jax.platform import compiles
from inferneo_jax.platform.huge_pages import use_small_pages
from inferneo_jax.platform.memory import (
    malloc_trim,
    oom_as_config_error,
    require,
)
from inferneo_jax.platform.progress import Progress
from inferneo_jax.platform.watchdog import PATIENCE
from inferneo_jax.request import RequestLimits
from inferneo_jax.runner.backends import DecoderBackend, decode_steps
from inferneo_jax.runner.capacity import (
    devices_sharing_memory,
    make_programs,
    measured_cache_budget,
)
from inferneo_jax.runner.compile_cache import ExecutableStore
from inferneo_jax.runner.manifest import compiled_ahead, decoder_facts
from inferneo_jax.runner.model_info import ModelInfo
from inferneo_jax.runner.programs import (
    MAX_STOP_IDS,
    Admit,
    Called,
    Constrain,
    Decode,
    Draft,
    EmptyCache,
    Fill,
    Forward,
    Key,
    Mixed,
    Prefill,
    ReadPages,
    Sample,
    Score,
    ScorePrompt,
    Verify,
    WritePages,
    depends,
    dispatch_forward,
    dispatch_sample,
    keeps,
    num_sampled,
    prefill_of,
)
from inferneo_jax.runner.slot_sampling import SlotSampling
from inferneo_jax.runner.wire import Wire
from inferneo_jax.scheduler.prefill import LEAST_TOKENS, PrefillTimes, Shape
from inferneo_jax.scheduler.scheduler import (
    DecodeRow,
    PrefillChunk,
    SchedulerOutputs,
    num_decode_steps,
    prefill_shape,
)
from inferneo_jax.scheduler.speculation import DraftModel, SpeculativeConfig, StepCosts
from inferneo_jax.sharding import mesh as meshes
from inferneo_jax.text.grammar import ConstrainedRow
from inferneo_jax.weights.placement import flat, local_bytes, weight_shapes

log = logging.getLogger(__name__)

_TIMES = 3
"""Number of timed runs of a program when its time is compared with another's."""
_PREFILL_TIMES, _TIMED_TOKENS, _PREFILL_SECONDS = 4, 64, 1.0
"""Maximum number of timed runs of prefill, the tokens up to which they are repeated, and the time
after which no more are made. The fastest counts; the engine goes on measuring."""

_PIECE_TOKENS = 128
"""Tokens of a piece of the cache that is handed over: 17 MB for Llama-3.1-8B in bfloat16."""


class StepResults(NamedTuple):
    """The results of a step on the host.

    Attributes:
        decode: what the decode rows sampled, as numpy arrays; None without decode rows. Ids are
            ``[rows]``, or ``[rows, tokens]`` if they verify drafts or several steps are dispatched.
        prefill: the same of prefill.
        drafts: the tokens that the draft model drafted for each decode row, ``[rows, tokens]``;
            None if it drafted none.
        decode_seconds: the time that the device took to decode; 0.0 if it did not, or not alone.
        mixed_seconds: the time that it took to decode and prefill in one pass; 0.0 if it did not.
    """

    decode: Sampled | None = None
    prefill: Sampled | None = None
    drafts: np.ndarray[Any, np.dtype[np.int32]] | None = None
    decode_seconds: float = 0.0
    mixed_seconds: float = 0.0


@dataclass(slots=True)
class DeviceClock:
    """Since when the device has no step left to run, as far as the host knows.

    Attributes:
        free: a time of ``time.perf_counter``.
    """

    free: float = 0.0


class Unsampled(NamedTuple):
    """What a forward pass has left to be sampled once it is known which tokens are allowed.

    Attributes:
        inputs: of the forward pass.
        to_sample: what it has left to sample from.
        prompt_scores: what it has brought besides, if a request wants it.
    """

    inputs: Any
    to_sample: SampleInputs
    prompt_scores: Any


Dispatched = tuple[Forward, Sampled | None]
"""A program and its results, on the device; None until its rows are sampled."""


@dataclass(frozen=True, slots=True)
class PendingStep:
    """A dispatched step, whose results are being copied to the host.

    The results of decode and of prefill are each paired with the program that computes them. Where
    a row has a grammar, there are none before ``Runner.sample``.

    Attributes:
        scheduled: what it runs.
        decode: the results of its decode rows.
        ahead: the results of the decode steps that were dispatched together with it, in order.
        prefill: the results of its prefill.
        mixed: the results of both in one pass, instead.
        drafts: the results of the draft model, one token of each draft after the other.
        dispatched: when its programs were dispatched, in seconds of ``time.perf_counter``.
        clock: that of the device.
    """

    scheduled: SchedulerOutputs
    decode: Dispatched | None
    ahead: list[Dispatched]
    prefill: Dispatched | None
    mixed: Dispatched | None
    drafts: list[Dispatched]
    dispatched: float
    clock: DeviceClock

    def wait(self) -> StepResults:
        """Wait for the results of decode and prefill, and return them as numpy arrays."""
        # The device runs one program after the other, and one step after the other.
        started = max(self.dispatched, self.clock.free)
        if self.mixed:
            decode, prefill = _split(*self.mixed, self.scheduled)
            self.clock.free = time.perf_counter()
            return StepResults(decode, prefill, mixed_seconds=self.clock.free - started)
        drafted = [_read(*each, len(self.scheduled)).ids for each in self.drafts]
        drafts = np.stack(drafted, axis=1) if drafted else None
        decoded = self.decode and _read(*self.decode, len(self.scheduled))
        if decoded and self.ahead:
            steps = [decoded, *(_read(*each, len(self.scheduled)) for each in self.ahead)]
            decoded = _stack(steps)
        decode_seconds = time.perf_counter() - started if decoded else 0.0
        prefilled = self.prefill and _read(*self.prefill, len(self.scheduled))
        self.clock.free = time.perf_counter()
        return StepResults(decoded, prefilled, drafts, decode_seconds)


def _fetch(key: Forward, sampled: Sampled | None) -> Dispatched:
    """Start copying the results to the host, if they are there."""
    for array in jax.tree.leaves(sampled):
        array.copy_to_host_async()
    return key, sampled


def _stack(steps: list[Sampled]) -> Sampled:
    """Return the results of decode steps that were dispatched together, step by step on axis 1.

    A step in which no row that wants scores takes part has none. It gets those of the first step,
    which has all rows; nobody reads them.
    """
    first = steps[0].scores
    whole = [each._replace(scores=each.scores or first) for each in steps]
    stacked: Sampled = jax.tree.map(lambda *arrays: np.stack(arrays, axis=1), *whole)
    return stacked


def _read(key: Forward, sampled: Sampled | None, dp_size: int) -> Sampled:
    """Return the results of a program's own rows as numpy arrays; with drafts, per token as well.

    Token ids are ``[rows]``, or ``[rows, tokens]`` for a program that verifies drafts.
    """
    assert sampled, "the step was not sampled"
    rows = dp_size * key.rows
    shape = (rows, key.tokens) if isinstance(key, Verify) else (rows,)

    def own(array: Any) -> Any:
        padded = np.asarray(array)
        by_rank = padded.reshape(dp_size, -1, *padded.shape[1:])
        return by_rank[:, : num_sampled(key)].reshape(*shape, *padded.shape[1:])

    def by_prompt(array: Any) -> Any:
        prompts = prefill_of(key)
        assert prompts
        return np.asarray(array).reshape(dp_size * prompts.rows, -1, *array.shape[1:])

    ids, scores = jax.tree.map(own, (sampled.ids, sampled.scores))
    return Sampled(ids, scores, jax.tree.map(by_prompt, sampled.prompt_scores))


def _split(
    key: Forward, sampled: Sampled | None, scheduled: SchedulerOutputs
) -> tuple[Sampled, Sampled]:
    """Return the results of decode and of prefill, each in the order of its own rows."""
    assert isinstance(key, Mixed)
    both = _read(key, sampled, len(scheduled))
    # A rank's chunks follow its decode rows.
    chunks = np.arange(key.prefill.rows)
    of_ranks = [
        rank * key.rows + np.minimum(len(output.decode) + chunks, key.rows - 1)
        for rank, output in enumerate(scheduled)
    ]
    index = np.concatenate(of_ranks)
    ids, scores = jax.tree.map(lambda x: x[index], (both.ids, both.scores))
    return Sampled(both.ids, both.scores), Sampled(ids, scores, both.prompt_scores)


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
        draft: how a second model runs that drafts what the first one verifies; None: there is none.

    Attributes:
        step_seconds: the time after which a step counts as hanging; known after ``warm_up``.
        speculation: when to make drafts; None: never. Known after ``warm_up``.
        decode_seconds: how long it takes to decode one row. Known after ``warm_up``.
        prefill_times: how much longer a step takes that prefills as well. Known after ``warm_up``.
        wire: encodes steps for the other processes; None: there are none.

    Raises:
        JobError: the other processes have different programs.
    """

    def __init__(
        self,
        backend: DecoderBackend,
        config: EngineConfig,
        processes: ProcessGroup | None = None,
        draft: DecoderBackend | None = None,
    ) -> None:
        self.model = backend.model
        self._mesh = backend.mesh
        self._processes = processes or SingleProcess()
        backends = [each for each in (backend, draft) if each]
        self._weight_bytes = sum(
            local_bytes(flat(weight_shapes(each.padded, each.mesh, each.quantization)))
            for each in backends
        )
        facts = decoder_facts(backend, config, draft)
        self._ahead = compiled_ahead(config.compilation_cache, facts)
        self._programs = make_programs(backend, config, self._cache_budget, draft)
        agree(self._processes, "programs", self._programs.described())
        self.wire = Wire(self._programs) if processes else None
        self.config = config = self._programs.config
        self.page_len = self._programs.page_len
        self.max_len, self.num_pages = self._programs.max_len, self._programs.num_pages
        self.dp_size = self._programs.dp_size
        self.slots = self._programs.slots
        self.decode_steps = decode_steps(config, self._mesh)
        self.shapes = self._programs.prefill_shapes
        self._store = ExecutableStore(
            config.compilation_cache,
            self._mesh,
            facts | self._programs.sizes,
            depends,
            partial(keeps, self._mesh),
        )
        self._inputs = self._programs.inputs
        self._compiled: dict[Key, Any] = {}
        self.step_seconds = config.step_seconds
        self.speculation: SpeculativeConfig | None = None
        self.decode_seconds = 0.0
        self.prefill_times = PrefillTimes()
        self._clock = DeviceClock()
        self._weights: list[Array]
        self._draft_weights: list[Array]
        self._cache: KVCache
        self._draft_cache: KVCache
        self._state: SlotState
        self._sampling: SlotSampling
        self._unsampled: deque[Unsampled] = deque()

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

    @property
    def mask_words(self) -> int:
        """Words of the mask of a row with a grammar, 32 tokens each."""
        return self._programs.mask_words

    def info(self) -> ModelInfo:
        """Describe the model that runs. Must not be called during a step, which takes the cache."""
        weights = [*self._weights, *self._draft_weights]
        caches = jax.tree.leaves((self._cache, self._draft_cache))
        return ModelInfo.of(self._programs.backend, weights, caches)

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
            self._wait()
        self._processes.exchange("reset", None, self.step_seconds)
        self._allocate()

    def _allocate(self) -> None:
        self._unsampled.clear()
        for name in ("_cache", "_draft_cache"):
            vars(self).pop(name, None)  # freed first, as there may be no memory for two
        tokens = self.num_pages * self.page_len
        what = f"the KV cache of {self.dp_size * tokens} tokens"
        require(self._programs.token_bytes * tokens * devices_sharing_memory(self._mesh), what)
        with compiles.expected(), oom_as_config_error(f"{what} was allocated"):
            self._cache, *drafter = (self._compiled[key]() for key in self._programs.cache_keys())
            self._draft_cache = drafter[0] if drafter else []
            if self._mesh.devices.flat[0].platform == "cpu":
                for each in jax.tree.leaves((self._cache, self._draft_cache)):
                    use_small_pages(each)
            sharding = NamedSharding(self._mesh, meshes.spec("slots"))
            empty = self._programs.place(self._inputs.empty_state(), "slots")
            self._state = jax.device_put(empty, sharding)
            self._sampling = SlotSampling(self.dp_size, self.slots, self.model.vocab_size)
            self._wait()

    def prepare_handover(self) -> tuple[int, KVCache]:
        """Compile what ``read_pages`` and ``write_pages`` run; before the first request.

        Returns:
            The number of pages of a piece, and the shapes of its contents.

        Raises:
            ConfigError: the model runs on several hosts, or on several data-parallel ranks.
        """
        if self.wire or self.dp_size > 1:
            raise ConfigError(
                "keys and values are handed over by engines of one host with data=1 in their mesh; "
                f"this one has data={self.dp_size}" + (" and several hosts" if self.wire else "")
            )
        both = ReadPages(self.piece_pages), WritePages(self.piece_pages)
        with compiles.expected():
            self._compile([key for key in both if key not in self._compiled])
        return self.piece_pages, self._programs.handed_over(self.piece_pages)

    @property
    def piece_pages(self) -> int:
        """Pages of a piece of the cache that is handed over."""
        return max(1, _PIECE_TOKENS // self.page_len)

    def read_pages(self, pages: list[int]) -> list[KVCache]:
        """Dispatch copies of pages, in pieces of which the last may end in arbitrary pages."""
        program, size = self._compiled[ReadPages(self.piece_pages)], self.piece_pages
        pieces = (pages[start : start + size] for start in range(0, len(pages), size))
        return [program(self._cache, self._padded(each)) for each in pieces]

    def write_pages(self, pages: list[int | None], piece: KVCache) -> None:
        """Dispatch writing the contents of pages, which ``read_pages`` has made elsewhere.

        Args:
            pages: where each page of the piece goes; None: nowhere.
            piece: on the device.
        """
        program = self._compiled[WritePages(self.piece_pages)]
        self._cache = program(self._cache, self._padded(pages), piece)

    def _padded(self, pages: Sequence[int | None]) -> "np.ndarray[Any, np.dtype[np.int32]]":
        """The numbers of one piece's pages; beyond the last page where there is none."""
        numbers = np.full(self.piece_pages, self.num_pages, np.int32)
        for place, page in enumerate(pages):
            numbers[place] = self.num_pages if page is None else page
        return numbers

    def _wait(self) -> None:
        """Wait until the device has run everything."""
        jax.block_until_ready((self._cache, self._draft_cache, self._state))

    def place(self, weights: list[Array], draft_weights: Iterable[Array] = ()) -> None:
        """Take weights as laid out by ``place_weights``, and allocate the caches and the slots.

        Args:
            weights: of the model.
            draft_weights: of the draft model; none without one.

        Raises:
            ConfigError: there is not enough memory for the cache.
        """
        self._weights, self._draft_weights = weights, list(draft_weights)
        self._compile(self._programs.cache_keys())
        self._allocate()

    def compile(self, progress: Progress | None = None) -> None:
        """Compile the programs that every request can be served with.

        On a CPU these are few, and the others follow in ``compile_rest``. Elsewhere a program is
        first run when it is compiled, and in a job all processes must have the same ones at any
        time: there all are compiled now.
        """
        keys = self._programs.first_keys() if self._defers else self._programs.all_keys()
        # Those that make the caches are compiled by ``place``, which runs beside this.
        self._compile([key for key in keys if not isinstance(key, EmptyCache)], progress)

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
        """Whether a forward pass, and what may have to follow it, are compiled."""
        rows = self._programs.sampled_rows(key)
        needed: set[Key] = {key, Sample(rows, max(Sampling)), Constrain(rows), Score(rows)}
        if prefill := prefill_of(key):
            needed.add(self._programs.scored_by(prefill))
        return needed <= self._compiled.keys()

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
            slowest = max(self._seconds(key) for key in keys if not isinstance(key, Constrain))
            times = self._measure()
            times["slowest"] = max(slowest, times["slowest"])
            self._run_following()
        self.decode_seconds = times["decode"]
        self.prefill_times = PrefillTimes(times["prefill"], times["decode"])
        self.step_seconds = max(self.config.step_seconds, PATIENCE * times["slowest"])
        if self._programs.draft_buckets:
            self.speculation = self._speculation(times)

    def _run_following(self) -> None:
        """Run the programs that follow a forward pass: no request waits for their first run."""
        for key in self._programs.following_keys():
            program, nothing = self._compiled[key], self._programs.nothing_for(key)
            match key:
                case Sample():
                    tokens, block_tables, sampling = self._state
                    tokens, _ = program(tokens, sampling, *nothing)
                    self._state = SlotState(tokens, block_tables, sampling)
                case Score() | Constrain():
                    program(*nothing)
                case ScorePrompt():
                    program(self._weights, *nothing)
        self._wait()

    def _measure(self) -> dict[str, Any]:
        """Measure what ``warm_up`` wants to know, in JSON's types."""
        prefill = self._measure_prefill()
        drafts = self.config.speculation == "auto" and self._programs.draft_buckets
        ends = (1, min(drafts[-1], self.slots)) if drafts else ()
        # Of the smallest program that is there: in a larger one, most is the work of padding.
        decode = min(key for key in self._compiled if isinstance(key, Decode))
        return {
            "decode": min(self._seconds(decode, rows=1) for _ in range(_TIMES)),
            "prefill": prefill,
            "slowest": max(seconds for _, seconds in prefill),
            "costs": [list(dataclasses.astuple(self._step_costs(rows))) for rows in ends],
            "fill": [(key.tokens, self._seconds(key)) for key in self._programs.fill_keys()[1:]],
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

    def _seconds(self, key: Called, tokens: int | None = None, rows: int | None = None) -> float:
        """Measure the seconds that a program takes when its rows are busy.

        Args:
            key: the program.
            tokens: prompt tokens of each row of a prefill; None: as many as it has room for.
            rows: how many rows of each rank are busy; None: all.
        """
        arguments = self._programs.busy_arguments(key, tokens, rows)
        started = time.perf_counter()
        self.execute(key, arguments)
        self._wait()
        return time.perf_counter() - started

    def _step_costs(self, rows: int) -> StepCosts:
        """How long the parts of a step with that many rows take, in plain steps.

        Verifying includes a tenth more, because no step is dispatched ahead of one that verifies
        drafts.
        """
        bucket = self._programs.draft_buckets[-1]
        plain, verify = Decode(bucket), Verify(bucket, self.config.draft_tokens + 1)
        keys: list[Called] = [plain, verify, *([Draft(bucket)] if self._programs.draft else [])]
        # In turns, so that what else runs on the machine slows down all of them.
        times = [[self._seconds(key, rows=rows) for key in keys] for _ in range(_TIMES)]
        decoding, verifying, *drafting = map(min, zip(*times, strict=True))
        costs = StepCosts(1.1 * verifying / decoding)
        if drafting:
            fill = self._programs.fill_keys()[-1]
            a_token = min(self._seconds(fill) for _ in range(_TIMES)) / fill.tokens
            costs = StepCosts(costs.verify, drafting[0] / decoding, a_token / decoding)
        return costs

    def _speculation(self, times: dict[str, Any]) -> SpeculativeConfig:
        """When to make drafts, from the times that ``_measure`` has found."""
        config = self.config
        most = min(self._programs.draft_buckets[-1], self.slots)
        costs = (StepCosts(0.0),) * most
        if times["costs"]:
            one, many = (StepCosts(*each) for each in times["costs"])
            costs = tuple(one.toward(many, i / max(1, most - 1)) for i in range(most))
        model = None
        if draft := self._programs.draft:
            budget = config.itl_budget / 1000
            fits = [tokens for tokens, seconds in times["fill"] if seconds <= budget]
            tokens, seconds = times["fill"][0]
            # Even if it takes longer, so few tokens are computed: no less than in prefill.
            part = min(tokens, max(LEAST_TOKENS, int(tokens * budget / seconds)))
            model = DraftModel(draft.model.context_length, max([part, *fits]))
        return SpeculativeConfig(
            max_tokens=config.draft_tokens,
            costs=costs,
            always=config.speculation != "auto",
            ngram=config.speculation != "model",
            model=model,
        )

    def run(self, scheduled: SchedulerOutputs) -> PendingStep:
        """Dispatch a scheduled step and return without waiting for its results.

        If a row of it has a grammar, ``sample`` must follow before the next step.
        """
        if most := max(len(rank.admitted) for rank in scheduled):
            rows = 1 if most == 1 else self.shapes.max_rows
            admitted = self._inputs.admit((rank.admitted for rank in scheduled), rows)
            self._dispatch(Admit(rows), admitted)
        decode = prefill = mixed = None
        ahead: list[Dispatched] = []
        drafts: list[Dispatched] = []
        most = max(len(rank.decode) for rank in scheduled)
        shape = prefill_shape(scheduled)
        one_each = num_decode_steps(scheduled) == 1 and not any(rank.drafted for rank in scheduled)
        decode_rows = [rank.decode for rank in scheduled]
        chunks = [rank.prefill for rank in scheduled]
        if most:
            drafts = self._run_draft_model(scheduled, most)
        if shape and one_each and self._has(key := self._programs.mixed(shape)):
            inputs = self._inputs.mixed(decode_rows, key.rows, chunks, shape[0])
            mixed = self._forward(key, inputs)
        else:
            if most:
                decode, *ahead = self._decode(scheduled, most)
            if shape:
                prefill = self._forward(Prefill(*shape), self._inputs.prefill(chunks, shape[0]))
        return PendingStep(
            scheduled,
            decode and _fetch(*decode),
            [_fetch(*each) for each in ahead],
            prefill and _fetch(*prefill),
            mixed and _fetch(*mixed),
            [_fetch(*each) for each in drafts],
            time.perf_counter(),
            self._clock,
        )

    def sample(self, step: PendingStep) -> PendingStep:
        """Dispatch the sampling of those rows of a step that have grammars, and those beside them.

        All tokens before must be known to the matchers of the sequences. Blocks while the masks are
        computed, not for the device, which runs the forward pass meanwhile.
        """
        decode = [rank.decode for rank in step.scheduled]
        chunks = [rank.prefill for rank in step.scheduled]
        none = [()] * len(step.scheduled)
        return dataclasses.replace(
            step,
            decode=self._sample(step.decode, decode, none),
            prefill=self._sample(step.prefill, none, chunks),
            mixed=self._sample(step.mixed, decode, chunks),
        )

    def _sample(
        self,
        dispatched: Dispatched | None,
        decode: Sequence[Sequence[DecodeRow]],
        chunks: Sequence[Sequence[PrefillChunk]],
    ) -> Dispatched | None:
        """Sample the rows of a forward pass, its decode rows before its chunks, if it waits."""
        if not dispatched or dispatched[1] is not None:
            return dispatched
        key = dispatched[0]
        rows = self._programs.sampled_rows(key)
        each = key.tokens if isinstance(key, Verify) else 1
        constrained = []
        for rank, (of_decode, of_chunks) in enumerate(zip(decode, chunks, strict=True)):
            drafts = [row.draft for row in of_decode] + [()] * len(of_chunks)
            sequences = [row.sequence for row in of_decode] + [row.sequence for row in of_chunks]
            for i, (sequence, draft) in enumerate(zip(sequences, drafts, strict=True)):
                # Nobody reads what a sequence samples that has ended meanwhile, or what a chunk
                # does that is not the last of its prompt: its sequence's matcher stays as it is.
                if sequence.matcher and not sequence.finished:
                    place = rank * rows + i * each
                    constrained.append(ConstrainedRow(sequence.matcher, place, draft))
        masks = self._inputs.masks(rows, constrained)
        return _fetch(key, self._dispatch(Constrain(rows), (masks,)))

    def _run_draft_model(self, scheduled: SchedulerOutputs, most: int) -> list[Dispatched]:
        """Dispatch what the draft model does before a decode step of at most ``most`` rows.

        Its tokens stay on the device, where they are verified. They are sampled as the tokens of
        the model are, with the same random numbers, so that more of them agree.
        """
        ranks = [rank.decode for rank in scheduled]
        fills = [[row.fill for row in rank if row.fill] for rank in ranks]
        if any(fills):
            short, *chunked = self._programs.fill_keys()
            ones = [[fill for fill in rank if fill.length == 1] for rank in fills]
            if any(ones):
                self._dispatch(short, (self._inputs.prefill(ones, short.rows),))
            longer = [[fill for fill in rank if fill.length > 1] for rank in fills]
            for each in zip_longest(*longer):
                chunks = [[chunk] if chunk else [] for chunk in each]
                length = max(chunk.length for rank in chunks for chunk in rank)
                fill = next(each for each in chunked if each.tokens >= length)
                self._dispatch(fill, (self._inputs.prefill(chunks, fill.rows),))
        count = max((row.num_drafted for rank in ranks for row in rank if row.by_model), default=0)
        if not count:
            return []
        key = Draft(self._draft_bucket(most))
        return [self._forward(key, each) for each in self._inputs.draft(ranks, key.rows, count)]

    def _decode(self, scheduled: SchedulerOutputs, most: int) -> list[Dispatched]:
        """Dispatch decode steps of at most ``most`` rows per rank, or one that verifies drafts.

        Each reads its tokens where the step before wrote them, so none waits for the host.
        """
        ranks = [rank.decode for rank in scheduled]
        if not any(rank.drafted for rank in scheduled):
            buckets = self._programs.row_buckets
            bucket = next(b for b in buckets if b >= most and self._has(Decode(b)))
            inputs = self._inputs.decode(ranks, bucket, num_decode_steps(scheduled))
            return [self._forward(Decode(bucket), each) for each in inputs]
        length, bucket = self.config.draft_tokens, self._draft_bucket(most)
        drafted = self._inputs.verify(ranks, bucket, length)
        return [self._forward(Verify(bucket, length + 1), drafted)]

    def _draft_bucket(self, most: int) -> int:
        """The number of rows for which a step drafts and verifies: both have the same places."""
        length = self.config.draft_tokens
        return next(
            bucket
            for bucket in self._programs.draft_buckets
            if bucket >= most
            and self._has(Verify(bucket, length + 1))
            and (not self._programs.draft or self._has(Draft(bucket)))
        )

    def _forward(self, key: Forward, inputs: Any) -> Dispatched:
        """Dispatch a forward pass; return its program together with the sampled results."""
        return key, self._dispatch(key, (inputs,))

    def _dispatch(self, key: Called, arguments: tuple[Any, ...]) -> Sampled | None:
        """Dispatch one program, on the other processes first, as they take longer to reach."""
        if self.wire:
            self._processes.announce(Kind.STEP, *self.wire.write(key, arguments))
        return self.execute(key, arguments)

    def execute(self, key: Called, arguments: tuple[Any, ...]) -> Sampled | None:
        """Dispatch one program in this process, and the program that samples from its results.

        After a forward pass with a row that has a grammar, it is ``Constrain`` that samples.

        Returns:
            The sampled results, on the device.
        """
        program, placed = self._compiled[key], self._programs.place(arguments)
        if isinstance(key, Admit):
            self._state = program(self._state, *placed)
            self._sampling.admit(*arguments)
            return None
        if isinstance(key, Fill):
            weights, cache = self._draft_weights, self._draft_cache
            tokens, block_tables, _ = self._state
            self._draft_cache = program(weights, cache, tokens, block_tables, *placed)
            return None
        if isinstance(key, Constrain):
            unsampled = self._unsampled.popleft()
            return self._sampled(unsampled, program(unsampled.to_sample, *placed))
        (inputs,) = arguments
        if isinstance(key, Draft):
            weights, cache = self._draft_weights, self._draft_cache
            self._draft_cache, self._state, to_sample = dispatch_forward(
                program, weights, cache, self._state, *placed
            )
            sample = self._sampler(inputs, to_sample)
            self._state, ids = dispatch_sample(sample, self._state, to_sample)
            return Sampled(ids, None)
        self._cache, self._state, to_sample, *states = dispatch_forward(
            program, self._weights, self._cache, self._state, *placed
        )
        prompt_scores = None
        if prefill := prefill_of(key):
            chunks = inputs.prefill if isinstance(key, Mixed) else inputs
            if chunks.scored.any():
                score = self._compiled[self._programs.scored_by(prefill)]
                prompt_scores = score(self._weights, *states)
        unsampled = Unsampled(inputs, to_sample, prompt_scores)
        if self._sampling.constrained(inputs):
            self._unsampled.append(unsampled)
            return None
        return self._sampled(unsampled, to_sample.logits)

    def _sampled(self, unsampled: Unsampled, logits: Array) -> Sampled:
        """Sample from these logits; scores are those of all tokens, allowed or not."""
        inputs, to_sample, prompt_scores = unsampled
        sample = self._sampler(inputs, to_sample)
        self._state, ids = dispatch_sample(sample, self._state, to_sample._replace(logits=logits))
        scores = None
        if self._sampling.scored(inputs):
            scores = self._compiled[Score(self._rows(to_sample))](to_sample, ids)
        return Sampled(ids, scores, prompt_scores)

    def _sampler(self, inputs: Any, to_sample: SampleInputs) -> Any:
        """The program that does the least of sampling that all rows of a forward pass need."""
        rows, kind = self._rows(to_sample), self._sampling.kind(inputs)
        able = (Sample(rows, each) for each in Sampling if each >= kind)
        return next(self._compiled[each] for each in able if each in self._compiled)

    def _rows(self, to_sample: SampleInputs) -> int:
        return to_sample.logits.shape[0] // self.dp_size

    def _cache_budget(self) -> int:
        """Bytes of one device for the KV cache: the minimum over all processes."""
        mine = measured_cache_budget(self._mesh, self._weight_bytes)
        if self._ahead and self._ahead.cache_bytes <= mine:
            mine = self._ahead.cache_bytes
        elif self._ahead:
            log.warning(
                "the programs compiled ahead are for a KV cache of %d bytes on a device, and %d "
                "are left: programs are compiled anew",
                self._ahead.cache_bytes,
                mine,
            )
        return min(self._processes.exchange("cache budget", mine))
