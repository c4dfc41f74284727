"""From a request to the stream of its choices: JSON, SSE and WebSocket all consume this one.

The engine calls back on its own thread. What it brings goes into a mailbox, and the event loop
empties that at its own pace: what piled up meanwhile becomes one event a choice.
"""

import asyncio
import dataclasses
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from contextvars import Context
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from inferneo_jax import (
    EngineStoppedError,
    GenerationOutput,
    GenerationRequest,
    InferneoError,
    SamplingParams,
)
from server.http.alarm import Alarm
from server.http.deadline import Deadline
from server.keys.store.store import Usage
from server.run.output import OutputProcessor, Prompt, TextOptions, TextPart
from server.run.portions import Arrived, portions

if TYPE_CHECKING:
    from inferneo_jax import Engine, Tokenizer
    from server.observe.metrics import Meter

MAX_UNTAKEN = 64
"""Outputs of a choice that may wait for a reader that cannot keep up."""
SILENCE_SECONDS = 15.0
"""After so long without an event a stream says that it is alive."""

_SEEDS = 2**64


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A request, validated and tokenized.

    Attributes:
        id: of the answer; the engine's requests are named after it.
        num_choices: sequences of each prompt.
        sampling: with the seed of choice 0; choice i has the seed i above it.
        logprobs: alternatives wanted beside each token's own log probability; None: nothing.
        ranked: log probabilities are needed to choose the best, whatever the client sees.
        owner: the id of the caller's key.
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

    def request(self, index: int) -> GenerationRequest:
        """The engine's request for the choice of this index."""
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
        )


