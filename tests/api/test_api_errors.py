"""Every error is the one envelope, whoever finds it, and is logged without a request's words."""

from typing import Any

import httpx
import pytest
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from inferneo_jax import (
    ContextLengthError,
    EngineError,
    EngineFailedError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
)
from tests.support.asking import CHATS, COMPLETIONS, HI, error_of
from tests.support.fake_server import CHAT, EMBED, Rig


def test_unknown_paths_are_not_found(rig: Rig) -> None:
    response = rig.client.get("/v1/nothing")
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"


@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/v1/embeddings"])
def test_unknown_models_are_not_found(rig: Rig, path: str) -> None:
    fields = {"model": "org/none", "prompt": "Hi", "messages": HI, "input": "Hi"}
    response = rig.post(path, fields)
    error = error_of(response)
    assert (response.status_code, error["code"], error["param"]) == (
        404,
        "model_not_found",
        "model",
    )
    assert CHAT in error["message"]


def test_an_embedding_model_does_not_chat(rig: Rig) -> None:
    response = rig.post(CHATS, {"model": EMBED, "messages": HI})
    assert response.status_code == 400
    assert "/v1/embeddings" in error_of(response)["message"]


@pytest.mark.parametrize(
    ("path", "fields", "numbers"),
    [
        (COMPLETIONS, {"prompt": "x" * 500, "max_tokens": 13}, ["500", "13", "513", "512"]),
        (COMPLETIONS, {"prompt": "x" * 512}, ["512"]),
        (COMPLETIONS, {"prompt": ["x", "x" * 600]}, ["prompt[1]", "600", "512"]),
        (COMPLETIONS, {"prompt": [1] * 600}, ["600", "512"]),
        (CHATS, {"messages": [{"role": "user", "content": "x" * 600}]}, ["512"]),
    ],
)
def test_too_long_names_both_numbers(
    rig: Rig, path: str, fields: dict[str, Any], numbers: list[str]
) -> None:
    response = rig.post(path, {"model": CHAT, **fields})
    error = error_of(response)
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    for number in numbers:
        assert number in error["message"]
    assert not rig.engine.submitted


def test_a_prompt_that_just_fits_is_served(rig: Rig) -> None:
    assert rig.post(COMPLETIONS, {"model": CHAT, "prompt": "x" * 511}).status_code == 200
    assert rig.engine.submitted[0].max_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (OverloadedError("4 requests are waiting already"), 503, "overloaded"),
        (EngineStoppedError("stopped"), 503, "overloaded"),
        (EngineFailedError("a step failed"), 500, "engine_failed"),
        (EngineError("no process can be started"), 503, "overloaded"),
        (RequestError("stop_token_ids holds 999", "stop_token_ids"), 400, None),
        (ContextLengthError("too long", "prompt"), 400, "context_length_exceeded"),
        (ZeroDivisionError("in /some/file.py"), 500, None),
    ],
)
def test_a_refusal_of_the_engine_has_a_status_streamed_or_not(
    rig: Rig, refusal: Exception, status: int, code: str | None, stream: bool
) -> None:
    rig.engine.refusal = refusal
    response = rig.post(COMPLETIONS, {"model": CHAT, "prompt": "Hi", "stream": stream})
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert ("Retry-After" in response.headers) == (status == 503)


def test_a_failure_before_the_first_token_has_a_status(rig: Rig) -> None:
    rig.engine.limit, rig.engine.failure = 0, EngineFailedError("a step failed")
    for stream in (False, True):
        response = rig.post(COMPLETIONS, {"model": CHAT, "prompt": "Hi", "stream": stream})
        assert response.status_code == 500
        assert error_of(response)["type"] == "server_error"


def test_a_failing_prompt_frees_its_siblings(rig: Rig) -> None:
    rig.engine.limit = 0
    original = rig.engine.script

    def script(request: Any) -> Any:
        if request.id.endswith("-2"):
            raise OverloadedError("full")
        return original(request)

    rig.engine.script = script
    assert rig.post(COMPLETIONS, {"model": CHAT, "prompt": "Hi", "n": 4}).status_code == 503
    rig.engine.wait_until(lambda e: len(e.aborted) == 2 and e.num_running == 0)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        *((sane, True) for sane in ("my-id.7", "a" * 128)),
        *((odd, False) for odd in ("a" * 129, "x" * 10_000, "", "a b", "a\tb", "<script>")),
        *((odd, False) for odd in ("%0d%0aSet-Cookie:a=b", "\u00e9", "../../etc")),
    ],
)
def test_the_clients_request_id_comes_back_if_it_is_sane(rig: Rig, given: str, kept: bool) -> None:
    for path in ("/health", "/v1/models", "/v1/nothing"):
        response = rig.client.get(path, headers={"X-Request-Id": given.encode("latin-1")})
        got = response.headers["X-Request-Id"]
        assert got == given if kept else got.startswith("req_")
        assert "Set-Cookie" not in response.headers


def test_a_request_is_logged_without_its_words(rig: Rig) -> None:
    with capture_logs([merge_contextvars]) as logs, httpx.Client(base_url=rig.url) as client:
        for path, fields in (
            (COMPLETIONS, {"prompt": "a secret", "user": "someone", "max_tokens": 3}),
            (COMPLETIONS, {"prompt": "a secret", "temperature": "a secret"}),
            (CHATS, {"messages": [{"role": "user", "content": "a secret"}], "stream": True}),
        ):
            client.post(path, json={"model": CHAT, **fields}, headers={"X-Request-Id": "mine"})
        client.post(COMPLETIONS, json={})  # a connection's requests are logged one by one
    lines = [line for line in logs if line["event"] == "request" and line["id"] == "mine"]
    assert [line["status"] for line in lines] == [200, 400, 200]
    assert lines[0] == lines[0] | {
        "method": "POST",
        "route": COMPLETIONS,
        "model": CHAT,
        "user": "someone",
        "prompt_tokens": 8,
        "completion_tokens": 3,
    }
    assert "secret" not in str(logs)


def test_a_fault_of_the_server_is_logged_under_the_requests_id(rig: Rig) -> None:
    rig.engine.refusal = ZeroDivisionError("a fault")
    with capture_logs([merge_contextvars]) as logs:
        response = rig.post(COMPLETIONS, {"model": CHAT, "prompt": "Hi"})
    assert response.status_code == 500
    (line,) = [line for line in logs if line["event"] == "request_failed"]
    assert line["id"] == response.headers["X-Request-Id"]
    assert line["exc_info"] is rig.engine.refusal
