"""The engine's loop: schedule, run, commit. Token ids in, token ids out.

One thread owns the scheduler and the runner. Other threads leave requests, and changes to them, in
an inbox, and read the figures that the thread publishes after each step. Outputs go to the sink of
each request, which is called on the engine's thread.
"""

import dataclasses
import logging
import threading
import time
from concurrent.futures import Future
from functools import partial

from inferneo_jax.engine.forecast import Forecast, Measured
from inferneo_jax.engine.inbox import Inbox
from inferneo_jax.engine.outputs import read_results
from inferneo_jax.errors import (
    EngineError,
    EngineFailedError,
    EngineStoppedError,
    InferneoError,
    RequestError,
)
from inferneo_jax.layers.cache import KVCache
from inferneo_jax.platform import compiles
from inferneo_jax.platform.watchdog import Heartbeat
from inferneo_jax.request import (
    EngineStats,
    EngineTotals,
    FinishReason,
    GenerationRequest,
    OutputSink,
    RequestLimits,
    TokenLogprob,
)
from inferneo_jax.runner.runner import PendingStep, Runner, StepResults
from inferneo_jax.scheduler.prefill import PrefillPlanner
from inferneo_jax.scheduler.scheduler import (
    DataParallelScheduler,
    SchedulerOutputs,
    num_decode_steps,
)
from inferneo_jax.scheduler.sequence import Sequence
from inferneo_jax.text.grammar import GrammarCompiler, Matcher

log = logging.getLogger(__name__)

_MAX_FAILURES, _FAILURE_SECONDS = 3, 60.0
"""An engine with this many failed steps within this many seconds is not rebuilt again."""
_STOP_SECONDS = 0.1


