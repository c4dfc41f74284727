"""Deterministic fakes of the engine and the embedder: the same calls and threads, but no model.

The engine generates a script, one token per step, on its own thread, and records what was submitted
and aborted, so that tests wait for events instead of sleeping.
"""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from inferneo_jax import (
    EngineStats,
    EngineStoppedError,
    GenerationOutput,
    GenerationRequest,
    InferneoError,
    ModelInfo,
    RequestError,
    Tokenizer,
    TokenLogprob,
)

TIMEOUT = 10.0
INFO = ModelInfo(
    dtype="float32",
    quantization="none",
    kv_dtype="float32",
    kernels="xla",
    mesh="data=1,model=1",
    device="cpu",
    weight_bytes=1024,
    cache_bytes=4096,
)
"""Of the models that a fake stands for."""
Script = Callable[[GenerationRequest], Sequence[int]]


def logprob_of(token: int, num_top: int) -> TokenLogprob:
    """A made-up log probability; the alternatives are the ids that follow."""
    top = tuple(((token + i) % 256, -0.01 * (token % 7 + 1 + i)) for i in range(num_top))
    return TokenLogprob(token, -0.01 * (token % 7 + 1), top)


@dataclass
class _Job:
    request: GenerationRequest
    sink: Callable[[GenerationOutput], None]
    script: Sequence[int]
    written: int = 0
    aborted: bool = False
    paused: bool = False


@dataclass
class FakeEngine:
    """Generates ``script(request)``.

    Attributes:
        max_len: context, in tokens.
        batch: tokens per output.
        limit: tokens that each request may have until ``release`` is called; None: no limit.
        refusal: raised by ``submit``.
        failure: ends every request at its limit.
        stuck_seconds: for how long a step has not answered.
        forecast_seconds: what it expects any request to take.
    """

    script: Script
    max_len: int = 512
    batch: int = 1
    limit: int | None = None
    refusal: Exception | None = None
    failure: InferneoError | None = None
    stuck_seconds: float = 0.0
    forecast_seconds: float | None = None
    submitted: list[GenerationRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    finished: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._jobs: dict[str, _Job] = {}
        self._stopped = False
        self._totals = {"output_tokens": 0, "prompt_tokens": 0, "steps": 0}
        self._thread = threading.Thread(target=self._run, name="fake-engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest, sink: Callable[[GenerationOutput], None]) -> None:
        with self._changed:
            if self.refusal:
                raise self.refusal
            assert request.id not in self._jobs
            self.submitted.append(request)
            self._jobs[request.id] = _Job(request, sink, tuple(self.script(request)))
            self._changed.notify_all()

    def abort(self, request_id: str) -> None:
        with self._changed:
            if request_id in self._jobs:
                self._jobs[request_id].aborted = True
                self._changed.notify_all()

    def pause(self, request_id: str) -> None:
        self._set_paused(request_id, True)

    def resume(self, request_id: str) -> None:
        self._set_paused(request_id, False)

    def _set_paused(self, request_id: str, paused: bool) -> None:
        with self._changed:
            if request_id in self._jobs:
                self._jobs[request_id].paused = paused
                self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(TIMEOUT)

    def stats(self) -> EngineStats:
        with self._changed:
            used = len(self._jobs)
        counts = dict.fromkeys(EngineStats.__slots__, 0)
        counts |= {"slots": 4, "slots_used": used, "running": used, "pages": 64, "page_len": 16}
        counts |= {"pages_used": min(64, used), **self._totals}
        return EngineStats(**counts | {"ready": not self._stopped and not self.stuck_seconds})

    def ended(self) -> bool:
        return self._stopped

    def stuck(self) -> float:
        return self.stuck_seconds

    def forecast(self, requests: list[GenerationRequest]) -> float | None:
        assert requests
        return self.forecast_seconds

    def release(self) -> None:
        """Let every request run on."""
        with self._changed:
            self.limit = None
            self._changed.notify_all()

    def wait_until(self, what: Callable[["FakeEngine"], object]) -> None:
        """Wait for something that the engine has seen."""
        with self._changed:
            assert self._changed.wait_for(lambda: what(self), TIMEOUT), "it never happened"

    @property
    def num_running(self) -> int:
        return len(self._jobs)

    @property
    def num_paused(self) -> int:
        return sum(job.paused for job in self._jobs.values())

    @property
    def num_written(self) -> int:
        """Tokens of the requests that run."""
        return sum(job.written for job in self._jobs.values())

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or any(map(self._can_run, self._jobs)))
                jobs = list(self._jobs.values())
                stopped = self._stopped
            for job in jobs:
                if stopped:
                    error = EngineStoppedError("the engine was stopped")
                    self._deliver(job, GenerationOutput(finish_reason="error", error=error))
                elif self._can_run(job.request.id):
                    self._step(job)
            if stopped:
                return

    def _can_run(self, request_id: str) -> bool:
        job = self._jobs[request_id]
        allowed = self.limit is None or job.written < self.limit
        return job.aborted or (allowed and not job.paused) or self.failure is not None

    def _step(self, job: _Job) -> None:
        request = job.request
        if job.aborted:
            self.aborted.append(request.id)
            return self._deliver(job, GenerationOutput(finish_reason="abort"))
        if self.failure and self.limit is not None and job.written >= self.limit:
            return self._deliver(job, GenerationOutput(finish_reason="error", error=self.failure))
        first = job.written == 0
        self._totals["steps"] += 1
        self._totals["prompt_tokens"] += first * (len(request.prompt) - len(request.prompt) // 2)
        ids, reason = [], "length" if request.max_tokens == 0 else None
        while reason is None and len(ids) < self.batch:
            ids.append(job.script[job.written])
            job.written += 1
            self._totals["output_tokens"] += 1
            if ids[-1] in request.stop_token_ids:
                reason = "stop"
            elif job.written >= min(request.max_tokens, len(job.script)):
                reason = "length"
        scores = None
        if request.logprobs is not None:
            scores = tuple(logprob_of(token, request.logprobs) for token in ids)
        prompt_scores = None
        if first and request.prompt_logprobs is not None:
            rest = (logprob_of(token, request.prompt_logprobs) for token in request.prompt[1:])
            prompt_scores = (None, *rest)
        output = GenerationOutput(
            token_ids=tuple(ids),
            logprobs=scores,
            prompt_logprobs=prompt_scores,
            cached_tokens=len(request.prompt) // 2,
            finish_reason=reason,
        )
        return self._deliver(job, output)

    def _deliver(self, job: _Job, output: GenerationOutput) -> None:
        if output.finish_reason is not None:
            with self._changed:
                del self._jobs[job.request.id]
                self.finished.append(job.request.id)
                self._changed.notify_all()
        job.sink(output)


class FakeEmbedder:
    """A vector per text that depends on its ids alone, of length one."""

    hidden_size = 8

    def __init__(self, max_tokens: int = 32) -> None:
        self.max_tokens = max_tokens
        self.calls: list[Sequence[Sequence[int]]] = []

    def embed(self, texts: Sequence[Sequence[int]], owner: str = "") -> Future[np.ndarray]:
        self.calls.append(texts)
        for ids in texts:
            if wrong := [i for i in ids if not 0 <= i < 256 + 7]:
                raise RequestError(f"input holds token id {wrong[0]}", "input")
        future: Future[np.ndarray] = Future()
        vectors = np.array([[sum(ids) % 97 + i for i in range(1, 9)] for ids in texts], np.float32)
        future.set_result(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        return future

    def stuck(self) -> float:
        return 0.0

    def ended(self) -> bool:
        return False

    def stop(self) -> None:
        pass


def writes(tokenizer: Tokenizer, text: str, *, end: bool = True) -> Script:
    """A script: ``text``, then the end of the sequence; it repeats when ``end`` is false."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    (eos,) = tokenizer.eos_token_ids
    return lambda request: [*ids, eos] if end else ids * (request.max_tokens // len(ids) + 1)


def writes_its_seed(tokenizer: Tokenizer) -> Script:
    """A script that shows which seed the request had."""
    (eos,) = tokenizer.eos_token_ids

    def script(request: GenerationRequest) -> list[int]:
        text = f"seed {request.sampling.seed}"
        return [*tokenizer.encode(text, add_special_tokens=False), eos]

    return script
