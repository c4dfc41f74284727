"""The batching loop: schedule, run, commit. Token ids in, token ids out.

One thread owns the scheduler and the runner. Other threads only leave requests and aborts in an
inbox; outputs go to each request's sink, called on the engine's thread.
"""

import dataclasses
import logging
import threading
import time
from collections import deque

from inferneo_jax import compiles
from inferneo_jax.errors import (
    EngineError,
    EngineFailedError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
)
from inferneo_jax.groups import Groups, Plans
from inferneo_jax.heartbeat import Heartbeat
from inferneo_jax.request import (
    EngineStats,
    EngineTotals,
    FinishReason,
    GenerationRequest,
    OutputSink,
    TokenLogprob,
)
from inferneo_jax.results import Result, results_of
from inferneo_jax.runner import PendingStep, Runner
from inferneo_jax.sequence import Sequence
from inferneo_jax.steps import Sampled

log = logging.getLogger(__name__)

_MAX_FAILURES, _FAILURE_SECONDS = 3, 60.0
"""An engine whose steps fail so often within so long a time is not rebuilt once more."""
_STOP_SECONDS = 0.1


class Engine:
    """Runs the requests of one model, any number at a time."""

    def __init__(self, runner: Runner) -> None:
        self.max_len, self._limits = runner.max_len, runner.limits
        self._runner = runner
        self._groups = Groups(
            runner.groups,
            slots=runner.slots,
            num_pages=runner.num_pages,
            page_len=runner.page_len,
            shapes=runner.shapes,
        )
        self._sequences: dict[str, Sequence] = {}
        self._in_flight: PendingStep | None = None
        self._changed = threading.Condition()
        self._submitted: deque[Sequence] = deque()
        self._aborted: deque[str] = deque()
        self._ids: set[str] = set()
        self._stuck = False
        self._arrivals = 0
        self._failures: list[float] = []
        self._end: EngineError | None = None
        self._hung = False
        self._heartbeat = Heartbeat("engine", runner.step_seconds, self._give_up_step)
        self._totals = EngineTotals()
        self._compiles_before = compiles.num_unexpected()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, sink: OutputSink) -> None:
        """Queue a request; its outputs go to the sink, the last with a finish reason.

        Thread-safe.

        Raises:
            RequestError: it can never be served; ContextLengthError when it is too long.
            OverloadedError: a step hangs.
            EngineStoppedError: the engine was stopped; EngineFailedError: it failed for good.
        """
        self._limits.check(request)
        with self._changed:
            if self._end:
                raise self._end
            if request.id in self._ids:
                raise RequestError(f"a request with id {request.id} is already under way", "id")
            if self._hung:
                raise OverloadedError("the engine does not answer; try again later")
            self._ids.add(request.id)
            self._submitted.append(Sequence(request, sink, self._arrivals))
            self._arrivals += 1
            self._changed.notify()

    def abort(self, request_id: str) -> None:
        """End a request before the next step, if it still runs. Thread-safe."""
        with self._changed:
            if request_id in self._ids:
                self._aborted.append(request_id)
                self._changed.notify()

    def pause(self, request_id: str) -> None:
        """Decode no further tokens of a request until ``resume``. Thread-safe, idempotent.

        It keeps its slot and pages, so whoever pauses must resume or abort; up to two tokens that
        are under way still arrive. When pages run out it is preempted like any other.
        """
        self._set_paused(request_id, paused=True)

    def resume(self, request_id: str) -> None:
        """Undo ``pause``. Thread-safe, idempotent."""
        self._set_paused(request_id, paused=False)

    def stop(self) -> None:
        """End every request, and the thread unless it hangs. Thread-safe."""
        with self._changed:
            self._end = self._end or EngineStoppedError("the engine was stopped")
            self._changed.notify()
        self._thread.join(self._heartbeat.limit)
        while self._thread.is_alive() and not self._heartbeat.condemn():
            self._thread.join(_STOP_SECONDS)
        self._heartbeat.stop()

    def fail(self, reason: str) -> None:
        """End every request and the engine for good, without waiting for the step. Thread-safe."""
        with self._changed:
            self._end = self._end or EngineFailedError(reason)
            self._changed.notify()
        self._heartbeat.condemn()

    def stuck(self) -> float:
        """Seconds by which the current step has exceeded its limit. Thread-safe."""
        return self._heartbeat.late()

    def stats(self) -> EngineStats:
        """The engine's numbers as of its latest step. Thread-safe."""
        with self._changed:
            return EngineStats(
                ready=not (self._end or self._hung),
                compiles_after_ready=compiles.num_unexpected() - self._compiles_before,
                **self._groups.counts(len(self._submitted)),
                **dataclasses.asdict(self._totals),
            )

    def _run(self) -> None:
        """The engine's thread."""
        while True:
            try:
                while self._await_work():
                    self.step()
                break
            except Exception as error:
                log.exception("a step of the engine failed")
                failure = EngineFailedError("the engine failed while it ran this request")
                failure.__cause__ = error
                if self._end or not self._rebuild(failure):
                    break
        with self._changed:
            end = self._end
            left = [*self._sequences.values(), *self._submitted]
            self._submitted.clear()
        self._clear()
        for sequence in left:
            sequence.deliver(reason="error", error=end)

    def _rebuild(self, failure: EngineFailedError) -> bool:
        """End what the failed step may have spoiled, and begin anew; False to give up.

        The step's inputs were donated, so cache and slots are lost; the weights are not. Requests
        that wait for a slot are not touched.
        """
        now = time.monotonic()
        self._failures = [t for t in self._failures if now - t < _FAILURE_SECONDS] + [now]
        with self._changed:
            known = [s for s in self._sequences.values() if not s.finished]
        untouched = [s for s in known if s.slot is None and s.num_sampled == len(s.output)]
        spoiled = [s for s in known if s not in untouched]
        self._clear()
        for sequence in spoiled:
            sequence.deliver(reason="error", error=failure)
        with self._changed:
            self._ids |= {s.request.id for s in untouched}
            self._submitted.extendleft(reversed(untouched))
        try:
            if len(self._failures) >= _MAX_FAILURES:
                raise failure
            with self._heartbeat:
                self._runner.reset()
        except Exception:
            log.exception("the engine cannot be rebuilt")
            with self._changed:
                self._end = failure
            return False
        with self._changed:
            self._hung = False
        log.warning("the engine was rebuilt; %d requests were lost", len(spoiled))
        return True

    def _give_up_step(self) -> None:
        """End every request while a step hangs. The heartbeat holds the engine's thread there."""
        with self._changed:
            self._hung = True
            known = [*self._sequences.values(), *self._submitted]
            self._submitted.clear()
            self._ids.clear()
            error = self._end or EngineFailedError("a step of the engine does not return")
        log.error("a step hangs; %d requests were lost", len(known))
        for sequence in known:
            sequence.deliver(reason="error", error=error)

    def _clear(self) -> None:
        """Forget every sequence, page and step under way."""
        with self._changed:
            self._ids -= self._sequences.keys()
            self._sequences = {}
            self._in_flight = None
            self._groups.clear()

    def step(self) -> None:
        """Dispatch the next step, then read the one before it, which ran meanwhile.

        Drafts follow what is known: where there may be some, the step before is read first.
        """
        if self._in_flight and (self._in_flight.drafted or self._may_draft()):
            with self._heartbeat:
                known = self._in_flight.wait()
            self._commit(self._in_flight.plans, *known)
            self._in_flight = None
        with self._changed:
            plans = self._groups.schedule(None if self._in_flight else self._runner.drafts)
        with self._heartbeat:
            pending = self._runner.run(plans) if plans else None
            results = self._in_flight.wait() if self._in_flight else None
        if self._in_flight and results:
            self._commit(self._in_flight.plans, *results)
        elif not pending:
            self._stuck = True  # all that is left is paused, or waits for what the paused hold
        self._in_flight = pending

    def _may_draft(self) -> bool:
        return self._runner.drafts is not None and self._groups.may_draft(self._runner.drafts)

    def _set_paused(self, request_id: str, *, paused: bool) -> None:
        with self._changed:
            for sequence in (*self._submitted, *self._sequences.values()):
                if sequence.request.id == request_id:
                    sequence.paused = paused
            self._stuck = False
            self._changed.notify()

    def _await_work(self) -> bool:
        """Take what the inbox holds; sleep while there is nothing to do. False to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    self._end
                    or self._submitted
                    or self._aborted
                    or self._in_flight
                    or (self._sequences and not self._stuck)
                )
            )
            self._stuck = False
            if self._end:
                return False
            while self._submitted:
                sequence = self._submitted.popleft()
                self._sequences[sequence.request.id] = sequence
                self._groups.add(sequence)
            aborted, self._aborted = self._aborted, deque()
        for request_id in aborted:
            if known := self._sequences.get(request_id):
                self._finish(known, "abort")
        return True

    def _commit(self, plans: Plans, decode: Sampled | None, prefill: Sampled | None) -> None:
        """Hand out the results of a step to the requests that still want them."""
        self._totals.steps += 1
        for found in results_of(plans, decode, prefill):
            self._totals.prompt_tokens += found.prefilled
            if found.drafted:
                self._totals.drafted_tokens += found.drafted
                self._totals.accepted_tokens += len(found.tokens) - 1
                cost = self._runner.drafts.cost if self._runner.drafts else 0.0
                self._groups.accept(found.sequence, found.drafted, len(found.tokens) - 1, cost)
            if found.sequence.finished:
                continue  # it ended while this step was under way
            if found.tokens:
                self._deliver(found)
            elif found.ends:
                self._finish(found.sequence, "length")

    def _deliver(self, found: Result) -> None:
        """Deliver sampled tokens, up to the one that ends the request."""
        sequence, kept, reason = found.sequence, 0, None
        self._totals.cached_tokens += 0 if sequence.started else sequence.cached_tokens or 0
        while kept < len(found.tokens) and not reason:
            reason = sequence.accept(found.tokens[kept])
            kept += 1
        self._totals.output_tokens += kept
        output = tuple(found.tokens[:kept]), found.logprobs(kept)
        if reason:
            self._finish(sequence, reason, *output)
        else:
            sequence.deliver(*output)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
    ) -> None:
        """Free what the sequence holds, then deliver its last output."""
        with self._changed:
            if self._sequences.pop(sequence.request.id, None):
                self._groups.remove(sequence)
            self._ids.discard(sequence.request.id)
        sequence.deliver(token_ids, logprobs, reason)
