"""The chat page over the fake engine: what is shown is what the API gives, and what is sent."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import expect

from inferneo_jax import Tokenizer
from tests.support.fake_engine import writes
from tests.support.fake_server import CHAT, REPLY, Rig
from tests.web.browsing import Visit
from tests.web.chatting import Chat, asked


@pytest.fixture
def chat(rig: Rig, visit: Callable[..., Visit]) -> Chat:
    return Chat(visit(rig.url))


def test_what_streams_is_what_the_api_gives(rig: Rig, chat: Chat) -> None:
    expect(chat.page.get_by_label("Model")).to_have_text(CHAT)  # and not the embedding model
    rig.engine.limit = 5
    chat.send("Hello")
    expect(chat.answers).to_contain_text(REPLY[:3])
    expect(chat.answers).to_have_attribute("aria-busy", "true")
    expect(chat.answers.locator(".counter")).to_contain_text("5 tokens")
    rig.engine.release()
    chat.expect_done()
    assert chat.said() == ["Hello", REPLY]
    messages = [{"role": "user", "content": "Hello"}]
    whole = rig.post("/v1/chat/completions", {"model": CHAT, "messages": messages}).json()
    assert whole["choices"][0]["message"]["content"] == REPLY
    assert chat.count("tokens") == whole["usage"]["completion_tokens"]
    assert chat.count("cached") == whole["usage"]["prompt_tokens_details"]["cached_tokens"]
    counter = chat.answers.locator(".counter")
    expect(counter).to_contain_text(f"prompt {whole['usage']['prompt_tokens']} ")
    expect(counter).to_contain_text("first after")
    expect(chat.page.get_by_role("status")).to_contain_text("complete")


@pytest.mark.parametrize("by", ["button", "Escape"])
def test_stop_frees_the_slot_and_keeps_what_was_said(rig: Rig, chat: Chat, by: str) -> None:
    rig.engine.limit = 5
    chat.send("Hello")
    expect(chat.answers).to_contain_text(REPLY[:3])
    assert rig.engine.num_running == 1
    if by == "button":
        chat.button("Stop").click()
    else:
        chat.page.keyboard.press("Escape")
    rig.engine.wait_until(lambda e: e.num_running == 0)
    assert len(rig.engine.aborted) == 1
    chat.expect_done()
    expect(chat.answers).to_contain_text("stopped")
    assert chat.said()[1].startswith(REPLY[:3])


def test_what_is_sent_is_what_is_shown(rig: Rig, chat: Chat) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("System prompt").fill("Be kind.")
    system = ("system", "Be kind.")
    chat.ask("One")
    assert asked(rig.engine) == [system, ("user", "One")]
    chat.ask("Two")
    chat.ask("Three\nlines")
    assert asked(rig.engine)[1:] == [
        ("user", "One"),
        ("assistant", REPLY),
        ("user", "Two"),
        ("assistant", REPLY),
        ("user", "Three\nlines"),
    ]
    # An edited message goes out anew, and what came after it is gone.
    message = chat.messages.nth(1)
    message.get_by_role("button", name="Edit").click()
    message.get_by_label("Edit the message").fill("Second")
    message.get_by_role("button", name="Send again").click()
    chat.expect_done()
    assert chat.said() == ["One", REPLY, "Second", REPLY]
    assert asked(rig.engine)[1:] == [("user", "One"), ("assistant", REPLY), ("user", "Second")]
    chat.messages.nth(0).get_by_role("button", name="Delete").click()
    assert chat.said() == ["Second", REPLY]
    chat.button("Regenerate").click()
    rig.engine.wait_until(lambda e: len(e.finished) == 5)
    chat.expect_done()
    assert asked(rig.engine) == [system, ("user", "Second")]


def test_a_message_is_edited_while_its_answer_streams(rig: Rig, chat: Chat) -> None:
    rig.engine.limit = 5
    chat.send("Wrong")
    expect(chat.answers).to_contain_text(REPLY[:3])
    chat.messages.get_by_role("button", name="Edit").click()
    chat.page.get_by_label("Edit the message").fill("Right")
    chat.page.keyboard.press("Enter")
    rig.engine.wait_until(lambda e: len(e.aborted) == 1 and len(e.submitted) == 2)
    rig.engine.release()
    chat.expect_done()
    assert chat.said() == ["Right", REPLY]
    assert asked(rig.engine) == [("user", "Right")]


def test_a_chat_survives_a_reload_until_it_is_deleted(rig: Rig, chat: Chat) -> None:
    page = chat.page
    chat.ask("Remember me")
    chat.button("Chats").click()
    expect(page.get_by_text("kept in this browser")).to_be_visible()
    chat.button("New chat").click()
    expect(chat.answers).to_have_count(0)
    chat.ask("Another")
    page.reload()
    chat.expect_ready()
    assert chat.said() == ["Another", REPLY]
    chat.button("Remember me").click()
    assert chat.said() == ["Remember me", REPLY]
    chat.button("Delete the chat Another").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(chat.button("Another")).to_have_count(0)
    chat.button("Clear all").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_text("None yet.")).to_be_visible()
    assert "Remember" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()
    chat.expect_ready()
    assert chat.said() == []


def test_what_cannot_be_kept_is_said(rig: Rig, chat: Chat) -> None:
    """The browser's storage is full: first the probabilities are left out, then all is."""
    chat.page.evaluate(
        """() => {
          const { setItem } = Storage.prototype;
          window.room = 3000;
          Storage.prototype.setItem = function (name, value) {
            if (value.length > window.room) throw new DOMException("", "QuotaExceededError");
            setItem.call(this, name, value);
          };
        }"""
    )
    chat.button("Probabilities").click()
    chat.ask("One")
    expect(chat.page.get_by_text("the probabilities of this chat are not kept")).to_be_visible()
    chat.page.evaluate("window.room = 500")
    chat.ask("Two")
    expect(chat.page.get_by_text("this chat is not kept. Export it")).to_be_visible()


