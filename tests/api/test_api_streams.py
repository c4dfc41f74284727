"""The bytes of a stream, and the frames of a socket, line by line."""

from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from inferneo_jax import EngineFailedError, Tokenizer
from tests.support.asking import (
    BODIES,
    CHATS,
    COMPLETIONS,
    ask,
    frames,
    joined,
    receive,
    send,
    stream,
    text_of,
    until_done,
    whole_texts,
)
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, REPLY, Rig
from tests.support.raw_http import events, parse_stream

BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHATS])
OBJECTS = {COMPLETIONS: "text_completion", CHATS: "chat.completion.chunk"}
PREFIXES = {COMPLETIONS: "cmpl-", CHATS: "chatcmpl-"}


def pieces(rig: Rig, path: str, **changes: Any) -> list[bytes]:
    """A stream's bytes as they arrive."""
    body = BODIES[path] | changes | {"stream": True}
    with (
        httpx.Client(base_url=rig.url) as client,
        client.stream("POST", path, json=body) as response,
    ):
        assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
        assert "Content-Length" not in response.headers
        return list(response.iter_raw())


@BOTH
def test_every_line_of_a_stream_is_data_or_empty(rig: Rig, path: str) -> None:
    raw = b"".join(pieces(rig, path))
    assert raw.endswith(b"data: [DONE]\n\n")
    assert raw.count(b"[DONE]") == 1
    for block in raw.removesuffix(b"\n\n").split(b"\n\n"):
        assert block.startswith(b"data: ")
        assert b"\n" not in block
        block.decode()  # no event splits a character


@BOTH
def test_every_chunk_has_the_head_of_the_page(rig: Rig, path: str) -> None:
    chunks = stream(rig, path, n=2, stream_options={"include_usage": True})
    assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
    for chunk in chunks:
        assert chunk.keys() == {"id", "object", "created", "model", "choices", "usage"}
        assert chunk["id"].startswith(PREFIXES[path])
        assert (chunk["object"], chunk["model"]) == (OBJECTS[path], CHAT)
        assert isinstance(chunk["created"], int)


@BOTH
def test_usage_comes_last_and_is_null_before(rig: Rig, path: str) -> None:
    asked = {"n": 2, "stream_options": {"include_usage": True}}
    usage = ask(rig, path, n=2)["usage"]
    for chunks in (stream(rig, path, **asked), frames(rig, path, **asked)):
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == usage
        assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    for asked in ({}, {"stream_options": {"include_usage": False}}):
        assert all("usage" not in chunk for chunk in stream(rig, path, **asked))


