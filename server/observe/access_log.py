"""What is said of a request: its log line, and its span."""

import time
from typing import Any

import structlog
from werkzeug.datastructures import Headers

from server.http.errors import ApiError
from server.observe.tracing import Trace, Tracing
from server.run.dialect import Usage

log = structlog.get_logger(__name__)


class Record:
    """What is said of a request when it is over: in its log line, and in its span if it has one.

    Attributes:
        trace: its trace; None: it has none.
    """

    def __init__(self) -> None:
        self.trace: Trace | None = None
        self.facts: dict[str, Any] = {}
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
        """Begin its span, if traces are wanted of it; what is logged meanwhile names that."""
        self.trace = tracing.begin(method, path, headers, id) if tracing is not None else None
        if self.trace is not None:
            structlog.contextvars.bind_contextvars(**self.trace.ids)

    def note(self, **facts: Any) -> None:
        """Add facts; None is left out."""
        self.facts |= {name: fact for name, fact in facts.items() if fact is not None}

    def note_usage(self, usage: Usage) -> None:
        """Add the tokens it took."""
        self.note(
            prompt_tokens=usage.prompt,
            cached_tokens=usage.cached,
            completion_tokens=usage.completion,
        )

    def note_error(self, error: ApiError) -> None:
        """Add why it was not served, or not to its end."""
        self.note(error=error.name)
        self._failed = error.status >= 500

    def write(self, event: str) -> None:
        """Log it, and end its span."""
        elapsed = (time.perf_counter() - self._started) * 1000
        log.info(event, **self.facts, ms=round(elapsed, 1))
        if self.trace is not None:
            self.trace.end(self.facts, failed=self._failed)