def test_a_chat_without_a_mouse(rig: Rig, chat: Chat) -> None:
    page, press = chat.page, chat.page.keyboard.press
    expect(chat.input).to_be_focused()
    page.keyboard.type("Line one")
    press("Shift+Enter")
    page.keyboard.type("line two")
    press("Enter")
    chat.expect_done()
    assert asked(rig.engine) == [("user", "Line one\nline two")]
    expect(chat.input).to_be_focused()

    def tab_to(name: str) -> None:
        for _ in range(40):
            press("Shift+Tab")
            if page.evaluate("document.activeElement.textContent") == name:
                return
        raise AssertionError(f"{name} is not reached")

    tab_to("Edit")
    press("Enter")
    expect(page.get_by_label("Edit the message")).to_be_focused()
    press("Escape")
    expect(page.get_by_role("button", name="Edit")).to_be_focused()
    tab_to("Settings")
    press("Enter")
    expect(page.locator("#settings")).to_be_visible()
    assert page.evaluate("document.activeElement.closest('#settings') !== null")
    press("Enter")  # its Close is what has the focus
    expect(page.locator("#settings")).to_be_hidden()
    expect(chat.button("Settings")).to_be_focused()


def test_two_settings_are_compared_side_by_side(rig: Rig, chat: Chat, tokenizer: Tokenizer) -> None:
    page = chat.page
    rig.engine.script = lambda request: writes(
        tokenizer, "cold" if request.sampling.temperature == 0 else "warm"
    )(request)
    chat.ask("First")
    chat.button("Compare").click()
    chat.button("Settings").click()
    page.get_by_label("Column A").check()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Column B").check()
    chat.set("Temperature", "0")
    rig.engine.limit = 1
    chat.send("Second")
    rig.engine.wait_until(lambda e: e.num_running == 2)  # at once, not one after the other
    expect(page.locator(".answer.running")).to_have_count(2)
    rig.engine.release()
    chat.expect_done()
    # The second column began with what the first one had said.
    assert chat.said() == ["First", "warm", "warm", "Second", "warm", "cold"]
    history = [("user", "First"), ("assistant", "warm"), ("user", "Second")]
    sent = [asked(rig.engine, -2), asked(rig.engine, -1)]
    assert sorted(sent) == sorted([[("system", "Be brief."), *history], history])
    for counter in chat.answers.locator(".counter").all():
        expect(counter).to_contain_text("tokens")
    left, right = (each.bounding_box() for each in chat.answers.all()[-2:])
    assert left
    assert right
    assert left["y"] == right["y"]
    chat.ask("Third")
    assert [each[-1] for each in (asked(rig.engine, -2), asked(rig.engine, -1))] == [
        ("user", "Third")
    ] * 2
    page.set_viewport_size({"width": 600, "height": 800})
    left, right = (each.bounding_box() for each in chat.answers.all()[-2:])
    assert left
    assert right
    assert (left["x"], left["y"] + left["height"] <= right["y"]) == (right["x"], True)


