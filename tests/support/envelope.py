"""The one form that every error has."""

from typing import Any

import httpx

from tests.support.paths import ROOT

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
    for trace in ("Traceback", ".py", str(ROOT), "site-packages", "object at 0x"):
        assert trace not in response.text
    return error
