"""Events on the wire, whatever dialect they are of."""

from collections.abc import AsyncGenerator

from server.http import sse


async def events(*rest: sse.Event | None, error: Exception | None = None) -> AsyncGenerator:
    for event in rest:
        yield event
    if error is not None:
        raise error


async def written(rest: AsyncGenerator, done: str | None) -> list[bytes]:
    def fail(error: Exception) -> sse.Event:
        return "error", {"message": str(error)}

    return [part async for part in sse.stream((None, {"a": 1}), rest, fail, done)]


async def test_events_have_the_names_that_their_dialect_gives_them() -> None:
    assert await written(events(("delta", {"b": 2}), None), None) == [
        b'data: {"a":1}\n\n',
        b'event: delta\ndata: {"b":2}\n\n',
        b": keep-alive\n\n",
    ]


async def test_a_failure_is_an_event_before_the_end() -> None:
    assert await written(events(error=ValueError("no")), "[DONE]") == [
        b'data: {"a":1}\n\n',
        b'event: error\ndata: {"message":"no"}\n\n',
        b"data: [DONE]\n\n",
    ]
