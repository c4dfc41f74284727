"""What a key's holder sees of its limits, and what it is charged for."""

import time
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
import websockets
from websockets.sync.client import connect

from inferneo_jax import EngineFailedError, OverloadedError, Tokenizer
from server.keys.key import Limits
from server.keys.limits import duration
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, EMBED
from tests.support.keyed_server import KeyRig, bearer, key_rig
from tests.support.raw_http import parse_stream
from tests.support.waiting import until

COMPLETIONS = "/v1/completions"
BODY = {"model": CHAT, "prompt": "Hi", "max_tokens": 100}
MESSAGES: Any = [{"role": "user", "content": "Hi"}]


def usage(rig: KeyRig, headers: dict[str, str]) -> dict[str, int]:
    """What a key was charged."""
    answer = rig.client.get("/v1/usage", headers=headers)
    assert answer.status_code == 200
    total: dict[str, int] = answer.json()["total"]
    return total


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
    ("refusal", "status"), [(OverloadedError("full"), 503), (EngineFailedError("dead"), 500)]
)
def test_what_the_engine_cannot_serve_costs_nothing(
    rig: KeyRig, refusal: Exception, status: int
) -> None:
    rig.engine.refusal = refusal
    headers = rig.headers(Limits(requests=1, day_requests=1))
    for _ in range(2):
        answer = rig.client.post(COMPLETIONS, headers=headers, json=BODY)
        assert answer.status_code == status
    assert usage(rig, headers)["requests"] == 0


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
    key, text = rig.key()
    with connect(rig.ws + COMPLETIONS, additional_headers=bearer(text)) as ws:
        body = {**BODY, "stream": True}
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


def test_servers_share_limits_over_redis(
    tokenizer: Tokenizer, redis_url: str, tmp_path: Path
) -> None:
    with (
        key_rig(tokenizer, redis_url, require_key="true") as one,
        key_rig(tokenizer, redis_url, require_key="true") as two,
    ):
        headers = one.headers(Limits(requests=3))
        status = [
            rig.client.post(COMPLETIONS, headers=headers, json=BODY).status_code
            for rig in (one, two, one, two)
        ]
        assert status == [200, 200, 200, 429]
        assert usage(two, headers)["requests"] == 3
        ticket = one.client.post("/v1/ws-tickets", headers=headers).json()["ticket"]
        with pytest.raises(websockets.InvalidStatus) as caught:
            connect(f"{two.ws}{COMPLETIONS}?token={ticket}")
        assert caught.value.response.status_code == 429  # known there, and exhausted
