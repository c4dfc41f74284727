"""Requests to an OpenAI-compatible server, and the reading of its answers."""

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
    """The sink of one answer, which records arrivals and reads only what is needed.

    Args:
        sample: the sample to fill in.
        keep_text: whether to collect the generated text.
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
        """Receive a piece of an answer that should be a stream."""
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
        """Receive a piece of an answer that is one JSON object."""
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
        """Fill in the numbers of tokens once the answer is complete.

        Raises:
            RequestFailedError: the answer is an error, or incomplete.
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
        model: the server's name for the model.
        ignore_eos: whether the server can generate the full length; found by ``probe``.
        batch: number of texts in one embeddings request.
        api_key: used only for the advice in errors.
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
        """Generate from a text or messages, and return the generated text if ``keep_text`` is set.

        Raises:
            RequestFailedError: the request failed.
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
            RequestFailedError: the request failed.
        """
        body = {"model": self.model, "input": texts, "encoding_format": "base64"}
        answer = Answer(sample)
        message = orjson.dumps(body)
        answer.finish(await self.client.request(PATHS["embeddings"], message, answer.whole))
        sample.texts = len(texts)

    def as_prompt(self, text: str) -> str | list[dict[str, str]]:
        """Return a text in the form that this endpoint takes."""
        return text if self.endpoint == "completions" else [{"role": "user", "content": text}]

    async def probe(self, seed: int) -> None:
        """Check that the server answers, and measure how it counts the tokens of prompts.

        Raises:
            BenchError: the server does not answer; the message says what to do.
        """
        rng = random.Random(f"probe {seed}")
        try:
            try:
                sizes = [await self._ask_size(words(count, rng)) for count in PROBES]
            except RequestFailedError as error:
                if error.status not in (400, 422) or not self.ignore_eos:
                    raise
                self.ignore_eos = False  # OpenAI's own servers reject unknown parameters
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
        """Return an error that says what to do about a server that does not answer."""
        if error.status == 404:
            try:
                known = ", ".join(await list_models(self.client)) or "none"
            except RequestFailedError:
                known = "unknown"
            return BenchError(f"{error}\nModels at {self.client.url}: {known}; choose with --model")
        return explained(error, self.client.url, self.api_key)


def explained(error: RequestFailedError, url: str, api_key: str | None) -> BenchError:
    """Return an error that says what to do about a failed request."""
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
    """Connect to a model and check that it answers; the default is the server's first model.

    Raises:
        BenchError: the model does not answer; the message says what to do.
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
    """Return the ids of a server's models; empty if it does not list them.

    Raises:
        RequestFailedError: there was no answer, or it is not a list of models.
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
