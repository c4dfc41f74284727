"""OpenTelemetry traces of requests, configured by its own variables: see docs/tracing.md.

A request is one span. Its attributes are the facts of its log line, under the names of the semantic
conventions for HTTP and for generative AI; below it, each sequence's time is cut at the instants
that ``/metrics`` counts. Of OpenTelemetry nothing is imported unless traces are wanted.
"""

import asyncio
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import structlog
from werkzeug.datastructures import Headers

from inferneo_jax import __version__
from server.config.settings import traces_wanted

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

    from inferneo_jax import SamplingParams

log = structlog.get_logger(__name__)

METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
"""The methods of HTTP. Clients may invent others, which must not name metrics or spans."""
WEBSOCKET = "WEBSOCKET"
"""In place of a method, which requests on a WebSocket do not have."""
CLOSE_SECONDS = 3.0
"""How long the shutdown of the server waits for a collector."""
_LONGEST_PATH = 200
_MOST_SEQUENCES = 16
"""Maximum sequences of one request whose times become spans."""

_ATTRIBUTES = {
    "route": "http.route",
    "status": "http.response.status_code",
    "error": "error.type",
    "model": "gen_ai.request.model",
    "stream": "gen_ai.request.stream",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "cached_tokens": "gen_ai.usage.cache_read.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "key": "inferneo.key_id",
    "disconnected": "inferneo.disconnected",
}
"""The span attribute of each access log field; fields not listed are left out."""


class Times:
    """When a sequence was submitted, got a slot, its first token and its last token.

    In seconds of ``time.monotonic``.
    """

    __slots__ = ("admitted", "first", "last", "started", "tokens")

    def __init__(self, started: float) -> None:
        self.started = started
        self.admitted: float | None = None
        self.first: float | None = None
        self.last = started
        self.tokens = 0


class Trace:
    """The spans of one request and of its sequences. Unsampled, calls cost next to nothing.

    Attributes:
        ids: ``trace_id`` and ``span_id``, in hexadecimal digits, for log lines.
    """

    def __init__(self, tracing: "Tracing", method: str, span: "Span") -> None:
        from opentelemetry.trace import format_span_id, format_trace_id

        self._tracing, self._method, self._span = tracing, method, span
        # The engine's clock is monotonic; spans have the time of day, in nanoseconds.
        self._offset = time.time_ns() - time.monotonic_ns()
        self._finish_reasons: dict[int, str] = {}
        self._first: float | None = None
        context = span.get_span_context()
        self.ids = {
            "trace_id": format_trace_id(context.trace_id),
            "span_id": format_span_id(context.span_id),
        }

    def planned(
        self,
        id: str,  # noqa: A002
        model: str,
        max_tokens: int,
        sampling: "SamplingParams",
        num_choices: int,
    ) -> None:
        """Add what will be generated, by which model, and how each choice is sampled."""
        if not self._span.is_recording():
            return
        self._span.set_attributes(
            {
                "gen_ai.response.id": id,
                "gen_ai.response.model": model,
                "gen_ai.request.max_tokens": max_tokens,
                "gen_ai.request.temperature": sampling.temperature,
                "gen_ai.request.top_p": sampling.top_p,
                "gen_ai.request.choice.count": num_choices,
            }
        )

    def sequence(self, index: int, reason: str, times: Times) -> None:
        """A sequence has ended: its time in the queue, in prefill and in decode."""
        if not self._span.is_recording():
            return
        self._finish_reasons[index] = reason
        if times.first is None:
            return
        taken = times.first - times.started
        self._first = taken if self._first is None else min(self._first, taken)
        if index >= _MOST_SEQUENCES:
            return
        facts = {"inferneo.sequence": index}
        # Without the instant of its slot, waiting and prefill cannot be told apart.
        admitted = times.started if times.admitted is None else times.admitted
        if times.admitted is not None:
            self._child("queue", times.started, admitted, facts)
        self._child("prefill", admitted, times.first, facts)
        tokens = {"gen_ai.usage.output_tokens": times.tokens}
        self._child("decode", times.first, times.last, facts | tokens)

    def end(self, facts: "Mapping[str, Any]", *, failed: bool) -> None:
        """The request is over; ``failed``: by the server's fault."""
        from opentelemetry.trace import StatusCode

        span, route = self._span, facts.get("route", "none")
        if span.is_recording():
            found = {_ATTRIBUTES[name]: fact for name, fact in facts.items() if name in _ATTRIBUTES}
            if (operation := self._tracing.operations.get(route)) is not None:
                found |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "inferneo"}
            if self._finish_reasons:
                reasons = [reason for _, reason in sorted(self._finish_reasons.items())]
                found["gen_ai.response.finish_reasons"] = reasons
            if self._first is not None:
                found["gen_ai.server.time_to_first_token"] = self._first
            if route == "none":  # nothing is served at this path
                found.pop("http.route", None)
            else:
                span.update_name(f"{self._method} {route}")
            span.set_attributes(found)
            if failed:
                span.set_status(StatusCode.ERROR)
        span.end()

    def _child(self, name: str, start: float, end: float, facts: dict[str, Any]) -> None:
        start_time, end_time = (int(1e9 * t) + self._offset for t in (start, max(start, end)))
        child = self._tracing.start(name, self._span, start_time, facts)
        child.end(end_time)


