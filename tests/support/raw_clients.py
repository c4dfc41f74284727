"""Clients of every kind, which record how their requests ended."""

import json
import socket
from dataclasses import dataclass, field
from typing import Any

import httpx
import websockets

from tests.support.raw_http import event_of, post
from tests.support.server_process import Process
from tests.support.tiny_checkpoints import CHAT

PATH = "/v1/completions"


@dataclass
class Ending:
    """What a client got.

    Attributes:
        way: how it asked.
        tokens: that it was sent.
        error: the code of the error that it was told; None: none.
        complete: it was told that this was all: a whole body, ``[DONE]``, or a closing frame.
        status: of HTTP, or the closing code of a socket.
    """

    way: str
    tokens: int = 0
    error: str | None = None
    complete: bool = False
    status: int = 0
    text: list[str] = field(default_factory=list)


def body(tokens: int, **changes: Any) -> dict[str, Any]:
    return {"model": CHAT, "prompt": "x", "max_tokens": tokens, "ignore_eos": True} | changes


async def stream(server: Process, asked: dict[str, Any], **options: Any) -> Ending:
    """Over server-sent events."""
    ending = Ending("sse")
    try:
        async with (
            httpx.AsyncClient(timeout=60) as client,
            client.stream(
                "POST", server.url + PATH, json=asked | {"stream": True}, **options
            ) as answer,
        ):
            ending.status = answer.status_code
            if answer.status_code != 200:
                ending.error = json.loads(await answer.aread())["error"]["code"]
                ending.complete = True
                return ending
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    ending.complete = True
                elif event := event_of(line):
                    note(ending, event)
    except httpx.TransportError:
        ending.complete = False
    return ending


async def plain(server: Process, asked: dict[str, Any], **options: Any) -> Ending:
    """For the whole answer at once."""
    ending = Ending("plain")
    try:
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(server.url + PATH, json=asked, **options)
    except httpx.TransportError:
        return ending
    ending.status, ending.complete = answer.status_code, True
    told = answer.json()
    if "error" in told:
        ending.error = told["error"]["code"]
    else:
        ending.tokens = told["usage"]["completion_tokens"]
    return ending


async def socketed(
    server: Process, asked: dict[str, Any] | None, *, patient: bool = True
) -> Ending:
    """Over a WebSocket, until it is closed, or to the first error; None: asks for nothing."""
    ending = Ending("websocket")
    try:
        async with websockets.connect(server.ws + PATH, open_timeout=30) as ws:
            if asked is not None:
                await ws.send(json.dumps(asked | {"stream": True}))
            async for frame in ws:
                note(ending, json.loads(frame))
                if ending.error and not patient:
                    ending.complete = True
                    return ending
            ending.status = ws.close_code or 0
            ending.complete = ending.status in (1000, 1001)
    except (OSError, websockets.WebSocketException):
        ending.complete = False
    return ending


def note(ending: Ending, payload: dict[str, Any]) -> None:
    if "error" in payload:
        ending.error = payload["error"]["code"]
    for choice in payload.get("choices", ()):
        ending.text.append(choice["text"])
        ending.tokens += choice["finish_reason"] is None


def stuck(server: Process) -> socket.socket:
    """A client that asks for a long stream and reads nothing of it."""
    host, port = server.address.split(":")
    raw = socket.create_connection((host, int(port)))
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.sendall(post(PATH, body(30_000, stream=True, logprobs=5), host=server.address))
    return raw
