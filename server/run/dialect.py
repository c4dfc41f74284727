"""The parts of an answer that both generation endpoints share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from server.keys.store.store import Usage
from server.run.output import TextPart, TokenInfo


@dataclass(frozen=True, kw_only=True)
class Dialect(ABC):
    """How answers look: the whole one, and the chunks of a streamed one.

    Attributes:
        id: the same in every chunk, and so are ``created`` and ``model``.
        model: the name that was asked for.
        with_logprobs: the request asked for log probabilities.
        include_usage: a stream ends with a chunk of usage.
        continuous_usage: the chunks before that one hold the usage so far.
        warnings: for the client; in a stream they are part of the first chunk.
    """

    whole: ClassVar[str]
    part: ClassVar[str]

    id: str
    created: int
    model: str
    with_logprobs: bool
    include_usage: bool
    continuous_usage: bool
    warnings: tuple[str, ...]

    @abstractmethod
    def columns(self, tokens: Sequence[TokenInfo]) -> dict[str, list[Any]]:
        """The lists that log probabilities consist of, for these tokens."""

    @abstractmethod
    def message(self, text: str, columns: Mapping[str, Any]) -> dict[str, Any]:
        """A choice's text and log probabilities in a whole answer."""

    @abstractmethod
    def delta(self, event: TextPart) -> dict[str, Any]:
        """A choice's text and log probabilities in a chunk."""

    @abstractmethod
    def ending(self) -> dict[str, Any]:
        """The chunk that carries nothing but a finish reason."""

    def opening(self) -> dict[str, Any] | None:
        """What each choice begins with, before any text."""
        return None

    def answer(self, choices: Any, usage: Usage) -> dict[str, Any]:
        """The whole answer."""
        return self._head(self.whole, choices, self.warnings) | {"usage": _usage(usage)}

    def chunk(
        self,
        index: int,
        content: dict[str, Any],
        finish_reason: str | None = None,
        *,
        usage: Usage,
        first: bool = False,
    ) -> dict[str, Any]:
        """One chunk of a stream, with the usage so far; the first carries the warnings."""
        choice = {"index": index, **content, "finish_reason": finish_reason}
        chunk = self._head(self.part, [choice], self.warnings if first else ())
        if not self.include_usage:
            return chunk
        return chunk | {"usage": _usage(usage) if self.continuous_usage else None}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last chunk, when usage was asked for."""
        return self._head(self.part, [], ()) | {"usage": _usage(usage)}

    def _head(self, kind: str, choices: Any, warnings: tuple[str, ...]) -> dict[str, Any]:
        head = {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }
        return head | {"warnings": list(warnings)} if warnings else head


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
        "prompt_tokens_details": {"cached_tokens": usage.cached},
    }