class _Mailbox:
    """Carries outputs from the engine's thread to the event loop.

    A choice whose outputs are not taken is paused, until they are: its reader is slow, which is
    nobody else's concern.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._outputs: deque[Arrived] = deque()
        self._untaken: dict[str, int] = {}
        self._paused: set[str] = set()
        self._filled = asyncio.Event()
        self._silent = False
        self._silence = Alarm(SILENCE_SECONDS, self._break_silence)

    def sink(self, index: int, request_id: str) -> Callable[[GenerationOutput], None]:
        """Where the engine puts the outputs of one choice."""

        def put(output: GenerationOutput) -> None:
            with self._lock:
                first = not self._outputs
                self._outputs.append((index, output, time.monotonic()))
                self._untaken[request_id] = number = self._untaken.get(request_id, 0) + 1
                if number >= MAX_UNTAKEN:
                    # Within the lock, so that it comes before the resumption that it needs; and
                    # again for every output, should an earlier resumption have come late.
                    self._paused.add(request_id)
                    self._engine.pause(request_id)
            if first:  # one call wakes the reader for everything until it looks
                with suppress(RuntimeError):  # the loop has closed: nobody will read this
                    self._loop.call_soon_threadsafe(self._filled.set)

        return put

    def wake(self) -> None:
        """Let the reader look, though nothing came."""
        self._filled.set()

    def close(self) -> None:
        """Nothing more will be taken."""
        self._silence.close()

    def _break_silence(self) -> None:
        self._silent = True
        self._filled.set()

    async def take(self) -> list[Arrived] | None:
        """Everything that has come, waiting for something; None after a long silence."""
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
        usage: what it has taken so far; complete when the events are.
        on_end: told the usage once, when nothing more will be generated, if anything ever was.
        deadline: by which it must end; None: it may take as long as it likes.
        meter: is told what comes when; None: nobody is.
    """

    def __init__(self, engine: "Engine", tokenizer: "Tokenizer", plan: Plan) -> None:
        self.plan = plan
        self.usage = Usage(prompt=sum(len(prompt.ids) for prompt in plan.prompts))
        self.cancelled = False
        self.on_end: Callable[[Usage], None] | None = None
        self.deadline: Deadline | None = None
        self.meter: Meter | None = None
        self._submitted = False
        self._engine = engine
        self._mailbox: _Mailbox | None = None
        self._failure: Exception | None = None
        self.choices = [
            OutputProcessor(i, tokenizer, plan.prompts[i // plan.num_choices], plan.text)
            for i in range(len(plan.prompts) * plan.num_choices)
        ]

    def forecast(self) -> float | None:
        """Seconds that it would take from now, as :meth:`Engine.forecast` estimates them."""
        return self._engine.forecast(self._requests)

    @cached_property
    def _requests(self) -> list[GenerationRequest]:
        """The engine's requests, one for each choice."""
        return [self.plan.request(index) for index in range(len(self.choices))]

    def cancel(self) -> None:
        """Finish every choice with what it has; the events then end. For the event loop only."""
        self.cancelled = True
        if self._mailbox is not None:
            self._mailbox.wake()

    def end(self) -> None:
        """Tell ``on_end``; comes by itself after events that have begun."""
        tell, self.on_end = self.on_end, None
        if tell is not None and self._submitted:
            tell(self.usage)

    async def events(self) -> AsyncGenerator[TextPart | None, None]:
        """Submit, then what comes, until every choice has finished; None after a long silence.

        Raises:
            RequestError: the engine cannot serve it.
            EngineError: the engine cannot serve it now, or failed meanwhile.
            ApiError: its deadline has come.
        """
        self._mailbox = mailbox = _Mailbox(self._engine)
        running: dict[int, str] = {}
        clock = self._expire_in_time(running)
        try:
            await self._submit(mailbox, running)
            while running:
                outputs = [] if self.cancelled else await mailbox.take()
                if outputs is None:
                    yield None
                    continue
                for i, portion in enumerate(portions(outputs)):
                    if i:
                        await asyncio.sleep(0)  # others are served between two portions
                    for event in self._commit(portion, running):
                        yield event
                    if self._failure is not None:
                        raise self._failure
        finally:
            if clock is not None:
                clock.cancel()
            mailbox.close()
            for index, request_id in running.items():
                self._engine.abort(request_id)
                if self.meter is not None:
                    self.meter.ended(index, "error" if self._failure is not None else "abort")
            self.end()

    async def _submit(self, mailbox: _Mailbox, running: dict[int, str]) -> None:
        for index, request in enumerate(self._requests):
            if index:
                await asyncio.sleep(0)  # a long prompt takes milliseconds to check, each time
            try:
                self._engine.submit(request, mailbox.sink(index, request.id))
            except InferneoError:
                self._submitted = False  # what it has of the others is given up at once
                raise
            self._submitted = True
            running[index] = request.id
            if self.meter is not None:
                self.meter.submitted(index, len(request.prompt))

    def _expire_in_time(self, running: dict[int, str]) -> asyncio.TimerHandle | None:
        """Fail when the deadline has come, even while the reader is stuck and takes nothing."""
        if (deadline := self.deadline) is None:
            return None

        def expire() -> None:
            self._failure = deadline.missed()
            for request_id in running.values():
                self._engine.abort(request_id)
            assert self._mailbox is not None
            self._mailbox.wake()

        # Of an empty context: a timer that is cancelled keeps it until it would have been due.
        return asyncio.get_running_loop().call_at(deadline.at, expire, context=Context())

    def _commit(self, outputs: list[Arrived], running: dict[int, str]) -> list[TextPart]:
        """Feed the choices; those that finish leave ``running``. A failure comes last."""
        touched: dict[int, bool] = {}  # index: the engine is done with it
        for index, output, when in outputs:
            if index not in running:
                continue  # what the engine had under way when its choice was finished here
            if output.finish_reason in ("error", "abort"):  # not by us: that left ``running``
                stopped = EngineStoppedError("the engine was stopped")
                self._failure = self._failure or output.error or stopped
                break
            if self.meter is not None:
                self.meter.output(index, output, when)
            self.choices[index].feed(output)
            touched[index] = output.finish_reason is not None
        if self.cancelled:
            for index in running:
                self.choices[index].cancel()
                touched.setdefault(index, False)
        events = []
        for index, done in touched.items():
            choice = self.choices[index]
            if choice.finish_reason is not None:
                request_id = running.pop(index)
                if self.meter is not None:
                    self.meter.ended(index, choice.finish_reason)
                if not done:  # a stop string or the client ended it
                    self._engine.abort(request_id)
            if event := choice.take():
                events.append(event)
        self._count()
        return events

    def _count(self) -> None:
        first = self.choices[:: self.plan.num_choices]  # the others share its prompt's pages
        self.usage = Usage(
            prompt=self.usage.prompt,
            completion=sum(choice.num_tokens for choice in self.choices),
            cached=sum(choice.cached_tokens for choice in first),
        )
