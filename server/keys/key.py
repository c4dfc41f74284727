"""API keys, their scopes and their limits. No storage and no HTTP here.

A key reads ``inferneo-<id>-<secret>``. The id finds it and may be shown; the secret is 131 bits of
randomness that its holder alone knows. What is kept is an HMAC-SHA-256 of the whole.
"""

import dataclasses
import hashlib
import hmac
import json
import re
import secrets
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

Scope = Literal["inference", "embeddings", "metrics", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
DEFAULT_SCOPES: tuple[Scope, ...] = ("inference", "embeddings")

_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH, _SECRET_LENGTH = 10, 22  # log2(62) * 22 = 131 bits
_KEY = re.compile(rf"inferneo-([A-Za-z0-9]{{{_ID_LENGTH}}})-[A-Za-z0-9]{{{_SECRET_LENGTH}}}")


_TICKET = re.compile(r"ticket-[0-9a-f]{32}")
TICKET_SECONDS = 30
"""How long a ticket for a WebSocket is valid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """The limits of a key; None is no limit.

    Attributes:
        requests: a minute.
        tokens: a minute, of prompts and answers.
        day_requests: a day, which begins at midnight UTC.
        concurrent: requests that run at once.
    """

    requests: int | None = 60
    tokens: int | None = 150_000
    day_requests: int | None = 3_500
    concurrent: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """A key as it is stored.

    Attributes:
        id: public, and the same after a rotation.
        digest: of the text that its holder sends.
        models: ids or aliases that it may use; empty: all.
        created: epoch seconds; so are ``expires`` (None: never) and ``revoked`` (None: it is not).
    """

    id: str
    name: str
    digest: str
    scopes: frozenset[Scope] = frozenset(DEFAULT_SCOPES)
    models: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    created: float = 0.0
    expires: float | None = None
    revoked: float | None = None

    def matches(self, pepper: bytes, text: str) -> bool:
        """Whether ``text`` is this key; compared in constant time."""
        return hmac.compare_digest(self.digest, digest(pepper, text))

    def to_fields(self) -> dict[str, str]:
        """The fields that stores keep, as strings by name."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        del values["id"]
        return encode_fields(values)

    @classmethod
    def from_fields(cls, key_id: str, fields: Mapping[str, str]) -> Self:
        """The reverse of ``to_fields``."""
        values: dict[str, Any] = {name: json.loads(text) for name, text in fields.items()}
        values["scopes"] = frozenset(values["scopes"])
        values["models"] = tuple(values["models"])
        values["limits"] = Limits(**values["limits"])
        return cls(id=key_id, **values)


def encode_fields(values: Mapping[str, Any]) -> dict[str, str]:
    """Attributes of a key as strings."""
    return {name: json.dumps(_plain(value)) for name, value in values.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Limits):
        return dataclasses.asdict(value)
    return sorted(value) if isinstance(value, frozenset) else value


def new_key(pepper: bytes, *, name: str, created: float, **rights: Any) -> tuple[Key, str]:
    """A new key, and its text, which cannot be recovered later.

    Args:
        pepper: the secret of the store it is for.
        name: for people.
        created: now, in epoch seconds.
        rights: further attributes of :class:`Key`.
    """
    key_id = _random(_ID_LENGTH)
    text = new_text(key_id)
    key = Key(id=key_id, name=name, digest=digest(pepper, text), created=created, **rights)
    return key, text


def new_text(key_id: str) -> str:
    """A new text for the key of this id."""
    return f"inferneo-{key_id}-{_random(_SECRET_LENGTH)}"


def id_of(text: str) -> str | None:
    """The id in a key's text; None if it is not a key."""
    match = _KEY.fullmatch(text)
    return match[1] if match else None


def new_ticket() -> str:
    """A new ticket, which stands for a key once."""
    return f"ticket-{secrets.token_hex(16)}"


def is_ticket(text: str) -> bool:
    """Whether ``text`` has the form of a ticket."""
    return _TICKET.fullmatch(text) is not None


def digest(pepper: bytes, text: str) -> str:
    """The digest that is stored in place of a secret."""
    return hmac.new(pepper, text.encode(), hashlib.sha256).hexdigest()


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))