def test_reading_is_not_disturbed_by_what_streams(
    rig: Rig, chat: Chat, tokenizer: Tokenizer
) -> None:
    text = "\n\n".join(f"Part {i}." for i in range(30))
    rig.engine.script = writes(tokenizer, text)
    rig.engine.limit = len(text) - 30
    chat.send("Go")
    top = "document.getElementById('thread').scrollTop"
    expect(chat.answers).to_contain_text("Part 25.")
    expect(chat.button("Go to the end")).to_be_hidden()
    assert chat.page.evaluate(top) > 0  # it followed
    chat.page.locator("#thread").evaluate("element => { element.scrollTop = 0; }")
    expect(chat.button("Go to the end")).to_be_visible()
    rig.engine.release()
    expect(chat.answers).to_contain_text("Part 29.")
    chat.expect_done()
    assert chat.page.evaluate(top) == 0
    chat.button("Go to the end").click()
    assert chat.page.evaluate(top) > 0


def test_controls_have_the_bounds_and_defaults_of_the_api(rig: Rig, chat: Chat) -> None:
    controls = chat.page.evaluate("import('/pages/chat-controls.js').then((m) => m.CONTROLS)")
    schema = rig.client.get("/openapi.json").json()["components"]["schemas"]["ChatBody"]
    for control in controls:
        described = schema["properties"][control["name"]]
        rules = {each["type"]: each for each in described["anyOf"]}
        assert control["standard"] == described.get("default"), control
        if control["kind"] == "lines":
            assert control["most"] == rules["array"]["maxItems"]
            continue
        rule = rules["integer" if control["kind"] == "integer" else "number"]
        low = rule.get("exclusiveMinimum", rule.get("minimum"))
        high = rule.get("maximum", rule.get("exclusiveMaximum", 0) - 1)
        if control["name"] == "seed":  # those that JavaScript holds exactly
            assert (control["min"], control["max"]) == (1 - 2**53, 2**53 - 1)
            assert low <= control["min"]
            assert control["max"] <= high
        elif control["name"] == "max_tokens":  # chat refuses 0, which its schema cannot say
            assert (control["min"], low, "max" in control) == (1, 0, "maximum" in rule)
        else:
            assert (control["min"], control["max"]) == (low, high), control
            assert control.get("above", False) == ("exclusiveMinimum" in rule)


CHANGES: dict[str, tuple[str, str, Any]] = {
    "Temperature": ("0.3", "temperature", 0.3),
    "Top-p": ("0.5", "top_p", 0.5),
    "Top-k": ("7", "top_k", 7),
    "Min-p": ("0.25", "min_p", 0.25),
    "Frequency penalty": ("1.5", "frequency_penalty", 1.5),
    "Presence penalty": ("-1", "presence_penalty", -1.0),
    "Repetition penalty": ("1.1", "repetition_penalty", 1.1),
    "Seed": ("42", "seed", 42),
}


def test_a_control_changes_what_is_asked_for_and_is_remembered(rig: Rig, chat: Chat) -> None:
    page = chat.page
    chat.button("Settings").click()
    page.get_by_text("More sampling").click()
    for label, (text, _, _) in CHANGES.items():
        chat.set(label, text)
    chat.set("Max tokens", "12")
    chat.set("Stop strings", "na\\n\nau")
    chat.ask("Hi")
    assert chat.said()[1] == REPLY.split("au")[0].strip()
    request = rig.engine.submitted[-1]
    assert request.max_tokens == 12
    for _, name, value in CHANGES.values():
        assert getattr(request.sampling, name) == value, name
    page.reload()
    chat.expect_ready()
    fields = page.locator("#settings")
    expect(fields.get_by_role("textbox", name="Seed")).to_have_value("42")
    expect(fields.get_by_role("textbox", name="Stop strings")).to_have_value("na\\n\nau")
    chat.set("Temperature", "3")
    expect(fields.get_by_text("must be a number, at least 0 and at most 2")).to_be_visible()
    expect(fields.get_by_text("0.3 is in use")).to_be_visible()
    chat.button("Reset Seed").click()
    expect(fields.get_by_role("textbox", name="Seed")).to_have_value("")
    chat.button("Reset all").click()
    chat.button("Regenerate").click()
    rig.engine.wait_until(lambda e: len(e.finished) == 2)
    assert rig.engine.submitted[-1].sampling.temperature == 0.7
    chat.expect_done()
    assert chat.said()[1] == REPLY


def test_reasoning_is_folded_above_the_answer(chat: Chat) -> None:
    deltas = [{"reasoning_content": "Hm, <b>"}, {"reasoning_content": "why?"}, {"content": "So."}]
    chunks = [
        {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
    ]
    events = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
    body = "".join([*events, "data: [DONE]\n\n"])
    chat.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=body),
    )
    chat.ask("Hello")
    reasoning = chat.answers.locator(".reasoning")
    expect(reasoning.locator("p")).to_be_hidden()
    reasoning.get_by_text("Reasoning").click()
    expect(reasoning.locator("p")).to_have_text("Hm, <b>why?")
    assert chat.said() == ["Hello", "So."]
