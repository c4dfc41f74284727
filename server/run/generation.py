"""Generation: runs a request on the engine and yields its parts, for JSON, SSE and WebSocket alike.

The engine calls back on its own thread. Its outputs go into a mailbox, which the event loop empties
at its own pace: outputs that have accumulated become one part per choice.
"""

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import aclosing, suppress
from contextvars import Context as ContextVars
from dataclasses import dataclass
from functools import cached_property
from io import StringIO
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary, ref

from inferneo_jax import (
    Constraint,
    EngineStoppedError,
    GenerationOutput,
    GenerationRequest,
    InferneoError,
    SamplingParams,
)
from server.http.alarm import Alarm
from server.http.deadline import Deadline
from server.http.pieces import JsonList
from server.http.sse import Event
from server.keys.store.store import Usage
from server.observe.metrics import Meter
from server.prompt.prompts import Prompt
from server.run.admission import Admission
from server.run.context import Context
from server.run.dialect import Choice, Dialect, End, Part, Result, Start, Text
from server.run.output import OutputProcessor, TextOptions, TextPart, ToolCall

if TYPE_CHECKING:
    from inferneo_jax import GenerationEngine, LanguageModel
    from server.models.registry import Registry

MAX_UNTAKEN = 64
"""Maximum number of outputs of a choice that wait for a slow reader before it is paused."""
SILENCE_SECONDS = 15.0
"""After this long without a part, a stream sends a keep-alive."""
PORTION = 400
"""Maximum number of records handled at once: tokens, and alternatives with log probabilities."""

_SEEDS = 2**64

