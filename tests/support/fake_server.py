"""A whole server on a real socket, with fake engines."""

import asyncio
import contextlib
import dataclasses
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import tokenizers
from hypercorn.asyncio import serve
from hypercorn.config import Config

from inferneo_jax import EmbeddingModel, GrammarCompiler, LanguageModel, Tokenizer
from server.app import create_app
from server.config.settings import Settings
from server.models.sources import Loader
from tests.support.fake_engine import INFO, TIMEOUT, FakeEmbedder, FakeEngine, writes
from tests.support.raw_http import parse_stream

CHAT, EMBED = "org/tiny-chat", "tiny-embed"
REPLY = "Caf\u00e9 au lait, na\u00efve \U0001f600 END of it."
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def make_tokenizer(*special: str, template: str | None = TEMPLATE) -> Tokenizer:
    """One token a byte, and the words "the" and "END"; characters beyond ASCII take several."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    words = ["th", "the", "EN", "END"]
    vocab = {piece: i for i, piece in enumerate([*alphabet, *words])}
    merges = [("t", "h"), ("th", "e"), ("E", "N"), ("EN", "D")]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|begin|>", "<|end|>", "<|start|>", *special])
    config = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "chat_template": template}
    return Tokenizer(backend, config)


class Server:
    """Hypercorn on a thread of its own, on a port that the system chose."""

    def __init__(self, loader: Loader, **settings: Any) -> None:
        self._loader = loader
        self._settings = Settings(models=(CHAT, EMBED), log_format="json", **settings)
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.ws = f"ws://127.0.0.1:{self.port}"
        self.config = Config()
        self.config.bind = [f"fd://{listener.detach()}"]
        self.config.graceful_timeout = 0.2
        self.config.errorlog = None
        self.errors: list[dict[str, Any]] = []
        self._started = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.loop.set_exception_handler(lambda _, context: self.errors.append(context))
        self._ended = asyncio.Event()
        app = create_app(self._settings, self._loader)

        async def until_stopped() -> None:
            self._started.set()
            await self._ended.wait()

        await serve(app, self.config, shutdown_trigger=until_stopped)

    def __enter__(self) -> "Server":
        self._thread.start()
        assert self._started.wait(TIMEOUT)
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        assert self.errors == [], self.errors


def wait_ready(client: httpx.Client) -> None:
    """Fakes load at once, but on a thread."""
    while client.get("/ready").status_code != 200:
        pass


class Rig:
    """A running server and the engine behind it."""

    def __init__(self, server: Server, client: httpx.Client, engine: FakeEngine) -> None:
        self.server = server
        self.client = client
        self.engine = engine
        self.url, self.ws = server.url, server.ws
        self.embedder: FakeEmbedder

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        return self.client.post(path, json=body, **kwargs)

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The events of a stream, and its comments as text."""
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return parse_stream(response.text)


def models_of(
    engine: FakeEngine, embedder: FakeEmbedder, tokenizer: Tokenizer
) -> dict[str, Callable[[], Any]]:
    return {
        CHAT: lambda: LanguageModel(
            name=CHAT,
            created=1700000000,
            tokenizer=tokenizer,
            engine=engine,
            grammars=GrammarCompiler.of(tokenizer),
            max_len=engine.max_len,
            info=INFO,
        ),
        EMBED: lambda: EmbeddingModel(
            name=EMBED,
            created=1700000001,
            tokenizer=tokenizer,
            embedder=embedder,
            max_len=embedder.max_tokens,
            info=dataclasses.replace(INFO, kv_dtype="", cache_bytes=0),
        ),
    }


@contextlib.contextmanager
def as_new(engine: FakeEngine, tokenizer: Tokenizer) -> Iterator[None]:
    """Begin with the engine as it was made; afterwards nothing may be left running."""
    engine.script = writes(tokenizer, REPLY)
    engine.batch, engine.limit, engine.refusal, engine.failure = 1, None, None, None
    for kept in (engine.submitted, engine.aborted, engine.finished):
        kept.clear()
    yield
    engine.release()
    engine.wait_until(lambda e: e.num_running == 0)


@contextlib.contextmanager
def loading(
    tokenizer: Tokenizer, stage: str, done: int, total: int
) -> Iterator[tuple[Server, FakeEngine, threading.Event]]:
    """A server whose models have come so far, and are loaded once the event is set."""
    engine, go_on = FakeEngine(writes(tokenizer, REPLY)), threading.Event()
    models = models_of(engine, FakeEmbedder(), tokenizer)

    def load(source: Any, _: Any, progress: Any) -> Any:
        progress(stage, done, total)
        assert go_on.wait(TIMEOUT)
        return models[source.id]()

    with Server(load) as server:
        try:
            yield server, engine, go_on
        finally:
            go_on.set()


@contextlib.contextmanager
def running(tokenizer: Tokenizer, context: int = 512, **settings: Any) -> Iterator[Rig]:
    """A server that is ready."""
    engine = FakeEngine(writes(tokenizer, REPLY), max_len=context)
    embedder = FakeEmbedder()
    models = models_of(engine, embedder, tokenizer)
    with (
        Server(lambda source, *_: models[source.id](), **settings) as server,
        httpx.Client(base_url=server.url, timeout=TIMEOUT) as client,
    ):
        wait_ready(client)
        rig = Rig(server, client, engine)
        rig.embedder = embedder
        yield rig
