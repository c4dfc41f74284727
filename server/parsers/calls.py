"""The syntaxes in which models write calls: each reads one after the marker that opens it."""

import ast
import html
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar, NamedTuple, Protocol

from server.parsers.reader import MAX_NAME, CutError, MalformedError, Reader, Step

Tools = Mapping[str, Mapping[str, Any]]
"""The JSON schemas of the arguments of the tools that are offered, by their names."""

MAX_PYTHON = 32 * 1024
"""Maximum length of calls in Python, in characters: parsing those takes 20 ms."""
MAX_DEPTH = 64
"""Maximum depth of arguments: every level is a generator that waits for text."""

_NAME = re.compile(rf"[\w.:/-]{{1,{MAX_NAME}}}")
_PYTHON_CALL = re.compile(r"\[\s*(?:[A-Za-z_][\w.-]{0,127}\s*(?P<open>\()?)?", re.ASCII)
_PYTHON_NAMES = {"true": True, "false": False, "null": None}
_LITERALS = {"True": "true", "False": "false", "None": "null"}
_FIRST_KEYS = ("name", "arguments", "parameters", "type", "function", "id", "tool_name")


class Call(NamedTuple):
    """A call: the name of a tool, and its arguments, the text of a JSON object."""

    name: str
    arguments: str


class Syntax(Protocol):
    """A way to write calls."""

    @property
    def literals(self) -> tuple[str, ...]:
        """What is written around names and values, of which tokens may be special."""

    def read(self, reader: Reader, tools: Tools) -> Step[list[Call]]:
        """Read what follows the opening marker.

        Raises:
            MalformedError: this is no call.
            CutError: the text ends before the call is complete.
        """


@dataclass(frozen=True, kw_only=True)
class JsonCalls:
    """A JSON object with a name and arguments, or a list of such objects.

    Attributes:
        starts: the characters that may begin one.
        close: the marker after it, which may be missing; empty if there is none.
        known: whether only the names of tools that are offered make it a call.
        between: what may stand between one object and the next.
    """

    starts: ClassVar[str] = "{["

    close: str = ""
    known: bool = False
    between: str = ""

    @property
    def literals(self) -> tuple[str, ...]:
        return (self.close,)

    def read(self, reader: Reader, tools: Tools) -> Step[list[Call]]:
        yield from reader.skip_space()
        if (yield from reader.next_of("[")):
            yield from _looks_like_list(reader)
        else:
            yield from _looks_like_call(reader)
        calls = self.parsed((yield from reader.brackets()))
        if not calls or (self.known and any(call.name not in tools for call in calls)):
            raise MalformedError
        for literal in (self.between, self.close):
            if literal:
                yield from reader.skip(literal)
        return calls

    @staticmethod
    def parsed(text: str) -> list[Call]:
        """Return the calls in a JSON text.

        Raises:
            MalformedError: it is no JSON, or does not describe calls.
        """
        value = _json(text)
        return [_call(each) for each in (value if isinstance(value, list) else [value])]


def _looks_like_call(reader: Reader) -> Step[None]:
    """Check that the object here begins with a key of a call, without waiting for its end."""
    start = reader.at
    yield from reader.expect("{")
    yield from reader.skip_space()
    yield from reader.expect(*(f'"{key}"' for key in _FIRST_KEYS))
    reader.at = start


def _looks_like_list(reader: Reader) -> Step[None]:
    """Check that the list here begins with an object like a call."""
    start = reader.at
    yield from reader.expect("[")
    yield from reader.skip_space()
    yield from _looks_like_call(reader)
    reader.at = start


def _call(value: object) -> Call:
    """Return the call that an object describes."""
    if not isinstance(value, dict):
        raise MalformedError
    if isinstance(inner := value.get("function"), dict):
        value = inner
    name = next((value[key] for key in ("name", "tool_name", "function") if key in value), None)
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise MalformedError
    arguments: Any = next((value[key] for key in ("arguments", "parameters") if key in value), {})
    if isinstance(arguments, str):  # some models write them as OpenAI's API does
        arguments = _json(arguments)
    return Call(name, _object({} if arguments is None else arguments))


