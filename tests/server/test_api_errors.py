"""Every error is the one envelope, with a sentence that names the field and its bound."""

import socket
from typing import Any

import httpx
import pytest
from harness import CHAT, EMBED, Rig
from structlog.contextvars import merge_contextvars
from structlog.testing import capture_logs

from inferneo_jax import (
    ContextLengthError,
    EngineFailedError,
    EngineStoppedError,
    OverloadedError,
    RequestError,
)

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
HI = [{"role": "user", "content": "Hi"}]


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
    for trace in ("Traceback", ".py", "/work", "site-packages", "object at 0x"):
        assert trace not in response.text
    return error


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"temperature": 2.5}, "temperature", ["2.5", "at most 2"]),
        ({"temperature": -0.1}, "temperature", ["-0.1", "at least 0"]),
        ({"temperature": "hot"}, "temperature", ["'hot'", "a number"]),
        ({"temperature": True}, "temperature", ["true", "a number"]),
        ({"top_p": 0}, "top_p", ["above 0"]),
        ({"top_p": 1.01}, "top_p", ["at most 1"]),
        ({"top_k": -2}, "top_k", ["at least -1"]),
        ({"top_k": 1.5}, "top_k", ["an integer"]),
        ({"min_p": 1.5}, "min_p", ["at most 1"]),
        ({"frequency_penalty": 3}, "frequency_penalty", ["at most 2"]),
        ({"presence_penalty": -3}, "presence_penalty", ["at least -2"]),
        ({"repetition_penalty": 0}, "repetition_penalty", ["above 0"]),
        ({"max_tokens": -1}, "max_tokens", ["at least 0"]),
        ({"max_tokens": 0}, "max_tokens", ["at least 1"]),
        ({"max_tokens": "5"}, "max_tokens", ["'5'", "an integer"]),
        ({"n": 0}, "n", ["at least 1"]),
        ({"n": 1000}, "n", ["at most 256"]),
        ({"prompt": ["a"] * 200, "n": 2}, "prompt", ["200", "256"]),
        ({"best_of": 1, "n": 2}, "best_of", ["at least n"]),
        ({"best_of": 2, "stream": True}, "best_of", ["stream"]),
        ({"logprobs": 21}, "logprobs", ["at most 20"]),
        ({"logprobs": True}, "logprobs", ["true", "an integer"]),
        ({"stop": 5}, "stop", ["a string or a list"]),
        ({"stop": [""]}, "stop", ["empty string"]),
        ({"stop": ["a"] * 17}, "stop", ["17", "16"]),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]", ["an integer"]),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens", ["at most max_tokens, 5"]),
        ({"seed": 2**64}, "seed", ["an integer"]),
        ({"seed": -(2**63) - 1}, "seed", ["an integer"]),
        ({"logit_bias": {"1": 101}}, "logit_bias", ["from -100 to 100", "101"]),
        ({"logit_bias": {"x": 1}}, "logit_bias", ["'x'", "token ids"]),
        ({"logit_bias": {"1": "2"}}, "logit_bias", ["a number"]),
        ({"logit_bias": [1]}, "logit_bias", ["an object"]),
        ({"stream": "yes"}, "stream", ["true or false"]),
        ({"stream_options": {"include_usage": True}}, "stream_options", ["stream"]),
        ({"stream": True, "stream_options": []}, "stream_options", ["an object"]),
        ({"prompt": 5}, "prompt", ["an integer", "a string"]),
        ({"prompt": []}, "prompt", ["an empty list"]),
        ({"prompt": [[]]}, "prompt", ["an empty list"]),
        ({"prompt": ["a", 1]}, "prompt", ["mixed"]),
        ({"prompt": [1, True]}, "prompt", ["mixed"]),
        ({"prompt": [1.0]}, "prompt", ["mixed"]),
        ({"prompt": None}, "prompt", ["required"]),
        ({"model": None}, "model", ["required"]),
        ({"model": 5}, "model", ["a string"]),
        ({"user": 5}, "user", ["a string"]),
        ({"metadata": 5}, "metadata", ["an object"]),
        ({"service_tier": 5}, "service_tier", ["a string"]),
        ({"priority": 2**31}, "priority", ["below"]),
    ],
)
def test_a_wrong_parameter_is_named_with_its_bound(
    rig: Rig, changes: dict[str, Any], param: str, words: list[str]
) -> None:
    response = rig.post(COMPLETIONS, {"model": CHAT, "prompt": "Hi", **changes})
    error = error_of(response)
    assert response.status_code == 400
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert error["message"].startswith(param)
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        ({"messages": []}, "messages", ["at least one"]),
        ({"messages": "Hi"}, "messages", ["a string", "a list"]),
        ({"messages": None}, "messages", ["required"]),
        ({"messages": ["Hi"]}, "messages[0]", ["an object"]),
        ({"messages": [{"content": "Hi"}]}, "messages[0].role", ["one of"]),
        ({"messages": [*HI, {"role": "boss", "content": ""}]}, "messages[1].role", ["'boss'"]),
        ({"messages": [{"role": "user"}]}, "messages[0].content", ["null", "a string"]),
        (
            {"messages": [{"role": "assistant", "tool_calls": "f"}]},
            "messages[0].tool_calls",
            ["a string", "a list of objects"],
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0]",
            ["'image_url'", "text only"],
        ),
        ({"logprobs": 3}, "logprobs", ["true or false"]),
        ({"top_logprobs": 3}, "top_logprobs", ["logprobs"]),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", ["at most 20"]),
        ({"max_tokens": 0}, "max_tokens", ["at least 1"]),
        ({"continue_final_message": True}, "continue_final_message", ["assistant"]),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            ["exclude"],
        ),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", ["messages"]),
    ],
)
def test_a_wrong_chat_parameter_is_named(
    rig: Rig, changes: dict[str, Any], param: str, words: list[str]
) -> None:
    response = rig.post(CHATS, {"model": CHAT, "messages": HI, **changes})
    error = error_of(response)
    assert (response.status_code, error["param"]) == (400, param)
    for word in words:
        assert word in error["message"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no body"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"a": Infinity}', "not valid JSON"),
        (b'{"a": 1e999}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a": "\\ud800"}', "not valid JSON"),
        (b'"\xff"', "not valid JSON"),
        (b"[" * 5000 + b"]" * 5000, "not valid JSON"),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, "not valid JSON"),
        (b"[]", "not an object"),
        (b"null", "not an object"),
        (b'"text"', "not an object"),
        (b"\x00\x01", "not valid JSON"),
    ],
)
@pytest.mark.parametrize("path", [COMPLETIONS, CHATS, "/v1/embeddings"])
def test_a_body_that_is_no_object_is_refused(
    rig: Rig, path: str, content: bytes, words: str
) -> None:
    headers = {"Content-Type": "application/json"}
    response = rig.client.post(path, content=content, headers=headers)
    assert response.status_code == 400
    assert words in error_of(response)["message"]


