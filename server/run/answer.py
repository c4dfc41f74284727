"""A generation dressed as the client asked: chunks of a stream, or one whole answer."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from io import StringIO
from typing import Any

from server.http.pieces import JsonList
from server.keys.caller import Caller
from server.run.dialect import Dialect
from server.run.generation import Generation
from server.run.output import TextPart

Prepare = Callable[..., "Answer"]
"""Makes the answer to a body; called as ``(registry, caller, fields, strict=...)``.

It validates, tokenizes and fits the request, perhaps in a thread of the CPU pool.
"""


class _Collected:
    """What a choice of a whole answer holds so far."""

    def __init__(self, dialect: Dialect) -> None:
        self.text = StringIO()
        self.columns = {name: JsonList[Any]() for name in dialect.columns(())}
        self._dialect = dialect

    def add(self, event: TextPart) -> None:
        self.text.write(event.text)
        for name, values in self._dialect.columns(event.tokens).items():
            self.columns[name].extend(values)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request will be answered with, and how.

    Attributes:
        stream: the client wants chunks.
        num_returned: choices of each prompt in a whole answer: the best of those sampled.
        user: whom the client serves, by its own name for them; for the log.
    """

    caller: Caller
    generation: Generation
    dialect: Dialect
    stream: bool
    num_returned: int
    user: str | None

    async def chunks(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The chunks of a stream, in order; None after a long silence.

        Raises:
            InferneoError: as :meth:`Generation.events` does.
        """
        dialect, opened, first = self.dialect, False, True
        async with aclosing(self.generation.events()) as events:
            async for event in events:
                if not opened:
                    # Only now: whatever fails before this is an error with a status of its own.
                    opened = True
                    if (opening := dialect.opening()) is not None:
                        for choice in self.generation.choices:
                            yield dialect.chunk(
                                choice.index, opening, usage=self.generation.usage, first=first
                            )
                            first = False
                if event is None:
                    yield None
                    continue
                if event.text or event.tokens:
                    yield dialect.chunk(
                        event.index, dialect.delta(event), usage=self.generation.usage, first=first
                    )
                    first = False
                if event.finish_reason is not None:
                    ending = dialect.ending()
                    yield dialect.chunk(
                        event.index,
                        ending,
                        event.finish_reason,
                        usage=self.generation.usage,
                        first=first,
                    )
                    first = False
        if dialect.include_usage or self.generation.cancelled:
            yield dialect.usage_chunk(self.generation.usage)

    async def whole(self) -> dict[str, Any]:
        """The whole answer, to be written by :class:`~server.http.pieces.Json`.

        Raises:
            InferneoError: as :meth:`Generation.events` does.
        """
        choices = self.generation.choices
        collected = [_Collected(self.dialect) for _ in choices]
        async with aclosing(self.generation.events()) as events:
            async for event in events:
                if event is not None:
                    collected[event.index].add(event)
        returned = [
            {
                "index": index,
                **self.dialect.message(collected[i].text.getvalue(), collected[i].columns),
                "finish_reason": choices[i].finish_reason,
            }
            for index, i in enumerate(self._best())
        ]
        return self.dialect.answer(returned, self.generation.usage)

    def _best(self) -> list[int]:
        """The sequences to return: all, or of each prompt the likeliest, best first."""
        plan, choices = self.generation.plan, self.generation.choices
        if plan.num_choices == self.num_returned:
            return list(range(len(choices)))
        best: list[int] = []
        for start in range(0, len(choices), plan.num_choices):
            group = range(start, start + plan.num_choices)
            best += sorted(group, key=lambda i: -choices[i].mean_logprob)[: self.num_returned]
        return best
