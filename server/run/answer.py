"""A generation dressed as the client asked: chunks of a stream, or one whole answer."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from io import StringIO
from typing import Any

from server.http.pieces import JsonList
from server.run.choice import ChoiceEvent
from server.run.dialect import Shape
from server.run.generation import Generation


class _Collected:
    """What a choice of a whole answer holds so far."""

    def __init__(self, shape: Shape) -> None:
        self.text = StringIO()
        self.columns = {name: JsonList() for name in shape.columns(())}
        self._shape = shape

    def add(self, event: ChoiceEvent) -> None:
        self.text.write(event.text)
        for name, values in self._shape.columns(event.tokens).items():
            self.columns[name].extend(values)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a request will be answered with, and how.

    Attributes:
        stream: the client wants chunks.
        num_returned: choices of each prompt in a whole answer: the best of those sampled.
        user: whom the client serves, by its own name for them; for the log.
    """

    generation: Generation
    shape: Shape
    stream: bool
    num_returned: int
    user: str | None

    async def chunks(self) -> AsyncGenerator[dict[str, Any] | None, None]:
        """The chunks of a stream, in order; None after a long silence.

        Raises:
            InferneoError: as :meth:`Generation.events` does.
        """
        shape, opened, first = self.shape, False, True
        usage = self.generation.usage
        async with aclosing(self.generation.events()) as events:
            async for event in events:
                if not opened:
                    # Only now: whatever fails before this is an error with a status of its own.
                    opened = True
                    if (opening := shape.opening()) is not None:
                        for choice in self.generation.choices:
                            yield shape.chunk(choice.index, opening, usage=usage, first=first)
                            first = False
                if event is None:
                    yield None
                    continue
                if event.text or event.tokens:
                    yield shape.chunk(event.index, shape.delta(event), usage=usage, first=first)
                    first = False
                if event.finish_reason is not None:
                    ending = shape.ending()
                    yield shape.chunk(
                        event.index, ending, event.finish_reason, usage=usage, first=first
                    )
                    first = False
        if shape.include_usage or self.generation.cancelled:
            yield shape.usage_chunk(usage)

    async def whole(self) -> dict[str, Any]:
        """The whole answer, to be written by :class:`~server.http.pieces.Json`.

        Raises:
            InferneoError: as :meth:`Generation.events` does.
        """
        choices = self.generation.choices
        collected = [_Collected(self.shape) for _ in choices]
        async with aclosing(self.generation.events()) as events:
            async for event in events:
                if event is not None:
                    collected[event.index].add(event)
        returned = [
            {
                "index": index,
                **self.shape.message(collected[i].text.getvalue(), collected[i].columns),
                "finish_reason": choices[i].finish_reason,
            }
            for index, i in enumerate(self._best())
        ]
        return self.shape.answer(returned, self.generation.usage)

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