@dataclass(frozen=True, kw_only=True)
class NamedJson:
    """A name, then a JSON object of arguments.

    Attributes:
        head: what stands before the object; its group ``name`` is the name.
        tails: what may stand after it, in this order.
        lists: whether a list of objects may stand in its place.
        marks: the markers in ``head``.
    """

    head: re.Pattern[str]
    tails: tuple[str, ...] = ()
    lists: bool = False
    marks: tuple[str, ...] = ()

    @property
    def literals(self) -> tuple[str, ...]:
        return (*self.marks, *self.tails)

    def read(self, reader: Reader, tools: Tools) -> Step[list[Call]]:
        yield from reader.skip_space()
        if self.lists and (yield from reader.next_of("[")):
            return (yield from JsonCalls().read(reader, tools))
        head = self.head.fullmatch((yield from reader.until("{", limit=MAX_NAME)))
        if head is None:
            raise MalformedError
        arguments = _object(_json((yield from reader.brackets())))
        for tail in self.tails:
            yield from reader.skip(tail)
        return [Call(_name(head["name"]), arguments)]


class Tag(NamedTuple):
    """A tag before a value: how it begins and ends, and what stands between.

    Attributes:
        inner: its groups are ``name`` and, in tags of parameters, perhaps ``kind``, which is the
            JSON type of the value, or whether that is a string.
    """

    start: str
    inner: re.Pattern[str]
    ends: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TaggedCall:
    """A name and parameters between tags, whose values are not escaped.

    A value may hold any of these tags. So it ends with its closing tag only where a parameter or
    the end of the call follows, and without it only where ``sloppy`` says so.

    Attributes:
        head: the tag with the name; without ``start`` the opening marker is its beginning.
        keeps_end: whether the end of ``head`` begins what follows.
        parameter: the tag before a value.
        value_end: the closing tag of a value.
        end: the closing tag of a call.
        close: the marker after the call, which may be missing; empty if there is none.
        trims: whether a newline at each end of a value is none of it.
        sloppy: what ends a value although its closing tag is missing, each with what must follow
            it, if not the end of the text.
    """

    head: Tag
    keeps_end: bool = False
    parameter: Tag
    value_end: str
    end: str
    close: str = ""
    trims: bool = False
    sloppy: tuple[tuple[str, tuple[str, ...]], ...] = ()

    @property
    def literals(self) -> tuple[str, ...]:
        tags = chain.from_iterable((tag.start, *tag.ends) for tag in (self.head, self.parameter))
        return (*tags, self.parameter.inner.pattern, self.value_end, self.end, self.close)

    def read(self, reader: Reader, tools: Tools) -> Step[list[Call]]:
        yield from reader.skip_space()
        if self.head.start:
            yield from reader.expect(self.head.start)
        head = yield from _tag(reader, self.head, keeps_end=self.keeps_end)
        name = _name(head["name"])
        properties = tools.get(name, {}).get("properties", {})
        values: dict[str, str] = {}
        while not head[0].endswith("/"):  # a tag that closes itself
            yield from reader.skip_space()
            if (yield from reader.expect(self.parameter.start, self.end)) == self.end:
                break
            tag = yield from _tag(reader, self.parameter)
            key, kind = html.unescape(tag["name"]), tag.groupdict().get("kind")
            value = yield from self._value(reader)
            schema = properties.get(key) if isinstance(properties, dict) else None
            values[key] = _typed(value, kind, schema)
        if self.close:
            yield from reader.skip(self.close)
        pairs = (f"{_dumped(key)}: {value}" for key, value in values.items())
        return [Call(name, "{" + ", ".join(pairs) + "}")]

    def _value(self, reader: Reader) -> Step[str]:
        """Read a value and its end."""
        start = reader.at
        ends = (self.value_end, *(end for end, _ in self.sloppy))
        while True:
            yield from reader.until(*ends)
            text = reader.text[start : reader.at]
            end = yield from reader.expect(*ends)
            found = reader.at
            yield from reader.skip_space()
            if end == self.value_end:
                if (yield from reader.next_of(self.parameter.start, self.end)):
                    break
                if reader.at == len(reader.text):
                    raise CutError
            else:
                after = dict(self.sloppy)[end]
                over = reader.at == len(reader.text)
                if not after or over or (yield from reader.next_of(*after)):
                    reader.at = found - len(end)
                    break
            reader.at = found  # it is text
        if self.trims:
            text = text.removeprefix("\n").removesuffix("\n")
        return text