@BOTH
def test_continuous_usage_grows_to_the_whole(rig: Rig, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    usage = ask(rig, path, n=2)["usage"]
    asked = {"n": 2, "stream_options": options}
    for chunks in (stream(rig, path, **asked), frames(rig, path, **asked)):
        counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {usage["prompt_tokens"]}
        assert chunks[-1]["usage"] == chunks[-2]["usage"] == usage


@pytest.mark.parametrize("batch", [1, 7])
def test_a_chat_choice_is_role_then_content_then_reason(rig: Rig, batch: int) -> None:
    rig.engine.batch = batch
    chunks = stream(rig, CHATS, n=3)
    assert all(len(chunk["choices"]) == 1 for chunk in chunks)
    assert [chunk["choices"][0]["index"] for chunk in chunks[:3]] == [0, 1, 2]
    for index in range(3):
        choices = [c for chunk in chunks for c in chunk["choices"] if c["index"] == index]
        first, *middle, last = choices
        assert first["delta"] == {"role": "assistant", "content": ""}
        assert all(choice["delta"].keys() == {"content"} for choice in middle)
        assert all(choice["delta"]["content"] for choice in middle)
        assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
        assert (last["delta"], last["finish_reason"]) == ({}, "stop")


def test_a_completion_choice_ends_with_an_empty_text(rig: Rig) -> None:
    *texts, last = stream(rig, COMPLETIONS)
    assert all(c["text"] and not c["finish_reason"] for e in texts for c in e["choices"])
    assert last["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}]


def test_a_generation_of_nothing_is_still_a_whole_stream(rig: Rig, tokenizer: Tokenizer) -> None:
    rig.engine.script = writes(tokenizer, "")
    role, end = stream(rig, CHATS)
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert end["choices"][0]["finish_reason"] == "stop"
    assert whole_texts(ask(rig, CHATS)) == {0: ""}
    (end,) = stream(rig, COMPLETIONS)
    assert end["choices"][0]["finish_reason"] == "stop"


@BOTH
def test_silence_is_a_comment_and_no_event(
    rig: Rig, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert b": keep-alive" not in b"".join(pieces(rig, path))
    monkeypatch.setattr("server.run.generation.SILENCE_SECONDS", 0.01)
    rig.engine.limit = 0
    body = BODIES[path] | {"stream": True}
    seen: list[str] = []
    with rig.client.stream("POST", path, json=body) as response:
        for line in response.iter_lines():
            seen.append(line)
            if seen.count(": keep-alive") == 2:
                rig.engine.release()
    assert joined(events(seen)) == {0: REPLY}
    assert seen[-2:] == ["data: [DONE]", ""]


@BOTH
def test_a_failure_after_the_first_byte_is_an_event_then_done(rig: Rig, path: str) -> None:
    rig.engine.limit, rig.engine.failure = 3, EngineFailedError("a step failed")
    raw = b"".join(pieces(rig, path))
    *shown, envelope = parse_stream(raw.decode())
    assert envelope.keys() == {"error"}
    assert envelope["error"].keys() == {"message", "type", "param", "code"}
    assert envelope["error"]["type"] == "server_error"
    assert joined(shown) == {0: REPLY[:3]}
    assert all(c["finish_reason"] is None for chunk in shown for c in chunk["choices"])


@BOTH
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_events_frames_and_whole_answers_agree(rig: Rig, path: str, batch: int) -> None:
    rig.engine.batch = batch
    for changes in (
        {},
        {"stop": "of"},
        {"stop": ["\U0001f600", "ïv"], "include_stop_str_in_output": True},
        {"n": 3, "max_tokens": 7},
    ):
        wanted = whole_texts(ask(rig, path, **changes))
        chunks = stream(rig, path, **changes)
        assert joined(chunks) == wanted
        if "max_tokens" not in changes:  # else it may end within a character
            assert not any("\ufffd" in text_of(c) for chunk in chunks for c in chunk["choices"])
        framed = frames(rig, path, **changes)
        assert joined(framed) == wanted
        if "n" not in changes:
            for frame, event in ((framed[0], chunks[0]), (framed[-1], chunks[-1])):
                assert frame.keys() == event.keys()
                assert frame["choices"] == event["choices"]


@BOTH
def test_an_envelope_marks_every_frame_of_its_answer(rig: Rig, path: str) -> None:
    body = BODIES[path] | {"stream": True, "stream_options": {"include_usage": True}}
    with connect(rig.ws + path) as ws:
        send(ws, {"type": "request", "id": "a", "body": body})
        got = until_done(ws)
        # Frames of a bare body that follows carry none.
        send(ws, BODIES[path])
        whole = receive(ws)
    assert {frame["request_id"] for frame in got} == {"a"}
    assert got[-1] == {"object": "done", "id": got[0]["id"], "request_id": "a"}
    assert "request_id" not in whole
    assert whole_texts(whole) == {0: REPLY}


@BOTH
def test_a_cancelled_answer_ends_in_order(rig: Rig, path: str) -> None:
    rig.engine.limit = 2
    envelope = {"type": "request", "id": "a", "body": BODIES[path] | {"stream": True, "n": 2}}
    with connect(rig.ws + path) as ws:
        send(ws, envelope)
        got: list[Any] = []
        while joined(got) != dict.fromkeys((0, 1), REPLY[:2]):
            got.append(receive(ws))
        send(ws, {"type": "cancel", "id": "a"})
        first, second, usage, done = (receive(ws) for _ in range(4))
        for frame in (first, second):
            assert frame["choices"][0]["finish_reason"] == "abort"
            assert text_of(frame["choices"][0]) == ""
        assert {first["choices"][0]["index"], second["choices"][0]["index"]} == {0, 1}
        assert (usage["choices"], usage["usage"]["completion_tokens"]) == ([], 4)
        assert done == {"object": "done", "id": first["id"], "request_id": "a"}
    rig.engine.wait_until(lambda e: len(e.aborted) == 2)


@BOTH
def test_the_page_reads_every_frame_it_gets(rig: Rig, path: str) -> None:
    # The page's client takes data.choices[0].delta.content of every frame that has choices.
    for frame in frames(rig, path):
        assert len(frame["choices"]) == 1
        assert ("delta" in frame["choices"][0]) == (path == CHATS)
