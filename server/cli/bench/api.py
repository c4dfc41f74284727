"""What is asked of an OpenAI-compatible server, and what its answers say."""

import random
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson

from server.cli.bench.errors import BenchError, RequestFailedError
from server.cli.bench.http import Client
from server.cli.bench.prompts import PROBES, PromptSize, words
from server.cli.bench.sse import EventReader
from server.cli.bench.stats import Sample

Endpoint = Literal["completions", "chat", "embeddings"]
PATHS: dict[Endpoint, str] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
    "embeddings": "/v1/embeddings",
}
_DETAIL = 300
_MOST_BYTES = 64 * 1024 * 1024


class Answer:
    """The sink of one answer: notes arrivals, and reads what is needed of the rest.

    Args:
        sample: what is filled in.
        keep_text: gather the text that was generated.
    """

    def __init__(self, sample: Sample, *, keep_text: bool = False) -> None:
        self.text: list[str] | None = [] if keep_text else None
        self.usage: dict[str, Any] | None = None
        self._sample = sample
        self._events = EventReader()
        self._raw: list[bytes] = []
        self._size = 0
        self._done = self._is_stream = False

    def stream(self, piece: bytes, now: float) -> None:
        """A piece of an answer that should be a stream."""
        if not self._is_stream and not self._raw:
            self._is_stream = not piece.lstrip().startswith(b"{")
        if not self._is_stream:  # an error, or a server that does not stream
            self.whole(piece, now)
            return
        for data in self._events.feed(piece):
            if data == b"[DONE]":
                self._done = True
            else:
                self._event(data, now)

    def whole(self, piece: bytes, _: float) -> None:
        """A piece of an answer that is one JSON object."""
        self._size += len(piece)
        if self._size > _MOST_BYTES:
            raise RequestFailedError("malformed answer", f"it has over {_MOST_BYTES} bytes")
        self._raw.append(piece)

    def _event(self, data: bytes, now: float) -> None:
        payload = _parse(data)
        if choices := payload.get("choices"):
            choice = choices[0]
            delta = choice.get("delta")
            if delta is None:
                text = choice.get("text")
            else:
                text = delta.get("content") or delta.get("reasoning_content")
            if text:
                self._sample.arrivals.append(now)
                if self.text is not None:
                    self.text.append(text)
        if usage := payload.get("usage"):
            self.usage = usage
        if error := payload.get("error"):
            raise RequestFailedError("error in the stream", _message(error))

    def finish(self, status: int) -> None:
        """The answer is complete: fill in what it says of tokens.

        Raises:
            RequestFailedError: it is an error, or not all of an answer.
        """
        raw = b"".join(self._raw)
        if status != 200:
            raise RequestFailedError(f"HTTP {status}", _error_text(raw), status)
        if self._is_stream:
            if not (self._done and self._events.empty):
                raise RequestFailedError("stream cut", "it ended without [DONE]")
        else:
            self.usage = _parse(raw).get("usage")
        if not self.usage:
            raise RequestFailedError("no usage", "the answer does not say how many tokens it took")
        sample, usage = self._sample, self.usage
        sample.prompt_tokens = usage.get("prompt_tokens") or 0
        sample.output_tokens = usage.get("completion_tokens") or 0
        sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0


def _parse(data: bytes) -> dict[str, Any]:
    try:
        payload = orjson.loads(data)
    except ValueError:
        raise RequestFailedError("malformed event", repr(data[:80])) from None
    if not isinstance(payload, dict):
        raise RequestFailedError("malformed event", repr(data[:80]))
    return payload


def _error_text(raw: bytes) -> str:
    try:
        return _message(orjson.loads(raw)["error"])
    except (ValueError, KeyError, TypeError):
        return raw[:_DETAIL].decode("utf-8", "replace")


def _message(error: Any) -> str:
    text = error.get("message") if isinstance(error, dict) else error
    return str(text)[:_DETAIL]