def _tag(reader: Reader, tag: Tag, *, keeps_end: bool = False) -> Step[re.Match[str]]:
    """Read the rest of a tag after its beginning."""
    inner = tag.inner.fullmatch((yield from reader.until(*tag.ends, limit=MAX_NAME)))
    if inner is None:
        raise MalformedError
    if not keeps_end:
        yield from reader.expect(*tag.ends)
    return inner


def _typed(text: str, kind: str | None, schema: object) -> str:
    """Return a value as JSON, of the type that its tag or its schema says."""
    if kind is not None:
        types = {"string"} if kind in ("true", "string") else {"any"}
    else:
        types = _types(schema)
    if types == {"string"}:
        return _dumped(text)
    stripped = text.strip()
    try:
        value = _json(_LITERALS.get(stripped, stripped))
    except MalformedError:
        return _dumped(text)
    if "any" in types or "string" not in types or _type(value) & types:
        return _dumped(value)
    return _dumped(text)


def _types(schema: object) -> set[str]:
    """Return the JSON types that a schema allows; ``any`` if it does not say."""
    if not isinstance(schema, dict):
        return {"any"}
    if isinstance(kind := schema.get("type"), str):
        return {kind}
    if isinstance(kind, list):
        return {each for each in kind if isinstance(each, str)} or {"any"}
    if isinstance(values := schema.get("enum"), list) and values:
        return set().union(*map(_type, values))
    if "const" in schema:
        return _type(schema["const"])
    for key in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(key), list) and options:
            return set().union(
                *({"any"} if not isinstance(each, dict) else _flat(each) for each in options)
            )
    return {"any"}


def _flat(schema: dict[str, Any]) -> set[str]:
    """Return the types of an alternative, which is not looked into further."""
    return {"any"} if "anyOf" in schema or "oneOf" in schema else _types(schema)


def _type(value: object) -> set[str]:
    """Return the JSON types that a value has."""
    match value:
        case bool():
            return {"boolean"}
        case int():
            return {"integer", "number"}
        case float():
            return {"number"}
        case str():
            return {"string"}
        case None:
            return {"null"}
    return {"array"} if isinstance(value, list) else {"object"}


@dataclass(frozen=True)
class PythonCalls:
    """A Python list of calls with keyword arguments: ``[f(a=1), g()]``.

    Attributes:
        starts: the characters that may begin one.
        known: whether only the names of tools that are offered make it a call.
    """

    starts: ClassVar[str] = "["

    known: bool = False

    @property
    def literals(self) -> tuple[str, ...]:
        return ()

    def read(self, reader: Reader, tools: Tools) -> Step[list[Call]]:
        yield from reader.skip_space()
        while True:  # whether it looks like a call is known before its end
            match = _PYTHON_CALL.match(reader.text, reader.at)
            if match is not None and match["open"]:
                break
            if reader.at < len(reader.text) and (match is None or match.end() < len(reader.text)):
                raise MalformedError
            yield from reader.more()
        text = yield from reader.brackets("\"'")
        if len(text) > MAX_PYTHON:
            raise MalformedError
        try:
            tree = ast.parse(text, mode="eval").body
            nodes = tree.elts if isinstance(tree, ast.List) else []
            calls = [_python_call(node) for node in nodes]
        except (ValueError, SyntaxError, RecursionError, MemoryError, AttributeError):
            raise MalformedError from None
        if not calls or (self.known and any(call.name not in tools for call in calls)):
            raise MalformedError
        return calls


