"""What a key's holder sees of its limits, and what counts: all that makes the server work."""

import threading
import time
from typing import Any

import httpx
import openai
import orjson
import pytest
import websockets
from websockets.sync.client import connect

from inferneo_jax import EngineFailedError, OverloadedError, RequestError, Tokenizer
from server.http.errors import unavailable
from server.keys.key import Limits
from server.keys.limits import duration
from tests.support.fake_engine import TIMEOUT, writes
from tests.support.fake_server import CHAT, EMBED
from tests.support.keyed_server import KeyRig, bearer, key_rig
from tests.support.raw_http import parse_stream
from tests.support.waiting import until

COMPLETIONS = "/v1/completions"
BODY = {"model": CHAT, "prompt": "Hi", "max_tokens": 100}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]
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


def usage(rig: KeyRig, headers: dict[str, str]) -> dict[str, int]:
    """What a key was charged."""
    answer = rig.client.get("/v1/usage", headers=headers)
    assert answer.status_code == 200
    total: dict[str, int] = answer.json()["total"]
    return total


def post(rig: KeyRig, headers: dict[str, str], path: str, body: Any) -> httpx.Response:
    headers = headers | {"Content-Type": "application/json"}
    content = body if isinstance(body, bytes) else orjson.dumps(body)
    return rig.client.post(path, headers=headers, content=content)


def total(rig: KeyRig, headers: dict[str, str]) -> tuple[int, int]:
    """Requests and tokens that a key was charged."""
    spent = usage(rig, headers)
    return spent["requests"], spent["prompt_tokens"] + spent["completion_tokens"]


def settled(rig: KeyRig, key_id: str) -> dict[str, int]:
    """The same, once nothing of the key's is running."""
    until(lambda: not rig.store.quota_status(key_id, None).running, 10)
    (row,) = rig.store.usage(key_id)
    return {"requests": row.requests, "prompt": row.prompt, "completion": row.completion}


def test_every_answer_says_how_the_key_stands(rig: KeyRig) -> None:
    headers = rig.headers(Limits(requests=5, tokens=1000))
    before = time.time()
    fresh = rig.client.get("/v1/models", headers=headers).headers
    assert fresh["X-RateLimit-Limit"] == fresh["X-RateLimit-Remaining"] == "5"
    assert fresh["x-ratelimit-reset-requests"] == "0s"
    first = rig.client.post(COMPLETIONS, headers=headers, json=BODY).headers
    assert first["x-ratelimit-limit-requests"] == "5"
    assert first["x-ratelimit-remaining-requests"] == first["X-RateLimit-Remaining"] == "4"
    assert first["x-ratelimit-limit-tokens"] == "1000"
    assert first["x-ratelimit-remaining-tokens"] == str(1000 - 2 - 100)  # reserved
    assert first["x-ratelimit-reset-tokens"] in ("1m0s", "59s")
    assert before + 59 < int(first["X-RateLimit-Reset"]) < time.time() + 62
    answers = [
        rig.client.get("/v1/models/none", headers=headers),
        rig.client.get("/v1/nothing", headers=headers),
        rig.client.get(COMPLETIONS, headers=headers),
        rig.client.get("/v1/usage", headers=headers),
    ]
    assert [answer.status_code for answer in answers] == [404, 404, 405, 200]
    for answer in answers:
        assert answer.headers["X-RateLimit-Remaining"] == "4"
    stream = rig.client.post(COMPLETIONS, headers=headers, json={**BODY, "stream": True})
    assert stream.headers["X-RateLimit-Remaining"] == "3"
    vectors = rig.client.post(
        "/v1/embeddings", headers=headers, json={"model": EMBED, "input": "x"}
    )
    assert vectors.headers["X-RateLimit-Remaining"] == "2"
    left = int(vectors.headers["x-ratelimit-remaining-tokens"])
    spent = usage(rig, headers)
    assert left == 1000 - spent["prompt_tokens"] - spent["completion_tokens"]


def test_a_minutes_requests_are_refused_with_the_way_out(rig: KeyRig) -> None:
    headers = rig.headers(Limits(requests=1))
    assert rig.client.post(COMPLETIONS, headers=headers, json=BODY).status_code == 200
    refused = rig.client.post(COMPLETIONS, headers=headers, json=BODY)
    assert refused.status_code == 429
    assert 55 < int(refused.headers["retry-after"]) <= 60
    assert 55_000 < int(refused.headers["retry-after-ms"]) <= 60_000
    assert refused.headers["x-should-retry"] == "true"
    assert refused.headers["X-RateLimit-Remaining"] == "0"
    error = refused.json()["error"]
    assert (error["type"], error["code"], error["param"]) == (
        *("rate_limit_exceeded", "rate_limit_exceeded"),
        None,
    )
    assert rig.client.get("/v1/models", headers=headers).status_code == 200  # not counted
    assert usage(rig, headers)["requests"] == 1