@dataclass
class Api:
    """One model of one server.

    Attributes:
        model: by the name under which the server knows it.
        ignore_eos: whether the server goes on to the wanted length; found by ``probe``.
        batch: texts of one embeddings request.
        api_key: only for what errors advise.
    """

    client: Client
    model: str
    endpoint: Endpoint = "completions"
    ignore_eos: bool = True
    batch: int = 1
    api_key: str | None = None
    size: PromptSize = field(default_factory=lambda: PromptSize(0.0, 1.0))

    async def generate(
        self, sample: Sample, prompt: str | list[dict[str, str]], max_tokens: int, **how: bool
    ) -> str:
        """Generate from a text, or from messages; the text if ``keep_text`` is given.

        Raises:
            RequestFailedError: for whatever reason.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        body["prompt" if self.endpoint == "completions" else "messages"] = prompt
        if self.ignore_eos:
            body["ignore_eos"] = True
        answer = Answer(sample, **how)
        message = orjson.dumps(body)
        answer.finish(await self.client.request(PATHS[self.endpoint], message, answer.stream))
        return "".join(answer.text or ())

    async def embed(self, sample: Sample, texts: list[str]) -> None:
        """Embed some texts.

        Raises:
            RequestFailedError: for whatever reason.
        """
        body = {"model": self.model, "input": texts, "encoding_format": "base64"}
        answer = Answer(sample)
        message = orjson.dumps(body)
        answer.finish(await self.client.request(PATHS["embeddings"], message, answer.whole))
        sample.texts = len(texts)

    def as_prompt(self, text: str) -> str | list[dict[str, str]]:
        """A text as this endpoint takes it."""
        return text if self.endpoint == "completions" else [{"role": "user", "content": text}]

    async def probe(self, seed: int) -> None:
        """Find out how long prompts are here, and that the server answers at all.

        Raises:
            BenchError: it does not; the text says what to do.
        """
        rng = random.Random(f"probe {seed}")
        try:
            try:
                sizes = [await self._ask_size(words(count, rng)) for count in PROBES]
            except RequestFailedError as error:
                if error.status not in (400, 422) or not self.ignore_eos:
                    raise
                self.ignore_eos = False  # OpenAI's own servers refuse what they do not know
                sizes = [await self._ask_size(words(count, rng)) for count in PROBES]
        except RequestFailedError as error:
            raise await self._explained(error) from None
        self.size = PromptSize.fit((sizes[0], sizes[1]))

    async def _ask_size(self, text: str) -> int:
        sample = Sample(start=0.0)
        if self.endpoint == "embeddings":
            await self.embed(sample, [text])
        else:
            await self.generate(sample, self.as_prompt(text), 1)
        return sample.prompt_tokens

    async def _explained(self, error: RequestFailedError) -> BenchError:
        """What to do about a server that answers nothing."""
        if error.status == 404:
            try:
                known = ", ".join(await list_models(self.client)) or "none"
            except RequestFailedError:
                known = "unknown"
            return BenchError(f"{error}\nModels at {self.client.url}: {known}; choose with --model")
        return explained(error, self.client.url, self.api_key)


def explained(error: RequestFailedError, url: str, api_key: str | None) -> BenchError:
    """What to do about a request that no server answered as it should."""
    if error.status in (401, 403):
        what = "another --api-key" if api_key else "--api-key"
        return BenchError(f"{error}\nThe server at {url} wants {what}")
    if error.status == 429:
        return BenchError(
            f"{error}\nBenchmarks need a key without limits: "
            "inferneo keys create bench --rpm none --tpm none --rpd none"
        )
    if error.status == 503:
        return BenchError(f"{error}\nWait until {url}/ready answers 200, and try again")
    if error.reason == "cannot connect":
        return BenchError(
            f"nothing answers at {url} ({error}); start a server, as by "
            "`inferneo serve`, or name another with --url"
        )
    return BenchError(f"{url} answers no request: {error}")


async def connect(
    client: Client,
    model: str | None,
    endpoint: Endpoint = "completions",
    *,
    batch: int = 1,
    ignore_eos: bool = True,
    api_key: str | None = None,
    seed: int = 0,
) -> Api:
    """A model that was found to answer, by default the server's first.

    Raises:
        BenchError: it does not; the text says what to do.
    """
    if model is None:
        try:
            known = await list_models(client)
        except RequestFailedError as error:
            raise explained(error, client.url, api_key) from None
        if not known:
            raise BenchError(f"{client.url} names no models; name one with --model")
        model = known[0]
    api = Api(client, model, endpoint, ignore_eos, batch, api_key)
    await api.probe(seed)
    return api


async def list_models(client: Client) -> list[str]:
    """Ids of the models of a server; none if it does not say.

    Raises:
        RequestFailedError: no answer came, or one that is not a list of models.
    """
    pieces: list[bytes] = []
    status = await client.request("/v1/models", None, lambda piece, _: pieces.append(piece))
    raw = b"".join(pieces)
    if status == 404:
        return []
    if status != 200:
        raise RequestFailedError(f"HTTP {status}", _error_text(raw), status)
    try:
        return [str(each["id"]) for each in orjson.loads(raw)["data"]]
    except (ValueError, KeyError, TypeError):
        raise RequestFailedError("malformed answer", repr(raw[:80])) from None