class Engine:
    """Runs the requests of one model with continuous batching.

    Args:
        runner: runs its steps.
        grammars: compiles the grammars of requests; None: no request may have one.
    """

    def __init__(self, runner: Runner, grammars: GrammarCompiler | None = None) -> None:
        self.max_len, self._limits = runner.max_len, runner.limits
        self._runner, self._grammars = runner, grammars
        self._itl_budget = runner.config.itl_budget / 1000
        self._planner = PrefillPlanner(
            runner.shapes,
            runner.prefill_times,
            self._itl_budget,
            runner.has_prefill,
            runner.decode_seconds,
        )
        self._scheduler = DataParallelScheduler(
            runner.dp_size,
            slots=runner.slots,
            num_blocks=runner.num_pages,
            block_len=runner.page_len,
            planner=self._planner,
            speculation=runner.speculation,
            decode_steps=runner.decode_steps,
        )
        self._forecast = Forecast(runner.dp_size * runner.slots)
        self._in_flight: PendingStep | None = None
        self._idle = True  # the latest step found nothing to do
        self._totals = EngineTotals()
        self._inbox = Inbox()
        self._publish()
        self._failures: list[float] = []
        self._heartbeat = Heartbeat("engine", runner.step_seconds, self._give_up_step)
        self._compiles_before = compiles.num_unexpected()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, sink: OutputSink) -> None:
        """Queue a request; its outputs go to the sink, the last with a finish reason.

        Thread-safe. A grammar is compiled before the engine sees the request; if it cannot be, that
        is the request's output.

        Raises:
            RequestError: it can never be served; ContextLengthError when it is too long.
            OverloadedError: a step hangs.
            EngineStoppedError: the engine was stopped; EngineFailedError: it failed for good.
        """
        self._limits.check(request)
        if request.constraint is None:
            self._inbox.submit(request, sink)
            return
        if self._grammars is None:
            raise RequestError("this engine has no tokenizer, which a grammar needs", "constraint")
        sequence = self._inbox.submit(request, sink, prepared=False)
        compiling = self._grammars.submit(request.constraint)
        compiling.add_done_callback(partial(self._compiled, sequence))

    def _compiled(self, sequence: Sequence, compiling: "Future[Matcher]") -> None:
        """Let a sequence run whose grammar is compiled; called on another thread."""
        if error := compiling.exception():
            if not isinstance(error, InferneoError):
                log.error("a grammar was not compiled", exc_info=error)
                error = EngineFailedError("the engine failed while it compiled a grammar")
            self._inbox.discard(sequence)
            sequence.deliver(reason="error", error=error)
            return
        sequence.matcher = compiling.result()
        self._inbox.prepared(sequence)

    def prepare_handover(self) -> tuple[int, KVCache]:
        """Compile what ``read_prefix`` and ``write_prefix`` run; before the first request.

        Returns:
            The number of blocks of a piece, and the shapes of its contents.

        Raises:
            ConfigError: the engine runs on several hosts or data-parallel ranks.
        """
        return self._runner.prepare_handover()

    def read_prefix(
        self, hashes: list[bytes], start: int, pieces: int
    ) -> "Future[tuple[int, list[KVCache]]]":
        """Copy keys and values of a prompt's cached blocks, for another engine. Thread-safe.

        Args:
            hashes: of the prompt's blocks (``prompt_hashes``).
            start: the first block to copy.
            pieces: how many pieces, at most.

        Returns:
            A future of the number of blocks, and of the pieces, on the device. They are cut short
            where a block is no longer cached.

        Raises:
            EngineError: the engine has ended, or a step hangs; later the future raises it.
        """

        def read() -> tuple[int, list[KVCache]]:
            # Steps that change these blocks are dispatched after the copies.
            most = pieces * self._runner.piece_pages
            blocks = self._scheduler.cached_blocks(hashes[: start + most])[start:]
            return len(blocks), self._runner.read_pages(blocks)

        return self._inbox.call(read)

    def write_prefix(
        self, hashes: list[bytes], start: int, count: int, piece: KVCache
    ) -> "Future[None]":
        """Cache blocks of a prompt, computed by another engine; unless there is no room.

        Thread-safe. To be called piece by piece, before the request is submitted.

        Args:
            hashes: of the prompt's blocks (``prompt_hashes``).
            start: the first block.
            count: how many blocks.
            piece: their contents.

        Raises:
            EngineError: as ``read_prefix``.
        """

        def write() -> None:
            if pages := self._scheduler.cache_blocks(hashes[: start + count], start):
                self._runner.write_pages(pages, piece)

        return self._inbox.call(write)

    def abort(self, request_id: str) -> None:
        """End a request before the next step, if it still runs. Thread-safe."""
        self._inbox.change(request_id, "abort")

    def pause(self, request_id: str) -> None:
        """Decode no further tokens of a request until ``resume``. Thread-safe, idempotent.

        It keeps its slot and blocks, so whoever pauses must resume or abort; the tokens of up to
        two dispatches that are under way still arrive. When blocks run out it is preempted like any
        other.
        """
        self._inbox.change(request_id, "pause")

    def resume(self, request_id: str) -> None:
        """Undo ``pause``. Thread-safe, idempotent."""
        self._inbox.change(request_id, "resume")

    def stop(self) -> None:
        """End every request, and the thread unless it hangs. Thread-safe."""
        self._inbox.close(EngineStoppedError("the engine was stopped"))
        self._thread.join(self._heartbeat.limit)
        while self._thread.is_alive() and not self._heartbeat.condemn():
            self._thread.join(_STOP_SECONDS)
        self._heartbeat.stop()

    def fail(self, reason: str) -> None:
        """End every request and the engine for good, without waiting for the step. Thread-safe."""
        self._inbox.close(EngineFailedError(reason))
        self._heartbeat.condemn()

    def stuck(self) -> float:
        """Seconds by which the current step has exceeded its limit. Thread-safe."""
        return self._heartbeat.late()

    def ended(self) -> bool:
        """Whether the engine was stopped or has failed for good. Thread-safe.

        An engine that recovers from a failed step is not ready for a moment, but has not ended.
        """
        return self._inbox.end is not None

    @property
    def limits(self) -> RequestLimits:
        """What a request may ask for."""
        return self._limits

    @property
    def end(self) -> EngineError | None:
        """Why the engine ended; None while it has not. Thread-safe."""
        return self._inbox.end

    @property
    def measured(self) -> Measured:
        """What ``forecast`` has measured. Thread-safe."""
        return self._forecast.measured

    def stats(self) -> EngineStats:
        """The engine's numbers as of its latest step. Thread-safe."""
        counts, totals = self._figures
        return EngineStats(
            ready=self._inbox.open,
            compiles_after_ready=compiles.num_unexpected() - self._compiles_before,
            itl_budget=self._itl_budget,
            **counts | {"waiting": max(0, len(self._inbox) - counts["running"])},
            **dataclasses.asdict(totals),
        )

    def forecast(self, requests: list[GenerationRequest]) -> float | None:
        """Seconds until these would have finished, if they were submitted now. Thread-safe.

        They are of one owner and priority. None: they need not wait for a slot, the engine has
        nothing else to do, or it has measured too little.
        """
        counts, totals = self._figures
        return self._forecast.seconds(
            self._inbox.live(), requests, totals, counts["prefill_allowance"]
        )

    def _run(self) -> None:
        """The engine's thread."""
        while True:
            try:
                while self._inbox.wait(idle=self._idle):
                    self._idle = False
                    self.step()
                break
            except Exception as error:
                log.exception("a step of the engine failed")
                failure = EngineFailedError("the engine failed while it ran this request")
                failure.__cause__ = error
                if self._inbox.end or not self._rebuild(failure):
                    break
        left = self._inbox.clear()
        self._clear()
        for sequence in left:
            sequence.deliver(reason="error", error=self._inbox.end)

    def step(self) -> None:
        """Schedule a step, run it, and commit the step before it, which ran in the meantime.

        Where drafts may be made, the step before is committed first: they follow known tokens. What
        grammars allow follows known tokens too, but it is not needed before the forward pass has
        run: they are asked, and the step is sampled, after the step before is committed.
        """
        started = time.monotonic()
        before = previous = self._in_flight
        if previous and self._scheduler.must_commit(previous.scheduled):
            self._commit(previous, self._dispatch(None, previous)[1])
            previous = None
        self._take_inbox()
        scheduled = self._scheduler.schedule(draft=previous is None)
        # Asked for now: when the step before is committed, its last constrained sequence may end.
        constrained = self._scheduler.has_grammars and any(
            each.constrained for each in scheduled or ()
        )
        self._in_flight, results = self._dispatch(scheduled, previous)
        if previous:
            self._commit(previous, results)
        if self._in_flight and constrained:
            self._sample(self._in_flight)
        # When idle, every request is paused, or waits for what a paused one holds.
        self._idle = not (self._in_flight or previous)
        if self._in_flight or before:
            self._forecast.stepped(time.monotonic() - started, steps=_num_steps(before))
        self._publish()

    def _take_inbox(self) -> None:
        """Apply what other threads asked for since the last step."""
        calls, submitted, changes = self._inbox.take()
        for function, future in calls:
            try:
                future.set_result(function())
            except Exception as error:  # noqa: BLE001  (raised where the result is wanted)
                future.set_exception(error)
        for sequence in submitted:
            self._scheduler.add(sequence)
        for sequence, change in changes:
            if sequence.finished:
                continue  # it ended before it could be changed
            if change == "abort":
                self._finish(sequence, "abort")
            else:
                self._scheduler.pause(sequence, paused=change == "pause")

    def _dispatch(
        self, scheduled: SchedulerOutputs | None, previous: PendingStep | None
    ) -> tuple[PendingStep | None, StepResults]:
        """Run what is scheduled, without waiting for it; then wait for the step before it."""
        with self._heartbeat:
            # Asked for in here: ``fail`` closes the inbox, then condemns the step in flight.
            if self._inbox.end:
                return None, StepResults()
            step = self._runner.run(scheduled) if scheduled else None
            return step, previous.wait() if previous else StepResults()

    def _sample(self, step: PendingStep) -> None:
        """Sample the step in flight, whose forward pass runs; end sequences whose grammars fail."""
        with self._heartbeat:
            if self._inbox.end:
                return
            self._in_flight = self._runner.sample(step)
        for rank in step.scheduled:
            for sequence in rank.sampled:
                if sequence.matcher and sequence.matcher.error and not sequence.finished:
                    self._finish(sequence, "error", error=sequence.matcher.error)

    def _commit(self, step: PendingStep, results: StepResults) -> None:
        """Append a step's tokens to its sequences and deliver them to the sinks."""
        self._totals.steps += _num_steps(step)
        self._scheduler.measured(step.scheduled, results.decode_seconds, results.mixed_seconds)
        for result in read_results(step.scheduled, results):
            sequence = result.sequence
            self._totals.prompt_tokens += result.num_prefilled
            self._totals.drafted_tokens += result.num_drafted
            accepted = max(0, len(result.tokens) - 1)
            self._totals.accepted_tokens += accepted
            if result.by_model:
                self._totals.model_drafted_tokens += result.num_drafted
                self._totals.model_accepted_tokens += accepted
            kept, reason = self._scheduler.commit(
                sequence, result.tokens, result.num_drafted, by_model=result.by_model
            )
            self._totals.output_tokens += kept
            if kept and not sequence.started:
                self._totals.cached_tokens += sequence.cached_tokens or 0
            if sequence.finished:
                continue  # it ended while this step was in flight
            if reason or result.ends:
                output = result.tokens[:kept], result.logprobs(kept)
                self._finish(sequence, reason or "length", *output)
            elif kept:
                sequence.deliver(result.tokens[:kept], result.logprobs(kept))

    def _publish(self) -> None:
        """Publish the current figures for ``stats`` and ``forecast``."""
        self._figures = self._scheduler.counts(), dataclasses.replace(self._totals)

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] | None = None,
        error: InferneoError | None = None,
    ) -> None:
        """Free what the sequence holds, then deliver its last output."""
        self._scheduler.remove(sequence)
        if sequence.output and reason != "abort":
            self._forecast.finished(len(sequence.output))
        self._inbox.discard(sequence)
        self._publish()
        sequence.deliver(token_ids, logprobs, reason, error)

    def _rebuild(self, failure: EngineFailedError) -> bool:
        """End the requests that the failed step may have spoiled, and start over; False to give up.

        The step's inputs were donated, so cache and slots are lost; the weights are not. Requests
        that wait for a slot are not touched.
        """
        now = time.monotonic()
        self._failures = [t for t in self._failures if now - t < _FAILURE_SECONDS] + [now]
        known = self._inbox.taken()
        untouched = [s for s in known if s.slot is None and s.num_sampled == len(s.output)]
        spoiled = [s for s in known if s not in untouched]
        self._clear()
        gives_up = len(self._failures) >= _MAX_FAILURES
        if gives_up:  # before a request is told, whose owner may ask or stop the engine at once
            log.error("%d steps failed in a short time; the engine ends", len(self._failures))
            self._inbox.close(failure)
        for sequence in spoiled:
            self._inbox.discard(sequence)
            sequence.deliver(reason="error", error=failure)
        if gives_up:
            return False
        for sequence in untouched:
            self._scheduler.add(sequence)
        try:
            with self._heartbeat:
                self._runner.reset()
        except Exception:
            log.exception("the engine cannot be rebuilt")
            self._inbox.close(failure)
            return False
        self._inbox.hang(hung=False)
        log.warning("the engine was rebuilt; %d requests were lost", len(spoiled))
        return True

    def _give_up_step(self) -> None:
        """End every request while a step hangs. The heartbeat holds the engine's thread there."""
        self._inbox.hang(hung=True)
        known = self._inbox.clear()
        error = self._inbox.end or EngineFailedError("a step of the engine does not return")
        log.error("a step hangs; %d requests were lost", len(known))
        for sequence in known:
            sequence.deliver(reason="error", error=error)

    def _clear(self) -> None:
        """Forget every sequence, block and step in flight."""
        self._in_flight = None
        self._scheduler.clear()
        self._publish()


def _num_steps(pending: PendingStep | None) -> int:
    """Number of steps that were dispatched together."""
    return max(1, num_decode_steps(pending.scheduled)) if pending else 0
