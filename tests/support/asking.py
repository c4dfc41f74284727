"""Requests to both generating endpoints over HTTP, SSE and WebSocket, and their answers."""

from typing import Any

import httpx
import orjson
from websockets.sync.client import ClientConnection, connect

from inferneo_jax import Tokenizer
from tests.support.fake_server import CHAT, Rig
from tests.support.paths import ROOT

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    COMPLETIONS: {"model": CHAT, "prompt": "Hi", "max_tokens": 100},
    CHATS: {"model": CHAT, "messages": HI, "max_tokens": 100},
}


def ask(rig: Rig, path: str, headers: dict[str, str] | None = None, **changes: Any) -> Any:
    """The whole answer."""
    response = rig.post(path, BODIES[path] | changes, headers=headers)
    assert response.status_code == 200, response.text
    return response.json()


def refused(rig: Rig, path: str, headers: dict[str, str] | None = None, **changes: Any) -> Any:
    """The error of a request that must be refused with 400."""
    response = rig.post(path, BODIES[path] | changes, headers=headers)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def stream(rig: Rig, path: str, **changes: Any) -> list[Any]:
    """The chunks of a stream, without ``[DONE]``."""
    return rig.events(path, BODIES[path] | changes)


def frames(rig: Rig, path: str, **changes: Any) -> list[Any]:
    """The frames of a streamed answer over a WebSocket, without the done frame."""
    with connect(rig.ws + path) as ws:
        send(ws, BODIES[path] | changes | {"stream": True})
        *got, done = until_done(ws)
    assert done == {"object": "done", "id": got[0]["id"]}
    return got


def send(ws: ClientConnection, frame: Any) -> None:
    """Send a frame of JSON."""
    ws.send(orjson.dumps(frame).decode())


def receive(ws: ClientConnection) -> Any:
    """The next frame."""
    frame = ws.recv(timeout=10)
    assert isinstance(frame, str)
    return orjson.loads(frame)


def until_done(ws: ClientConnection, names: int = 1) -> list[Any]:
    """The frames up to the last of ``names`` done frames, that one included."""
    got = [receive(ws)]
    while sum(frame.get("object") == "done" for frame in got) < names:
        got.append(receive(ws))
    return got


def prompt_text(rig: Rig, tokenizer: Tokenizer) -> str:
    """The last prompt that the engine got."""
    return tokenizer.decode(rig.engine.submitted[-1].prompt, skip_special_tokens=False)


def text_of(choice: dict[str, Any]) -> str:
    """The text of a choice, whole or a chunk's, of either endpoint."""
    if "text" in choice:
        return str(choice["text"])
    return str(choice.get("message", choice.get("delta", {})).get("content") or "")


def joined(chunks: list[Any]) -> dict[int, str]:
    """The texts of a stream by their choice's index."""
    texts: dict[int, str] = {}
    for chunk in chunks:
        for choice in chunk.get("choices", ()):
            texts[choice["index"]] = texts.get(choice["index"], "") + text_of(choice)
    return texts


def whole_texts(answer: Any) -> dict[int, str]:
    """The texts of a whole answer by their choice's index."""
    return {choice["index"]: text_of(choice) for choice in answer["choices"]}


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error, after what holds for all of them."""
    envelope = response.json()
    assert envelope.keys() == {"error"}
    error: dict[str, Any] = envelope["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["message"].endswith((".", "!"))
    assert error["code"] is None or isinstance(error["code"], str)
    assert response.headers["X-Request-Id"]
    for trace in ("Traceback", ".py", str(ROOT), "site-packages", "object at 0x"):
        assert trace not in response.text
    return error
