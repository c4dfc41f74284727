"""The chat page on the real model."""

from collections.abc import Callable

import httpx
import pytest
from playwright.sync_api import expect

from tests.support.server_process import CHAT_MODEL
from tests.web.browsing import Visit
from tests.web.chatting import Chat

pytestmark = pytest.mark.real

QUESTION = "What is the capital of France, and what is it known for?"


def test_the_real_model_answers_as_its_api_does(address: str, visit: Callable[..., Visit]) -> None:
    chat = Chat(visit(f"http://{address}"))
    chat.be_greedy()
    expect(chat.page.get_by_role("heading", name=f"Talk to {CHAT_MODEL}")).to_be_visible()
    chat.button(QUESTION).click()
    chat.expect_done()
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": CHAT_MODEL, "messages": messages, "temperature": 0}
    whole = httpx.post(f"http://{address}/v1/chat/completions", json=body, timeout=60).json()
    assert chat.said() == [QUESTION, whole["choices"][0]["message"]["content"]]
    assert chat.count("tokens") == whole["usage"]["completion_tokens"]