def test_a_minutes_tokens_are_refused(rig: KeyRig) -> None:
    headers = rig.headers(Limits(tokens=150))
    body = {**BODY, "n": 2, "max_tokens": 400}  # more than the limit: reserves all of it
    first = rig.client.post(COMPLETIONS, headers=headers, json=body)
    assert first.headers["x-ratelimit-remaining-tokens"] == "0"
    after = rig.client.get("/v1/models", headers=headers).headers["x-ratelimit-remaining-tokens"]
    assert int(after) == 150 - first.json()["usage"]["total_tokens"]
    refused = rig.client.post(COMPLETIONS, headers=headers, json=body)
    assert refused.status_code == 429
    assert "150 tokens a minute" in refused.json()["error"]["message"]
    small = {**BODY, "max_tokens": 1}
    assert rig.client.post(COMPLETIONS, headers=headers, json=small).status_code == 200


def test_a_days_requests_are_a_quota(rig: KeyRig) -> None:
    headers = rig.headers(Limits(day_requests=1))
    assert rig.client.post(COMPLETIONS, headers=headers, json=BODY).status_code == 200
    refused = rig.client.post(COMPLETIONS, headers=headers, json=BODY)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "insufficient_quota"
    assert refused.json()["error"]["type"] == "insufficient_quota"
    assert refused.headers["x-should-retry"] == "false"
    assert 0 < int(refused.headers["retry-after"]) <= 86_400


