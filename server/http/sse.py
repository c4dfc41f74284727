"""Server-sent events, as in the HTML standard's "Server-sent events" section."""

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any

import orjson

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",  # nginx would collect the events otherwise
}
_KEEP_ALIVE = b": keep-alive\n\n"

Event = tuple[str | None, Mapping[str, Any]]
"""An event's name, or None for the standard's default, and its data."""


def event(name: str | None, payload: Mapping[str, Any]) -> bytes:
    """One event."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + orjson.dumps(payload) + b"\n\n"


async def stream(
    first: Event | None,
    rest: AsyncGenerator[Event | None, None],
    fail: Callable[[Exception], Event],
    done: str | None,
) -> AsyncGenerator[bytes, None]:
    """The events of an answer whose first one is there already.

    Args:
        first: the first event; None: it is silence, as in ``rest``.
        rest: the others, with None after a long silence.
        fail: makes an event of a failure, for the status line has long been sent.
        done: the data that comes last in any case; None: nothing does.
    """
    async with aclosing(rest):
        try:
            yield _KEEP_ALIVE if first is None else event(*first)
            async for each in rest:
                yield _KEEP_ALIVE if each is None else event(*each)
        except Exception as error:  # noqa: BLE001
            yield event(*fail(error))
        if done is not None:
            yield f"data: {done}\n\n".encode()
