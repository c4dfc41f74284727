"""The chat page on the real model; the pictures of docs/images are made here."""

import os
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import expect

from tests.support.server_process import CHAT_MODEL, process
from tests.web.browsing import Visit
from tests.web.chatting import Chat

pytestmark = pytest.mark.real

QUESTION = "What is the capital of France, and what is it known for?"
TIPS = "Write three short tips for a good night's sleep."
CODE = "Write a Python function that adds two numbers."
IMAGES = "INFERNEO_DOCS_IMAGES"
"""Names the folder that takes the pictures; without it none are made."""


def open_greedy(visit: Callable[..., Visit], address: str) -> Chat:
    """The page, with temperature 0."""
    chat = Chat(visit(f"http://{address}"))
    chat.button("Settings").click()
    chat.set("Temperature", "0")
    chat.button("Settings").click()
    return chat


def test_the_real_model_answers_as_its_api_does(address: str, visit: Callable[..., Visit]) -> None:
    chat = open_greedy(visit, address)
    expect(chat.page.get_by_role("heading", name=f"Talk to {CHAT_MODEL}")).to_be_visible()
    chat.button(QUESTION).click()
    chat.expect_done()
    messages = [{"role": "user", "content": QUESTION}]
    body = {"model": CHAT_MODEL, "messages": messages, "temperature": 0}
    whole = httpx.post(f"http://{address}/v1/chat/completions", json=body, timeout=60).json()
    assert chat.said() == [QUESTION, whole["choices"][0]["message"]["content"]]
    assert chat.count("tokens") == whole["usage"]["completion_tokens"]


@pytest.mark.skipif(IMAGES not in os.environ, reason=f"{IMAGES} names no folder")
def test_pictures_of_the_chat_page(
    real_checkpoints: Path, visit: Callable[..., Visit], tmp_path: Path
) -> None:
    folder = Path(os.environ[IMAGES])
    folder.mkdir(exist_ok=True)
    with process(tmp_path / "log", {"INFERNEO_CHECKPOINTS": str(real_checkpoints)}) as server:
        server.wait_ready()
        chat = open_greedy(visit, server.address)
        page = chat.page
        chat.ask(TIPS)
        chat.ask(CODE)
        page.locator("#thread").evaluate("element => { element.scrollTop = 0; }")
        page.screenshot(path=folder / "chat.png")
        chat.button("New chat").click()
        chat.button("Probabilities").click()
        chat.ask(QUESTION)
        page.locator(".tokens .token:is(.p0, .p1)").first.hover()
        page.screenshot(path=folder / "chat-probabilities.png")