def _python_call(node: ast.expr) -> Call:
    if not isinstance(node, ast.Call) or node.args:
        raise MalformedError
    arguments = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise MalformedError
        arguments[keyword.arg] = _python_value(keyword.value)
    return Call(_name(ast.unparse(node.func)), _object(arguments))


def _python_value(node: ast.expr) -> Any:
    match node:
        case ast.Constant(value=str() | int() | float() | None):
            return node.value
        case ast.Name(id=name) if name in _PYTHON_NAMES:
            return _PYTHON_NAMES[name]
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return -number
        case ast.List(elts=nodes) | ast.Tuple(elts=nodes):
            return [_python_value(each) for each in nodes]
        case ast.Dict(keys=keys, values=nodes):
            names = [_python_value(key) if key else None for key in keys]
            if all(isinstance(name, str) for name in names):
                return dict(zip(names, map(_python_value, nodes), strict=True))
    raise MalformedError


@dataclass(frozen=True, kw_only=True)
class BareKeys:
    """``call:NAME{key:value,...}``: keys without quotes, strings between markers.

    Attributes:
        quote: the marker before and after a string.
        close: the marker after the call, which may be missing.
    """

    quote: str
    close: str

    @property
    def literals(self) -> tuple[str, ...]:
        return (self.quote, self.close)

    def read(self, reader: Reader, tools: Tools) -> Step[list[Call]]:
        yield from reader.skip_space()
        yield from reader.expect("call:")
        name = _name((yield from reader.until("{", limit=MAX_NAME)))
        arguments = yield from self._object(reader, 1)
        yield from reader.skip(self.close)
        return [Call(name, _object(arguments))]

    def _object(self, reader: Reader, depth: int) -> Step[dict[str, Any]]:
        yield from reader.expect("{")
        values: dict[str, Any] = {}
        yield from reader.skip_space()
        while not (yield from reader.next_of("}")):
            key = yield from reader.until(":", limit=MAX_NAME)
            yield from reader.expect(":")
            values[key.replace(self.quote, "").strip()] = yield from self._value(reader, depth)
            yield from reader.skip_space()
            if (yield from reader.next_of("}")) is None:
                yield from reader.expect(",")
                yield from reader.skip_space()
        yield from reader.expect("}")
        return values

    def _list(self, reader: Reader, depth: int) -> Step[list[Any]]:
        yield from reader.expect("[")
        values: list[Any] = []
        yield from reader.skip_space()
        while not (yield from reader.next_of("]")):
            values.append((yield from self._value(reader, depth)))
            yield from reader.skip_space()
            if (yield from reader.next_of("]")) is None:
                yield from reader.expect(",")
                yield from reader.skip_space()
        yield from reader.expect("]")
        return values

    def _value(self, reader: Reader, depth: int) -> Step[Any]:
        if depth > MAX_DEPTH:
            raise MalformedError
        yield from reader.skip_space()
        match (yield from reader.next_of(self.quote, "{", "[")):
            case "{":
                return (yield from self._object(reader, depth + 1))
            case "[":
                return (yield from self._list(reader, depth + 1))
            case None:
                text = (yield from reader.until(",", "}", "]")).strip()
                try:
                    return _json(text)
                except MalformedError:
                    return text
        yield from reader.expect(self.quote)
        text = yield from reader.until(self.quote)
        yield from reader.expect(self.quote)
        return text


def _name(text: str) -> str:
    name = text.strip()
    if not _NAME.fullmatch(name):
        raise MalformedError
    return name


def _json(text: str) -> Any:
    """Return a JSON value; line breaks in strings are allowed, since models write them."""
    try:
        return json.loads(text, strict=False, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise MalformedError from None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _object(value: object) -> str:
    """Return a JSON object as text."""
    if not isinstance(value, dict):
        raise MalformedError
    return _dumped(value)


def _dumped(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which only an escape can spell
        return json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        raise MalformedError from None
    return text


def literals_of(syntaxes: Mapping[str, Syntax]) -> Iterator[str]:
    """Yield the opening markers of syntaxes, and what is written within them."""
    for opening, syntax in syntaxes.items():
        yield opening
        yield from syntax.literals
