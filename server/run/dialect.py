"""The seam between a generation and a wire format: typed parts in, events or one answer out."""

from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from server.http.errors import ApiError
from server.http.pieces import JsonList
from server.http.sse import Event
from server.keys.store.store import Usage
from server.run.output import FinishReason, TextPart, TokenInfo, ToolCall


@dataclass(frozen=True, slots=True)
class Start:
    """The first part of a generation: the engine has accepted all its choices."""

    num_choices: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class Text:
    """New text of one choice, and the usage of the whole request so far."""

    part: TextPart
    usage: Usage


@dataclass(frozen=True, slots=True)
class End:
    """The last part: every choice has finished, and the usage has been charged.

    Attributes:
        cancelled: whether the client ended the generation.
    """

    usage: Usage
    cancelled: bool


Part = Start | Text | End | None
"""What a generation yields; None after a long silence."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A finished choice.

    Attributes:
        logprobs: the columns of :meth:`Dialect.logprobs`, for all of its tokens.
    """

    text: str
    reasoning: str
    calls: Sequence[ToolCall]
    logprobs: Mapping[str, JsonList[Any]]
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Result:
    """A finished generation."""

    choices: Sequence[Choice]
    usage: Usage


class Dialect(ABC):
    """A wire format, made for one answer.

    Attributes:
        done: the data of the event that ends a stream of server-sent events; None if there is none.
    """

    done: ClassVar[str | None] = None

    @abstractmethod
    def logprobs(self, tokens: Sequence[TokenInfo]) -> dict[str, list[Any]]:
        """Return the log probabilities of ``tokens`` as this format's lists, by their names.

        A whole answer is collected in this form, since it takes less memory than the tokens.
        """

    @abstractmethod
    def whole(self, result: Result) -> Mapping[str, Any]:
        """Build the answer to a request that does not stream."""

    @abstractmethod
    def events(self, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[Event | None, None]:
        """Yield the events of a stream, None after a long silence; closes ``parts`` at the end."""

    @abstractmethod
    def error(self, error: ApiError) -> Event:
        """Build the event that reports an error in the middle of a stream."""