class Tracing:
    """Begins the traces of one application, and sends them off in the end.

    Args:
        provider: of OpenTelemetry's SDK; its processors decide where spans go.
        operations: by route, what the conventions for generative AI call the operation.
        untraced: paths whose requests have no traces.
    """

    def __init__(
        self,
        provider: "TracerProvider",
        operations: "Mapping[str, str]",
        untraced: "Collection[str]",
    ) -> None:
        from opentelemetry import propagate, trace
        from opentelemetry.propagators.textmap import Getter

        class ReadHeaders(Getter[Headers]):
            def get(self, carrier: Headers, key: str) -> list[str] | None:
                return carrier.getlist(key) or None

            def keys(self, carrier: Headers) -> list[str]:
                return list(carrier.keys())

        self.operations = operations
        self._untraced = untraced
        self._provider = provider
        self._tracer = provider.get_tracer("inferneo", __version__)
        self._propagate, self._trace, self._getter = propagate, trace, ReadHeaders()

    def begin(self, method: str, path: str, headers: Headers, id: str) -> Trace | None:  # noqa: A002
        """The trace of a request that has come; a child of the client's span if it names one.

        Args:
            method: of HTTP, or ``WEBSOCKET`` for one of the requests on a socket.
            path: None is begun for those that are untraced.
            headers: with ``traceparent`` (https://www.w3.org/TR/trace-context/), or none.
            id: of the request.
        """
        if path in self._untraced:
            return None
        facts = {"url.path": path[:_LONGEST_PATH], "inferneo.request_id": id}
        if method == WEBSOCKET:
            facts["network.protocol.name"] = "websocket"
        else:
            facts["http.request.method"] = method if method in METHODS else "_OTHER"
            method = method if method in METHODS else "HTTP"
        parent = self._propagate.extract(headers, getter=self._getter)
        kind = self._trace.SpanKind.SERVER
        span = self._tracer.start_span(method, parent, kind=kind, attributes=facts)
        return Trace(self, method, span)

    def start(self, name: str, parent: "Span", start_time: int, facts: dict[str, Any]) -> "Span":
        """A part of ``parent``, begun at ``start_time``, in nanoseconds since 1970."""
        context = self._trace.set_span_in_context(parent)
        return self._tracer.start_span(name, context, attributes=facts, start_time=start_time)

    async def close(self) -> None:
        """Send what has not been sent, in ``CLOSE_SECONDS`` at most."""
        closed, loop = asyncio.Event(), asyncio.get_running_loop()

        def shut_down() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop has closed: nobody waits any more
                loop.call_soon_threadsafe(closed.set)

        # A thread that is left behind if it must be: the process would wait for one of a pool.
        threading.Thread(target=shut_down, name="traces-end", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_SECONDS):
                await closed.wait()
        except TimeoutError:
            log.warning("traces_lost", reason=f"not all were taken within {CLOSE_SECONDS:g} s")


def open_tracing(operations: "Mapping[str, str]", untraced: "Collection[str]") -> Tracing | None:
    """What the variables of OpenTelemetry ask for; None: nothing, or what cannot be done.

    The latter is one warning in the log: a server without traces serves all the same.
    """
    wanted = traces_wanted()
    if not wanted.exporters:
        return None
    try:
        provider = _provider([_exporter(name, wanted.protocol) for name in wanted.exporters])
        return Tracing(provider, operations, untraced)
    except ModuleNotFoundError as error:
        reason = f"{error}. Traces need OpenTelemetry: pip install 'inferneo-jax[otel]'"
    except Exception as error:  # noqa: BLE001  (of the variables that the SDK reads itself)
        reason = str(error)
    log.warning("traces_off", reason=reason)
    return None


def _exporter(name: str, protocol: str) -> "SpanExporter":
    match name:
        case "otlp" if protocol == "http/protobuf":
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            return OTLPSpanExporter()
        case "otlp":
            raise ValueError(
                f"OTEL_EXPORTER_OTLP_PROTOCOL is {protocol}; this server sends http/protobuf only, "
                "which collectors take on port 4318 as a rule"
            )
        case "console":
            from opentelemetry.sdk.trace.export import ConsoleSpanExporter

            return ConsoleSpanExporter()
    raise ValueError(f"OTEL_TRACES_EXPORTER names {name}; there are otlp, console and none")


def _provider(exporters: "list[SpanExporter]") -> "TracerProvider":
    from opentelemetry.sdk.resources import SERVICE_NAME, Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    resource = Resource.create({"service.version": __version__})
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: "inferneo"}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider
