"""Server-sent events, as in the HTML standard's "Server-sent events" section."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import orjson

from server.http.errors import as_api_error
from server.observe.access_log import AccessLogEntry

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect the events otherwise
}
_KEEP_ALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"


def event(payload: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(payload) + b"\n\n"


async def stream(
    first: Mapping[str, Any] | None,
    rest: AsyncGenerator[Mapping[str, Any] | None, None],
    entry: AccessLogEntry,
) -> AsyncGenerator[bytes, None]:
    """The events of an answer whose first chunk is there already.

    A failure becomes an event of its own; ``[DONE]`` comes last in any case.
    """
    async with aclosing(rest):
        try:
            yield _KEEP_ALIVE if first is None else event(first)
            async for chunk in rest:
                yield _KEEP_ALIVE if chunk is None else event(chunk)
        except Exception as error:  # noqa: BLE001  (the status line has long been sent)
            failure = as_api_error(error)
            entry.add_error(failure)
            yield event(failure.envelope())
        yield _DONE
