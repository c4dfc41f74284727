"""Requests and changes from other threads, kept until the engine's thread takes them.

The lock is held only to move references, never while a step is scheduled, run or committed, so an
event loop can call every method.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, NamedTuple, TypeVar

from inferneo_jax.errors import (
    EngineError,
    EngineFailedError,
    OverloadedError,
    RequestError,
)
from inferneo_jax.request import GenerationRequest, OutputSink
from inferneo_jax.scheduler.sequence import Sequence

Change = Literal["abort", "pause", "resume"]
T = TypeVar("T")


class Taken(NamedTuple):
    """What the engine's thread has taken, each in order; a change never precedes its sequence.

    Attributes:
        calls: functions to be called first, and where their results are waited for.
        submitted: new sequences.
        changes: to sequences, new ones included.
    """

    calls: list[tuple[Callable[[], Any], "Future[Any]"]]
    submitted: list[Sequence]
    changes: list[tuple[Sequence, Change]]


class Inbox:
    """The unfinished requests of one engine, and the pending changes to them. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._live: dict[str, Sequence] = {}  # accepted and unfinished, by id
        self._submitted: list[Sequence] = []
        self._preparing: set[Sequence] = set()  # accepted, and not to be taken yet
        self._changes: list[tuple[Sequence, Change]] = []
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._arrivals = 0
        self._end: EngineError | None = None
        self._hung = False

    def __len__(self) -> int:
        """Number of unfinished requests, taken or not."""
        return len(self._live)

    @property
    def end(self) -> EngineError | None:
        """Why the engine ends; None while it runs."""
        return self._end

    @property
    def open(self) -> bool:
        """Whether requests are accepted."""
        return not (self._end or self._hung)

    def submit(
        self, request: GenerationRequest, sink: OutputSink, *, prepared: bool = True
    ) -> Sequence:
        """Accept a request.

        Args:
            request: the request.
            sink: receives its outputs.
            prepared: whether it may be taken at once; otherwise after :meth:`prepared`.

        Raises:
            EngineError: the engine ends, or a step hangs.
            RequestError: its id is that of an unfinished request.
        """
        with self._changed:
            if self._end:
                raise self._end
            if request.id in self._live:
                raise RequestError(f"a request with id {request.id} is already under way", "id")
            self._check_hung()
            sequence = Sequence(request, sink, self._arrivals)
            self._arrivals += 1
            self._live[request.id] = sequence
            if prepared:
                self._submitted.append(sequence)
                self._changed.notify()
            else:
                self._preparing.add(sequence)
        return sequence

    def prepared(self, sequence: Sequence) -> None:
        """Let a sequence be taken that was submitted unprepared."""
        with self._changed:
            if sequence in self._preparing:
                self._preparing.discard(sequence)
                self._submitted.append(sequence)
                self._changed.notify()

    def call(self, function: Callable[[], T]) -> "Future[T]":
        """Have a function called on the engine's thread, between two steps.

        Raises:
            EngineError: the engine ends, or a step hangs; later the future raises it.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._end:
                raise self._end
            self._check_hung()
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def _check_hung(self) -> None:
        if self._hung:
            raise OverloadedError("the engine does not answer; try again later")

    def change(self, request_id: str, change: Change) -> None:
        """Request a change; without effect if the request has finished."""
        with self._changed:
            if sequence := self._live.get(request_id):
                self._changes.append((sequence, change))
                self._changed.notify()

    def close(self, reason: EngineError) -> None:
        """End the engine; the first reason counts."""
        with self._changed:
            self._end = self._end or reason
            self._changed.notify()

    def wait(self, *, idle: bool) -> bool:
        """Wait, if the engine is idle, until there is something to do; False once it must end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._end or self._submitted or self._due() or self._calls or not idle
            )
            return not self._end

    def take(self) -> Taken:
        """Take what is new."""
        with self._changed:
            taken = Taken(self._calls, self._submitted, self._due())
            self._calls, self._submitted = [], []
            self._changes = [each for each in self._changes if each[0] in self._preparing]
        return taken

    def _due(self) -> list[tuple[Sequence, Change]]:
        """The pending changes of sequences that are prepared."""
        return [each for each in self._changes if each[0] not in self._preparing]

    def live(self) -> list[Sequence]:
        """The unfinished sequences, taken or not."""
        with self._changed:
            return list(self._live.values())

    def taken(self) -> list[Sequence]:
        """The unfinished sequences that were taken."""
        with self._changed:
            arriving = self._preparing.union(self._submitted)
            return [each for each in self._live.values() if each not in arriving]

    def discard(self, sequence: Sequence) -> None:
        """Forget a sequence that has finished."""
        with self._changed:
            self._live.pop(sequence.request.id, None)
            self._preparing.discard(sequence)

    def hang(self, *, hung: bool) -> None:
        """Refuse requests while a step hangs; accept them again after."""
        with self._changed:
            self._hung = hung

    def clear(self) -> list[Sequence]:
        """Forget every unfinished sequence. Returns them, since they must be told why they end."""
        with self._changed:
            left = list(self._live.values())
            self._live.clear()
            self._submitted.clear()
            self._preparing.clear()
            self._changes.clear()
            calls, self._calls = self._calls, []
        error = self._end or EngineFailedError("a step of the engine does not return")
        for _, future in calls:
            future.set_exception(error)
        return left