def test_deep_values_within_the_limit_do_no_harm(rig: Rig) -> None:
    deep: Any = 1
    for _ in range(400):
        deep = [deep]
    response = rig.post(COMPLETIONS, {"model": CHAT, "prompt": "Hi", "metadata": {"a": deep}})
    assert response.status_code == 200
    assert rig.post(COMPLETIONS, {"model": CHAT, "prompt": deep}).status_code == 400
    response = rig.post(
        CHATS, {"model": CHAT, "messages": HI, "chat_template_kwargs": {"tools": deep}}
    )
    assert response.status_code == 200


@pytest.mark.parametrize("content_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_other_content_types_are_refused(rig: Rig, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    response = rig.client.post(COMPLETIONS, content=b'{"model": "x"}', headers=headers)
    assert response.status_code == 415
    assert "application/json" in error_of(response)["message"]


def test_json_with_a_charset_is_json(rig: Rig) -> None:
    response = rig.client.post(
        COMPLETIONS,
        content=b'{"model": "org/tiny-chat", "prompt": "Hi"}',
        headers={"Content-Type": "application/json; charset=utf-8"},
    )
    assert response.status_code == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_answered_all_the_same(rig: Rig, chunked: bool) -> None:
    content: Any = (b"x" * 100_000 for _ in range(30)) if chunked else b"x" * 3_000_000
    headers = {"Content-Type": "application/json"}
    with httpx.Client(base_url=rig.url) as client:
        response = client.post(COMPLETIONS, content=content, headers=headers)
        assert response.status_code == 413
        error = error_of(response)
        assert error["type"] == "invalid_request_error"
        assert "INFERNEO_MAX_BODY_BYTES" in error["message"]


def test_a_large_body_does_not_hide_other_errors(rig: Rig) -> None:
    for path, status in (("/v1/nothing", 404), ("/v1/models", 405)):
        response = rig.client.post(path, content=b"x" * 3_000_000)
        assert response.status_code == status
        error_of(response)


def test_unknown_paths_and_methods(rig: Rig) -> None:
    response = rig.client.get("/v1/nothing")
    assert response.status_code == 404
    assert error_of(response)["code"] == "not_found"
    response = rig.client.get(COMPLETIONS)
    assert response.status_code == 405
    assert "POST" in response.headers["Allow"]
    error_of(response)


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


def test_a_failure_in_a_stream_is_an_event_before_done(rig: Rig) -> None:
    rig.engine.limit, rig.engine.failure = 3, EngineFailedError("a step failed")
    events = rig.events(CHATS, {"model": CHAT, "messages": HI})
    assert "".join(e["choices"][0]["delta"]["content"] for e in events[:-1]) == "Caf"
    assert events[-1]["error"]["type"] == "server_error"


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
    [("my-id.7", True), ("a" * 128, True), ("a" * 129, False), ("", False), ("a b", False)],
)
def test_the_clients_request_id_comes_back_if_it_is_sane(rig: Rig, given: str, kept: bool) -> None:
    for path in ("/health", "/v1/models", "/v1/nothing"):
        got = rig.client.get(path, headers={"X-Request-Id": given}).headers["X-Request-Id"]
        assert (got == given) == kept
        assert got


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


def test_a_request_that_is_no_http_is_refused(rig: Rig) -> None:
    with socket.create_connection(("127.0.0.1", rig.server.port)) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        assert raw.recv(100).startswith(b"HTTP/1.1 400")
