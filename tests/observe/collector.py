"""Where spans go in tests: kept in memory, or a collector that speaks OTLP over HTTP."""

import contextlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import SpanKind

from server.observe.tracing import Tracing
from tests.support.fake_engine import TIMEOUT


class Kept(SpanExporter):
    """Spans in the order of their ends, and a wait for them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._spans: list[ReadableSpan] = []
        self.closed = False

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with self._changed:
            self._spans += spans
            self._changed.notify_all()
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self.closed = True

    def clear(self) -> None:
        self._spans.clear()

    def requests(self, number: int = 1) -> list[ReadableSpan]:
        """The spans of this many requests, which are all that there are."""

        def found() -> list[ReadableSpan]:
            return [span for span in self._spans if span.kind is SpanKind.SERVER]

        with self._changed:
            assert self._changed.wait_for(lambda: len(found()) >= number, TIMEOUT)
            assert len(found()) == number
            return found()

    def below(self, parent: ReadableSpan) -> list[ReadableSpan]:
        """The parts of a request, by sequence and time."""
        of = [s for s in self._spans if s.parent and s.parent.span_id == parent.context.span_id]
        return sorted(of, key=lambda s: (s.attributes["inferneo.sequence"], s.start_time))

    @property
    def spans(self) -> list[ReadableSpan]:
        return list(self._spans)

    def tracing(self, operations: Mapping[str, str], untraced: Collection[str]) -> Tracing:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(self))
        return Tracing(provider, operations, untraced)


class Collector:
    """What a collector on loopback was sent."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.headers: list[Message] = []
        self.received: list[ExportTraceServiceRequest] = []


@contextlib.contextmanager
def collecting(answer: Callable[[], int]) -> Iterator[Collector]:
    """A collector whose every answer has the status that ``answer`` gives, when it gives it."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collector.received.append(ExportTraceServiceRequest.FromString(body))
            collector.headers.append(self.headers)
            status = answer()
            with contextlib.suppress(ConnectionError):
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
