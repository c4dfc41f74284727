"""Metrics for ``GET /metrics``, in the Prometheus text format.

A metric that vLLM has too has its name, labels and unit
(https://docs.vllm.ai/en/stable/usage/metrics.html), so that dashboards and alerts made for vLLM
work. All others begin with ``inferneo_``. Times are taken where the engine emits a token, before
detokenization and HTTP; those of a request begin when it is submitted to the engine.
"""

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)

from inferneo_jax import GenerationOutput
from server.observe.collector import MODEL, ServerState, StateCollector
from server.observe.tracing import METHODS, Times, Trace

# When each figure began: a series more for each, which nobody plots.
disable_created_metrics()  # type: ignore[no-untyped-call]

_REASONS = ("stop", "length", "abort", "error")

_SECONDS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_SHORT_SECONDS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1)
_LONG_SECONDS = (
    0.1,
    0.3,
    0.5,
    0.8,
    1,
    1.5,
    2,
    2.5,
    5,
    10,
    15,
    20,
    30,
    40,
    50,
    60,
    120,
    240,
    480,
    960,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class Metrics:
    """All metrics of one application.

    Args:
        read_state: returns what the gauges show now.

    Attributes:
        registry: of ``prometheus_client``, to be written out.
    """

    def __init__(self, read_state: Callable[[], ServerState] = ServerState) -> None:
        self.registry = registry = CollectorRegistry()
        registry.register(StateCollector(read_state))
        ProcessCollector(registry=registry)

        def histogram(name: str, words: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, words, [MODEL], buckets=buckets, registry=registry)

        def counter(name: str, words: str, *labels: str) -> Counter:
            return Counter(name, words, labels, registry=registry)

        self._prompts = counter("vllm:prompt_tokens", "Tokens of prompts, cached or not.", MODEL)
        self._queries = counter(
            "vllm:prefix_cache_queries", "Tokens that were looked up in the prefix cache.", MODEL
        )
        self._hits = counter(
            "vllm:prefix_cache_hits", "Tokens that were found in the prefix cache.", MODEL
        )
        self._finished = counter(
            "vllm:request_success",
            "Sequences that ended, by why: stop, length, abort (its reader left), error.",
            MODEL,
            "finished_reason",
        )
        self._begun: set[str] = set()
        self._first = histogram(
            "vllm:time_to_first_token_seconds", "From request to first token.", _SECONDS
        )
        self._between = histogram(
            "vllm:inter_token_latency_seconds", "Between successive tokens.", _SHORT_SECONDS
        )
        self._whole = histogram(
            "vllm:e2e_request_latency_seconds", "From request to last token.", _LONG_SECONDS
        )
        self._queue = histogram(
            "vllm:request_queue_time_seconds", "From request to slot.", _LONG_SECONDS
        )
        self._prefill = histogram(
            "vllm:request_prefill_time_seconds", "From slot to first token.", _LONG_SECONDS
        )
        self._decode = histogram(
            "vllm:request_decode_time_seconds", "From first to last token.", _LONG_SECONDS
        )
        self._prompt_sizes = histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self._output_sizes = histogram(
            "vllm:request_generation_tokens", "Tokens generated for a sequence.", _TOKENS
        )
        self._embedded = counter(
            "inferneo_embedding_tokens", "Tokens of texts that were embedded.", MODEL
        )
        self._requests = counter(
            "http_requests",
            "Requests answered, by route and status.",
            "method",
            "handler",
            "status",
        )

        self._sockets = counter(
            "inferneo_websockets",
            "WebSockets that ended, by the status they were refused with, or else the close code.",
            "handler",
            "code",
        )

    def meter(self, model: str, trace: Trace | None = None) -> "Meter":
        """For one request to a model that generates; ``trace`` is told the same times."""
        if model not in self._begun:
            self._begun.add(model)
            # From 0: of a series that appears with its first error Prometheus sees no increase.
            for reason in _REASONS:
                self._finished.labels(model, reason)
        return Meter(self, model, trace)

    def embedded(self, model: str, tokens: int) -> None:
        """Texts were embedded."""
        self._embedded.labels(model).inc(tokens)

    def answered(self, method: str, rule: str, status: int) -> None:
        """A request was answered; ``rule`` is its route's pattern, not its path.

        Clients may make up methods, which must make no series.
        """
        known = method if method in METHODS else "other"
        self._requests.labels(known, rule, f"{status // 100}xx").inc()

    def socket_ended(self, rule: str, code: str) -> None:
        """A WebSocket ended: with this status or close code of the server, or by its ``client``."""
        self._sockets.labels(rule, code).inc()


class Meter:
    """Takes the times of one request's sequences."""

    def __init__(self, metrics: Metrics, model: str, trace: Trace | None) -> None:
        self._metrics, self._model, self._trace = metrics, model, trace
        self._started = time.monotonic()
        self._running: dict[int, Times] = {}
        self._between = metrics._between.labels(model)

    def submitted(self, index: int, prompt_tokens: int) -> None:
        """A sequence was given to the engine."""
        self._running[index] = Times(self._started)
        self._metrics._prompts.labels(self._model).inc(prompt_tokens)
        self._metrics._prompt_sizes.labels(self._model).observe(prompt_tokens)
        self._metrics._queries.labels(self._model).inc(prompt_tokens)

    def output(self, index: int, output: GenerationOutput, when: float) -> None:
        """The engine handed something over."""
        times, count = self._running.get(index), len(output.token_ids)
        if times is None or not count:
            return
        if times.first is None:
            # Tokens that come with the first one have waited for none: as in vLLM, an interval is
            # one between two outputs.
            times.first, times.admitted = when, output.admitted_at
            self._metrics._first.labels(self._model).observe(when - self._started)
            self._metrics._hits.labels(self._model).inc(output.cached_tokens)
        else:
            for _ in range(count):  # tokens that come at once share the interval before them
                self._between.observe((when - times.last) / count)
        times.last, times.tokens = when, times.tokens + count

    def ended(self, index: int, reason: str) -> None:
        """A sequence is over."""
        if (times := self._running.pop(index, None)) is None:
            return
        if self._trace is not None:
            self._trace.sequence(index, reason, times)
        metrics, model = self._metrics, self._model
        counted = "stop" if reason == "tool_calls" else reason  # as vLLM counts them
        metrics._finished.labels(model, counted).inc()
        metrics._output_sizes.labels(model).observe(times.tokens)
        if times.first is None or reason in ("abort", "error"):
            return
        metrics._whole.labels(model).observe(times.last - self._started)
        metrics._decode.labels(model).observe(times.last - times.first)
        if times.admitted is not None:
            metrics._queue.labels(model).observe(max(0.0, times.admitted - self._started))
            metrics._prefill.labels(model).observe(times.first - times.admitted)
