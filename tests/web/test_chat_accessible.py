"""axe finds no fault with the chat page, in either theme and whatever it shows."""

from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from inferneo_jax import OverloadedError, Tokenizer
from tests.support.fake_engine import writes
from tests.support.fake_server import Rig
from tests.web.browsing import Visit
from tests.web.chatting import Chat

TEXT = "# Hi\n\n- a [link](https://example.com)\n\n```py\nx = 1\n```\n\n|a|b|\n|-|-|\n|1|2|\n"
PHONE = {"width": 360, "height": 740}


@pytest.mark.parametrize("dark", [False, True])
def test_every_state_is_accessible(
    rig: Rig, visit: Callable[..., Visit], tokenizer: Tokenizer, dark: bool
) -> None:
    chat = Chat(visit(rig.url, dark=dark))
    visited, page, theme = chat.visited, chat.page, "dark" if dark else "light"

    def look(state: str) -> None:
        visited.shot(f"chat-{theme}-{state}")
        visited.assert_accessible()

    look("empty")
    rig.engine.script = writes(tokenizer, TEXT)
    rig.engine.limit = 20
    chat.send("Hello")
    expect(chat.answers).to_contain_text("link")
    look("streaming")
    rig.engine.release()
    chat.expect_done()
    chat.button("Probabilities").click()
    chat.button("Regenerate").click()
    chat.expect_done()
    page.locator(".tokens .token").nth(4).hover()
    look("probabilities")
    chat.button("Probabilities").click()
    chat.button("Compare").click()
    chat.button("Settings").click()
    chat.button("Chats").click()
    page.get_by_text("More sampling").click()
    chat.set("Top-p", "7")
    rig.engine.refusal = OverloadedError("too many requests wait")
    visited.expected = ["503"]
    chat.send("And then?")
    expect(page.get_by_text("The server is busy")).to_have_count(2)
    expect(page.get_by_text("Top-p must be a number, above 0 and at most 1")).to_be_visible()
    look("compare-panels-error")
    chat.button("API key").click()
    look("dialog")


def test_a_phone_has_room_for_everything(rig: Rig, visit: Callable[..., Visit]) -> None:
    chat = Chat(visit(rig.url, viewport=PHONE))
    chat.ask("Hello")
    for panel in ("Chats", "Settings"):
        chat.button(panel).click()
        assert chat.page.evaluate("document.getElementById('main').inert")
        chat.visited.assert_accessible()
        chat.visited.shot(f"chat-phone-{panel}")
        chat.page.keyboard.press("Escape")
        expect(chat.button(panel)).to_be_focused()
    chat.visited.shot("chat-phone")
    width = chat.page.evaluate("document.documentElement.scrollWidth")
    assert width <= PHONE["width"]
    chat.visited.assert_accessible()
