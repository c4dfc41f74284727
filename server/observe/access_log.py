"""The access log: one line for each request, and the attributes of its trace span."""

import time
from typing import Any, Protocol

import structlog
from werkzeug.datastructures import Headers

from server.observe.tracing import Trace, Tracing

log = structlog.get_logger(__name__)


class LoggedError(Protocol):
    """An error that ends a request: its name, and its HTTP status."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def status(self) -> int: ...  # noqa: D102


class TokenCounts(Protocol):
    """How many tokens a request took; ``cached`` of the prompt's were in the prefix cache."""

    @property
    def prompt(self) -> int: ...  # noqa: D102
    @property
    def cached(self) -> int: ...  # noqa: D102
    @property
    def completion(self) -> int: ...  # noqa: D102


class AccessLogEntry:
    """The access log entry of one request, which is also written to its trace span, if it has one.

    Attributes:
        trace: the request's trace; None if it is not traced.
        fields: what the log line will contain, by name.
    """

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self.fields: dict[str, Any] = {}
        self._failed = False
        self._started = time.perf_counter()

    def begin_trace(
        self,
        tracing: Tracing | None,
        method: str,
        path: str,
        headers: Headers,
        id: str,  # noqa: A002
    ) -> None:
        """Start the request's span, if it is to be traced; log lines written meanwhile name it."""
        self.trace = tracing.begin(method, path, headers, id) if tracing is not None else None
        if self.trace is not None:
            structlog.contextvars.bind_contextvars(**self.trace.ids)

    def add(self, **fields: Any) -> None:
        """Add fields; those that are None are left out."""
        self.fields |= {name: value for name, value in fields.items() if value is not None}

    def add_usage(self, usage: TokenCounts) -> None:
        """Add the token counts."""
        self.add(
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
        )

    def add_error(self, error: LoggedError) -> None:
        """Add the error with which the request ended."""
        self.add(error=error.name)
        self._failed = error.status >= 500

    def write(self, event: str) -> None:
        """Write the line under the name ``event``, and end the span."""
        elapsed = (time.perf_counter() - self._started) * 1000
        log.info(event, **self.fields, ms=round(elapsed, 1))
        if self.trace is not None:
            self.trace.end(self.fields, failed=self._failed)
