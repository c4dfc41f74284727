"""JSON in pieces, so that a long response is neither built nor copied as a whole."""

import secrets
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar, get_args

import orjson
from pydantic import GetCoreSchemaHandler
from pydantic_core import CoreSchema

PIECE = 64 * 1024
_OPTIONS = orjson.OPT_SERIALIZE_NUMPY


Item = TypeVar("Item")


class JsonList(Generic[Item]):
    """A JSON array that is serialized as it grows, and takes no more memory than its text."""

    __slots__ = ("text",)

    def __init__(self) -> None:
        self.text = bytearray(b"[]")

    @classmethod
    def __get_pydantic_core_schema__(cls, kind: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """That of a list: in a schema both are the same array."""
        return handler.generate_schema(list[*get_args(kind)])  # type: ignore[misc]

    def extend(self, values: Sequence[Item]) -> None:
        """Append ``values``; NumPy arrays among them become lists of numbers."""
        if values:
            self.text[-1:] = b"," if len(self.text) > 2 else b""
            self.text += memoryview(orjson.dumps(values, option=_OPTIONS))[1:]


class Json:
    """A payload as JSON; each :class:`JsonList` in it is an array, of which nothing is copied.

    Attributes:
        size: in bytes.
    """

    def __init__(self, payload: Any) -> None:
        lists: list[JsonList[Any]] = []
        mark = secrets.token_hex(16)

        def note(value: Any) -> str:
            if not isinstance(value, JsonList):
                raise TypeError(f"{type(value).__name__} cannot be written as JSON")
            lists.append(value)
            return mark

        text = orjson.dumps(payload, default=note, option=_OPTIONS)
        first, *rest = text.split(b'"%s"' % mark.encode()) if lists else [text]
        self._parts: list[bytes | bytearray] = [first]
        for each, after in zip(lists, rest, strict=True):
            self._parts += [each.text, after]
        self.size = sum(map(len, self._parts))

    def __bytes__(self) -> bytes:
        """All of it, copied."""
        return b"".join(self._parts)

    def pieces(self) -> Iterator[bytes]:
        """All of it, in pieces of about :data:`PIECE` bytes."""
        piece = bytearray()
        for part in self._parts:
            for start in range(0, len(part), PIECE):
                piece += part[start : start + PIECE]
                if len(piece) >= PIECE:
                    yield bytes(piece)
                    piece.clear()
        yield bytes(piece)
