"""A chat whose screen is text, and servers that misbehave."""

import io
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from server.cli.chat.client import Server
from server.cli.chat.dialogue import Dialogue
from server.cli.chat.screen import Screen
from server.cli.chat.talk import Talk
from tests.support.fake_server import CHAT


class Paper(Screen):
    """A screen of 80 columns, kept as text."""

    def __init__(self, file: io.StringIO | None = None) -> None:
        self.file, self.errors = file or io.StringIO(), io.StringIO()
        super().__init__(Console(file=self.file, width=80), Console(file=self.errors, width=80))

    @property
    def text(self) -> str:
        return self.file.getvalue()

    @property
    def complaints(self) -> str:
        """All errors, in one line."""
        return " ".join(self.errors.getvalue().split())


def talk_to(url: str, screen: Paper | None = None, key: str = "") -> Talk:
    return Talk(Server(url, key), Dialogue(model=CHAT), screen or Paper())


@contextmanager
def answering(*replies: bytes) -> Iterator[str]:
    """A server that sends each of these once, and closes the connection; its address."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        for reply in replies:
            connection, _ = listener.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65_536)
                head, _, body = head.partition(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r")[0] or 0)
                while len(body) < length:
                    body += connection.recv(65_536)
                connection.sendall(reply)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        thread.join(10)
        listener.close()
        assert not thread.is_alive()
