"""Chats as files: what is exported is imported, and anything else is refused with a reason."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.support.fake_server import CHAT, REPLY, Rig
from tests.web.browsing import Visit
from tests.web.chatting import Chat, answer, column, file


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


def test_another_file_is_refused_with_the_reason(chat: Chat) -> None:
    chat.ask("Stay")
    hot = column() | {"sampling": {"temperature": 9}}
    refused = {
        "not json": "file.json is not JSON.",
        "[1, 2]": "no chat of this page",
        "null": "no chat of this page",
        file(version=2): "of version 2; this page reads version 1",
        file(turns=[{"user": 3, "answers": []}]): "damaged: turns[0].user is not",
        file(turns=answer(text=None)): "damaged: turns[0].answers[0].text is not",
        file(turns=answer(tokens=[["a", "b", []]])): "turns[0].answers[0].tokens[0] is not",
        file(turns=answer(usage={"prompt": 1})): "turns[0].answers[0].usage.cached is not",
        file(columns=[column()]): "damaged: columns is not",
        file(columns=[column(), hot]): "damaged: columns[1].sampling.temperature is not",
        file(columns=[column() | {"sampling": {"stop": None}}, column()]): "sampling.stop is not",
        file(turns=answer(times={"total": math.inf})).replace(
            "Infinity", "1e999"
        ): "times.total is",
        file(turns=answer(warnings=["w"] * 101)): "warnings has 101 entries; at most 100 are read",
        file(turns=answer(tokens=[["a", 0, [["b", 0]] * 21]])): "answers[0].tokens[0] is not",
        file(turns=answer(model="m" * 10_001)): "answers[0].model is not",
        file(turns=[{"user": "", "answers": []}] * 2001): "turns has 2,001 entries; at most 2,000",
        file(turns=answer(text="- a\n" * 250_001)): "has 1,000,006 characters in messages and",
    }
    wrong = chat.page.locator("#history").get_by_role("alert")
    for text, reason in refused.items():
        chat.load(text)
        expect(wrong).to_contain_text(reason)
    assert chat.said() == ["Stay", REPLY]
    unknown = {"__proto__": 1, "onclick": "alert(1)"}
    chat.load(file(turns=answer(text="<b>**imported**</b>", **unknown)))
    expect(chat.answers.locator(".prose strong")).to_have_text("imported")
    expect(chat.answers.locator(".prose b")).to_have_count(0)
    expect(wrong).to_have_count(0)
