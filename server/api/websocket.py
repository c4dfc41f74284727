"""Generation over a WebSocket: each frame starts an answer, and several may run at once.

A frame is a request body, or an envelope that gives it an id; see ``docs/api.md``. Frames are read
only as fast as they are handled, and sent only as fast as the client reads, so neither accumulates.
"""

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any

from quart import websocket

from server.config.validation import json_kind
from server.http.codec import STRICT_HEADER, is_strict, parse_object
from server.http.deadline import TIMEOUT_HEADER
from server.http.errors import ApiError, bad_request
from server.http.frames import FrameError
from server.http.pieces import Json
from server.http.socket_connection import close_code, current_socket
from server.keys.caller import Caller
from server.keys.limits import Charge
from server.keys.socket_auth import open_socket
from server.keys.store.store import Usage
from server.observe.access_log import AccessLogEntry
from server.observe.tracing import WEBSOCKET
from server.prompt.cpu_pool import INLINE_BYTES
from server.run.context import Context
from server.run.generation import Answer, Prepare
from server.services import Services

MAX_AT_ONCE = 16
_LONGEST_ID = 128
_ENVELOPES = ("request", "cancel")


async def serve_socket(
    services: Services,
    prepare: Prepare,
    *,
    inline: bool,
    blocks: Callable[[dict[str, Any]], bool],
) -> None:
    """Accept the connection and serve it until the client goes away.

    ``prepare`` reads the bodies, small ones on the event loop if ``inline``, but for those that
    it ``blocks`` on.

    Raises:
        ApiError: a page of a foreign origin opened the connection, which is not accepted.
    """
    await open_socket(services.settings, services.limiter)
    strict = is_strict(websocket.headers.get(STRICT_HEADER))
    await _Session(services, prepare, strict=strict, inline=inline, blocks=blocks).run()


@dataclass(slots=True)
class _Running:
    """A request of this socket that is running.

    Attributes:
        size: size of its frame, in bytes.
        charge: its charge, if the frame was so large that it was counted before being parsed.
        answer: None until its body has been read.
    """

    size: int
    charge: Charge | None
    answer: Answer | None = None
    cancelled: bool = False
    streamed: bool = False

    def cancel(self) -> None:
        self.cancelled = True
        if self.answer is not None:
            self.answer.generation.cancel()


def _shown(kind: Any) -> str:
    return repr(kind[:40]) if isinstance(kind, str) else json_kind(kind)


