"""Whatever a body holds, it is answered."""

from typing import Any

import httpx
import pytest

from tests.support.asking import CHATS, COMPLETIONS, HI, error_of
from tests.support.fake_server import CHAT, Rig


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
        CHATS, {"model": CHAT, "messages": HI, "chat_template_kwargs": {"documents": deep}}
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
