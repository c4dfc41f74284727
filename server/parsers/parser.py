"""The output parser: text of one choice in; content, reasoning and calls out, once certain.

Only text that may begin a marker, and calls that are not complete, are held back. The result does
not depend on the pieces in which the text arrives.
"""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal, NamedTuple

from server.parsers.calls import Call, JsonCalls, PythonCalls, Syntax, Tools, literals_of
from server.parsers.reader import (
    MAX_CALL,
    MAX_NAME,
    CutError,
    MalformedError,
    Reader,
    Step,
    TooLongError,
)

MAX_DRAFTS = 64
"""Maximum number of calls that are looked for within reasoning, where each may be read twice."""

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.:/-]+)")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_START, _HEADER, _BODY, _CHANNELS = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_MESSAGE_ENDS = ("<|end|>", "<|return|>", "<|call|>")


class Form(NamedTuple):
    """How calls are written whose arguments are JSON, as the family's models do.

    Attributes:
        before: what stands before the name of a tool.
        between: what stands between the name and the arguments.
        after: what stands after the arguments.
        separator: what stands between two calls.
        begin: what stands before all calls.
        end: what stands after all calls.
    """

    before: str
    between: str
    after: str
    separator: str = ""
    begin: str = ""
    end: str = ""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How a family of models writes calls and reasoning.

    Attributes:
        calls: the syntax that each opening marker begins.
        bare: the syntax of calls without a marker, which may begin an answer.
        section: the markers around all calls together.
        thoughts: the markers around reasoning, which begins an answer.
        dropped: markers that are no part of the content.
        ids: the ids of calls that the family's templates expect: ``long`` as OpenAI's, ``short``
            of nine letters and digits, or ``numbered`` with the tool's name.
        forms: how calls are written, each with a text that the model's template must hold.
        channels: whether answers are messages with headers, as gpt-oss writes them; then
            ``thoughts`` and ``calls`` are not used.
    """

    calls: Mapping[str, Syntax]
    bare: JsonCalls | PythonCalls | None = None
    section: tuple[str, str] | None = None
    thoughts: tuple[tuple[str, str], ...] = (("<think>", "</think>"),)
    dropped: tuple[str, ...] = ()
    ids: Literal["long", "short", "numbered"] = "long"
    forms: tuple[tuple[str, Form], ...] = ()
    channels: bool = False

    @cached_property
    def literals(self) -> frozenset[str]:
        """All markers; a special token that is a part of one must reach the parser as text."""
        if self.channels:
            return frozenset((_START, _HEADER, _BODY, _CHANNELS, *_MESSAGE_ENDS))
        found = {*literals_of(self.calls), *self.dropped, *(self.section or ())}
        return frozenset(found.union(*self.thoughts)) - {""}


class OutputParser:
    """Parses the text of one choice.

    Attributes:
        thinking: whether reasoning is being written.
        num_calls: number of calls so far.
    """

    def __init__(self, format: Format, tools: Tools | None, *, thinking: bool) -> None:
        """Begin a text.

        Args:
            format: how the model writes.
            tools: the tools that are offered; None looks for no calls.
            thinking: whether the prompt has begun the reasoning.
        """
        self.thinking = thinking
        self.num_calls = 0
        self._format = format
        self._tools = tools
        self._reader = Reader()
        self._cut = False
        self._content = _Words()
        self._reasoning = _Words()
        self._calls: list[Call] = []
        self._openings = () if tools is None else (*format.calls, *(format.section or ())[:1])
        self._closings = tuple(end for _, end in format.thoughts)
        begins = tuple(begin for begin, _ in format.thoughts)
        self._marks = (*self._openings, *begins, *format.dropped)
        self._steps = self._channels() if format.channels else self._run()

    def push(self, text: str) -> None:
        """Take the next piece of the text."""
        self._reader.text += text
        next(self._steps, None)

    def finish(self, *, cut: bool) -> None:
        """End the text.

        Args:
            cut: whether it was ended before the model did; an incomplete call is then left out,
                while otherwise it is content.
        """
        self._reader.ended, self._cut = True, cut
        for _ in self._steps:
            pass
        self.thinking = False
        if not (self.num_calls or self._reasoning.begun):
            self._content.keep_end()

    def take(self) -> tuple[str, str, tuple[Call, ...]]:
        """Return the content, the reasoning and the calls since the last time."""
        calls, self._calls = tuple(self._calls), []
        return self._content.take(), self._reasoning.take(), calls

    def _run(self) -> Step[None]:
        """Read an answer of content, reasoning and calls between markers."""
        format, reader = self._format, self._reader
        if self.thinking:
            yield from self._think()
        fresh = True  # whether a call without a marker may come next
        while True:
            reader.forget()
            if fresh and format.bare is not None and self._tools is not None:
                with suppress(MalformedError):  # more of it than a call may take
                    yield from reader.skip_space()
                self._say(reader.text[: reader.at])
                reader.forget()
                if reader.text[:1] in format.bare.starts and reader.text:
                    if (yield from self._call("", format.bare)):
                        continue
                    fresh = False
                    continue
            mark = yield from self._pass_on(self._marks, self._say)
            if mark is None:
                return
            reader.forget()
            thought = next((each for each in format.thoughts if each[0] == mark), None)
            if thought is not None and not self._content.begun:
                reader.at += len(mark)
                yield from self._think()
                fresh = True
            elif mark in self._openings:
                fresh = yield from self._open(mark)
            else:
                reader.at += len(mark)
                fresh = thought is None
                if not fresh:
                    self._say(mark)  # reasoning only begins an answer

    def _open(self, mark: str) -> Step[bool]:
        """Read a call or a section of calls; return whether there was one."""
        if mark in self._format.calls:
            return (yield from self._call(mark, self._format.calls[mark]))
        assert self._format.section is not None, "it is the only other mark"
        reader, (begin, end) = self._reader, self._format.section
        text, found = begin, False
        reader.at += len(begin)
        while True:
            noise: list[str] = []
            mark_or_end = yield from self._pass_on((*self._format.calls, end), noise.append)
            text += "".join(noise)
            reader.forget()
            if mark_or_end is None or mark_or_end == end:
                reader.at += len(mark_or_end or "")
                if not found and text.removeprefix(begin).strip() and not self._cut:
                    self._say(text + (mark_or_end or ""))
                return found
            syntax = self._format.calls[mark_or_end]
            found = (yield from self._call(mark_or_end, syntax)) or found

    def _call(self, mark: str, syntax: Syntax) -> Step[bool]:
        """Read what may be a call after its marker; return whether it is one, or say it."""
        reader = self._reader
        assert self._tools is not None, "no marks of calls are looked for"
        reader.at += len(mark)
        try:
            calls = yield from syntax.read(reader, self._tools)
            if reader.at > MAX_CALL:
                raise TooLongError
        except TooLongError:
            reader.at = MAX_CALL  # nothing in it is looked at again
        except MalformedError:
            reader.at = max(reader.at, 1)
        except CutError:
            reader.at = len(reader.text)
            if self._cut:
                self._content.drop_end()
                return False
        else:
            self._found(calls)
            return True
        self._say(reader.text[: reader.at])
        return False

    def _found(self, calls: list[Call]) -> None:
        self._calls += calls
        self.num_calls += len(calls)

    def _think(self) -> Step[None]:
        """Read reasoning up to its end, or to calls that end the text without it."""
        reader, drafts = self._reader, 0
        self.thinking = True
        while True:
            openings = self._openings if drafts < MAX_DRAFTS else ()
            mark = yield from self._pass_on((*self._closings, *openings), self._muse)
            if mark is None:
                break
            reader.forget()
            if mark in self._closings:
                reader.at += len(mark)
                self._reasoning.drop_end()
                break
            drafts += 1
            calls = yield from self._last_calls()
            if calls:
                self._found(calls)
                break
            self._muse(reader.text[: reader.at])
        self.thinking = False

    def _last_calls(self) -> Step[list[Call]]:
        """Read calls within reasoning if the text ends after them; else only the first marker.

        A model that drafts a call goes on thinking; one that forgets to end its reasoning ends with
        its calls.
        """
        reader, format, tools = self._reader, self._format, self._tools
        assert tools is not None, "no marks of calls are looked for"
        marks = (*format.calls, *(format.section or ()))
        first = yield from reader.next_of(*marks)
        calls: list[Call] = []
        try:
            while (mark := (yield from reader.next_of(*marks))) is not None:
                reader.at += len(mark)
                if mark in format.calls:
                    read = format.calls[mark].read(reader, tools)
                    calls += yield from self._unless_closed(read)
                yield from reader.skip_space()
        except (MalformedError, CutError):
            calls = []
        if calls and reader.ended and not self._cut and reader.at == len(reader.text):
            return calls
        reader.at = len(first or "")
        return []

    def _unless_closed(self, read: Step[list[Call]]) -> Step[list[Call]]:
        """Read calls within reasoning, but no further than the end of that."""
        reader, searched = self._reader, 0
        longest = max(map(len, self._closings), default=1)
        while True:
            try:
                next(read)
            except StopIteration as done:
                read_over = any(end in reader.text[: reader.at] for end in self._closings)
                if read_over or reader.at > MAX_CALL:
                    raise MalformedError from None
                return done.value
            if any(reader.text.find(closing, searched) >= 0 for closing in self._closings):
                raise MalformedError
            searched = max(0, len(reader.text) - longest)
            yield

    def _pass_on(self, marks: tuple[str, ...], pass_on: Callable[[str], None]) -> Step[str | None]:
        """Hand on the text up to the first of ``marks``, and return that; None at the end."""
        reader = self._reader
        while True:
            mark: str | None = None
            found = [(at, each) for each in marks if (at := reader.text.find(each, reader.at)) >= 0]
            if found:
                # Of two at one place the longer, which the shorter begins.
                end, mark = min(found, key=lambda each: (each[0], -len(each[1])))
            else:
                end = (
                    len(reader.text) if reader.ended else _held_from(reader.text, reader.at, marks)
                )
            if end > reader.at:
                pass_on(reader.text[reader.at : end])
                reader.at = end
            if mark is not None or reader.ended:
                return mark
            reader.forget()
            yield

    def _say(self, text: str) -> None:
        self._content.add(text, after=self._reasoning.begun or self.num_calls > 0)

    def _muse(self, text: str) -> None:
        self._reasoning.add(text, after=True)

    def _channels(self) -> Step[None]:
        """Read an answer of messages, each with a header that says what it is."""
        reader = self._reader
        marks = (_START, _HEADER, *_MESSAGE_ENDS)
        if (yield from reader.next_of(" to=")):  # the prompt has begun the header
            yield from self._message()
        while True:
            mark = yield from self._pass_on(marks, self._say)
            if mark is None:
                return
            reader.forget()
            if mark in _MESSAGE_ENDS:
                reader.at += len(mark)
            else:
                yield from self._message()

    def _message(self) -> Step[None]:
        """Read a message, from its header on."""
        reader = self._reader
        try:
            header = yield from reader.until(_BODY, limit=8 * MAX_NAME)
            yield from reader.expect(_BODY)
        except (CutError, MalformedError):
            reader.at = len(reader.text)  # a header that leads to nothing is no content
            return
        reader.forget()
        # What comes before, in a header that was begun anew, is dropped.
        header = re.split(r"<\|(?:start|end)\|>", header)[-1]
        recipient, channel = _RECIPIENT.search(header), _CHANNEL.findall(header)
        ends: tuple[str, ...] = (*_MESSAGE_ENDS, _START)
        if recipient is not None and recipient[1] != "assistant" and self._tools is not None:
            yield from self._addressed(recipient[1])
        elif channel[-1:] == ["analysis"]:
            self.thinking = True
            self._reasoning.separate()
            # The others are special tokens only where the model means to end.
            yield from self._pass_on(("<|end|>", _START), self._muse)
            self._reasoning.drop_end()
            self.thinking = False
        else:
            self._content.separate()
            yield from self._pass_on(ends, self._say)

    def _addressed(self, name: str) -> Step[None]:
        """Read the body of a message to a tool."""
        reader = self._reader
        try:
            yield from reader.skip_space()
            if (yield from reader.next_of("{")) is None:
                raise MalformedError
            start = reader.at
            yield from reader.brackets()
        except MalformedError:
            self._say(reader.text[: reader.at])
            return
        except CutError:
            if not self._cut:
                self._say(reader.text)
            reader.at = len(reader.text)
            return
        body = f'{{"name": "{name}", "arguments": {reader.text[start : reader.at]}}}'
        try:
            self._found(JsonCalls.parsed(body))
        except MalformedError:
            self._say(reader.text[: reader.at])


class _Words:
    """Content or reasoning, without the white space around it.

    White space is held until other text follows it.

    Attributes:
        begun: whether there is any text but white space.
    """

    def __init__(self) -> None:
        self.begun = False
        self._ready: list[str] = []
        self._space = ""

    def add(self, text: str, *, after: bool) -> None:
        """Add text; ``after``: other text comes before this, so white space does not begin it."""
        words = text.rstrip()
        space = text[len(words) :]
        if not words:
            self._space += space
            return
        if not self.begun and after:
            self._space, words = "", words.lstrip()
        self.begun = True
        self._ready += (self._space, words)
        self._space = space

    def separate(self) -> None:
        """Begin a new line, if there is text before."""
        if self.begun and not self._space.endswith("\n"):
            self._space += "\n"

    def drop_end(self) -> None:
        """Drop the white space that has come last."""
        self._space = ""

    def keep_end(self) -> None:
        """Add the white space that has come last."""
        self._ready.append(self._space)
        self._space = ""

    def take(self) -> str:
        """Return the text since the last time."""
        text = "".join(self._ready)
        self._ready.clear()
        return text


def _held_from(text: str, start: int, marks: tuple[str, ...]) -> int:
    """Return where the longest end of ``text`` begins that may begin one of ``marks``."""
    longest, firsts = _beginnings(marks)
    for match in firsts.finditer(text, max(start, len(text) - longest + 1)):
        rest = text[match.start() :]
        if any(mark.startswith(rest) for mark in marks):
            return match.start()
    return len(text)


@lru_cache(maxsize=128)
def _beginnings(marks: tuple[str, ...]) -> tuple[int, re.Pattern[str]]:
    """Return the length of the longest mark, and a pattern of their first characters."""
    firsts = "".join(sorted({re.escape(mark[0]) for mark in marks}))
    return max(map(len, marks), default=1), re.compile(f"[{firsts}]" if firsts else r"(?!)")