Arrived = tuple[int, GenerationOutput, float]
"""The index of a choice, an output of it, and when that arrived."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A request, validated and tokenized.

    Attributes:
        id: the id of the answer, from which the ids of the engine's requests are derived.
        num_choices: number of sequences for each prompt.
        sampling: sampling parameters, with the seed of choice 0; choice i uses that seed plus i.
        logprobs: number of alternatives to return with each token's log probability; None returns
            no log probabilities.
        ranked: whether log probabilities are needed to choose the best sequences.
        owner: the id of the caller's key.
        constraint: the grammar that each choice must match; None: there is none.
    """

    id: str
    prompts: tuple[Prompt, ...]
    num_choices: int = 1
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    text: TextOptions
    logprobs: int | None = None
    ranked: bool = False
    priority: int = 0
    cache_salt: bytes = b""
    owner: str = ""
    constraint: Constraint | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """The number of tokens in all prompts."""
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def max_completion_tokens(self) -> int:
        """The maximum number of tokens of all choices together."""
        return sum(prompt.max_tokens for prompt in self.prompts) * self.num_choices

    def request(self, index: int) -> GenerationRequest:
        """Return the engine's request for the choice with this index."""
        prompt = self.prompts[index // self.num_choices]
        seed = (self.sampling.seed + index) % _SEEDS
        return GenerationRequest(
            id=f"{self.id}-{index}",
            prompt=prompt.ids,
            max_tokens=prompt.max_tokens,
            sampling=dataclasses.replace(self.sampling, seed=seed),
            stop_token_ids=self.stop_token_ids,
            min_tokens=self.text.min_tokens,
            logprobs=0 if self.logprobs is None and self.ranked else self.logprobs,
            prompt_logprobs=self.logprobs if self.text.echo else None,
            priority=self.priority,
            cache_salt=self.cache_salt,
            owner=self.owner,
            constraint=self.constraint,
        )


class _Wakeups:
    """Sets events of an event loop from other threads.

    A step brings tokens for many readers at once. One call of ``call_soon_threadsafe``, which
    writes to the loop's own socket each time, wakes them all.
    """

    _by_loop: ClassVar["WeakKeyDictionary[asyncio.AbstractEventLoop, _Wakeups]"] = (
        WeakKeyDictionary()
    )

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = ref(loop)
        self._lock = threading.Lock()
        self._events: list[asyncio.Event] = []

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> "_Wakeups":
        """Those of a loop; called on its thread."""
        if (found := cls._by_loop.get(loop)) is None:
            found = cls._by_loop[loop] = cls(loop)
        return found

    def wake(self, event: asyncio.Event) -> None:
        """Set an event soon. Thread-safe."""
        with self._lock:
            first = not self._events
            self._events.append(event)
        if first and (loop := self._loop()):
            with suppress(RuntimeError):  # the loop has closed: nothing waits there any more
                loop.call_soon_threadsafe(self._set)

    def _set(self) -> None:
        with self._lock:
            events, self._events = self._events, []
        for event in events:
            event.set()


class _Mailbox:
    """Carries outputs from the engine's thread to the event loop.

    A choice whose outputs are not taken is paused until they are, so that a slow reader affects
    only itself.
    """

    def __init__(self, engine: "GenerationEngine") -> None:
        self._engine = engine
        self._wakeups = _Wakeups.of(asyncio.get_running_loop())
        self._lock = threading.Lock()
        self._outputs: deque[Arrived] = deque()
        self._untaken: dict[str, int] = {}
        self._paused: set[str] = set()
        self._filled = asyncio.Event()
        self._silent = False
        self._silence = Alarm(SILENCE_SECONDS, self._break_silence)

    def sink(self, index: int, request_id: str) -> Callable[[GenerationOutput], None]:
        """Return the callback that receives the engine's outputs for one choice."""

        def put(output: GenerationOutput) -> None:
            with self._lock:
                first = not self._outputs
                self._outputs.append((index, output, time.monotonic()))
                self._untaken[request_id] = number = self._untaken.get(request_id, 0) + 1
                if number >= MAX_UNTAKEN:
                    # Within the lock, so that it comes before the matching resumption; and
                    # again for every output, should an earlier resumption have come late.
                    self._paused.add(request_id)
                    self._engine.pause(request_id)
            if first:  # one call wakes the reader for everything until it looks
                self._wakeups.wake(self._filled)

        return put

    def wake(self) -> None:
        """Wake the reader although no output has arrived."""
        self._filled.set()

    def close(self) -> None:
        """Stop the alarm; outputs are no longer taken."""
        self._silence.close()

    def _break_silence(self) -> None:
        self._silent = True
        self._filled.set()

    async def take(self) -> list[Arrived] | None:
        """Wait for outputs and return all that have arrived; None after a long silence."""
        self._silence.set()
        await self._filled.wait()
        self._silence.clear()
        self._filled.clear()
        with self._lock:
            outputs, self._outputs = list(self._outputs), deque()
            paused, self._paused = self._paused, set()
            self._untaken.clear()
        for request_id in paused:
            self._engine.resume(request_id)
        silent, self._silent = self._silent, False
        return None if silent and not outputs else outputs


class Generation:
    """Runs a plan.

    Attributes:
        usage: the usage so far.
        cancelled: whether the client has cancelled it.
    """

    def __init__(self, model: "LanguageModel", plan: Plan) -> None:
        self.plan = plan
        self.usage = Usage(prompt=plan.num_prompt_tokens)
        self.cancelled = False
        self.processors = [
            OutputProcessor(i, model.tokenizer, plan.prompts[i // plan.num_choices], plan.text)
            for i in range(len(plan.prompts) * plan.num_choices)
        ]
        self._model = model
        self._engine = model.engine
        self._mailbox: _Mailbox | None = None
        self._submitted = False
        self._failure: Exception | None = None

    @cached_property
    def _requests(self) -> list[GenerationRequest]:
        """The engine's requests, one for each choice."""
        return [self.plan.request(index) for index in range(len(self.processors))]

    def cancel(self) -> None:
        """Finish every choice with its text so far. Call this on the event loop only."""
        self.cancelled = True
        if self._mailbox is not None:
            self._mailbox.wake()

    async def parts(self, context: Context, admission: Admission) -> AsyncGenerator[Part, None]:
        """Admit and submit the request, then yield its parts until every choice has finished.

        Raises:
            RequestError: the engine cannot serve the request.
            EngineError: the engine cannot serve it now, or failed while serving it.
            ApiError: the request is not admitted, or its deadline has passed.
        """
        plan, trace = self.plan, context.log_entry.trace
        try:
            async with admission.admitted(
                context,
                self._model.name,
                plan.num_prompt_tokens,
                plan.max_completion_tokens,
                sequences=len(self.processors),
                forecast=lambda: self._engine.forecast(self._requests),
            ) as work:
                if trace is not None:
                    max_tokens = max(prompt.max_tokens for prompt in plan.prompts)
                    trace.planned(
                        plan.id, self._model.name, max_tokens, plan.sampling, plan.num_choices
                    )
                assert context.deadline is not None
                try:
                    started = False
                    async with aclosing(self._texts(context.deadline, work.meter())) as texts:
                        async for text in texts:
                            if not started:
                                # Only now, so that an earlier failure has its own HTTP status.
                                started = True
                                yield Start(len(self.processors), self.usage)
                            yield text
                finally:
                    if self._submitted:
                        work.usage = self.usage
        finally:
            context.log_entry.add_usage(self.usage)
        yield End(self.usage, self.cancelled)

    async def _texts(self, deadline: Deadline, meter: Meter) -> AsyncGenerator[Text | None, None]:
        """Submit the request and yield its texts, and None after a long silence."""
        self._mailbox = mailbox = _Mailbox(self._engine)
        running: dict[int, str] = {}
        clock = self._expire_in_time(mailbox, deadline, running)
        told = time.monotonic()
        try:
            await self._submit(mailbox, running, meter)
            while running:
                outputs = [] if self.cancelled else await mailbox.take()
                if outputs is None:
                    yield None
                    continue
                for i, portion in enumerate(portions(outputs)):
                    if i:
                        await asyncio.sleep(0)  # other requests are served between two portions
                    parts = self._commit(portion, running, meter)
                    for part in parts:
                        yield Text(part, self.usage)
                    if parts:
                        told = time.monotonic()
                    elif time.monotonic() - told > SILENCE_SECONDS:
                        told = time.monotonic()
                        yield None  # a long call is held back until it is complete
                    if self._failure is not None:
                        raise self._failure
        finally:
            clock.cancel()
            mailbox.close()
            for index, request_id in running.items():
                self._engine.abort(request_id)
                meter.ended(index, "error" if self._failure is not None else "abort")

    async def _submit(self, mailbox: _Mailbox, running: dict[int, str], meter: Meter) -> None:
        for index, request in enumerate(self._requests):
            if index:
                await asyncio.sleep(0)  # a long prompt takes milliseconds to check, each time
            try:
                self._engine.submit(request, mailbox.sink(index, request.id))
            except InferneoError:
                self._submitted = False  # the engine drops the remaining requests at once
                raise
            self._submitted = True
            running[index] = request.id
            meter.submitted(index, len(request.prompt))

    def _expire_in_time(
        self, mailbox: _Mailbox, deadline: Deadline, running: dict[int, str]
    ) -> asyncio.TimerHandle:
        """Fail at the deadline, even while the reader is stuck and takes nothing."""

        def expire() -> None:
            self._failure = deadline.missed()
            for request_id in running.values():
                self._engine.abort(request_id)
            mailbox.wake()

        # With an empty context, which a cancelled timer keeps alive until it would have fired.
        return asyncio.get_running_loop().call_at(deadline.at, expire, context=ContextVars())

    def _commit(
        self, outputs: list[Arrived], running: dict[int, str], meter: Meter
    ) -> list[TextPart]:
        """Feed the choices; finished ones leave ``running``. A failure comes last."""
        touched: dict[int, bool] = {}  # index: the engine is done with it
        for index, output, when in outputs:
            if index not in running:
                continue  # an output that was in flight when its choice was finished here
            if output.finish_reason in ("error", "abort"):  # not by us: that left ``running``
                stopped = EngineStoppedError("the engine was stopped")
                self._failure = self._failure or output.error or stopped
                break
            meter.output(index, output, when)
            self.processors[index].feed(output)
            touched[index] = output.finish_reason is not None
        if self.cancelled:
            for index in running:
                self.processors[index].cancel()
                touched.setdefault(index, False)
        parts = []
        for index, done in touched.items():
            processor = self.processors[index]
            if processor.finish_reason is not None:
                request_id = running.pop(index)
                meter.ended(index, processor.finish_reason)
                if not done:  # a stop string or the client ended it
                    self._engine.abort(request_id)
            if part := processor.take():
                parts.append(part)
        self._count()
        return parts

    def _count(self) -> None:
        first = self.processors[:: self.plan.num_choices]  # the others share its prompt's pages
        self.usage = Usage(
            prompt=self.usage.prompt,
            completion=sum(each.num_tokens for each in self.processors),
            cached=sum(each.cached_tokens for each in first),
            reasoning=sum(each.num_reasoning for each in self.processors),
        )


class _Collected:
    """What has been collected for a choice of a whole answer."""

    def __init__(self, dialect: Dialect) -> None:
        self.text, self.reasoning = StringIO(), StringIO()
        self.calls: list[ToolCall] = []
        self.logprobs = {name: JsonList[Any]() for name in dialect.logprobs(())}
        self._dialect = dialect

    def add(self, part: TextPart) -> None:
        self.text.write(part.text)
        self.reasoning.write(part.reasoning)
        self.calls += part.calls
        for name, values in self._dialect.logprobs(part.tokens).items():
            self.logprobs[name].extend(values)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A prepared answer: the generation, and how it is written.

    Attributes:
        generation: generates the text.
        dialect: writes the text in a wire format.
        model: the model name as given in the request.
        stream: whether the client wants a stream of events.
        num_returned: number of choices returned for each prompt: the best of those sampled.
        user: the client's identifier for its end user, for the log.
    """

    generation: Generation
    dialect: Dialect
    model: str
    stream: bool
    num_returned: int
    user: str | None

    def events(self, context: Context, admission: Admission) -> AsyncGenerator[Event | None, None]:
        """Yield the events of a stream in order, and None after a long silence.

        Raises:
            InferneoError, ApiError: as :meth:`Generation.parts` does.
        """
        return self.dialect.events(self._parts(context, admission))

    async def whole(self, context: Context, admission: Admission) -> Mapping[str, Any]:
        """Return the whole answer, to be serialized by :class:`~server.http.pieces.Json`.

        Raises:
            InferneoError, ApiError: as :meth:`Generation.parts` does.
        """
        processors = self.generation.processors
        collected = [_Collected(self.dialect) for _ in processors]
        async with aclosing(self._parts(context, admission)) as parts:
            async for part in parts:
                if isinstance(part, Text):
                    collected[part.part.index].add(part.part)
        choices = []
        for i in self._best():
            reason = processors[i].finish_reason
            assert reason is not None, "the generation is over"
            each = collected[i]
            texts = each.text.getvalue(), each.reasoning.getvalue()
            choices.append(Choice(*texts, each.calls, each.logprobs, reason))
        return self.dialect.whole(Result(choices, self.generation.usage))

    def _parts(self, context: Context, admission: Admission) -> AsyncGenerator[Part, None]:
        context.log_entry.add(model=self.model, stream=self.stream, user=self.user)
        return self.generation.parts(context, admission)

    def _best(self) -> list[int]:
        """Return the sequences to return: all, or the likeliest of each prompt, best first."""
        plan, processors = self.generation.plan, self.generation.processors
        if plan.num_choices == self.num_returned:
            return list(range(len(processors)))
        best: list[int] = []
        for start in range(0, len(processors), plan.num_choices):
            group = range(start, start + plan.num_choices)
            ranked = sorted(group, key=lambda i: -processors[i].mean_logprob)
            best += ranked[: self.num_returned]
        return best


Prepare = Callable[["Registry", Context, dict[str, Any]], Answer]
"""Prepares the answer to a request from its body. It may run in a thread."""


def portions(arrived: list[Arrived]) -> Iterator[list[Arrived]]:
    """Yield the same outputs in lists of about :data:`PORTION` records each, at least one output.

    The event loop handles each list without a pause.
    """
    portion: list[Arrived] = []
    size = 0
    for index, output, when in arrived:
        for part in _parts(output):
            portion.append((index, part, when))
            size += _weight(part)
            if size >= PORTION:
                yield portion
                portion, size = [], 0
    if portion or not arrived:
        yield portion


def _weight(output: GenerationOutput) -> int:
    scores = output.logprobs or output.prompt_logprobs
    each = 1 + (len(scores[-1].top) if scores and scores[-1] else 0)
    return each * (len(output.token_ids) + len(output.prompt_logprobs or ()))


def _parts(output: GenerationOutput) -> Iterator[GenerationOutput]:
    """Split an output with a long prompt's log probabilities; the last part holds its tokens."""
    scores = output.prompt_logprobs
    if scores is None or (weight := _weight(output)) <= PORTION:
        yield output
        return
    step = max(1, len(scores) * PORTION // weight)
    for start in range(0, len(scores), step):
        part = scores[start : start + step]
        if start + step < len(scores):
            yield GenerationOutput(prompt_logprobs=part)
        else:
            yield dataclasses.replace(output, prompt_logprobs=part)