class _Session:
    """One open socket."""

    def __init__(
        self,
        services: Services,
        prepare: Prepare,
        *,
        strict: bool,
        inline: bool,
        blocks: Callable[[dict[str, Any]], bool],
    ) -> None:
        self._services = services
        self._prepare = prepare
        self._strict = strict
        self._inline = inline
        self._blocks = blocks
        self._caller: Caller = current_socket().caller
        self._running: dict[object, _Running] = {}

    async def run(self) -> None:
        """Handle frames until the client goes away, which cancels this and all running requests.

        Raises:
            FrameError: the client sent an invalid frame.
        """
        failed = None
        try:
            await self._run()
        except* FrameError as group:
            failed = group.exceptions[0]
        if failed is not None:
            raise failed

    async def _run(self) -> None:
        answers: set[asyncio.Task[None]] = set()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._leave_in_time(answers))
            while True:
                if (answering := await self._next()) is not None:
                    task = tasks.create_task(answering)
                    answers.add(task)
                    task.add_done_callback(answers.discard)

    async def _refuse(self, error: ApiError, name: str | None, charge: Charge | None) -> None:
        """Answer a frame that starts nothing; it still counts as a request."""
        try:
            charge = charge or await self._services.limiter.enter(self._caller)
        except ApiError as limit:
            error = limit
        else:
            charge.settle_failed(error)
        await self._send(error.envelope(), name)

    async def _next(self) -> Coroutine[Any, Any, None] | None:
        """Return what answers the next frame; None if it starts no request.

        Only the body of the request outlives this call; the frame itself does not.
        """
        charge, name = None, None
        try:
            frame = await current_socket().receive()
            if (size := len(frame)) > INLINE_BYTES:
                charge = await self._services.limiter.enter(self._caller)
            message = await self._services.cpu_pool.run(
                size, partial(parse_object, frame), owner=self._caller.id
            )
            name = message.get("id") if "type" in message else None
            name = name if isinstance(name, str) else None
            body = self._open(message, name)
        except FrameError:
            raise
        except ApiError as error:
            await self._refuse(error, name, charge)
            return None
        if body is None:
            if charge is not None:
                charge.settle(Usage())
            return None
        key = object() if name is None else name
        self._running[key] = _Running(size, charge)
        return self._answer(key, name, body)

    async def _leave_in_time(self, answers: set[asyncio.Task[None]]) -> None:
        """When the server shuts down, close the connection once all its requests have finished."""
        await self._services.permits.closed.wait()
        while answers:
            await asyncio.wait(tuple(answers))
        await current_socket().close(1001, "the server is shutting down")

    def _open(self, message: dict[str, Any], name: str | None) -> dict[str, Any] | None:
        """Return the body of the request to start; None if the frame is a cancellation."""
        if "type" not in message:
            body: Any = message
        else:
            kind, body = message["type"], message.get("body")
            if kind not in _ENVELOPES:
                raise bad_request(
                    f"type is {_shown(kind)}; a frame is a request body, or an envelope of "
                    f"type {' or '.join(_ENVELOPES)}.",
                    "type",
                )
            if name is None or not 0 < len(name) <= _LONGEST_ID:
                raise bad_request(
                    f"id must be a string of 1 to {_LONGEST_ID} characters; the answer's frames "
                    "carry it.",
                    "id",
                )
            if kind == "cancel":
                if name not in self._running:
                    raise bad_request(
                        f"No request {name!r} is running on this socket; it may have ended.", "id"
                    )
                self._running[name].cancel()
                return None
            if name in self._running:
                raise bad_request(f"A request {name!r} is running on this socket already.", "id")
            if not isinstance(body, dict):
                raise bad_request("body must be an object, the request itself.", "body")
        if len(self._running) >= MAX_AT_ONCE:
            raise ApiError(
                429,
                f"{MAX_AT_ONCE} requests are running on this socket, the most it may have; send "
                "this one again when another has ended, or open another socket.",
                code="too_many_requests",
            )
        return body

    async def _answer(self, key: object, name: str | None, body: dict[str, Any]) -> None:
        """Run one request to its end; its errors affect no other request."""
        entry, running = AccessLogEntry(), self._running[key]
        socket = current_socket()
        path = socket.path
        entry.begin_trace(self._services.tracing, WEBSOCKET, path, socket.headers, socket.id)
        entry.add(route=path, key=self._caller.id, request_id=name)
        async with AsyncExitStack() as cleanup:
            context = Context(
                caller=self._caller,
                strict=self._strict,
                timeout=websocket.headers.get(TIMEOUT_HEADER),
                log_entry=entry,
                cleanup=cleanup,
            )
            try:
                context = await self._services.admission.enter(context, running.charge)
                await self._generate(context, running, name, body)
            except asyncio.CancelledError:
                entry.add(disconnected=True)
                raise
            except Exception as error:  # noqa: BLE001
                failure = context.fail(error)
                answer = running.answer
                told = failure.envelope() if answer is None else answer.dialect.error(failure)[1]
                await self._send(told, name)
                if failure.status == 401:  # the key was revoked, or has expired
                    socket.log_entry.add_error(failure)
                    await socket.close(close_code(failure), failure.name)
            finally:
                del self._running[key]
                entry.write("websocket_request")
            if running.streamed:
                assert running.answer is not None
                done = {"object": "done", "id": running.answer.generation.plan.id}
                await self._send(done, name)

    async def _generate(
        self, context: Context, running: _Running, name: str | None, body: dict[str, Any]
    ) -> None:
        """Answer a request that has been admitted."""
        services = self._services
        prepare = partial(self._prepare, services.registry, context, body)
        answer = await services.cpu_pool.run(
            running.size,
            prepare,
            owner=self._caller.id,
            deadline=context.deadline,
            inline=self._inline and not self._blocks(body),
        )
        running.answer = answer
        if running.cancelled:
            answer.generation.cancel()
        if not answer.stream:
            await self._send(await answer.whole(context, services.admission), name)
            return
        async with aclosing(answer.events(context, services.admission)) as events:
            async for event in events:
                running.streamed = True
                if event is not None:  # None is a silence: the protocol's own pings keep alive
                    await self._send(event[1], name)

    async def _send(self, payload: Mapping[str, Any], name: str | None) -> None:
        if name is not None:
            payload = {**payload, "request_id": name}
        await websocket.send(bytes(Json(payload)).decode())
