"""Whatever makes the server work counts as a request of its key, answered or refused."""

import threading
from typing import Any

import httpx
import orjson
import pytest
from websockets.sync.client import connect

from inferneo_jax import RequestError, Tokenizer
from server.http.errors import unavailable
from server.keys.key import Limits
from tests.support.fake_engine import TIMEOUT, writes
from tests.support.fake_server import CHAT, EMBED
from tests.support.keyed_server import KeyRig, bearer

COMPLETIONS = "/v1/completions"
BODY = {"model": CHAT, "prompt": "Hi", "max_tokens": 3}
REFUSED: dict[str, tuple[str, Any]] = {
    "no JSON": (COMPLETIONS, b"{"),
    "a wrong field": (COMPLETIONS, BODY | {"n": "x"}),
    "an unknown model": (COMPLETIONS, BODY | {"model": "none"}),
    "too long a prompt": ("/v1/completions", BODY | {"prompt": "x" * 1000}),
    "a wrong conversation": ("/v1/chat/completions", {"model": CHAT, "messages": []}),
    "too long an input": ("/v1/embeddings", {"model": EMBED, "input": "x" * 100}),
    "no prompt": ("/tokenize", {}),
    "no tokens": ("/detokenize", {}),
}
COUNTED: dict[str, tuple[str, Any]] = {
    "text": ("/tokenize", {"prompt": "Hi"}),
    "conversation": ("/tokenize", {"messages": [{"role": "user", "content": "Hi"}]}),
    "tokens": ("/detokenize", {"tokens": [1]}),
}


def post(rig: KeyRig, headers: dict[str, str], path: str, body: Any) -> httpx.Response:
    headers = headers | {"Content-Type": "application/json"}
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    return rig.client.post(path, headers=headers, content=content)


def total(rig: KeyRig, headers: dict[str, str]) -> tuple[int, int]:
    """Requests and tokens that a key was charged."""
    spent = rig.client.get("/v1/usage", headers=headers).json()["total"]
    return spent["requests"], spent["prompt_tokens"] + spent["completion_tokens"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_request_counts_without_tokens(rig: KeyRig, name: str) -> None:
    headers = rig.headers(Limits(requests=2, tokens=1000, concurrent=1))
    answers = [post(rig, headers, *REFUSED[name]) for _ in range(3)]
    assert [answer.status_code for answer in answers[:2]] == [404 if "unknown" in name else 400] * 2
    assert answers[1].headers["X-RateLimit-Remaining"] == "0"
    assert answers[2].json()["error"]["code"] == "rate_limit_exceeded"
    assert total(rig, headers) == (2, 0)


@pytest.mark.parametrize("name", COUNTED)
def test_tokenizing_counts_without_tokens(rig: KeyRig, name: str) -> None:
    headers = rig.headers(Limits(requests=2, tokens=1, concurrent=1))
    answers = [post(rig, headers, *COUNTED[name]) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert total(rig, headers) == (2, 0)


def test_no_text_is_read_for_a_key_that_is_over_its_limit(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = rig.headers(Limits(requests=1))
    assert post(rig, headers, COMPLETIONS, BODY).status_code == 200
    monkeypatch.delattr("server.http.codec.parse_object")  # or the answer would be a 500
    assert post(rig, headers, COMPLETIONS, BODY).status_code == 429


def test_what_the_engine_refuses_counts_and_costs_no_tokens(rig: KeyRig) -> None:
    rig.engine.refusal = RequestError("no", "prompt")
    headers = rig.headers()
    assert post(rig, headers, COMPLETIONS, BODY).status_code == 400
    assert total(rig, headers) == (1, 0)


def test_a_request_that_a_limit_refuses_does_not_count(rig: KeyRig) -> None:
    headers = rig.headers(Limits(requests=3, tokens=20))
    assert post(rig, headers, COMPLETIONS, BODY | {"max_tokens": 18}).status_code == 200
    for _ in range(5):
        refused = post(rig, headers, COMPLETIONS, BODY | {"max_tokens": 18})
        assert "20 tokens a minute" in refused.json()["error"]["message"]
    assert total(rig, headers) == (1, 20)


def test_a_server_that_cannot_read_the_text_charges_nothing(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise unavailable("full", "overloaded", 1)

    headers = rig.headers(Limits(requests=1, day_requests=1))
    monkeypatch.setattr("server.prompt.cpu_pool.CpuPool.run", refuse)
    for _ in range(3):
        assert post(rig, headers, COMPLETIONS, BODY).status_code == 503
    assert total(rig, headers) == (0, 0)


def test_work_that_outlasts_its_deadline_counts(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its thread goes on, so it must not be had for nothing."""
    never = threading.Event()
    monkeypatch.setattr(
        "inferneo_jax.Tokenizer.render_chat", lambda *_, **__: never.wait(TIMEOUT) and "Hi"
    )
    headers = rig.headers(Limits(requests=1))
    body = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}
    patient = headers | {"X-Request-Timeout": "0.1"}
    assert post(rig, patient, "/v1/chat/completions", body).status_code == 504
    assert total(rig, headers) == (1, 0)
    assert post(rig, headers, "/v1/chat/completions", body).status_code == 429
    never.set()


def test_embeddings_that_cannot_be_written_cost_no_tokens(
    rig: KeyRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise unavailable("full", "overloaded", 1)

    headers = rig.headers()
    body = {"model": EMBED, "input": "Hi"}
    with monkeypatch.context() as patched:
        patched.setattr("server.api.openai.embeddings.embedding_answer", refuse)
        assert post(rig, headers, "/v1/embeddings", body).status_code == 503
    assert total(rig, headers) == (0, 0)
    assert post(rig, headers, "/v1/embeddings", body).status_code == 200
    assert total(rig, headers) == (1, 2)


@pytest.mark.parametrize("size", [0, 5000])
def test_a_frame_that_starts_nothing_counts(rig: KeyRig, size: int) -> None:
    text = rig.key(Limits(requests=3, concurrent=1))[1]
    frames = ["[" * size + "{", orjson.dumps({"type": "x" * size}).decode()]
    frames.append(orjson.dumps(BODY | {"n": "x", "user": "x" * size}).decode())
    with connect(rig.ws + COMPLETIONS, additional_headers=bearer(text)) as ws:
        for frame in frames:
            ws.send(frame)
            error = orjson.loads(ws.recv(timeout=TIMEOUT))["error"]
            assert error["type"] == "invalid_request_error"
        ws.send(frames[0])
        error = orjson.loads(ws.recv(timeout=TIMEOUT))["error"]
        assert error["code"] == "rate_limit_exceeded"
    assert total(rig, bearer(text)) == (3, 0)


def test_a_cancellation_does_not_count(rig: KeyRig, tokenizer: Tokenizer) -> None:
    rig.engine.script, rig.engine.limit = writes(tokenizer, "x", end=False), 1
    text = rig.key(Limits(requests=1))[1]
    body = BODY | {"stream": True, "user": "x" * 500}
    with connect(rig.ws + COMPLETIONS, additional_headers=bearer(text)) as ws:
        ws.send(orjson.dumps({"type": "request", "id": "a", "body": body}).decode())
        ws.recv(timeout=TIMEOUT)
        ws.send(orjson.dumps({"type": "cancel", "id": "a"}).decode())
        while orjson.loads(ws.recv(timeout=TIMEOUT))["object"] != "done":
            pass
    assert total(rig, bearer(text))[0] == 1
