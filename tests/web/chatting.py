"""The chat page as a person uses it, and what the fake engine was asked meanwhile."""

import json
import re
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Self

from playwright.sync_api import Locator, expect

from tests.support.fake_engine import FakeEngine
from tests.support.fake_server import CHAT, make_tokenizer
from tests.web.browsing import Visit

_MESSAGE = re.compile(r"<\|start\|>(\w+)\n(.*?)<\|end\|>\n", re.DOTALL)
_TOKENIZER = make_tokenizer()


class Chat:
    """The page at ``/``, and its parts."""

    def __init__(self, visited: Visit) -> None:
        self.visited = visited
        self.page = visited.page
        self.input = self.page.get_by_label("Message", exact=True)
        self.answers = self.page.locator(".answer")
        self.messages = self.page.locator(".message")
        self.expect_ready()

    def expect_ready(self) -> None:
        expect(self.button("Send")).to_be_enabled()

    def button(self, name: str | re.Pattern[str]) -> Locator:
        return self.page.get_by_role("button", name=name, exact=isinstance(name, str))

    def send(self, text: str) -> None:
        """Send a message; the answer begins."""
        self.input.fill(text)
        self.input.press("Enter")

    def ask(self, text: str) -> None:
        """Send a message and wait for all of its answers."""
        self.send(text)
        self.expect_done()

    def expect_done(self) -> None:
        expect(self.button("Send")).to_be_visible()
        expect(self.page.locator(".answer.running")).to_have_count(0)

    def be_greedy(self) -> None:
        """Set the temperature to 0."""
        self.button("Settings").click()
        self.set("Temperature", "0")
        self.button("Settings").click()

    def said(self) -> list[str]:
        """The messages and answers that are shown, in order."""
        return self.page.locator(".message .said, .answer .prose").all_inner_texts()

    def set(self, label: str, value: str) -> None:
        """Type a value into a control of the open settings."""
        field = self.page.locator("#settings").get_by_role("textbox", name=label, exact=True)
        field.fill(value)
        field.blur()

    def load(self, text: str, name: str = "file.json") -> None:
        """Import a file of this text; the panel of chats is open."""
        with self.page.expect_file_chooser() as chooser:
            self.button("Import").click()
        file = {"name": name, "mimeType": "application/json", "buffer": text.encode()}
        chooser.value.set_files([file])  # type: ignore[list-item]

    def count(self, what: str) -> int:
        """The number before ``what`` in the last counter."""
        found = re.search(rf"(\d+) {what}", self.answers.last.locator(".counter").inner_text())
        assert found
        return int(found[1])


def asked(engine: FakeEngine, index: int = -1) -> list[tuple[str, str]]:
    """The conversation that the engine got, as (role, content)."""
    prompt = _TOKENIZER.decode(engine.submitted[index].prompt, skip_special_tokens=False)
    return _MESSAGE.findall(prompt)


def column() -> dict[str, Any]:
    """What a file says of a column."""
    return {"model": CHAT, "system": "", "sampling": {}}


def file(**changes: Any) -> str:
    """A chat as "Export JSON" writes it, with these parts changed."""
    chat = {"format": "inferneo-chat", "version": 1, "title": "T", "updated": 1, "compare": False}
    return json.dumps(chat | {"columns": [column(), column()], "turns": []} | changes)


def answer(**changes: Any) -> list[dict[str, Any]]:
    """The turns of a chat: one, whose answer has these parts changed."""
    return [{"user": "Hi", "answers": [column() | {"text": "Hello"} | changes]}]


class Cable:
    """Carries bytes to a server till it is cut.

    Attributes:
        url: where its other end is.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = self._run(self._accept)

    def cut(self) -> None:
        """End every connection, and take no more."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        self._listener.close()
        for end in self._ends:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._ends.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._ends:
            self.cut()

    def _run(self, what: Callable[..., None], *arguments: Any) -> threading.Thread:
        thread = threading.Thread(target=what, args=arguments, daemon=True)
        thread.start()
        return thread

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near = self._listener.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [near, far]
                self._run(self._carry, near, far)
                self._run(self._carry, far, near)

    def _carry(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