def test_requests_at_once_are_bounded(rig: KeyRig, tokenizer: Tokenizer) -> None:
    headers = rig.headers(Limits(concurrent=1))
    rig.engine.script, rig.engine.limit = writes(tokenizer, "x", end=False), 1
    with rig.client.stream(
        "POST", COMPLETIONS, headers=headers, json={**BODY, "stream": True}
    ) as running:
        assert running.status_code == 200
        refused = httpx.post(rig.url + COMPLETIONS, headers=headers, json=BODY)
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        rig.engine.release()
        assert "[DONE]" in running.read().decode()
    assert rig.client.post(COMPLETIONS, headers=headers, json=BODY).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_used_is_charged_before_the_answer_ends(rig: KeyRig, stream: bool) -> None:
    headers = rig.headers()
    body = {**BODY, "n": 2, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
        answer = rig.client.post(COMPLETIONS, headers=headers, json=body)
        found = parse_stream(answer.text)[-1]["usage"]
    else:
        found = rig.client.post(COMPLETIONS, headers=headers, json=body).json()["usage"]
    assert usage(rig, headers) == {
        "requests": 1,
        "prompt_tokens": found["prompt_tokens"],
        "completion_tokens": found["completion_tokens"],
        "cached_tokens": found["prompt_tokens_details"]["cached_tokens"],
    }


def test_a_client_that_leaves_is_charged_what_was_generated(
    rig: KeyRig, tokenizer: Tokenizer
) -> None:
    rig.engine.script, rig.engine.limit = writes(tokenizer, "x", end=False), 3
    key, text = rig.key()
    for stream in (True, False):
        body = {**BODY, "stream": stream}
        with (
            httpx.Client(base_url=rig.url) as client,
            client.stream("POST", COMPLETIONS, headers=bearer(text), json=body, timeout=0.5)
            if stream
            else pytest.raises(httpx.ReadTimeout),
        ):
            if not stream:
                client.post(COMPLETIONS, headers=bearer(text), json=body, timeout=0.5)
    spent = settled(rig, key.id)
    assert (spent["requests"], spent["prompt"]) == (2, 4)
    assert 0 < spent["completion"] <= 6


@pytest.mark.parametrize(
    ("refusal", "status", "requests"),
    [
        (RequestError("no", "prompt"), 400, 1),
        (OverloadedError("full"), 503, 0),
        (EngineFailedError("dead"), 500, 0),
        ("the text cannot be read", 503, 0),
    ],
)
def test_what_cannot_be_served_costs_no_tokens_and_counts_if_it_is_wrong(
    rig: KeyRig,
    monkeypatch: pytest.MonkeyPatch,
    refusal: Exception | str,
    status: int,
    requests: int,
) -> None:
    if isinstance(refusal, Exception):
        rig.engine.refusal = refusal
    else:
        monkeypatch.setattr("server.prompt.cpu_pool.CpuPool.run", refuse)
    headers = rig.headers(Limits(requests=1, day_requests=1))
    answers = [post(rig, headers, COMPLETIONS, BODY) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [status] + [
        429 if requests else status
    ] * 2
    assert total(rig, headers) == (requests, 0)


def refuse(*_: object, **__: object) -> None:
    raise unavailable("full", "overloaded", 1)


def test_what_fails_on_its_way_is_charged_as_far_as_it_came(
    rig: KeyRig, tokenizer: Tokenizer
) -> None:
    rig.engine.script, rig.engine.limit = writes(tokenizer, "x", end=False), 2
    rig.engine.failure = EngineFailedError("broken")
    headers = rig.headers()
    rig.client.post(COMPLETIONS, headers=headers, json={**BODY, "stream": True})
    spent = usage(rig, headers)
    assert (spent["requests"], spent["prompt_tokens"], spent["completion_tokens"]) == (1, 2, 2)


def test_sockets_count_requests(rig: KeyRig) -> None:
    text = rig.key(Limits(requests=2))[1]
    with connect(rig.ws + COMPLETIONS, additional_headers=bearer(text)) as ws:
        assert ws.response is not None
        assert ws.response.headers["X-RateLimit-Remaining"] == "2"
        for wanted in (None, None, "rate_limit_exceeded"):
            ws.send(orjson.dumps(BODY).decode())
            answer = orjson.loads(ws.recv(timeout=10))
            assert answer.get("error", {}).get("code") == wanted
    assert usage(rig, bearer(text))["requests"] == 2
    with pytest.raises(websockets.InvalidStatus) as caught:  # no other socket would help
        connect(rig.ws + COMPLETIONS, additional_headers=bearer(text))
    assert caught.value.response.status_code == 429
    assert int(caught.value.response.headers["Retry-After"]) > 50
    with connect(rig.ws + COMPLETIONS) as ws:
        ws.send(orjson.dumps({"type": "auth", "api_key": text}).decode())
        assert b"rate_limit_exceeded" in ws.recv(timeout=10, decode=False)
        with pytest.raises(websockets.ConnectionClosed):
            ws.recv()
        assert ws.close_code == 4429


def test_a_cancelled_request_is_charged_what_it_had(rig: KeyRig, tokenizer: Tokenizer) -> None:
    rig.engine.script, rig.engine.limit = writes(tokenizer, "x", end=False), 2
    key, text = rig.key(Limits(requests=1))
    with connect(rig.ws + COMPLETIONS, additional_headers=bearer(text)) as ws:
        body = {**BODY, "stream": True, "user": "x" * 500}
        ws.send(orjson.dumps({"type": "request", "id": "a", "body": body}).decode())
        ws.recv(timeout=10)
        ws.send(orjson.dumps({"type": "cancel", "id": "a"}).decode())
        while orjson.loads(ws.recv(timeout=10))["object"] != "done":
            pass
    spent = settled(rig, key.id)
    assert (spent["requests"], spent["prompt"]) == (1, 2)
    assert spent["completion"] in (1, 2)


def test_the_official_client_sees_the_right_errors(rig: KeyRig) -> None:
    def client(text: str) -> openai.OpenAI:
        return openai.OpenAI(base_url=rig.url + "/v1", api_key=text, max_retries=0)

    good, limited = rig.key()[1], rig.key(Limits(requests=1))[1]
    restricted = rig.key(models=(EMBED,))[1]
    with client(good) as ok:
        assert ok.chat.completions.create(model=CHAT, messages=MESSAGES).choices
    with client("sk-wrong") as wrong, pytest.raises(openai.AuthenticationError):
        wrong.models.list()
    with client(restricted) as other, pytest.raises(openai.PermissionDeniedError):
        other.chat.completions.create(model=CHAT, messages=MESSAGES)
    with client(limited) as many:
        many.completions.create(model=CHAT, prompt="Hi")
        with pytest.raises(openai.RateLimitError) as caught:
            many.completions.create(model=CHAT, prompt="Hi")
    assert caught.value.code == "rate_limit_exceeded"


def test_the_official_client_waits_as_it_is_told(
    rig: KeyRig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", slept.append)
    limited, spent = rig.key(Limits(requests=1))[1], rig.key(Limits(day_requests=1))[1]
    for text, waits in ((limited, 2), (spent, 0)):
        with openai.OpenAI(base_url=rig.url + "/v1", api_key=text, max_retries=2) as client:
            client.completions.create(model=CHAT, prompt="Hi")
            slept.clear()
            with pytest.raises(openai.RateLimitError):
                client.completions.create(model=CHAT, prompt="Hi")
        assert len(slept) == waits
        assert all(50 < seconds <= 60 for seconds in slept)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (1, "1s"), (60, "1m0s"), (360, "6m0s"), (3661, "1h1m1s")]
)
def test_durations_are_written_as_openai_writes_them(seconds: int, text: str) -> None:
    assert duration(seconds) == text


def test_a_ticket_and_its_keys_limits_are_known_to_every_server_of_a_redis(
    tokenizer: Tokenizer, redis_url: str
) -> None:
    with (
        key_rig(tokenizer, redis_url, require_key="true") as one,
        key_rig(tokenizer, redis_url, require_key="true") as two,
    ):
        headers = one.headers(Limits(requests=1))
        assert one.client.post(COMPLETIONS, headers=headers, json=BODY).status_code == 200
        ticket = one.client.post("/v1/ws-tickets", headers=headers).json()["ticket"]
        with pytest.raises(websockets.InvalidStatus) as caught:
            connect(f"{two.ws}{COMPLETIONS}?token={ticket}")
        assert caught.value.response.status_code == 429  # known there, and exhausted


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


def test_a_request_that_a_limit_refuses_does_not_count(rig: KeyRig) -> None:
    headers = rig.headers(Limits(requests=3, tokens=20))
    assert post(rig, headers, COMPLETIONS, BODY | {"max_tokens": 18}).status_code == 200
    for _ in range(5):
        refused = post(rig, headers, COMPLETIONS, BODY | {"max_tokens": 18})
        assert "20 tokens a minute" in refused.json()["error"]["message"]
    assert total(rig, headers) == (1, 20)


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
