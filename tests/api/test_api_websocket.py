"""Generation over WebSockets."""

import asyncio
from typing import Any

import httpx
import orjson
import pytest
import websockets
from websockets.sync.client import connect

from inferneo_jax import EngineFailedError, Tokenizer
from server.app import create_app
from server.config.settings import Settings
from tests.support.asking import CHATS, COMPLETIONS, joined, receive, send, until_done
from tests.support.fake_engine import FakeEmbedder, FakeEngine, writes
from tests.support.fake_server import CHAT, EMBED, REPLY, Rig, models_of, running

BODY = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}], "stream": True}


def request(name: str, **changes: Any) -> dict[str, Any]:
    return {"type": "request", "id": name, "body": {**BODY, **changes}}


def test_without_stream_there_is_one_frame(rig: Rig) -> None:
    with connect(rig.ws + CHATS) as ws:
        send(ws, {**BODY, "stream": False})
        answer = receive(ws)
        assert answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"]["content"] == REPLY
        send(ws, {**BODY, "stream": None})
        assert receive(ws)["object"] == "chat.completion"


def test_a_socket_serves_many_at_once(rig: Rig) -> None:
    names = [f"r{i}" for i in range(16)]
    rig.engine.limit = 3
    with connect(rig.ws + CHATS) as ws:
        for name in names:
            send(ws, request(name))
        rig.engine.wait_until(lambda e: e.num_running == 16)
        send(ws, request("one too many"))
        refused = receive(ws)
        while "error" not in refused:
            refused = receive(ws)
        assert refused["request_id"] == "one too many"
        assert refused["error"]["code"] == "too_many_requests"
        rig.engine.release()
        frames = until_done(ws, names=16)
        send(ws, request("again"))
        assert joined(until_done(ws)) == {0: REPLY}
    ids = {frame["request_id"]: frame["id"] for frame in frames}
    assert ids.keys() == set(names)
    assert len(set(ids.values())) == 16


def test_answers_do_not_mix(rig: Rig, tokenizer: Tokenizer) -> None:
    (eos,) = tokenizer.eos_token_ids
    rig.engine.script = lambda request: [*request.prompt[-40:], eos]
    with connect(rig.ws + COMPLETIONS) as ws:
        for name in ("first", "second", "third"):
            body = {"model": CHAT, "prompt": name * 3, "max_tokens": 99, "stream": True}
            send(ws, {"type": "request", "id": name, "body": body})
        texts = dict.fromkeys(("first", "second", "third"), "")
        for frame in until_done(ws, names=3):
            for choice in frame.get("choices", ()):
                texts[frame["request_id"]] += choice["text"]
    assert texts == {name: name * 3 for name in texts}


def test_cancel_ends_a_plain_answer_with_what_there_is(rig: Rig) -> None:
    rig.engine.limit = 3
    with connect(rig.ws + CHATS) as ws:
        send(ws, request("a", stream=False))
        rig.engine.wait_until(lambda e: e.num_running == 1)
        send(ws, {"type": "cancel", "id": "a"})
        answer = receive(ws)
        assert answer["choices"][0]["finish_reason"] == "abort"
        assert answer["request_id"] == "a"
        rig.engine.wait_until(lambda e: len(e.aborted) == 1 and e.num_running == 0)
        rig.engine.release()
        send(ws, request("a"))
        assert joined(until_done(ws)) == {0: REPLY}


def test_cancel_leaves_the_others_alone(rig: Rig) -> None:
    rig.engine.limit = 3
    with connect(rig.ws + CHATS) as ws:
        send(ws, request("a"))
        send(ws, request("b"))
        rig.engine.wait_until(lambda e: e.num_running == 2)
        send(ws, {"type": "cancel", "id": "a"})
        rig.engine.wait_until(lambda e: len(e.aborted) == 1)
        rig.engine.release()
        frames = until_done(ws, names=2)
    assert joined([f for f in frames if f["request_id"] == "b"]) == {0: REPLY}


