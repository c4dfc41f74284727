"""A small Hugging Face Hub on loopback: the API of a model's files, and their downloads."""

import hashlib
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from inferneo_jax.weights import hub as hub_module

PIECE = 1 << 14


@dataclass
class Repo:
    """A repository; files of ``lfs`` suffixes are large ones, and ``more`` is told of all."""

    files: dict[str, bytes]
    sha: str = "a" * 40
    card: dict[str, Any] = field(default_factory=lambda: {"license": "apache-2.0"})
    gated: bool = False
    lfs: tuple[str, ...] = (".gguf", ".safetensors")
    more: dict[str, Any] = field(default_factory=dict)

    def is_large(self, path: str) -> bool:
        return path.endswith(self.lfs)


def git_digest(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class FakeHub:
    """What the server has, what it was asked for, and the faults it shows.

    Attributes:
        repos: repositories by ``org/name``.
        token: the token that may read gated repositories.
        requests: (path, range header, authorization header) of each request, in order.
        cut: for the next downloads, the number of bytes after which each is cut off.
        refuse_ranges: send whole files only.
        swapped: content that is sent in place of a path's own.
        seconds_per_piece: how long each 16 kB take.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self.repos: dict[str, Repo] = {}
        self.token = "hf_right"
        self.requests: list[tuple[str, str | None, str | None]] = []
        self.cut: list[int] = []
        self.refuse_ranges = False
        self.swapped: dict[str, bytes] = {}
        self.seconds_per_piece = 0.0

    def add(self, name: str, files: Mapping[str, bytes], **options: Any) -> Repo:
        self.repos[name] = Repo(dict(files), **options)
        return self.repos[name]

    def downloads(self) -> list[tuple[str, str | None]]:
        """The paths and ranges that were asked of the storage, in order."""
        return [(path, span) for path, span, _ in self.requests if "/resolve/" in path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        self.hub.requests.append(
            (path, self.headers.get("Range"), self.headers.get("Authorization"))
        )
        if path.startswith("/api/models/"):
            self._describe(path.removeprefix("/api/models/"))
        elif path.startswith("/storage/"):
            name, _, file = path.removeprefix("/storage/").partition("/-/")
            self._send(name, file)
        else:
            self._resolve(path)

    def _describe(self, name: str) -> None:
        repo = self.hub.repos.get(name)
        if repo is None:
            self._error(401, "RepoNotFound")
            return
        siblings = []
        for path, content in repo.files.items():
            each: dict[str, Any] = {"rfilename": path, "size": len(content)}
            if repo.is_large(path):
                digest = hashlib.sha256(content).hexdigest()
                each["blobId"] = "0" * 40  # that of the pointer
                each["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            else:
                each["blobId"] = git_digest(content)
            siblings.append(each)
        tags = [f"license:{repo.card['license']}"] if "license" in repo.card else []
        body = {
            "id": name,
            "sha": repo.sha,
            "gated": "auto" if repo.gated else False,
            "private": False,
            "tags": tags,
            "cardData": repo.card,
            "siblings": siblings,
            **repo.more,
        }
        self._reply(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, path: str) -> None:
        name, _, rest = path.removeprefix("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        repo = self.hub.repos.get(name)
        if repo is None:
            self._error(401, "RepoNotFound")
            return
        if repo.gated and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._error(401 if "Authorization" not in self.headers else 403, "GatedRepo")
            return
        if revision not in ("main", repo.sha):
            self._error(404, "RevisionNotFound")
            return
        if file not in repo.files:
            self._error(404, "EntryNotFound")
            return
        if not repo.is_large(file):
            self._send(name, file)
            return
        digest = hashlib.sha256(repo.files[file]).hexdigest()
        place = urllib.parse.quote(f"/storage/{name}/-/{file}")
        # Another name of this machine is another origin, as the Hub's storage is.
        location = self.hub.url.replace("127.0.0.1", "localhost") + place
        self._reply(302, b"", {"Location": location, "X-Linked-Etag": f'"{digest}"'})

    def _send(self, name: str, file: str) -> None:
        content = self.hub.swapped.get(file, self.hub.repos[name].files[file])
        span, start = self.headers.get("Range"), 0
        headers = {}
        if span and not self.hub.refuse_ranges:
            start = int(span.removeprefix("bytes=").partition("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(206 if headers else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        cut = self.hub.cut.pop(0) if self.hub.cut else len(content)
        rest = memoryview(content)[start : start + cut]
        for at in range(0, len(rest), PIECE):
            time.sleep(self.hub.seconds_per_piece)
            self.wfile.write(rest[at : at + PIECE])
        if start + cut < len(content):
            self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self._reply(status, b"", {"X-Error-Code": code, "X-Error-Message": code})

    def _reply(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that was killed is no error."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A hub in place of the real one, for this process, without a token, a cache or pauses."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/nowhere")
    monkeypatch.setattr(hub_module, "_PAUSES", (0.0, 0.0))
    path = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    with _served() as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.url + path)
        yield served


@contextmanager
def _served() -> Iterator[FakeHub]:
    """A hub that listens on a free port of loopback until the block ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"hub": hub})
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
