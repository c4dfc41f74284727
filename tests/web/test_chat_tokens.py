"""Probabilities of tokens: the API's, for the mouse, the keyboard and screen readers."""

import math
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import expect

from inferneo_jax import Tokenizer
from tests.support.fake_engine import logprob_of, writes
from tests.support.fake_server import CHAT, REPLY, Rig
from tests.web.browsing import Visit
from tests.web.chatting import Chat


@pytest.fixture
def chat(rig: Rig, visit: Callable[..., Visit]) -> Chat:
    found = Chat(visit(rig.url))
    found.button("Probabilities").click()
    return found


def test_tokens_have_the_probabilities_that_the_api_gives(rig: Rig, chat: Chat) -> None:
    chat.ask("Hi")
    body = {"model": CHAT, "messages": [{"role": "user", "content": "Hi"}]}
    whole = rig.post("/v1/chat/completions", body | {"logprobs": True, "top_logprobs": 5}).json()
    scored = whole["choices"][0]["logprobs"]["content"]
    tokens = chat.page.locator(".tokens .token")
    expect(tokens).to_have_count(len(scored))
    card = chat.page.locator("#card")
    for i, entry in list(enumerate(scored))[:3]:
        tokens.nth(i).hover()
        rows = [row.split()[:2] for row in card.locator("li").all_inner_texts()]
        tops = [(top["token"], top["logprob"]) for top in entry["top_logprobs"]]
        assert rows == [[name, f"{100 * math.exp(value):.1f}%"] for name, value in tops]
        assert rows[0][0] == entry["token"]
        expect(card.locator(".chosen")).to_contain_text(rows[0][1])
    chat.page.mouse.move(1, 1)
    expect(card).to_be_hidden()
    tokens.nth(1).hover()
    expect(card).to_be_visible()
    chat.page.keyboard.press("Escape")
    expect(card).to_be_hidden()
    # Whoever wants the text has it, and the tokens again.
    chat.button("Probabilities").click()
    assert chat.said() == ["Hi", REPLY]
    chat.button("Probabilities").click()
    expect(tokens).to_have_count(len(scored))


def test_parts_of_characters_control_tokens_and_white_space_are_told_apart(
    rig: Rig, chat: Chat, tokenizer: Tokenizer
) -> None:
    rig.engine.script = writes(tokenizer, "a \U0001f600\nb")
    chat.ask("Hi")
    tokens = chat.page.locator(".tokens .token")
    assert tokens.all_inner_texts()[:2] == ["a", " "]
    shown = tokens.all_text_contents()
    assert shown == ["a", " ", "F0", "9F", "98", "\U0001f600", "\u23ce\n", "b"]
    expect(chat.page.locator(".token.part")).to_have_count(3)
    card = chat.page.locator("#card")
    tokens.nth(2).hover()
    expect(card).to_contain_text("bytes F0")
    tokens.nth(1).hover()
    expect(card).to_contain_text("\u2423")
    chosen = logprob_of(tokenizer.encode(" ", add_special_tokens=False)[0], 0).logprob
    expect(card.locator(".chosen")).to_contain_text(f"{100 * math.exp(chosen):.1f}%")


def test_the_keyboard_steps_through_tokens_and_each_is_said(rig: Rig, chat: Chat) -> None:
    page, press = chat.page, chat.page.keyboard.press
    chat.ask("Hi")
    for _ in range(6):
        if page.evaluate("document.activeElement.classList.contains('tokens')"):
            break
        press("Shift+Tab")
    status, here = page.get_by_role("status"), page.locator(".token.here")
    expect(here).to_have_text(REPLY[0])
    press("ArrowRight")
    press("ArrowRight")
    expect(here).to_have_text(REPLY[2])
    expect(status).to_have_text(re.compile(rf"{REPLY[2]}\d+\.\d% chosen"))
    press("End")
    expect(here).to_have_text(REPLY[-1])
    press("ArrowLeft")
    expect(here).to_have_text(REPLY[-2])
    press("Home")
    expect(here).to_have_text(REPLY[0])
    press("Escape")
    expect(page.locator("#card")).to_be_hidden()


def test_what_was_made_without_probabilities_says_so(rig: Rig, chat: Chat) -> None:
    chat.button("Probabilities").click()
    chat.ask("Hi")
    assert rig.engine.submitted[-1].logprobs is None
    chat.button("Probabilities").click()
    expect(chat.answers).to_contain_text("Made without probabilities")
    chat.button("Regenerate").click()
    expect(chat.page.locator(".tokens .token").nth(5)).to_be_visible()
    assert rig.engine.submitted[-1].logprobs == 5