@pytest.mark.parametrize(
    ("frame", "param", "words"),
    [
        ("{", None, "not valid JSON"),
        ("", None, "no body"),
        ("[]", None, "not an object"),
        ("[" * 5000, None, "not valid JSON"),
        ({"type": "dance", "id": "a"}, "type", "'dance'"),
        ({"type": "request", "body": BODY}, "id", "1 to 128"),
        ({"type": "request", "id": 5, "body": BODY}, "id", "1 to 128"),
        ({"type": "request", "id": "x" * 129, "body": BODY}, "id", "1 to 128"),
        ({"type": "request", "id": "a", "body": []}, "body", "an object"),
        ({"type": "cancel", "id": "a"}, "id", "'a'"),
        ({**BODY, "temperature": 9}, "temperature", "at most 2"),
        ({**BODY, "model": "none"}, "model", "none"),
        ({**BODY, "model": EMBED}, "model", "/v1/embeddings"),
        ({}, "model", "required"),
        (" " * 300_000, None, "262144"),
    ],
)
def test_a_bad_frame_is_an_error_frame_and_the_socket_stays_open(
    rig: Rig, frame: Any, param: str | None, words: str
) -> None:
    with connect(rig.ws + CHATS) as ws:
        ws.send(frame if isinstance(frame, str) else orjson.dumps(frame).decode())
        error = receive(ws)["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["param"] == param
        assert words in error["message"]
        send(ws, BODY)
        assert joined(until_done(ws)) == {0: REPLY}


def test_binary_frames_are_read_like_text(rig: Rig) -> None:
    with connect(rig.ws + CHATS) as ws:
        ws.send(orjson.dumps(BODY))
        assert joined(until_done(ws)) == {0: REPLY}


def test_an_id_in_use_is_refused(rig: Rig) -> None:
    rig.engine.limit = 0
    with connect(rig.ws + CHATS) as ws:
        send(ws, request("a"))
        send(ws, request("a"))
        refused = receive(ws)
        assert refused["error"]["param"] == "id"
        rig.engine.release()
        assert joined(until_done(ws)) == {0: REPLY}


def test_a_failure_in_a_stream_is_a_frame_before_done(rig: Rig) -> None:
    rig.engine.limit, rig.engine.failure = 3, EngineFailedError("a step failed")
    with connect(rig.ws + CHATS) as ws:
        send(ws, request("a"))
        *_, error, done = until_done(ws)
        assert error["error"]["type"] == "server_error"
        assert done["request_id"] == error["request_id"] == "a"


def test_strict_holds_for_the_whole_socket(rig: Rig) -> None:
    with connect(rig.ws + CHATS, additional_headers={"X-Inferneo-Strict": "true"}) as ws:
        send(ws, {**BODY, "frobnicate": 1})
        assert receive(ws)["error"]["param"] == "frobnicate"


@pytest.mark.parametrize(
    ("origin", "allowed"),
    [
        (None, True),
        ("http://localhost:3000", True),
        ("http://127.0.0.1", True),
        ("http://[::1]:9", True),
        ("https://page.example", True),  # listed in the settings
        ("https://evil.example", False),
        ("http://localhost.evil.example", False),
        ("null", False),
        ("http://192.0.2.1", False),
        ("http://[", False),
    ],
)
def test_only_pages_of_known_origins_may_connect(
    rig: Rig, origin: str | None, allowed: bool
) -> None:
    if allowed:
        with connect(rig.ws + CHATS, origin=origin) as ws:  # type: ignore[arg-type]
            send(ws, BODY)
            assert joined(until_done(ws)) == {0: REPLY}
        return
    with pytest.raises(websockets.InvalidStatus) as caught:
        connect(rig.ws + CHATS, origin=origin)  # type: ignore[arg-type]
    response = caught.value.response
    assert response.status_code == 403
    assert response.headers["X-Request-Id"]
    assert orjson.loads(response.body or b"")["error"]["type"] == "permission_error"


def test_a_page_of_the_same_address_may_connect_but_not_of_the_same_name(
    tokenizer: Tokenizer,
) -> None:
    def status(rig: Rig, origin: str, host: str) -> int:
        headers = {"Origin": origin, "Host": host, "Upgrade": "websocket"}
        headers |= {"Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
        headers |= {"Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ=="}
        with (
            httpx.Client(base_url=rig.url) as client,
            client.stream("GET", CHATS, headers=headers) as response,
        ):
            return response.status_code

    with running(tokenizer, require_key="false") as rig:
        assert status(rig, "http://192.0.2.1:8000", "192.0.2.1:8000") == 101
        assert status(rig, "http://rebound.example:8000", "rebound.example:8000") == 403


@pytest.mark.parametrize(("path", "status"), [("/v1/embeddings", 405), ("/v1/nothing", 404)])
def test_paths_without_a_socket_are_refused_before_the_upgrade(
    rig: Rig, path: str, status: int
) -> None:
    with pytest.raises(websockets.InvalidStatus) as caught:
        connect(rig.ws + path)
    assert caught.value.response.status_code == status
    assert orjson.loads(caught.value.response.body or b"")["error"]["message"]


async def test_a_slow_reader_pauses_nobody_else(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, "go on ", end=False)
    slow_body = {"model": CHAT, "prompt": "Hi", "max_tokens": 400, "logprobs": 20, "stream": True}
    async with (
        websockets.connect(rig.ws + COMPLETIONS, max_queue=1, close_timeout=0) as slow,
        websockets.connect(rig.ws + COMPLETIONS) as quick,
    ):
        for i in range(16):
            await slow.send(
                orjson.dumps({"type": "request", "id": str(i), "body": slow_body}).decode()
            )
        await asyncio.to_thread(rig.engine.wait_until, lambda e: e.num_paused)
        await quick.send(orjson.dumps({**slow_body, "logprobs": None, "max_tokens": 6}).decode())
        text = ""
        async for frame in quick:
            payload = orjson.loads(frame)
            if payload["object"] == "done":
                break
            text += payload["choices"][0]["text"]
        assert text == "go on "
        # On a busy machine a pause may have been of the server's own slowness, and be over by now;
        # that of the reader, who takes nothing, comes and stays.
        await asyncio.to_thread(rig.engine.wait_until, lambda e: e.num_paused)


async def test_a_silent_socket_is_pinged(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.http.frames.PING_SECONDS", 0.01)
    pinged = asyncio.Event()

    class Client(websockets.ClientConnection):
        def process_event(self, event: Any) -> None:
            if getattr(event, "opcode", None) is websockets.Opcode.PING:
                pinged.set()
            super().process_event(event)

    async with websockets.connect(rig.ws + CHATS, create_connection=Client):
        await asyncio.wait_for(pinged.wait(), 10)


async def test_another_server_than_hypercorn_may_bring_the_frames(tokenizer: Tokenizer) -> None:
    """As Ray Serve does: messages of ASGI, and nothing of Hypercorn's to reach."""
    models = models_of(FakeEngine(writes(tokenizer, REPLY)), FakeEmbedder(), tokenizer)
    settings = Settings(models=(CHAT, EMBED), require_key="false")
    app = create_app(settings, lambda source, *_: models[source.id]())
    async with app.test_app() as started:
        client = started.test_client()
        while (await client.get("/ready")).status_code != 200:
            pass
        async with client.websocket(CHATS) as ws:
            for frame in (orjson.dumps({**BODY, "stream": False}).decode(), b"{}", ""):
                await ws.send(frame)
            kinds = [set(orjson.loads(await ws.receive())) for _ in range(3)]
        assert sorted("error" in kind for kind in kinds) == [False, True, True]
