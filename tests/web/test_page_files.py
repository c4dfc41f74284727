"""Chats as files: what is exported is imported, and anything else is refused with a reason."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support.fake_server import CHAT, REPLY, Rig
from tests.web.browsing import Visit
from tests.web.chatting import Chat, answer, file


@pytest.fixture
def chat(rig: Rig, visit: Callable[..., Visit]) -> Chat:
    found = Chat(visit(rig.url))
    found.button("Chats").click()
    return found


def export(chat: Chat, kind: str, folder: Path) -> str:
    with chat.page.expect_download() as download:
        chat.button(f"Export {kind}").click()
    saved = folder / download.value.suggested_filename
    download.value.save_as(saved)
    return saved.read_text(encoding="utf-8")


def test_what_is_exported_can_be_imported_and_is_the_same(chat: Chat, tmp_path: Path) -> None:
    chat.button("Settings").click()
    chat.page.get_by_label("System prompt").fill("Be kind.")
    chat.set("Temperature", "0.3")
    chat.button("Probabilities").click()
    chat.ask("One")
    chat.button("Compare").click()
    chat.button("Probabilities").click()
    chat.ask("Two")
    first = export(chat, "JSON", tmp_path)
    exported = json.loads(first)
    assert [turn["user"] for turn in exported["turns"]] == ["One", "Two"]
    assert len(exported["turns"][0]["answers"][0]["tokens"]) > 10
    before = chat.page.locator("#thread").inner_text()
    chat.button("Clear all").click()
    chat.page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(chat.answers).to_have_count(0)
    chat.load(first)
    expect(chat.answers).to_have_count(4)
    assert chat.page.locator("#thread").inner_text() == before
    assert export(chat, "JSON", tmp_path) == first
    chat.ask("Three")  # it can be gone on with
    expect(chat.answers).to_have_count(6)


def test_markdown_is_for_reading(chat: Chat, tmp_path: Path) -> None:
    chat.ask("How?")
    text = export(chat, "Markdown", tmp_path)
    assert text == f"# How?\n\n## You\n\nHow?\n\n## {CHAT}\n\n{REPLY}\n"


def test_what_a_file_has_beside_a_chat_is_left_out(chat: Chat) -> None:
    wrong = chat.page.locator("#history").get_by_role("alert")
    chat.load("null")
    expect(wrong).to_contain_text("file.json is JSON, but no chat of this page")
    unknown = {"__proto__": 1, "onclick": "alert(1)"}
    chat.load(file(turns=answer(text="<b>**imported**</b>", **unknown)))
    expect(chat.answers.locator(".prose strong")).to_have_text("imported")
    expect(chat.answers.locator(".prose b")).to_have_count(0)
    expect(wrong).to_have_count(0)
