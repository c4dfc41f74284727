"""The chat's client of a server: it lists models and streams answers."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
import orjson

from server.cli.bench.errors import RequestFailedError
from server.cli.bench.sse import EventReader
from server.process.listening import is_local

_CONNECT_SECONDS, _SILENT_SECONDS = 5.0, 120.0
"""This server sends something every 15 s; others may compute a long prompt in silence."""


class ChatError(Exception):
    """An error with a message for the user of the chat."""


class NoServerError(ChatError):
    """No server answers at the address."""


class KeyNeededError(ChatError):
    """The server needs an API key, or a different one."""


@dataclass
class Answer:
    """The answer to a request, so far.

    Attributes:
        text: the text generated so far.
        reason: the ``finish_reason``; None if the answer has not ended.
        tokens: number of tokens generated; None if the server did not say.
        warnings: the parts of the request that had no effect.
        first, last: when the first and the last piece arrived, in seconds after the request.
        reasoning: the reasoning before the text.
    """

    text: str = ""
    reason: str | None = None
    tokens: int | None = None
    warnings: list[str] = field(default_factory=list)
    first: float | None = None
    last: float = 0.0
    reasoning: str = ""

    @property
    def rate(self) -> float | None:
        """Tokens per second after the first one; None if there are too few to tell."""
        if self.first is None or not self.tokens or self.tokens < 2 or self.last <= self.first:
            return None
        return (self.tokens - 1) / (self.last - self.first)


class Server:
    """A server that speaks OpenAI's API.

    Args:
        url: the address, with or without ``/v1``.
        key: an API key; if empty, none is sent.

    Attributes:
        url: the address, without ``/v1``.
        key: the API key, which may be changed.
        started_here: whether the server was started for the chat.
    """

    started_here = False

    def __init__(self, url: str, key: str = "") -> None:
        with_scheme = url if "://" in url else f"http://{url}"
        self.url = with_scheme.rstrip("/").removesuffix("/v1")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ChatError(f"{url!r} is no address of a server; write http://host:port")
        self.key = key
        # A proxy set in the environment does not apply to servers on this machine.
        self._proxied = not is_local(parts.hostname)

    def models(self) -> list[str]:
        """Return the ids of the models that can chat, as far as the server tells them apart.

        Raises:
            ChatError: the server does not answer, or rejects the request.
        """
        names = [str(model["id"]) for model in self._json("/v1/models")["data"]]
        kinds = {state.get("id"): state.get("kind") for state in self.states()}
        return [name for name in names if kinds.get(name) != "encoder"]

    def check(self, model: str) -> None:
        """Check that there is a model with this id or alias.

        Raises:
            ChatError: there is none; the message lists the models.
        """
        self._json(f"/v1/models/{model}")

    def greet(self) -> None:
        """Check that the server answers.

        Raises:
            ChatError: it does not answer.
        """
        with self._talking(), self._client() as client:
            client.get("/health")

    def states(self) -> list[dict[str, Any]]:
        """Return the state of each model from ``/ready``; empty if the server has no such path."""
        unusable = contextlib.suppress(httpx.HTTPError, ValueError, KeyError, TypeError)
        with unusable, self._client() as client:
            models = orjson.loads(client.get("/ready").content)["models"]
            return [state for state in models if _is_state(state)]
        return []

    def stream(self, body: Mapping[str, Any], answer: Answer) -> Iterator[str]:
        """Request a chat completion and yield the pieces of its text; ``answer`` collects them.

        Raises:
            ChatError: the request fails; ``answer`` holds what arrived before.
        """
        sent = {**body, "stream": True, "stream_options": {"include_usage": True}}
        begin = time.perf_counter()
        with (
            self._talking(),
            self._client() as client,
            client.stream("POST", "/v1/chat/completions", json=sent) as response,
        ):
            if response.status_code != 200:
                response.read()
                raise _refusal(response, self)
            reader = EventReader()
            for piece in response.iter_bytes():
                for event in reader.feed(piece):
                    if event == b"[DONE]":
                        return
                    if (text := _read(event, answer)) or answer.reasoning:
                        answer.last = time.perf_counter() - begin
                        answer.first = answer.first or answer.last
                    if text:
                        answer.text += text
                        yield text
        if answer.reason is None:
            raise ChatError(f"The connection to {self.url} ended before the answer did.")

    def _json(self, path: str) -> Any:
        with self._talking(), self._client() as client:
            response = client.get(path)
            if response.status_code != 200:
                raise _refusal(response, self)
            return orjson.loads(response.content)

    def _client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {self.key}"} if self.key else {},
            timeout=httpx.Timeout(_SILENT_SECONDS, connect=_CONNECT_SECONDS),
            trust_env=self._proxied,
        )

    @contextlib.contextmanager
    def _talking(self) -> Iterator[None]:
        """Turn failures of the network into :class:`ChatError`."""
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NoServerError(f"No server answers at {self.url} ({error}).") from None
        except httpx.TimeoutException:
            raise ChatError(
                f"{self.url} has sent nothing for {_SILENT_SECONDS:g} s; the request is given up."
            ) from None
        except httpx.HTTPError as error:
            raise ChatError(f"The connection to {self.url} was lost ({error}).") from None
        except (RequestFailedError, ValueError, KeyError, TypeError, AttributeError):
            raise ChatError(
                f"What {self.url} answers is not what OpenAI's API has; is it the right address?"
            ) from None


def _is_state(state: Any) -> bool:
    """Return whether this is a model's state from ``/ready``, loaded or still loading."""
    if not isinstance(state, dict) or not isinstance(state.get("id"), str):
        return False
    counts = [state.get(name) for name in ("done", "total")]
    counted = all(isinstance(count, int) and 0 <= count < 2**63 for count in counts)
    return "stage" not in state or (isinstance(state["stage"], str) and counted)


def _read(event: bytes, answer: Answer) -> str:
    """Return the text that an event adds; put everything else in it into ``answer``."""
    chunk = orjson.loads(event)
    if error := chunk.get("error"):
        raise ChatError(str(error["message"]))
    answer.warnings += chunk.get("warnings") or []
    if usage := chunk.get("usage"):
        answer.tokens = int(usage["completion_tokens"])
    for choice in chunk.get("choices") or []:
        if reason := choice.get("finish_reason"):
            answer.reason = str(reason)
        delta = choice.get("delta") or {}
        answer.reasoning += str(delta.get("reasoning_content") or "")
        return str(delta.get("content") or "")
    return ""


def _refusal(response: httpx.Response, server: Server) -> ChatError:
    """Turn an error response into :class:`ChatError`."""
    try:
        error = orjson.loads(response.content)["error"]
        message, code = str(error["message"]), error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError):
        message, code = f"{server.url} answers with the status {response.status_code}.", None
    if response.status_code == 401:
        return KeyNeededError(message)
    if code == "context_length_exceeded":
        return ChatError(f"{message} /undo takes back the last turn, /clear all.")
    seconds = response.headers.get("Retry-After", "")
    if seconds.isdecimal() and response.headers.get("X-Should-Retry") != "false":
        return ChatError(f"{message} Try again in {int(seconds):,} s: /retry.")
    return ChatError(message)
